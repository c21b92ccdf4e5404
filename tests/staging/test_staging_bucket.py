"""Staging from a real Google Cloud Storage server, through a proxy that fails as networks do."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gcsfs
import numpy as np
import pytest
from google.auth.credentials import Credentials
from helpers.faults import Proxy, first, proxy_before
from helpers.gcs import gcs_server
from helpers.project import contents
from test_staging import (
    LISTS,
    ROWS,
    SMALL,
    STAGE,
    bytes_on_disk,
    data,
    is_readable,
    kill_when,
    start,
    write_source,
)

from laion_assets.io.errors import InputError
from laion_assets.staging import Manifest, SourceFile, Staged, open_staged, stage
from laion_assets.staging.transfer import bucket as bucket_module
from laion_assets.staging.transfer import errors as faults_module

MIB = 1 << 20
PARTIAL_LISTS = f".incoming/{LISTS}"


class Bucket:
    """A folder `laion` in a bucket of the test's own.

    Attributes:
        uri: of the folder.
        objects: where the server keeps its objects.
        proxy: between the bucket and who reads it.

    """

    def __init__(self, fs: Any, name: str, root: Path, proxy: Proxy) -> None:
        self._fs, self._name = fs, name
        self.uri = f"gs://{name}/laion"
        self.objects = root / name / "laion"
        self.proxy = proxy

    def put(self, folder: Path) -> None:
        self._fs.put(f"{folder}/", f"{self._name}/laion/", recursive=True)

    def write(self, name: str, content: bytes) -> None:
        self._fs.pipe_file(f"{self._name}/laion/{name}", content)

    def remove(self, name: str) -> None:
        self._fs.rm_file(f"{self._name}/laion/{name}")

    def stored(self, name: str) -> dict[str, Any]:
        """What the server knows of an object."""
        known: dict[str, Any] = json.loads(os.getxattr(self.objects / name, "user.metadata"))
        return known

    def set_checksum(self, name: str, checksum: str) -> str:
        """Change what the server says is an object's crc32c; returns what it said before."""
        stored = self.stored(name)
        told = json.dumps(stored | {"Crc32c": checksum}).encode()
        os.setxattr(self.objects / name, "user.metadata", told)
        before: str = stored["Crc32c"]
        return before


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    root = tmp_path_factory.mktemp("server") / "objects"
    with gcs_server(root) as url:
        yield url, root


numbers = count()


