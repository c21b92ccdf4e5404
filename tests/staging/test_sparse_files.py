"""In sparse files, needed pages are present and right, whatever the order, budget or crash."""

import errno
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fuzz import attempts
from helpers.sparse import TwoFiles, as_ranges, page
from helpers.staging import Steps, killed_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laion_assets.io import ranges
from laion_assets.io.errors import InputError
from laion_assets.staging import Manifest, TransferStats, parse_size
from laion_assets.staging.sparse import leases, pages, reads, store
from laion_assets.staging.sparse.pages import SparseFile, allocate, map_path
from laion_assets.staging.sparse.reads import PAGE_SIZE
from laion_assets.staging.transfer import disk as disk_module
from laion_assets.staging.transfer import fetch
from laion_assets.staging.transfer.fetch import Fetcher
from laion_assets.staging.transfer.locks import LEDGER_LOCK
from laion_assets.staging.transfer.range_readers import FsspecReader

EXAMPLES = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
numbers = count()


@pytest.fixture
def files(memory: Path) -> TwoFiles:
    return TwoFiles(memory)


# --- what is read ---------------------------------------------------------------------------------


@given(missing=st.sets(st.integers(0, 40_000), max_size=300))
def test_reads_cover_what_is_missing_and_little_else(missing):
    planned = reads.reads_for(np.array(sorted(missing), np.int64))
    read = set(ranges.members(planned))
    assert missing <= read
    assert all(set(range(n - reads.MERGE_GAP, n)) & missing for n in read - missing)
    assert ((planned[:, 1] - planned[:, 0]) <= reads.MAX_READ).all()
    batches = list(reads.read_batches(planned))
    np.testing.assert_array_equal(np.concatenate([np.empty((0, 2)), *batches]), planned)


def test_what_was_fetched_stays_and_is_not_fetched_again(files):
    with files.opened() as disk:
        assert files.need(disk, 5000, 90_000) == files.content[files.path][5000:90_000]
        assert disk.stats.fetched == PAGE_SIZE * len(files.marked())
    with files.opened() as disk:
        assert files.need(disk, 6000, 80_000) == files.content[files.path][6000:80_000]
        assert disk.stats.reads == 0


