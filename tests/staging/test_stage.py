"""Staging from a local folder, copied or in place: complete or refused, and never fetched twice."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers import indices
from helpers.fuzz import Tally, attempts, random_numbers
from helpers.project import contents, files_limited_to
from helpers.staging import (
    LISTS,
    SMALL,
    STAGE,
    Steps,
    bytes_in,
    crc32c_text,
    is_readable,
    kill_when,
    killed_at,
    staged_data,
    touched,
    write_source,
)

from laion_assets.io.errors import InputError
from laion_assets.staging import Manifest, NotStagedError, open_staged, stage, stager, verified_manifest

# --- a copy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "suffix", "files"),
    [(indices.MERGED, indices.ARROW, 3), ("single file", indices.PARQUET, 2), ("Flat", indices.ARROW, 1)],
)
def test_every_form_is_copied_whole_and_readable(tmp_path, form, suffix, files):
    source, cache = write_source(tmp_path / "source", form, suffix, files), tmp_path / "cache"
    done = stage(str(source), None, cache)
    there = contents(source)
    assert staged_data(cache) == there
    assert (done.fetched, done.bytes_fetched) == (len(there), sum(map(len, there.values())))
    listed = {file.name: (file.size, file.checksum) for file in verified_manifest(cache).files}
    assert listed == {name: (len(held), crc32c_text(held)) for name, held in there.items()}
    assert is_readable(cache)


def test_metadata_as_hdf5_is_named_with_the_way_out(source, cache):
    """As LAION-400M was published."""
    shutil.rmtree(source / "metadata")
    (source / "metadata.hdf5").write_bytes(b"\x89HDF\r\n")
    with pytest.raises(InputError, match=r"HDF5 \(metadata\.hdf5\).*convert it to Parquet"):
        stage(str(source), None, cache)


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
    assert staged_data(cache) == contents(source)
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
    other = write_source(tmp_path / "other", seed=1)
    assert stage(str(other), None, tmp_path / "d").manifest.fingerprint != first


@pytest.mark.parametrize("in_place", [False, True])
def test_a_copy_of_another_index_is_removed_only_where_it_may_be(source, cache, tmp_path, in_place):
    other = write_source(tmp_path / "other", seed=1)
    stage(str(source), None, cache)
    with pytest.raises(InputError, match=r"would be removed .*: set another cache directory") as refused:
        stage(str(other), None, cache, in_place=in_place, replace_other=False)
    assert refused.value.about == "cache_dir"
    assert str(source) in str(refused.value)
    assert staged_data(cache) == contents(source)
    assert is_readable(cache)
    lines: list[str] = []
    stage(str(other), None, cache, in_place=in_place, log=lines.append)
    assert any(f"which is of {source}" in line for line in lines)
    assert is_readable(cache)


def test_metadata_may_lie_elsewhere(source, cache, tmp_path):
    elsewhere = (source / "metadata").rename(tmp_path / "english")
    with pytest.raises(InputError, match="source/metadata") as missing:
        stage(str(source), None, cache)
    assert missing.value.about == "metadata_uri"
    stage(str(source), str(elsewhere), cache)
    assert staged_data(cache) == contents(source) | {
        f"metadata/{n}": b for n, b in contents(elsewhere).items()
    }
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
    assert staged_data(cache) == contents(other)


@pytest.mark.parametrize(("old", "new"), [(indices.MERGED, "Flat"), ("Flat", indices.MERGED)])
def test_an_index_of_another_form_replaces_the_old_one(tmp_path, cache, old, new):
    stage(str(write_source(tmp_path / "old", old)), None, cache)
    source = write_source(tmp_path / "new", new, indices.PARQUET, seed=1)
    stage(str(source), None, cache)
    assert staged_data(cache) == contents(source)
    assert is_readable(cache)


def test_an_index_is_not_copied_onto_itself(source):
    before = touched(source)
    with pytest.raises(InputError, match="onto itself") as refused:
        stage(str(source), None, source)
    assert refused.value.about == "staging"
    assert {n: t for n, t in touched(source).items() if n in before} == before
    assert stage(str(source), None, source, in_place=True).fetched == len(before)
    assert is_readable(source)


# --- killed ---------------------------------------------------------------------------------------


def verified_or_none(cache: Path) -> Manifest | None:
    try:
        return verified_manifest(cache)
    except NotStagedError:
        return None


@pytest.mark.faults
@pytest.mark.fuzz
def test_a_stager_that_is_killed_goes_on_where_it_was(source, cache):
    numbers, tally = random_numbers(), Tally("kills of a stager")
    (source / LISTS).write_bytes(numbers.randbytes(16 << 20))
    total = sum(len(held) for held in contents(source).values())
    for _ in attempts(1):
        _kill_and_go_on(source, cache, total, numbers, tally)
        shutil.rmtree(cache)
    tally.check("wrong bytes", "fetched twice")


def _kill_and_go_on(source: Path, cache: Path, total: int, numbers: random.Random, tally: Tally) -> None:
    refused = 0
    for share in sorted(numbers.uniform(0.02, 0.9) for _ in range(4)):
        target = share * total
        program = [sys.executable, "-c", STAGE, str(source), str(cache)]
        kill_when(program, lambda target=target: bytes_in(cache) >= target)
        manifest = Manifest.read(cache)
        assert manifest is not None
        if not manifest.complete:
            refused += 1
            with pytest.raises(NotStagedError, match=str(cache)):
                verified_manifest(cache)
        tally.add("killed")
    assert refused  # or nothing was killed in the middle
    was_complete = verified_or_none(cache)
    done = stage(str(source), None, cache, options=SMALL)
    assert staged_data(cache) == contents(source)
    assert done.bytes_fetched + done.bytes_reused == total
    assert done.bytes_reused > 0
    assert was_complete in (None, done.manifest)
    assert verified_manifest(cache) == done.manifest


@pytest.mark.faults
def test_killed_while_files_take_their_names_nothing_is_lost(source, memory, tmp_path, monkeypatch):
    """Whichever step of the exchange it was killed at, the next run finishes it and fetches nothing."""

    def until_killed(steps: Steps) -> None:
        exchange = stager._Stager._exchange

        def counting(*args: Any) -> Manifest:
            functions = [(os, "fsync"), (Path, "unlink"), (Path, "replace"), (Path, "rmdir")]
            steps.count(monkeypatch, functions)
            return exchange(*args)

        monkeypatch.setattr(stager._Stager, "_exchange", counting)
        stage(str(new), None, cache)

    cache, new = memory / "cache", write_source(tmp_path / "new", "Flat", seed=1)
    for step in count():
        shutil.rmtree(cache, ignore_errors=True)
        stage(str(source), None, cache)
        killed = killed_at(step, until_killed)
        done = stage(str(new), None, cache)
        assert staged_data(cache) == contents(new)
        assert is_readable(cache)
        assert done.bytes_fetched == 0
        if not killed:
            break
    assert step > 10


@pytest.mark.faults
def test_what_a_killed_stager_left_is_gone_when_the_source_no_longer_has_it(source, cache, tmp_path):
    big = source / "metadata" / "000.arrow"
    big.write_bytes(bytes(64 << 20))
    program = [sys.executable, "-c", STAGE, str(source), str(cache)]
    kill_when(program, lambda: any((cache / "metadata").glob("000.arrow*")))
    assert any("000.arrow" in name for name in contents(cache))
    other = write_source(tmp_path / "other", "Flat", indices.PARQUET)
    stage(str(other), None, cache)
    assert staged_data(cache) == contents(other)


# --- in place -------------------------------------------------------------------------------------


def test_in_place_nothing_is_copied_and_nothing_is_written_to_the_source(source, cache):
    before = touched(source)
    done = stage(str(source), None, cache, in_place=True)
    assert staged_data(cache) == {}
    assert touched(source) == before
    assert done.bytes_fetched == 0
    assert done.verified == "size and modification time of every file"
    assert {file.name: file.size for file in done.manifest.files} == {
        name: len(held) for name, held in contents(source).items()
    }
    assert is_readable(cache)
    assert stage(str(source), None, cache, in_place=True).fetched == 0
    os.utime(source / "metadata" / "001.arrow")
    again = stage(str(source), None, cache, in_place=True)
    assert again.fetched == 1
    assert again.manifest.fingerprint != done.manifest.fingerprint
    (source / "metadata" / "002.arrow").unlink()
    with pytest.raises(NotStagedError, match=r"002\.arrow is missing"), open_staged(cache):
        pass


def test_in_place_needs_a_local_disk(cache):
    fs = fsspec.filesystem("memory")
    for name in ("image.index", "metadata/0.parquet"):
        fs.pipe_file(f"/remote/{name}", b"x")
    with pytest.raises(InputError, match="memory://remote is not on a local disk") as refused:
        stage("memory://remote", None, cache, in_place=True)
    assert refused.value.about == "staging"
    assert not cache.exists()
    stage("memory://remote", None, cache)
    assert staged_data(cache) == {"image.index": b"x", "metadata/0.parquet": b"x"}
    fs.rm("/remote", recursive=True)


def test_switching_between_a_copy_and_in_place_keeps_the_source_and_leaves_no_copy(source, cache):
    before = touched(source)
    for in_place in (False, True, False, True):
        done = stage(str(source), None, cache, in_place=in_place)
        assert done.fetched == len(before)
        assert touched(source) == before
        assert staged_data(cache) == ({} if in_place else contents(source))
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
    ("damage", "found"),
    [(cut, "has"), (grow, "has"), (Path.unlink, "is missing")],
    ids=["cut", "grown", "gone"],
)
@pytest.mark.parametrize("name", [LISTS, "metadata/001.arrow"])
def test_a_file_that_is_not_as_it_was_staged_is_named_and_staged_again(
    source, cache, damage, found, name
):
    stage(str(source), None, cache)
    before = touched(cache)
    damage(cache / name)
    with pytest.raises(NotStagedError, match=f"{name} {found}"):
        is_readable(cache)
    done = stage(str(source), None, cache)
    assert (done.fetched, done.bytes_fetched) == (1, (source / name).stat().st_size)
    assert staged_data(cache) == contents(source)
    after = touched(cache)
    kept = set(contents(source)) - {name}
    assert {n: after[n] for n in kept} == {n: before[n] for n in kept}
    assert is_readable(cache)


def test_where_nothing_was_staged_that_is_said_and_nothing_is_made(cache):
    for _ in range(2):
        with pytest.raises(NotStagedError, match=f"nothing is staged in {cache}"), open_staged(cache):
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
    with pytest.raises(NotStagedError, match=r"manifest\.json is damaged.*stage the index again"):
        is_readable(cache)
    assert touched(cache) == before
    stage(str(source), None, cache)
    assert is_readable(cache)


def test_too_little_space_is_an_error_with_both_numbers_before_the_first_byte(source, cache, monkeypatch):
    usage = shutil.disk_usage(source)
    total = sum(len(held) for held in contents(source).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    with pytest.raises(InputError, match=f"1,234 bytes free, .*needs {total:,}") as refused:
        stage(str(source), None, cache)
    assert refused.value.about == "cache_dir"
    assert staged_data(cache) == {}
    stage(str(source), None, cache, in_place=True)  # needs no space
    monkeypatch.undo()
    stage(str(source), None, cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    assert stage(str(source), None, cache).bytes_fetched == 0  # nor does an index that is there


@pytest.mark.parametrize("place", ["file", "file/below", "/sys/laion"])
def test_a_cache_that_cannot_be_written_to_is_named_with_the_setting(source, tmp_path, place):
    (tmp_path / "file").write_bytes(b"mine")
    cache = tmp_path / place
    with pytest.raises(InputError, match=f"cannot write to {cache}") as refused:
        stage(str(source), None, cache)
    assert refused.value.about == "cache_dir"
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_disk_that_fills_up_meanwhile_is_told_of_and_staging_goes_on_later(source, cache):
    (source / "metadata" / "001.arrow").write_bytes(bytes(3 << 20))
    with (
        pytest.raises(InputError, match=f"cannot write to {cache}"),
        files_limited_to(1 << 20),
    ):
        stage(str(source), None, cache)
    with pytest.raises(NotStagedError, match="did not finish"), open_staged(cache):
        pass
    done = stage(str(source), None, cache)
    assert staged_data(cache) == contents(source)
    assert done.bytes_fetched + done.bytes_reused == done.manifest.size


# --- what is not an index -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "told", "about"),
    [
        (".", "no folder .*source", "index_uri"),
        ("image.index", "source holds no index", None),
        ("image.index/populated.index", "source holds no index.*merged_index.ivfdata", None),
        (LISTS, "merged_index.ivfdata", None),
        ("metadata", "no folder .*source/metadata", "metadata_uri"),
        ("metadata/*", r"source/metadata holds no \*\.arrow or \*\.parquet.*notes", None),
    ],
)
def test_a_part_that_is_missing_is_named_and_the_staged_index_stays(source, cache, missing, told, about):
    stage(str(source), None, cache)
    before = touched(cache)
    (source / "metadata" / "notes.txt").write_text("not metadata")
    for path in source.glob(missing) if "*" in missing else [source / missing]:
        if path.suffix != ".txt":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=told) as refused:
        stage(str(source), None, cache)
    assert about in (None, refused.value.about)
    assert touched(cache) == before
    assert is_readable(cache)