@pytest.fixture
def bucket(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket with an index that is in the folder `source` too, and little patience with it."""
    url, root = server
    fs = gcsfs.GCSFileSystem(endpoint_url=url, token="anon", skip_instance_cache=True)
    name = f"bucket-{next(numbers)}"
    fs.mkdir(name)
    monkeypatch.setattr(faults_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(faults_module, "LONGEST_PAUSE", 0.05)
    with proxy_before(url) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        made = Bucket(fs, name, root, proxy)
        made.put(write_source(tmp_path / "source"))
        yield made


def write_big(bucket: Bucket, source: Path, mib: int = 8, seed: int = 0) -> bytes:
    """Make the inverted lists big: they can be copied, but not searched."""
    content = random.Random(seed).randbytes(mib * MIB)
    (source / LISTS).write_bytes(content)
    bucket.write(LISTS, content)
    return content


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# --- a copy ---------------------------------------------------------------------------------------


def test_a_copy_from_a_bucket_is_whole_verified_and_not_made_twice(bucket, source, cache):
    there = contents(source)
    done = stage(bucket.uri, None, cache)
    assert data(cache) == there
    assert done.bytes_fetched == bucket.proxy.bytes_read == sum(map(len, there.values()))
    assert done.verified == "size and the source's crc32c of every file"
    assert is_readable(cache)
    again = stage(f"{bucket.uri}/", None, cache)
    assert (again.bytes_fetched, again.bytes_reused) == (0, done.bytes_fetched)
    assert again.manifest == done.manifest
    assert bucket.proxy.bytes_read == done.bytes_fetched


def test_only_what_changed_is_fetched_and_the_same_bytes_uploaded_again_are_not(bucket, source, cache):
    first_time = stage(bucket.uri, None, cache)
    changed = source / "metadata" / "000.arrow"
    (source / "metadata" / "001.arrow").rename(source / "metadata" / "001b.arrow")
    changed.write_bytes(changed.read_bytes()[:-1] + b"\1")
    bucket.remove("metadata/001.arrow")
    bucket.put(source)  # all of it, so that every object has another generation
    done = stage(bucket.uri, None, cache)
    assert data(cache) == contents(source)
    fetched = (changed, source / "metadata" / "001b.arrow")
    assert done.bytes_fetched == sum(path.stat().st_size for path in fetched)
    versions = {file.name: file.version for file in first_time.manifest.files}
    assert all(file.version != versions.get(file.name) for file in done.manifest.files)
    assert stage(bucket.uri, None, cache).manifest == done.manifest


class Signed(Credentials):
    """Credentials that give another token each time they are asked."""

    def __init__(self) -> None:
        super().__init__()
        self.given = count()

    def refresh(self, _: Any) -> None:
        self.token = f"token-{next(self.given)}"
        self.expiry = datetime.now(UTC).replace(tzinfo=None) + timedelta(hours=1)


@pytest.mark.parametrize(("credentials", "sent"), [(None, None), (Signed(), "Bearer token-0")])
def test_a_bucket_is_read_with_the_credentials_that_listed_it(bucket, source, credentials, sent):
    gcs = SimpleNamespace(
        base=f"{bucket.proxy.url}/storage/v1/", credentials=SimpleNamespace(credentials=credentials)
    )
    path = f"{bucket.uri.removeprefix('gs://')}/{LISTS}"
    held = (source / LISTS).read_bytes()
    generation = str(bucket.stored(LISTS)["Generation"])
    file = SourceFile(LISTS, f"gs://{path}", path, len(held), generation, None)
    reader = bucket_module.BucketReader(gcs)
    assert b"".join(reader.read(file, 3, len(held))) == held[3:]
    assert bucket.proxy.authorizations == {sent}


# --- faults that pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [503, 500, 429, 408, "reset", "half", "silence"])
def test_what_passes_is_tried_again_counted_and_told_of(bucket, source, cache, monkeypatch, fault):
    monkeypatch.setattr(bucket_module, "SILENCE", timedelta(seconds=0.3))
    bucket.proxy.rule = first(5, fault)
    told: list[str] = []
    done = stage(bucket.uri, None, cache, log=told.append)
    assert data(cache) == contents(source)
    assert done.retries == 5
    assert any("trying again in" in line and bucket.uri in line for line in told)


def test_what_does_not_pass_is_an_error_after_some_tries_and_staging_goes_on_later(bucket, source, cache):
    write_big(bucket, source)
    total = sum(map(len, contents(source).values()))
    passing = bucket.proxy.reads + 40
    bucket.proxy.rule = lambda _: 503 if bucket.proxy.reads > passing else None
    with pytest.raises(InputError, match=r"gs://.* could not be read in 8 tries \(.*503.*goes on"):
        stage(bucket.uri, None, cache, transfer=SMALL)
    fetched = bucket.proxy.bytes_read
    assert 0 < fetched < total
    bucket.proxy.rule = lambda _: None
    done = stage(bucket.uri, None, cache, transfer=SMALL)
    assert data(cache) == contents(source)
    assert done.bytes_fetched + done.bytes_reused == total
    assert fetched - SMALL.threads * SMALL.chunk <= done.bytes_reused <= fetched


# --- faults that stay -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (403, "no right to read {lists} .*Storage Object Viewer"),
        (401, "no right to read {lists} .*credentials"),
        (404, "{lists} is listed with .* bytes but cannot be read .*upload it"),
        (400, "{lists} cannot be read: .*400"),
    ],
)
def test_what_is_refused_is_an_error_at_once_that_names_the_object(bucket, cache, status, told):
    refused: list[str] = []

    def rule(path: str) -> int | None:
        if "ivfdata" not in path:
            return None
        refused.append(path)
        return status

    bucket.proxy.rule = rule
    with pytest.raises(InputError, match=told.format(lists=f"{bucket.uri}/{LISTS}")):
        stage(bucket.uri, None, cache)
    assert len(refused) == 1


def test_an_object_that_is_not_what_its_checksum_says_never_becomes_the_index(bucket, source, cache):
    stage(bucket.uri, None, cache)
    before = data(cache)
    write_big(bucket, source)
    right = bucket.set_checksum(LISTS, "AAAAAA==")
    for _ in range(2):
        with pytest.raises(
            InputError, match=f"{bucket.uri}/{LISTS} differs from its own checksum: .*AAAAAA==.*upload"
        ):
            stage(bucket.uri, None, cache, transfer=SMALL)
        assert {n: held for n, held in data(cache).items() if not n.startswith(".incoming")} == before
        assert is_readable(cache)  # what was there still is
    bucket.set_checksum(LISTS, right)
    stage(bucket.uri, None, cache, transfer=SMALL)
    assert data(cache) == contents(source)


def test_an_object_that_was_cut_off_in_the_bucket_is_named(bucket, cache):
    path = bucket.objects / LISTS
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match=f"{bucket.uri}/{LISTS} differs from its own checksum"):
        stage(bucket.uri, None, cache)
    with pytest.raises(InputError, match="did not finish"), open_staged(cache):
        pass


# --- overwritten meanwhile ------------------------------------------------------------------------


def after_reads(proxy: Proxy, reads: int, act: Any) -> None:
    """Do something once, just before some read of an object."""
    done = threading.Event()

    def rule(_: str) -> None:
        if proxy.reads > reads and not done.is_set():
            done.set()
            act()

    proxy.rule = rule


def test_an_object_that_is_overwritten_meanwhile_is_begun_again_and_never_mixed(bucket, source, cache):
    write_big(bucket, source)
    after_reads(bucket.proxy, 30, lambda: write_big(bucket, source, seed=1))
    told: list[str] = []
    done = stage(bucket.uri, None, cache, transfer=SMALL, log=told.append)
    assert data(cache) == contents(source)
    assert any(f"{bucket.uri}/{LISTS} was overwritten while it was copied" in line for line in told)
    assert done.manifest.complete


def test_an_object_that_is_overwritten_after_it_was_copied_is_noticed_before_the_end(
    bucket, source, cache
):
    write_big(bucket, source)
    new = (source / "image.index/populated.index").read_bytes()[:-1] + b"\1"
    (source / "image.index/populated.index").write_bytes(new)
    after_reads(bucket.proxy, 100, lambda: bucket.write("image.index/populated.index", new))
    told: list[str] = []
    stage(bucket.uri, None, cache, transfer=SMALL, log=told.append)
    assert data(cache) == contents(source)
    assert any("changed while it was copied" in line for line in told)


def test_a_source_that_never_rests_is_an_error(bucket, source, cache):
    stage(bucket.uri, None, cache)
    seeds = count()
    names = sorted(name for name in contents(source) if name.startswith("metadata"))

    def rule(_: str) -> None:
        bucket.write(names[0], str(next(seeds)).encode())

    bucket.write(names[0], b"new")
    bucket.proxy.rule = rule
    with pytest.raises(InputError, match=f"{bucket.uri} keeps changing .*wait until it is uploaded"):
        stage(bucket.uri, None, cache)
    assert is_readable(cache)


# --- killed, or the disk damaged ------------------------------------------------------------------


def test_killed_at_any_point_it_goes_on_and_fetches_only_what_is_missing(bucket, source, cache):
    write_big(bucket, source, mib=24)
    total = sum(map(len, contents(source).values()))
    kills = 0
    for share in sorted(random.uniform(0.05, 0.95) for _ in range(4)):
        target = share * total
        program = [sys.executable, "-c", STAGE, bucket.uri, str(cache)]
        kill_when(program, lambda target=target: bytes_on_disk(cache) >= target)
        manifest = Manifest.read(cache)
        kills += manifest is None or not manifest.complete
    assert kills  # or nothing was killed in the middle
    done = stage(bucket.uri, None, cache, transfer=SMALL)
    assert data(cache) == contents(source)
    # At a kill, what is lost are the chunks that were not yet recorded: at most one for each thread.
    assert bucket.proxy.bytes_read <= total + kills * SMALL.threads * SMALL.chunk
    assert done.bytes_reused >= done.manifest.size - done.bytes_fetched


def test_a_chunk_that_the_disk_lost_or_changed_is_fetched_again_and_no_other(bucket, source, cache):
    write_big(bucket, source)
    bucket.proxy.rule = lambda _: 403 if bucket.proxy.reads > 100 else None
    with pytest.raises(InputError, match="no right"):
        stage(bucket.uri, None, cache, transfer=SMALL)
    journal = (cache / f"{PARTIAL_LISTS}.journal").read_text().splitlines()[1:]
    recorded = sorted(int(line.split()[0]) for line in journal)
    with (cache / PARTIAL_LISTS).open("r+b") as file:
        file.seek(recorded[3] * SMALL.chunk + 5)
        file.write(b"bit rot")
    os.truncate(cache / PARTIAL_LISTS, recorded[-1] * SMALL.chunk + 7)
    bucket.proxy.rule = lambda _: None
    before = bucket.proxy.bytes_read
    done = stage(bucket.uri, None, cache, transfer=SMALL)
    assert data(cache) == contents(source)
    assert bucket.proxy.bytes_read - before == done.bytes_fetched
    chunks = (source / LISTS).stat().st_size // SMALL.chunk
    lists_fetched = (chunks - (len(recorded) - 2)) * SMALL.chunk
    rest = done.bytes_fetched - lists_fetched
    assert 0 <= rest < sum(len(held) for name, held in contents(source).items() if name != LISTS) + 1


# --- room on the disk -----------------------------------------------------------------------------


@contextmanager
def disk_of(mib: int, folder: Path) -> Iterator[Path]:
    """A file system of some size; skips the test where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_what_does_not_fit_is_told_before_the_first_byte_and_the_old_index_stays(
    bucket, source, tmp_path
):
    with disk_of(4, tmp_path / "disk") as disk:
        stage(bucket.uri, None, disk)
        before, read = data(disk), bucket.proxy.bytes_read
        write_big(bucket, source, mib=9)
        free = shutil.disk_usage(disk).free
        with pytest.raises(
            InputError, match=r"bytes free and .* more in files that go, .*needs 9,4"
        ) as told:
            stage(bucket.uri, None, disk)
        assert f"{free:,} bytes free" in str(told.value)
        assert (data(disk), bucket.proxy.bytes_read) == (before, read)
        assert is_readable(disk)


def test_a_new_version_that_fits_only_in_place_of_the_old_one_takes_it(bucket, source, tmp_path):
    with disk_of(12, tmp_path / "disk") as disk:
        write_big(bucket, source)
        stage(bucket.uri, None, disk)
        write_big(bucket, source, seed=1)
        told: list[str] = []
        stage(bucket.uri, None, disk, log=told.append)
        assert data(disk) == contents(source)
        assert f"removing {disk / LISTS}, which the index no longer needs" in told


def test_a_disk_that_fills_up_meanwhile_loses_nothing(bucket, source, tmp_path):
    with disk_of(12, tmp_path / "disk") as disk:
        write_big(bucket, source)
        other = disk / "of-somebody-else"
        after_reads(bucket.proxy, 30, lambda: other.write_bytes(bytes(shutil.disk_usage(disk).free)))
        with pytest.raises(InputError, match=f"cannot write to {disk} .*No space.*LAION_CACHE_DIR"):
            stage(bucket.uri, None, disk, transfer=SMALL)
        fetched = bucket.proxy.bytes_read
        other.unlink()
        done = stage(bucket.uri, None, disk, transfer=SMALL)
        assert {n: held for n, held in data(disk).items() if n != other.name} == contents(source)
        assert done.bytes_reused >= fetched - (SMALL.threads + 1) * SMALL.chunk - MIB


def test_a_reader_needs_no_right_to_write(bucket, tmp_path):
    with disk_of(8, tmp_path / "disk") as disk:
        stage(bucket.uri, None, disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert is_readable(disk)
        with pytest.raises(InputError, match=f"cannot write to {disk} .*LAION_CACHE_DIR"):
            stage(bucket.uri, None, disk)


# --- readers and stagers --------------------------------------------------------------------------


def test_the_second_stager_waits_says_for_whom_and_fetches_nothing(bucket, source, cache):
    write_big(bucket, source)
    begun, go_on = threading.Event(), threading.Event()

    def rule(_: str) -> None:
        begun.set()
        go_on.wait(30)

    bucket.proxy.rule = rule
    one, first_results = start(lambda: stage(bucket.uri, None, cache, transfer=SMALL))
    assert begun.wait(30)
    told: list[str] = []
    other, second_results = start(lambda: stage(bucket.uri, None, cache, log=told.append))
    other.join(0.5)
    assert other.is_alive()
    (line,) = told
    who = rf"waiting until the stager on \S+ \(process {os.getpid()}, since 20\S+\) is done with {cache}"
    assert re.fullmatch(who, line)
    go_on.set()
    for thread in (one, other):
        thread.join(30)
    assert isinstance(first_results[0], Staged)
    assert second_results[0].bytes_fetched == 0
    assert bucket.proxy.bytes_read == first_results[0].bytes_fetched
    assert data(cache) == contents(source)


def test_an_update_during_a_search_changes_nothing_under_it(bucket, cache, tmp_path):
    stage(bucket.uri, None, cache)
    new = write_source(tmp_path / "new", seed=1)
    with open_staged(cache) as opened:
        query = np.eye(1, opened.index.dimension, dtype=np.float32)
        before = opened.index.search(query, ROWS, opened.index.nlist)
        bucket.put(new)
        thread, results = start(lambda: stage(bucket.uri, None, cache))
        thread.join(1)
        assert thread.is_alive()  # it waits for us,
        assert set(contents(cache / ".incoming")) >= set(contents(new))  # and has copied all
        after = opened.index.search(query, ROWS, opened.index.nlist)
        np.testing.assert_array_equal(before.ids, after.ids)
        np.testing.assert_array_equal(before.similarity, after.similarity)
        assert opened.metadata.take(after.ids[0])["url"][0].as_py().startswith("https://example.org/0/")
        assert is_readable(cache)  # and others may still open it
    thread.join(30)
    assert results
    assert data(cache) == contents(new)
    with open_staged(cache) as opened:
        assert opened.metadata.take(np.array([0]))["url"][0].as_py() == "https://example.org/1/0.jpg"