def test_what_two_requests_need_at_once_is_fetched_once(files, monkeypatch):
    size = len(files.content[files.path])
    read = FsspecReader.read

    def slowly(*args: Any) -> Iterator[bytes]:
        time.sleep(0.1)
        yield from read(*args)

    monkeypatch.setattr(FsspecReader, "read", slowly)
    with files.opened() as one, files.opened() as other:
        threads = [threading.Thread(target=files.need, args=(disk, 0, size)) for disk in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert one.stats.fetched + other.stats.fetched == size


# --- the budget -----------------------------------------------------------------------------------

spans = st.tuples(st.integers(0, 1), st.floats(0, 1), st.integers(1, 9 * PAGE_SIZE))


def span_in(files: TwoFiles, span: tuple[int, float, int]) -> tuple[Path, int, int]:
    number, share, length = span
    path, content = list(files.content.items())[number]
    start = int(share * (len(content) - 1))
    return path, start, min(start + length, len(content))


@settings(EXAMPLES, max_examples=60)
@given(
    requests=st.lists(st.lists(spans, min_size=1, max_size=3), max_size=12),
    budget=st.integers(32, 50),
)
def test_what_is_needed_is_present_and_the_least_recently_used_is_evicted(memory, requests, budget):
    files = TwoFiles(memory / str(next(numbers)))
    last_use: dict[tuple[Path, int], int] = {}
    present: set[tuple[Path, int]] = set()
    beside = files.bytes_beside()
    with files.opened(budget * PAGE_SIZE) as disk:
        for request in requests:
            files.clock.now += 1
            used: set[tuple[Path, int]] = set()
            with disk.hold() as held:
                for path, start, stop in (span_in(files, span) for span in request):
                    held.need({path: as_ranges([(start, stop - start)])})
                    used |= {(path, n) for n in range(start // PAGE_SIZE, -(-stop // PAGE_SIZE))}
                    for where, number in used:
                        assert where.read_bytes()[page(number)] == files.content[where][page(number)]
            now = {(path, number) for path in files.content for number in files.marked(path)}
            assert used <= now <= present | used
            assert len(now) * PAGE_SIZE + files.bytes_beside() <= budget * PAGE_SIZE + beside
            gone, stayed = present - now, (present & now) - used
            if gone and stayed:
                assert max(last_use[page] for page in gone) <= min(last_use[page] for page in stayed)
            last_use |= dict.fromkeys(used, files.clock.now)
            present = now
    assert files.unmarked_data() == 0
    assert not list((files.cache / ".leases").glob("*"))


@settings(EXAMPLES, max_examples=60)
@given(
    spans=st.lists(
        st.tuples(st.integers(0, 40 * PAGE_SIZE), st.just(0) | st.integers(0, 9 * PAGE_SIZE)), max_size=40
    )
)
def test_what_is_read_once_is_right_and_takes_no_room(memory, spans):
    files = TwoFiles(memory / str(next(numbers)))
    content = files.content[files.path]
    edges = np.array([(at, min(at + length, len(content))) for at, length in spans]).reshape(-1, 2)
    with files.opened() as disk:
        assert disk.read(files.path, edges) == [content[start:stop] for start, stop in edges]
        apart = ranges.ranges_of(edges[:, 0], edges[:, 1], reads.MERGE_GAP * PAGE_SIZE)
        assert disk.stats.reads == len(apart)
        assert disk.stats.fetched == ranges.total(apart)
    assert files.marked() == []
    assert files.unmarked_data() == 0


@pytest.mark.parametrize("most", [3, 10_000])
def test_spans_that_are_read_together_are_near_and_few(most, monkeypatch):
    monkeypatch.setattr(reads, "MAX_READ", most)
    starts = np.random.default_rng(0).permutation(np.arange(0, 400 * PAGE_SIZE, 5000))
    spans = np.stack([starts, starts + 3 * PAGE_SIZE], axis=1)
    groups = reads.spans_of_reads(spans)
    assert sorted(np.concatenate(groups)) == list(range(len(spans)))
    assert len(groups) == -(-(400 + 2) // most)
    for some in groups:
        assert (np.diff(spans[some, 0]) > 0).all()
        assert np.ptp(spans[some, 0]) < most * PAGE_SIZE


def test_a_few_spans_are_read_side_by_side(files, monkeypatch):
    together = threading.Barrier(5, timeout=10)
    read = FsspecReader.read

    def waiting(*args: Any) -> Iterator[bytes]:
        together.wait()
        yield from read(*args)

    monkeypatch.setattr(FsspecReader, "read", waiting)
    starts = np.arange(5) * 8 * PAGE_SIZE
    with files.opened() as disk:
        assert len(disk.read(files.path, np.stack([starts, starts + 10], axis=1))) == 5


def test_what_is_held_is_never_evicted_and_a_request_that_needs_its_room_waits(files, monkeypatch):
    monkeypatch.setattr(store, "POLL_INTERVAL", 0.01)
    with files.opened(25 * PAGE_SIZE) as disk, files.opened(25 * PAGE_SIZE) as other:
        with disk.hold() as held:
            held.need({files.path: as_ranges([(0, 15 * PAGE_SIZE)])})
            thread = threading.Thread(target=files.need_pages, args=(other, 20, 40))
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
            assert set(range(15)) <= set(files.marked())
        thread.join(10)
        assert not thread.is_alive()
    assert set(range(20, 40)) <= set(files.marked())
    assert len(files.marked()) <= 25


def test_two_requests_that_need_more_and_more_do_not_wait_for_each_other(files, monkeypatch):
    monkeypatch.setattr(store, "POLL_INTERVAL", 0.01)
    both_began = threading.Barrier(2)

    def grow(first: int) -> None:
        with files.opened(25 * PAGE_SIZE) as disk, disk.hold() as held:
            held.need({files.path: as_ranges([(first * PAGE_SIZE, 10 * PAGE_SIZE)])})
            both_began.wait(10)
            held.need({files.path: as_ranges([((first + 10) * PAGE_SIZE, 10 * PAGE_SIZE)])})
            done.append(files.path.read_bytes()[first * PAGE_SIZE : (first + 20) * PAGE_SIZE])

    done: list[bytes] = []
    threads = [threading.Thread(target=grow, args=(first,)) for first in (0, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    content = files.content[files.path]
    assert sorted(done) == sorted(content[n * PAGE_SIZE : (n + 20) * PAGE_SIZE] for n in (0, 20))


def test_more_than_the_budget_is_refused_with_both_numbers(files):
    content = files.content[files.path]
    needed = f"{-(-len(content) // PAGE_SIZE) * PAGE_SIZE:,}"
    with files.opened(8 * PAGE_SIZE) as disk:
        with pytest.raises(InputError, match=f"needs {needed} bytes .*budget is 40,960") as refused:
            files.need(disk, 0, len(content))
        assert refused.value.about == "sparse_budget"
        assert files.need_pages(disk, 0, 8) == content[: 8 * PAGE_SIZE]


def test_a_disk_that_is_smaller_than_the_budget_is_named(files, monkeypatch):
    content = files.content[files.path]
    monkeypatch.setattr(
        store.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 6 * PAGE_SIZE)
    )
    with files.opened() as disk:
        with pytest.raises(InputError, match=f"{files.cache} has room for 24,576") as refused:
            files.need(disk, 0, len(content))
        assert refused.value.about == "cache_dir"
        assert files.need_pages(disk, 0, 1) == content[:PAGE_SIZE]


def test_what_was_written_and_never_marked_is_freed_when_room_is_needed(files):
    content = files.content[files.path]
    lost = SparseFile(files.path, len(content), "content")
    lost.write(content[: 20 * PAGE_SIZE], 0)  # by a request that left no lease
    lost.close()
    assert files.unmarked_data() == 20
    with files.opened(budget=25 * PAGE_SIZE) as disk:
        assert files.need_pages(disk, 25, 35) == content[25 * PAGE_SIZE : 35 * PAGE_SIZE]
    assert files.unmarked_data() == 0
    assert files.marked() == list(range(25, 35))


def test_a_request_that_waits_for_room_does_not_hold_up_one_that_fits(files, monkeypatch):
    monkeypatch.setattr(store, "POLL_INTERVAL", 0.01)
    budget = 25 * PAGE_SIZE
    with files.opened(budget) as disk, files.opened(budget) as large, files.opened(budget) as small:
        files.need_pages(disk, 30, 35)
        with disk.hold() as held:
            held.need({files.path: as_ranges([(0, 15 * PAGE_SIZE)])})
            thread = threading.Thread(target=files.need_pages, args=(large, 20, 40))
            thread.start()
            while not any("waiting for other requests" in line for line in files.log):
                time.sleep(0.01)
            files.need_pages(small, 15, 18)
            assert set(range(30, 35)) <= set(files.marked())  # nothing was evicted in vain
            assert thread.is_alive()
        thread.join(10)
        assert not thread.is_alive()
    assert set(range(20, 40)) <= set(files.marked())


def test_evictions_are_done_in_steps_and_free_the_disk_without_the_ledger(files, monkeypatch):
    monkeypatch.setattr(store, "EVICTION_STEP", 4)
    unmarked: list[int] = []
    unmark, free = SparseFile.unmark, SparseFile.free

    def counted(file: SparseFile, some: Any) -> None:
        unmarked.append(ranges.total(some))
        unmark(file, some)

    def without_the_ledger(file: SparseFile, some: Any) -> None:
        with (files.cache / LEDGER_LOCK).open("ab") as ledger:
            fcntl.flock(ledger, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free(file, some)

    with files.opened(20 * PAGE_SIZE) as disk:
        files.need_pages(disk, 0, 20)
        monkeypatch.setattr(SparseFile, "unmark", counted)
        monkeypatch.setattr(SparseFile, "free", without_the_ledger)
        files.need_pages(disk, 21, 39)
    assert sum(unmarked) >= 17
    assert max(unmarked) < 8


def test_page_maps_and_leases_count_against_the_budget_and_leftovers_go(files, monkeypatch):
    (files.cache / "metadata" / "gone.arrow.pages").write_bytes(bytes(100_000))
    map_path(files.path).with_name("0.arrow.pages.new").write_bytes(bytes(100_000))
    with files.opened(20 * PAGE_SIZE) as disk:
        files.need_pages(disk, 0, 19)
    assert {path.name for path in (files.cache / "metadata").glob("*.pages*")} == {
        "0.arrow.pages",
        "1.arrow.pages",
    }
    other = files.cache / leases.LEASES / "other"
    with files.opened(20 * PAGE_SIZE) as disk, other.open("w+") as lease:
        fcntl.flock(lease, fcntl.LOCK_EX)
        lease.write("x" * 100)
        lease.flush()
        monkeypatch.setattr(store, "POLL_INTERVAL", 0.01)
        files.need_pages(disk, 0, 18)
        thread = threading.Thread(target=files.need_pages, args=(disk, 0, 20))
        thread.start()
        while not any("waiting for other requests" in line for line in files.log):
            time.sleep(0.01)
        other.unlink()
        thread.join(10)
    assert files.marked() == list(range(20))


def test_a_map_grows_with_what_is_on_the_disk_and_not_with_what_is_used(files, monkeypatch):
    monkeypatch.setattr(pages, "SPARE_RECORDS", 50)
    size = map_path(files.path).stat().st_size
    with files.opened() as disk, files.opened() as other:
        for number in range(30):
            files.clock.now += 1
            files.need_pages((disk, other)[number % 2], 10, 20)
        most = pages.RECORD.itemsize * (2 * 10 + 50 + 10)
        assert map_path(files.path).stat().st_size < size + most
        assert disk.stats.fetched + other.stats.fetched == 10 * PAGE_SIZE
    huge = files.cache / "huge"
    allocate(huge, 1 << 40, "content")
    assert disk_module.allocated_bytes(map_path(huge)) <= PAGE_SIZE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("300GB", 300 * 10**9),
        ("1.5 TB", 15 * 10**11),
        ("2GiB", 2 << 30),
        ("4096", 4096),
        ("7mb", 7 * 10**6),
    ],
)
def test_a_budget_is_written_as_people_do(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["much", "3 XB", "-1GB", "GB"])
def test_a_budget_that_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(InputError, match=f"'{text}' is not a number of bytes.*300GB"):
        parse_size(text)


# --- damage ---------------------------------------------------------------------------------------


def zero_a_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(7 * PAGE_SIZE)
        file.write(bytes(PAGE_SIZE))


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7 * PAGE_SIZE + 11] ^= 1
    path.write_bytes(content)


def empty_with_the_same_size(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()
    path.touch()
    os.truncate(path, size)


def change_a_checksum(path: Path) -> None:
    found = bytearray(map_path(path).read_bytes())
    found[-8] ^= 1  # the last record is of the last page
    map_path(path).write_bytes(found)


def zero_the_records(path: Path) -> None:
    found = map_path(path).read_bytes()
    header = found.index(b"\n") + 1
    map_path(path).write_bytes(found[:header] + bytes(len(found) - header))


def swap_the_pages(path: Path) -> None:
    """As a map of another version would: all numbers are possible, and wrong."""
    found = map_path(path).read_bytes()
    header = found.index(b"\n") + 1
    records = np.frombuffer(found[header:], pages.RECORD).copy()
    records["checksum"] = records["checksum"][::-1]
    map_path(path).write_bytes(found[:header] + records.tobytes())


@pytest.mark.parametrize(
    ("damage", "pages_lost"),
    [
        (zero_a_page, 1),
        (change_a_byte, 1),
        (empty_with_the_same_size, 41),
        (change_a_checksum, 1),
        (zero_the_records, 41),
        (swap_the_pages, 40),
    ],
)
def test_damage_to_a_file_or_its_map_is_found_before_anything_wrong_is_read(files, damage, pages_lost):
    content = files.content[files.path]
    with files.opened() as disk:
        files.need(disk, 0, len(content))
    damage(files.path)
    files.log.clear()
    with files.opened() as disk:
        assert files.need(disk, 0, len(content)) == content
        assert -(-disk.stats.fetched // PAGE_SIZE) == pages_lost
    about_damage = [line for line in files.log if not line.startswith("fetch")]
    assert len(about_damage) == (damage is not zero_the_records)  # which is as if nothing were marked
    assert all(str(files.path) in line for line in about_damage)
    assert files.marked() == list(range(41))
    assert files.unmarked_data() == 0


@settings(EXAMPLES, max_examples=60)
@given(at=st.floats(0, 0.9999), flip=st.integers(1, 255), cut=st.booleans())
def test_whatever_happens_to_a_map_nothing_wrong_is_read(memory, at, flip, cut):
    files = TwoFiles(memory / str(next(numbers)))
    content = files.content[files.path]
    with files.opened() as disk:
        files.need_pages(disk, 3, 30)
    found = bytearray(map_path(files.path).read_bytes())
    position = int(at * len(found))
    found[position] ^= flip
    map_path(files.path).write_bytes(found[:position] if cut else found)
    with files.opened() as disk:
        if position > found.index(b"\n"):
            assert files.need(disk, 0, len(content)) == content
            assert files.marked() == list(range(41))
        else:
            with pytest.raises(InputError, match=rf"{map_path(files.path)} .* stage the index again"):
                files.need(disk, 0, len(content))


def test_a_map_that_lost_its_end_is_reported_and_its_pages_are_fetched_again(memory):
    files = TwoFiles(memory / "large", pages=1000)
    content = files.content[files.path]
    with files.opened() as disk:
        files.need(disk, 0, len(content))
    os.truncate(map_path(files.path), map_path(files.path).stat().st_size // 2)
    with files.opened() as disk:
        assert files.need(disk, 0, len(content)) == content
        assert disk.stats.fetched > len(content) / 3
    assert any(re.search(f"{files.path} holds .* does not list", line) for line in files.log)


def lose_the_map(path: Path) -> None:
    map_path(path).unlink()


def lose_the_file(path: Path) -> None:
    path.unlink()


def cut_the_file(path: Path) -> None:
    os.truncate(path, 10)


@pytest.mark.parametrize("damage", [lose_the_map, lose_the_file, cut_the_file, empty_with_the_same_size])
def test_a_file_that_is_replaced_while_it_is_in_use_is_an_error_that_names_it(files, damage):
    with files.opened() as disk:
        files.need_pages(disk, 0, 10)
        damage(files.path)
        with pytest.raises(InputError, match=rf"{files.path}.* stage the index again") as refused:
            files.need_pages(disk, 0, 20)
        assert refused.value.about == "staged_index"


def test_two_requests_that_find_the_same_damage_both_read_what_is_right(files, monkeypatch):
    size = len(files.content[files.path])
    with files.opened() as disk:
        files.need(disk, 0, size)
    empty_with_the_same_size(files.path)
    both_found_it = threading.Barrier(2, timeout=10)

    def find(disk: Any, needed: Any) -> Any:
        found = damaged_pages(disk, needed)
        if threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            both_found_it.wait()
        return found

    waited: set[int] = set()
    damaged_pages = store.SparseFiles._damaged
    monkeypatch.setattr(store.SparseFiles, "_damaged", find)
    with futures.ThreadPoolExecutor(2) as pool, files.opened() as one, files.opened() as other:
        read = list(pool.map(lambda disk: files.need(disk, 0, size), (one, other)))
        assert read == [files.content[files.path]] * 2
        assert one.stats.fetched + other.stats.fetched == size


# --- errors ---------------------------------------------------------------------------------------


def no_space(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_blocks(descriptor: int, mode: int, *more: Any, **named: Any) -> int:
    full = mode == disk_module.ALLOCATE
    return errno.ENOSPC if full else fallocate(descriptor, mode, *more, **named)


fallocate = disk_module._fallocate


@pytest.mark.parametrize(
    ("owner", "name", "full"), [(os, "pwrite", no_space), (disk_module, "_fallocate", no_blocks)]
)
def test_a_full_disk_is_an_error_that_leaves_nothing_wrong(files, monkeypatch, owner, name, full):
    content = files.content[files.path]
    with files.opened() as disk:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(InputError, match="No space left on device") as refused:
                files.need(disk, 0, len(content))
        assert refused.value.about == "cache_dir"
        assert files.marked() == []
        assert files.need(disk, 0, len(content)) == content


def test_short_reads_that_are_not_written_at_once_are_written_nevertheless(files, monkeypatch):
    monkeypatch.setattr(disk_module, "_pwrite", lambda *_: -1)
    with files.opened() as disk, disk.hold() as held:
        held.need({files.path: PAGE_SIZE * as_ranges([(0, 1), (8, 2), (16, 1)])})
        assert files.marked() == [0, 8, 9, 16]


def overwrite(files: TwoFiles, memory: Path) -> None:
    """Overwrite the first file at the source with as many other bytes."""
    source = memory / "source" / "0.arrow"
    source.write_bytes(b"x" * len(files.content[files.path]))
    os.utime(source, (1, 1))


def test_a_source_that_changes_meanwhile_is_noticed_though_it_pins_no_version(files, memory):
    with files.opened() as disk:
        files.need_pages(disk, 0, 1)
        overwrite(files, memory)
        with pytest.raises(InputError, match="no longer what was staged"):
            disk.read(files.path, np.array([[PAGE_SIZE, 2 * PAGE_SIZE]]))
        with pytest.raises(InputError, match="no longer what was staged") as refused:
            files.need_pages(disk, 0, 3)
        assert refused.value.about == "staged_index"
        assert files.marked() == [0]
        assert files.unmarked_data() == 0
    manifest = Manifest.read(files.cache)
    assert manifest is not None
    assert not manifest.complete


def test_present_pages_are_not_written_again_where_a_read_may_be_of_another_version(files, memory):
    content = files.content[files.path]
    with files.opened() as disk:
        files.need_pages(disk, 2, 3)
        overwrite(files, memory)
        with pytest.raises(InputError, match="no longer what was staged"):
            files.need_pages(disk, 1, 4)
        assert files.path.read_bytes()[page(2)] == content[page(2)]


def test_a_source_that_was_cut_off_is_a_change(files, memory):
    content = files.content[files.path]
    (memory / "source" / "0.arrow").write_bytes(content[: 5 * PAGE_SIZE])
    with files.opened() as disk, pytest.raises(InputError, match="no longer what was staged"):
        files.need(disk, 0, len(content))
    assert files.marked() == []


def test_a_server_that_sends_more_than_is_requested_is_refused(files, monkeypatch):
    content = files.content[files.path]
    with files.opened() as disk, monkeypatch.context() as patch:
        patch.setattr(FsspecReader, "read", lambda *_: iter([content]))
        with pytest.raises(InputError, match="cannot be read in parts"):
            files.need_pages(disk, 0, 1)
        assert files.marked() == []


def test_what_was_fetched_before_an_error_stays(files, monkeypatch):
    monkeypatch.setattr(reads, "BATCH_PAGES", 4)
    monkeypatch.setattr(reads, "MAX_READ", 2)
    monkeypatch.setattr(store, "READ_THREADS", 1)
    content = files.content[files.path]
    read = FsspecReader.read

    def refused_at_last(reader: FsspecReader, file: Any, start: int, stop: int) -> Iterator[bytes]:
        if start >= 30 * PAGE_SIZE:
            raise InputError("no permission")
        return read(reader, file, start, stop)

    with files.opened() as disk:
        with monkeypatch.context() as patch:
            patch.setattr(FsspecReader, "read", refused_at_last)
            with pytest.raises(InputError, match="no permission"):
                files.need(disk, 0, len(content))
        present = files.marked()
        assert present == list(range(len(present)))
        assert 24 <= len(present) <= 30
        assert files.unmarked_data() == 0
        before = disk.stats.fetched
        assert files.need(disk, 0, len(content)) == content
        assert disk.stats.fetched - before == len(content) - len(present) * PAGE_SIZE


def test_no_thread_writes_any_more_after_fetching_was_interrupted_however_often(monkeypatch):
    ended = []
    interrupts = iter([KeyboardInterrupt] * 3)

    def wait(*args: Any) -> Any:
        for interrupt in interrupts:
            raise interrupt
        return futures.wait(*args)

    def work(_: int) -> None:
        time.sleep(0.3)
        ended.append(True)

    monkeypatch.setattr(fetch, "wait", wait)
    fetcher = Fetcher(FsspecReader(None), 1, print, TransferStats())
    with pytest.raises(KeyboardInterrupt):
        fetcher.run(iter([0]), work)
    assert ended


# --- crashes --------------------------------------------------------------------------------------


def test_data_is_durable_before_marks_and_marks_are_cleared_before_holes(files, monkeypatch):
    """A power cut would reveal a wrong order, but a kill does not: the kernel keeps unsynced writes."""
    done: list[tuple[str, int]] = []

    def note(owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        def and_note(*args: Any) -> Any:
            done.append((what, len(files.marked())))
            return function(*args)

        monkeypatch.setattr(owner, name, and_note)

    with files.opened(11 * PAGE_SIZE) as disk:
        note(os, "pwrite", "write")
        note(disk_module, "_pwrite", "write")
        note(os, "fdatasync", "data durable")
        note(os, "fsync", "marks durable")
        note(pages, "punch_hole", "hole")
        files.need_pages(disk, 0, 10)
        marked = [("write", 0), ("marks durable", 10)]
        assert done == [("write", 0), ("data durable", 0), *marked]
        done.clear()
        files.need_pages(disk, 20, 22)
        evicted = [("write", 10), ("marks durable", 8), ("hole", 8)]
        marked = [("write", 8), ("marks durable", 10)]
        assert done == [*evicted, ("write", 8), ("data durable", 8), *marked]


STEPS = [
    *((os, name) for name in ("pwrite", "fsync", "fdatasync", "ftruncate")),
    *((disk_module, name) for name in ("_fallocate", "_pwrite")),
    (leases.Lease, "release"),
    (SparseFile, "mark"),
    (SparseFile, "unmark"),
    (SparseFile, "free"),
]


@pytest.mark.faults
@pytest.mark.fuzz
@settings(EXAMPLES, max_examples=len(attempts(40)))
@given(
    rounds=st.lists(
        st.tuples(st.lists(spans, min_size=1, max_size=4), st.integers(0, 20)), min_size=1, max_size=5
    )
)
def test_killed_at_any_step_nothing_wrong_is_ever_marked(memory, monkeypatch, rounds):
    monkeypatch.setattr(pages, "SPARE_RECORDS", 20)
    monkeypatch.setattr(store, "EVICTION_STEP", 4)
    files = TwoFiles(memory / str(next(numbers)))
    budget = 34 * PAGE_SIZE

    def request(some: Sequence[tuple[int, float, int]]) -> None:
        with files.opened(budget) as disk:
            for span in some:
                path, start, stop = span_in(files, span)
                assert files.need(disk, start, stop, path) == files.content[path][start:stop]

    def until_killed(steps: Steps, some: Sequence[tuple[int, float, int]]) -> None:
        steps.count(monkeypatch, STEPS)
        request(some)

    def all_marked_are_right() -> None:
        for path in files.content:
            files.marked(path)

    for some, step in rounds:
        files.clock.now += 1
        killed_at(step, lambda steps, some=some: until_killed(steps, some))
        all_marked_are_right()
        with files.opened(budget) as disk:  # the next request that makes room cleans up
            path, content = list(files.content.items())[1]
            file = SparseFile(path, len(content), "content")
            file.unmark(as_ranges([(2, 1)]))
            file.free(as_ranges([(2, 1)]))
            file.close()
            assert files.need(disk, 2 * PAGE_SIZE, 3 * PAGE_SIZE, path) == content[2 * PAGE_SIZE :]
        assert files.unmarked_data() == 0
        files.clock.now += 1
        request(some)
        assert files.unmarked_data() == 0


@pytest.mark.parametrize("step", range(26))
def test_an_eviction_that_is_killed_is_finished_by_the_next_request(files, monkeypatch, step):
    monkeypatch.setattr(store, "EVICTION_STEP", 4)

    def need(first: int, stop: int) -> None:
        with files.opened(20 * PAGE_SIZE) as disk:
            files.need_pages(disk, first, stop)

    def until_killed(steps: Steps) -> None:
        steps.count(monkeypatch, STEPS)
        need(25, 35)

    need(0, 20)
    assert killed_at(step, until_killed)
    need(36, 40)
    assert set(range(36, 40)) <= set(files.marked())
    assert files.unmarked_data() == 0


def test_a_page_map_of_other_content_is_not_believed(tmp_path):
    path = tmp_path / "file"
    allocate(path, 10 * PAGE_SIZE, "one")
    assert pages.is_allocated(path, 10 * PAGE_SIZE, "one")
    assert not pages.is_allocated(path, 10 * PAGE_SIZE, "other")
    assert not pages.is_allocated(path, 11 * PAGE_SIZE, "one")
    os.truncate(map_path(path), 40)
    assert not pages.is_allocated(path, 10 * PAGE_SIZE, "one")
