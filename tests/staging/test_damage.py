"""Damage to a full copy: found when the index is opened or verified, and mended block by block."""

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.faults import first
from helpers.project import contents
from helpers.staging import LISTS, POPULATED, SMALL, is_readable, staged_data, touched, write_many_chunks

from laion_assets.index import arrow_layout
from laion_assets.io.errors import InputError
from laion_assets.staging import (
    NotStagedError,
    open_staged,
    scrub,
    scrubber,
    stage,
    stager,
    verified_manifest,
    verify,
)
from laion_assets.staging.verify import record_verified, times_of

pytestmark = pytest.mark.faults

FIRST_ARROW = "metadata/000.arrow"


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def rot(cache: Path, name: str, at: int) -> None:
    """Change one bit as a failing disk does: no program has written, so the times do not change."""
    flip(cache / name, at)
    record_verified(cache, {name: times_of(cache / name)})


@pytest.fixture
def large(bucket: Any, source: Path, cache: Path) -> Path:
    """A copy with a file of 128 blocks, and the cache that holds it."""
    write_many_chunks(bucket, source)
    stage(bucket.uri, None, cache, options=SMALL)
    return cache


# --- when it is opened, and when it is staged -----------------------------------------------------


def test_damage_is_named_when_the_index_is_opened_and_staging_fetches_only_the_damaged_blocks(
    bucket, source, large
):
    places = [5, 3 * SMALL.chunk - 1, 3 * SMALL.chunk]  # in three blocks
    for at in places:
        flip(large / LISTS, at)
    flip(large / FIRST_ARROW, 700)
    with pytest.raises(NotStagedError, match=f"{LISTS} is damaged: bytes 0 to 65,536 and 2 more blocks"):
        verified_manifest(large)
    read = bucket.proxy.bytes_read
    done = stage(bucket.uri, None, large, options=SMALL)
    assert staged_data(large) == contents(source)
    assert (done.mended, done.fetched) == (2, 0)
    arrow = (large / FIRST_ARROW).stat().st_size
    assert done.bytes_fetched == bucket.proxy.bytes_read - read == 3 * SMALL.chunk + arrow
    assert verified_manifest(large) == done.manifest


def test_rot_that_changes_no_time_is_found_by_a_sample_and_then_mended(bucket, source, large):
    rot(large, FIRST_ARROW, 700)
    flips = [number * SMALL.chunk + 9 for number in range(128)]
    for at in flips:  # of a sample of 16 MiB some are in this file
        rot(large, LISTS, at)
    with pytest.raises(NotStagedError, match="is damaged"):
        verified_manifest(large)
    rot(large, FIRST_ARROW, 701)
    stage(bucket.uri, None, large, options=SMALL)
    assert staged_data(large)[LISTS] == (source / LISTS).read_bytes()
    scrub(large, repair=True)
    assert staged_data(large) == contents(source)


def test_an_intact_copy_is_not_read_again_and_nothing_is_written(large, monkeypatch):
    verified_manifest(large)
    before = touched(large)
    read: list[str] = []
    monkeypatch.setattr(verify, "verify_file", lambda file, *_: read.append(file.name))
    verified_manifest(large)
    assert (read, touched(large)) == ([], before)
    os.utime(large / POPULATED)
    verified_manifest(large)
    assert read == [POPULATED]


@pytest.mark.parametrize("sparse", [False, True])
def test_a_damaged_manifest_costs_none_of_the_files(bucket, cache, sparse):
    stage(bucket.uri, None, cache, sparse=sparse)
    assert is_readable(cache)
    (cache / "manifest.json").write_text("damaged")
    lines: list[str] = []
    done = stage(bucket.uri, None, cache, sparse=sparse, log=lines.append)
    assert (done.fetched, done.bytes_fetched) == (0, 0)
    assert any("manifest.json is damaged" in line for line in lines)
    read = bucket.proxy.bytes_read
    assert is_readable(cache)
    assert bucket.proxy.bytes_read == read


def test_a_copy_without_checksums_of_blocks_is_read_once_and_damage_costs_the_file(bucket, source, large):
    for kept in (".checksums", ".verified"):  # as an earlier version leaves a cache
        path = large / kept
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert verified_manifest(large)
    flip(large / LISTS, 100)
    shutil.rmtree(large / ".checksums")
    with pytest.raises(NotStagedError, match=f"{LISTS} is damaged"):
        verified_manifest(large)
    done = stage(bucket.uri, None, large, options=SMALL)
    assert (done.fetched, staged_data(large)) == (1, contents(source))


def test_a_source_that_returns_other_bytes_than_were_staged_mends_nothing(bucket, large):
    flip(large / LISTS, 5)
    damaged = (large / LISTS).read_bytes()
    bucket.proxy.rule = first(1, "flip", "ivfdata")
    with pytest.raises(InputError, match=f"{bucket.uri}/{LISTS} returns other bytes from 0 to 65,536"):
        stage(bucket.uri, None, large, options=SMALL)
    assert (large / LISTS).read_bytes() == damaged
    stage(bucket.uri, None, large, options=SMALL)
    assert verified_manifest(large)


# --- a download -----------------------------------------------------------------------------------


def test_a_bit_that_flips_in_a_download_costs_a_chunk_and_not_the_file(bucket, source, cache):
    write_many_chunks(bucket, source)
    bucket.proxy.rule = first(1, "flip", "ivfdata")
    lines: list[str] = []
    done = stage(bucket.uri, None, cache, options=SMALL, log=lines.append)
    assert staged_data(cache) == contents(source)
    assert any("reading it again to find the wrong part" in line for line in lines)
    assert done.bytes_fetched < sum(map(len, contents(source).values())) * 2


