"""The index on the local disk: copied or used in place, whole or refused, and never fetched twice."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from helpers import indices
from helpers.project import contents, files_limited_to
from hypothesis import given
from hypothesis import strategies as st

from laion_assets.io import checksums
from laion_assets.io.errors import InputError
from laion_assets.io.progress import Progress
from laion_assets.staging import (
    Manifest,
    NotStagedError,
    SourceFile,
    Staged,
    StagedFile,
    Transfer,
    open_staged,
    plan,
    stage,
    stager,
    verified_manifest,
)
from laion_assets.staging.transfer.source import _version

ROWS = 40
LISTS = "image.index/merged_index.ivfdata"


def write_source(
    folder: Path, form: str = indices.MERGED, suffix: str = indices.ARROW, files: int = 3, seed: int = 0
) -> Path:
    """An index of some form with metadata in some files; another seed gives other contents."""
    rows = indices.random_rows(np.random.default_rng(seed), ROWS)
    indices.write_index(folder, rows, form)
    urls = pa.table({"url": [f"https://example.org/{seed}/{i}.jpg" for i in range(ROWS)]})
    indices.write_files(
        folder / "metadata", np.array_split(np.arange(ROWS), files), urls, batch=7, suffix=suffix
    )
    return folder


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def data(cache: Path) -> dict[str, bytes]:
    """What is in a cache, but for its own two files."""
    return {
        n: held for n, held in contents(cache).items() if n not in ("manifest.json", ".lock", ".stager")
    }


def touched(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written or replaced."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".stager")
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def is_readable(cache: Path) -> bool:
    """Whether all rows are found, each with the URL of its own."""
    with open_staged(cache) as opened:
        query = np.eye(1, indices.DIMENSION, dtype=np.float32)
        ids = opened.index.search(query, ROWS, opened.index.nlist or None).ids[0]
        urls = opened.metadata.take(ids)["url"].to_pylist()
    return sorted(ids) == list(range(ROWS)) and all(
        url.endswith(f"/{number}.jpg") for url, number in zip(urls, ids, strict=True)
    )


def crc32c(content: bytes) -> str:
    return checksums.checksum_text(checksums.crc32c(content))


# --- a copy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "suffix", "files"),
    [(indices.MERGED, indices.ARROW, 3), ("single file", indices.PARQUET, 2), ("Flat", indices.ARROW, 1)],
)
def test_every_form_is_copied_whole_and_readable(tmp_path, form, suffix, files):
    source, cache = write_source(tmp_path / "source", form, suffix, files), tmp_path / "cache"
    done = stage(str(source), None, cache)
    there = contents(source)
    assert data(cache) == there
    assert (done.fetched, done.bytes_fetched) == (len(there), sum(map(len, there.values())))
    listed = {file.name: (file.size, file.checksum) for file in verified_manifest(cache).files}
    assert listed == {name: (len(held), crc32c(held)) for name, held in there.items()}
    assert is_readable(cache)


def test_a_second_run_fetches_nothing_and_writes_nothing(source, cache):
    first = stage(str(source), None, cache)
    before = touched(cache)
    again = stage(f"{source}/", None, cache)
    assert (again.fetched, again.bytes_fetched) == (0, 0)
    assert again.manifest == first.manifest
    assert touched(cache) == before


def test_only_what_changed_is_fetched_and_what_vanished_is_removed(source, cache):
    first = stage(str(source), None, cache)
    before = touched(cache)
    changed, gone, new = (source / "metadata" / name for name in ("000.arrow", "001.arrow", "001b.arrow"))
    changed.write_bytes(changed.read_bytes())  # the same bytes, but who knows before they are read?
    gone.rename(new)
    done = stage(str(source), None, cache)
    assert data(cache) == contents(source)
    assert done.bytes_fetched == changed.stat().st_size + new.stat().st_size
    after = touched(cache)
    same = set(contents(source)) - {"metadata/000.arrow", "metadata/001b.arrow"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert done.manifest.fingerprint != first.manifest.fingerprint
    assert is_readable(cache)


def test_the_fingerprint_is_of_the_contents_and_not_of_places_or_times(source, tmp_path):
    first = stage(str(source), None, tmp_path / "a").manifest.fingerprint
    moved = shutil.copytree(source, tmp_path / "moved", copy_function=shutil.copyfile)
    assert stage(str(moved), None, tmp_path / "b").manifest.fingerprint == first
    assert stage(str(source), None, tmp_path / "c", in_place=True).manifest.fingerprint == first
    other = write_source(tmp_path / "other", seed=1)
    assert stage(str(other), None, tmp_path / "d").manifest.fingerprint != first


def test_metadata_may_lie_elsewhere(source, cache, tmp_path):
    elsewhere = (source / "metadata").rename(tmp_path / "english")
    with pytest.raises(InputError, match="LAION_METADATA_URI"):
        stage(str(source), None, cache)
    stage(str(source), str(elsewhere), cache)
    assert data(cache) == contents(source) | {f"metadata/{n}": b for n, b in contents(elsewhere).items()}
    assert is_readable(cache)


def test_an_index_elsewhere_is_another_one_even_with_files_of_the_same_size_and_time(
    source, cache, tmp_path
):
    stage(str(source), None, cache)
    other = shutil.copytree(source, tmp_path / "other")  # times too
    changed = other / "metadata" / "000.arrow"
    time_then = changed.stat()
    changed.write_bytes(changed.read_bytes()[:-1] + b"\1")
    os.utime(changed, ns=(time_then.st_atime_ns, time_then.st_mtime_ns))
    stage(str(other), None, cache)
    assert data(cache) == contents(other)


@pytest.mark.parametrize(("old", "new"), [(indices.MERGED, "Flat"), ("Flat", indices.MERGED)])
def test_an_index_of_another_form_replaces_the_old_one(tmp_path, cache, old, new):
    stage(str(write_source(tmp_path / "old", old)), None, cache)
    source = write_source(tmp_path / "new", new, indices.PARQUET, seed=1)
    stage(str(source), None, cache)
    assert data(cache) == contents(source)
    assert is_readable(cache)


def test_an_index_is_not_copied_onto_itself(source):
    before = touched(source)
    with pytest.raises(InputError, match="LAION_STAGING=in-place"):
        stage(str(source), None, source)
    assert {n: t for n, t in touched(source).items() if n in before} == before
    assert stage(str(source), None, source, in_place=True).fetched == len(before)
    assert is_readable(source)


# --- killed ---------------------------------------------------------------------------------------

STAGE = """
import sys
from pathlib import Path
from laion_assets.staging import Transfer, stage
stage(sys.argv[1], None, Path(sys.argv[2]), transfer=Transfer(chunk=1 << 16, threads=4))
"""
SMALL = Transfer(chunk=1 << 16, threads=4)


def killed_at(step: int, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Do something in a process of its own that is killed before some step of the exchange."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = [step]

    def counted(taken: Callable[..., Any]) -> Callable[..., Any]:
        def or_killed(*args: Any, **more: Any) -> Any:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return taken(*args, **more)

        return or_killed

    exchange = stager._Stager._put_into_place

    def counting(*args: Any) -> Manifest:
        for owner, name in ((os, "fsync"), (Path, "unlink"), (Path, "replace"), (Path, "rmdir")):
            monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
        return exchange(*args)

    monkeypatch.setattr(stager._Stager, "_put_into_place", counting)
    try:
        call()
    finally:
        os._exit(0)


def verified_or_none(cache: Path) -> Manifest | None:
    try:
        return verified_manifest(cache)
    except NotStagedError:
        return None


def bytes_on_disk(folder: Path) -> int:
    return sum(held.st_size for held in map(os.stat, map(str, folder.rglob("*"))))


def kill_when(program: list[str], reached: Callable[[], bool]) -> None:
    """Run a program and kill it as soon as something is true."""
    with subprocess.Popen(program) as process:
        while process.poll() is None:
            try:
                if reached():
                    process.send_signal(signal.SIGKILL)
            except FileNotFoundError:  # renamed while we looked
                continue
    assert process.returncode in (0, -signal.SIGKILL)


def test_a_stager_that_is_killed_goes_on_where_it_was(source, cache):
    (source / LISTS).write_bytes(random.Random(0).randbytes(16 << 20))
    total = sum(len(held) for held in contents(source).values())
    refused = 0
    for share in sorted(random.uniform(0.02, 0.9) for _ in range(4)):
        target = share * total
        program = [sys.executable, "-c", STAGE, str(source), str(cache)]
        kill_when(program, lambda target=target: bytes_on_disk(cache) >= target)
        manifest = Manifest.read(cache)
        assert manifest is not None
        if not manifest.complete:
            refused += 1
            with pytest.raises(NotStagedError, match="materialize staged_laion_index again"):
                verified_manifest(cache)
    assert refused  # or nothing was killed in the middle
    was_complete = verified_or_none(cache)
    done = stage(str(source), None, cache, transfer=SMALL)
    assert data(cache) == contents(source)
    assert done.bytes_fetched + done.bytes_reused == total
    assert done.bytes_reused > 0
    assert was_complete in (None, done.manifest)
    assert verified_manifest(cache) == done.manifest


def test_killed_while_files_take_their_names_nothing_is_lost(source, cache, tmp_path, monkeypatch):
    """Whichever step of the exchange it was killed at, the next run ends it and fetches nothing."""
    new = write_source(tmp_path / "new", "Flat", seed=1)
    for step in count():
        shutil.rmtree(cache, ignore_errors=True)
        stage(str(source), None, cache)
        killed = killed_at(step, lambda: stage(str(new), None, cache), monkeypatch)
        done = stage(str(new), None, cache)
        assert data(cache) == contents(new)
        assert is_readable(cache)
        assert done.bytes_fetched == 0
        if not killed:
            break
    assert step > 10


def test_what_a_killed_stager_left_is_gone_when_the_source_no_longer_has_it(source, cache, tmp_path):
    big = source / "metadata" / "000.arrow"
    big.write_bytes(bytes(64 << 20))
    program = [sys.executable, "-c", STAGE, str(source), str(cache)]
    kill_when(program, lambda: any((cache / "metadata").glob("000.arrow*")))
    assert any("000.arrow" in name for name in contents(cache))
    other = write_source(tmp_path / "other", "Flat", indices.PARQUET)
    stage(str(other), None, cache)
    assert data(cache) == contents(other)


# --- in place -------------------------------------------------------------------------------------


def test_in_place_nothing_is_copied_and_nothing_is_written_to_the_source(source, cache):
    before = touched(source)
    done = stage(str(source), None, cache, in_place=True)
    assert data(cache) == {}
    assert touched(source) == before
    listed = {file.name: (file.size, file.checksum) for file in done.manifest.files}
    assert listed == {n: (len(held), crc32c(held)) for n, held in contents(source).items()}
    assert is_readable(cache)
    assert stage(str(source), None, cache, in_place=True).bytes_fetched == 0
    (source / "metadata" / "002.arrow").unlink()
    with pytest.raises(InputError, match=r"002\.arrow is missing.*materialize"), open_staged(cache):
        pass


def test_in_place_needs_a_local_disk(cache):
    fs = fsspec.filesystem("memory")
    for name in ("image.index", "metadata/0.parquet"):
        fs.pipe_file(f"/remote/{name}", b"x")
    with pytest.raises(InputError, match=r"memory://remote is not on a local disk.*LAION_STAGING"):
        stage("memory://remote", None, cache, in_place=True)
    assert not cache.exists()
    stage("memory://remote", None, cache)
    assert data(cache) == {"image.index": b"x", "metadata/0.parquet": b"x"}
    fs.rm("/remote", recursive=True)


def test_switching_between_a_copy_and_in_place_keeps_the_source_and_leaves_no_copy(source, cache):
    before = touched(source)
    for in_place in (False, True, False, True):
        done = stage(str(source), None, cache, in_place=in_place)
        assert done.fetched == len(before)
        assert touched(source) == before
        assert data(cache) == ({} if in_place else contents(source))
        assert is_readable(cache)


def test_a_copy_used_in_place_is_not_deleted(source, cache):
    stage(str(source), None, cache)
    before = {name: held for name, held in touched(cache).items() if name in contents(source)}
    stage(str(cache), None, cache, in_place=True)
    assert {name: touched(cache)[name] for name in before} == before
    assert is_readable(cache)


def test_in_place_follows_the_index_to_another_folder(source, cache, tmp_path):
    stage(str(source), None, cache, in_place=True)
    moved = shutil.copytree(source, tmp_path / "moved")  # times too, so the files look unchanged
    stage(str(moved), None, cache, in_place=True)
    shutil.rmtree(source)
    assert is_readable(cache)


# --- the disk is not what the manifest says -------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize(
    ("damage", "told"),
    [(cut, "has"), (grow, "has"), (Path.unlink, "is missing")],
    ids=["cut", "grown", "gone"],
)
@pytest.mark.parametrize("name", [LISTS, "metadata/001.arrow"])
def test_a_file_that_is_not_as_it_was_staged_is_named_and_staged_again(source, cache, damage, told, name):
    stage(str(source), None, cache)
    before = touched(cache)
    damage(cache / name)
    with pytest.raises(InputError, match=f"{name} {told}.*materialize staged_laion_index again"):
        is_readable(cache)
    done = stage(str(source), None, cache)
    assert (done.fetched, done.bytes_fetched) == (1, (source / name).stat().st_size)
    assert data(cache) == contents(source)
    after = touched(cache)
    kept = set(contents(source)) - {name}
    assert {n: after[n] for n in kept} == {n: before[n] for n in kept}
    assert is_readable(cache)


def test_where_nothing_was_staged_that_is_said_and_nothing_is_made(cache):
    for _ in range(2):
        with (
            pytest.raises(InputError, match=r"nothing is staged in .*materialize staged_laion_index"),
            open_staged(cache),
        ):
            pass
        assert not (cache / "manifest.json").exists()
        cache.mkdir(exist_ok=True)


def edited(manifest: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return manifest | {"files": [manifest["files"][0] | fields, *manifest["files"][1:]]}


BROKEN: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda manifest: [manifest],
    "no files": lambda manifest: {"source": manifest["source"], "complete": True},
    "files of another type": lambda manifest: manifest | {"files": 7},
    "a size that is text": lambda manifest: edited(manifest, size="12"),
    "a size that is null": lambda manifest: edited(manifest, size=None),
    "a path that is a number": lambda manifest: edited(manifest, path=5),
    "a field that nobody knows": lambda manifest: edited(manifest, colour="red"),
    "complete is text": lambda manifest: manifest | {"complete": "no"},
}


@pytest.mark.parametrize("broken", [*BROKEN, "empty", "cut off", "not text"])
def test_a_broken_manifest_is_named_with_the_remedy_which_works(source, cache, broken):
    stage(str(source), None, cache)
    path = cache / "manifest.json"
    whole = path.read_bytes()
    raw = {"empty": b"", "cut off": whole[: len(whole) // 2], "not text": b"\xff\xfe\x00" + whole}
    path.write_bytes(
        raw[broken] if broken in raw else json.dumps(BROKEN[broken](json.loads(whole))).encode()
    )
    before = touched(cache)
    for use in (lambda: is_readable(cache), lambda: stage(str(source), None, cache)):
        with pytest.raises(InputError, match=r"manifest\.json cannot be read.*delete it and materialize"):
            use()
    assert touched(cache) == before
    path.unlink()
    stage(str(source), None, cache)
    assert is_readable(cache)


def test_too_little_space_is_an_error_with_both_numbers_before_the_first_byte(source, cache, monkeypatch):
    # The one thing that cannot be had for real in a test: a disk that is nearly full.
    usage = shutil.disk_usage(source)
    total = sum(len(held) for held in contents(source).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    with pytest.raises(InputError, match=f"1,234 bytes free, staging needs {total:,}.*LAION_CACHE_DIR"):
        stage(str(source), None, cache)
    assert data(cache) == {}
    stage(str(source), None, cache, in_place=True)  # needs no space
    monkeypatch.undo()
    stage(str(source), None, cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    assert stage(str(source), None, cache).bytes_fetched == 0  # nor does an index that is there


@pytest.mark.parametrize("place", ["file", "file/below", "/sys/laion"])
def test_a_cache_that_cannot_be_written_to_is_named_with_the_setting(source, tmp_path, place):
    (tmp_path / "file").write_bytes(b"mine")
    cache = tmp_path / place
    with pytest.raises(InputError, match=f"cannot write to {cache} .*LAION_CACHE_DIR"):
        stage(str(source), None, cache)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_disk_that_fills_up_meanwhile_is_told_of_and_staging_goes_on_later(source, cache):
    (source / "metadata" / "001.arrow").write_bytes(bytes(3 << 20))
    with (
        pytest.raises(InputError, match=f"cannot write to {cache} .*LAION_CACHE_DIR"),
        files_limited_to(1 << 20),
    ):
        stage(str(source), None, cache)
    with pytest.raises(InputError, match="did not finish"), open_staged(cache):
        pass
    done = stage(str(source), None, cache)
    assert data(cache) == contents(source)
    assert done.bytes_fetched + done.bytes_reused == done.manifest.size


# --- what is not an index -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (".", "there is no folder .*LAION_INDEX_URI"),
        ("image.index", "holds no index.*populated.index.*LAION_INDEX_URI"),
        ("image.index/populated.index", "holds no index.*found .*merged_index.ivfdata"),
        (LISTS, "inverted lists .*merged_index.ivfdata are not: copy both"),
        ("metadata", "there is no folder .*metadata: set LAION_METADATA_URI"),
        ("metadata/*", r"holds no \*\.arrow or \*\.parquet file.*LAION_METADATA_URI.*found notes"),
    ],
)
def test_a_part_that_is_missing_is_named_and_the_staged_index_stays(source, cache, missing, told):
    stage(str(source), None, cache)
    before = touched(cache)
    (source / "metadata" / "notes.txt").write_text("not metadata")
    for path in source.glob(missing) if "*" in missing else [source / missing]:
        if path.suffix != ".txt":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=told):
        stage(str(source), None, cache)
    assert touched(cache) == before
    assert is_readable(cache)


# --- readers and stagers --------------------------------------------------------------------------


def start(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    return thread, results


def test_a_stager_that_must_change_bytes_waits_until_the_readers_are_done(source, cache):
    stage(str(source), None, cache)
    with open_staged(cache) as opened:
        assert stage(str(source), None, cache).bytes_fetched == 0  # has nothing to do, does not wait
        assert is_readable(cache)  # nor does another reader
        before = touched(cache)
        grow(source / "metadata" / "002.arrow")
        told: list[str] = []
        thread, results = start(lambda: stage(str(source), None, cache, log=told.append))
        thread.join(0.5)
        assert thread.is_alive()
        assert told == [f"waiting until the searches that read {cache} are done"]
        assert touched(cache).items() >= before.items()  # the new version lies beside
        last = opened.metadata.take(np.array([ROWS - 1]))
        assert last["url"].to_pylist() == [f"https://example.org/0/{ROWS - 1}.jpg"]
    thread.join(30)
    (done,) = results
    assert isinstance(done, Staged)
    assert done.fetched == 1
    assert data(cache) == contents(source)


def test_a_reader_in_another_process_is_waited_for_and_freed_when_it_is_killed(source, cache):
    stage(str(source), None, cache)
    program = (
        "import sys, time; from pathlib import Path\n"
        "from laion_assets.staging import open_staged\n"
        "with open_staged(Path(sys.argv[1])):\n"
        "    print('open', flush=True)\n"
        "    time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(cache)], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"open\n"
        (source / "metadata" / "001.arrow").unlink()
        thread, results = start(lambda: stage(str(source), None, cache))
        thread.join(0.5)
        assert thread.is_alive()
        assert (cache / "metadata" / "001.arrow").exists()
        reader.kill()
    thread.join(30)
    assert results
    assert data(cache) == contents(source)


def test_two_stagers_at_once_fetch_once(source, cache):
    cache.mkdir()
    with (cache / ".lock").open("a") as file:  # as a stager does, while both get ready
        fcntl.flock(file, fcntl.LOCK_EX)
        both = [start(lambda: stage(str(source), None, cache)) for _ in range(2)]
        time.sleep(0.2)
    for thread, _ in both:
        thread.join(30)
    assert sorted(results[0].fetched for _, results in both) == [0, len(contents(source))]
    assert data(cache) == contents(source)


# --- progress -------------------------------------------------------------------------------------


def test_the_log_tells_bytes_rate_and_time_left_and_seldom(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines: list[str] = []
    with Progress("staging", 2_000 * 10**9, "B", lines.append) as progress:
        for _ in range(2_000):  # a GB a second
            now[0] += 1
            progress.advance(10**9)
    assert lines[0] == "staging: 15.0GB of 2.00TB, 1.00GB/s, 33 min left"
    assert lines[-1].endswith("2 min left") or lines[-1].endswith("s left")
    assert 20 < len(lines) < 80


# --- checksums and versions -----------------------------------------------------------------------


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_the_checksums_of_parts_make_that_of_the_whole(parts):
    told = [(checksums.crc32c(part), len(part)) for part in parts]
    assert checksums.crc32c_of_parts(told) == checksums.crc32c(b"".join(parts))


def test_the_checksum_of_a_huge_file_is_put_together_as_that_of_a_small_one():
    zeros = bytes(1 << 20)
    one = checksums.crc32c(zeros)
    by_parts = checksums.crc32c_of_parts([(one, len(zeros))] * 1000)
    whole = 0
    for _ in range(1000):
        whole = checksums.crc32c(zeros, whole)
    assert by_parts == whole


@pytest.mark.parametrize("key", ["ETag", "etag", "generation", "mtime", "LastModified", "last_modified"])
def test_the_version_of_a_file_is_found_however_a_file_system_spells_it(key):
    assert _version({"name": "x", "size": 1, key: "v7"}) == "v7"


# --- the plan -------------------------------------------------------------------------------------

NAMES = st.sampled_from([f"metadata/{name}" for name in "abcdef"])
VERSIONS = st.tuples(st.sampled_from(["v1", "v2"]), st.integers(0, 2))  # version, size


@given(
    there=st.dictionaries(NAMES, VERSIONS),
    listed=st.none() | st.dictionaries(NAMES, VERSIONS),
    found=st.dictionaries(NAMES, st.integers(0, 2)),
)
def test_carrying_out_the_plan_makes_the_disk_the_source_and_keeps_what_did_not_change(
    there, listed, found
):
    source = [
        SourceFile(name, f"far:/{name}", f"/{name}", size, v, None) for name, (v, size) in there.items()
    ]
    files = {
        name: StagedFile(name, name, f"far:/{name}", size, v, f"crc of {v}")
        for name, (v, size) in (listed or {}).items()
    }
    manifest = None if listed is None else Manifest("far", tuple(files.values()), complete=True)
    sizes = {name: size for name, size in found.items() if name in files}
    todo = plan(source, manifest, sizes)

    unchanged = {n for n, at in (listed or {}).items() if there.get(n) == at and sizes.get(n) == at[1]}
    assert {file.name for file in todo.keep} == unchanged
    assert all(files[file.name] == file for file in todo.keep)
    assert {file.name for file in (*todo.keep, *todo.remove)} == set(files)

    disk = {name: (files[name].version, size) for name, size in sizes.items()}
    for gone in todo.remove:
        disk.pop(gone.name, None)
    assert set(disk) == unchanged
    disk |= {file.name: (file.version, file.size) for file in todo.fetch}
    assert disk == there

    made = [StagedFile(f.name, f.name, f.url, f.size, f.version, "crc") for f in todo.fetch]
    whole = Manifest("far", (*todo.keep, *made), complete=True)
    after = plan(source, whole, {file.name: file.size for file in source})
    assert (after.fetch, after.remove) == ((), ())