# --- all of it ------------------------------------------------------------------------------------


def test_verification_finds_rot_and_goes_on_where_it_was_interrupted(source, large, monkeypatch):
    monkeypatch.setattr(scrubber, "BLOCKS_AT_ONCE", 8)
    rot(large, LISTS, 20 * SMALL.chunk)
    rot(large, LISTS, 90 * SMALL.chunk)
    real, reads = verify.Blocks.damaged, []

    def interrupted(blocks: Any, path: Path, numbers: range, *more: Any) -> list[int]:
        reads.append((path.name, numbers[0]))
        if len(reads) == 8:
            raise KeyboardInterrupt
        return real(blocks, path, numbers, *more)

    monkeypatch.setattr(verify.Blocks, "damaged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scrub(large)
    found = scrub(large, repair=True)
    assert len(set(reads)) == len(reads) - 1  # only the interrupted part is read twice
    (damage,) = found.damaged
    assert f"{large / LISTS} is damaged: bytes 1,310,720 to 1,376,256 and 1 more block" in damage
    assert found.mended
    assert staged_data(large) == contents(source)
    assert not scrub(large).damaged


def test_the_pages_of_a_sparse_copy_are_verified_too(bucket, source, cache):
    stage(bucket.uri, None, cache, sparse=True)
    assert is_readable(cache)
    rows = (cache / FIRST_ARROW).read_bytes()
    flip(cache / FIRST_ARROW, 700)
    flip(cache / POPULATED, 700)
    found = scrub(cache)
    assert not found.mended
    assert sorted(clause.split(" is damaged")[0] for clause in found.damaged) == sorted(
        [str(cache / FIRST_ARROW), str(cache / POPULATED)]
    )
    assert scrub(cache, repair=True).mended
    assert (cache / FIRST_ARROW).read_bytes() == rows
    assert (cache / POPULATED).read_bytes() == (source / POPULATED).read_bytes()
    assert not scrub(cache).damaged


def test_pages_of_a_server_that_lied_are_found_and_fetched_again(bucket, source, cache):
    stage(bucket.uri, None, cache, sparse=True)
    bucket.proxy.rule = first(1, "flip", "ivfdata")
    assert is_readable(cache)  # the vector of a row is another
    right = (source / LISTS).read_bytes()
    assert (cache / LISTS).read_bytes() != right
    found = scrub(cache, repair=True)
    assert [clause.split(" is damaged")[0] for clause in found.damaged] == [str(cache / LISTS)]
    assert found.mended
    assert (cache / LISTS).read_bytes() == right
    bucket.proxy.rule = lambda _: 403
    assert not scrub(cache).damaged  # without the source the disk is verified all the same


def test_headers_about_which_a_source_lied_are_found_and_read_again(source, cache):
    stage(str(source), None, cache, sparse=True)
    path = source / FIRST_ARROW
    right, times = path.read_bytes(), path.stat()
    blocks = arrow_layout.read_table(len(right), lambda start, stop: right[start:stop])
    lied = np.int64(blocks.rows[0]).tobytes(), np.int64(blocks.rows[0] - 1).tobytes()

    def tell(content: bytes) -> None:
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    tell(right.replace(*lied, 3))
    with open_staged(cache) as opened:
        rows = len(opened.metadata)
    tell(right)
    assert [str(cache / FIRST_ARROW)] == [each.split(" is damaged")[0] for each in scrub(cache).damaged]
    assert scrub(cache, repair=True).mended
    assert not scrub(cache).damaged
    with open_staged(cache) as opened:
        assert len(opened.metadata) > rows


def test_verification_needs_no_right_to_write_and_says_what_it_cannot_check(source, cache):
    with pytest.raises(NotStagedError, match="nothing is staged"):
        scrub(cache)
    done = stage(str(source), None, cache, in_place=True)
    found = scrub(cache)
    assert (found.files, found.unchecked, found.damaged) == (0, len(done.manifest.files), ())


# --- the system -----------------------------------------------------------------------------------


def test_an_error_of_the_disk_is_named_and_staging_reads_all_files_again(
    bucket, source, large, monkeypatch
):
    for module in (verify, stager):
        monkeypatch.setattr(module, "sample_damage", lambda *_: [])
    rot(large, FIRST_ARROW, 700)
    disk = pytest.raises(InputError, match=f"the disk that holds {large}.*Input/output")
    with disk as found, open_staged(large):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert found.value.about == "staged_index"
    stage(bucket.uri, None, large, options=SMALL)
    assert staged_data(large) == contents(source)


def test_too_few_open_files_end_in_a_sentence_and_a_low_default_is_raised(source, cache):
    program = """
import resource, sys
from pathlib import Path
from laion_assets.io.errors import InputError
from laion_assets.staging import TransferOptions, open_staged, stage
soft, hard = map(int, sys.argv[3:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    stage(sys.argv[1], None, Path(sys.argv[2]))
    with open_staged(Path(sys.argv[2])):
        print("opened")
except InputError as error:
    print(error)
"""

    def told(soft: int, hard: int) -> str:
        command = [sys.executable, "-c", program, str(source), str(cache), str(soft), str(hard)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "may open only 8 files at once" in told(8, 8)
    assert told(8, 1024) == "opened\n"


def test_records_of_two_processes_at_once_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: record_verified(tmp_path, {f"{n}": [n, n, n]}), range(100)))
    assert json.loads((tmp_path / verify.VERIFIED).read_bytes()) == {
        f"{n}": [n, n, n] for n in range(100)
    }
