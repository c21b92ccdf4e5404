"""Only what requests touch is on the disk: the same answers as with all of it, whatever happens."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from helpers import indices
from helpers.metadata import metadata_files, write
from helpers.project import Demo, failures, new_project, reported
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_staging import LISTS, data, write_source

from laion_assets.defs.resources import index_from
from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.io import ranges
from laion_assets.io.errors import InputError
from laion_assets.io.ranges import Ranges
from laion_assets.io.tables import StoredTable
from laion_assets.search.retrieval import Request, retrieve_table
from laion_assets.staging import (
    Manifest,
    NotStagedError,
    StagedFile,
    open_staged,
    read_bytes,
    stage,
    verified_manifest,
)
from laion_assets.staging.sparse import leases, pages, reads, store
from laion_assets.staging.sparse.pages import SparseFile, lay_out, map_of
from laion_assets.staging.sparse.reads import PAGE
from laion_assets.staging.sparse.store import SparseFiles
from laion_assets.staging.transfer import fetch
from laion_assets.staging.transfer.fetch import Fetcher, Tally
from laion_assets.staging.transfer.source import FsspecReader, _version

EXAMPLES = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
POPULATED = "image.index/populated.index"
numbers = count()

# --- ranges ---------------------------------------------------------------------------------------

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12)


def as_ranges(some: Sequence[tuple[int, int]], gap: int = 0) -> Ranges:
    starts = np.array([start for start, _ in some], np.int64)
    return ranges.ranges_of(starts, starts + np.array([length for _, length in some], np.int64), gap)


def as_set(some: Sequence[tuple[int, int]]) -> set[int]:
    return {number for start, length in some for number in range(start, start + length)}


@EXAMPLES
@given(one=spans, other=spans, gap=st.integers(0, 5), size=st.integers(1, 9))
def test_ranges_are_sets_of_numbers(one, other, gap, size):
    there = as_set(one)
    made = as_ranges(one)
    assert set(ranges.members(made)) == there
    assert ranges.total(made) == len(there)
    assert (made[:, 0] < made[:, 1]).all()
    assert (made[1:, 0] > made[:-1, 1]).all()
    assert set(ranges.members(ranges.union(made, as_ranges(other)))) == there | as_set(other)
    np.testing.assert_array_equal(ranges.runs(np.array(sorted(there), np.int64)), made)
    joined = as_ranges(one, gap)
    assert (joined[1:, 0] > joined[:-1, 1] + gap).all()
    between = set(ranges.members(joined)) - there
    assert all({*range(n - gap, n)} & there and {*range(n + 1, n + gap + 1)} & there for n in between)
    cut = ranges.pieces(made, size)
    assert [n for piece in cut for n in range(*piece)] == sorted(there)
    assert ((cut[:, 1] - cut[:, 0]) <= size).all()
    portions = list(ranges.in_portions(made, size))
    assert [n for some in portions for n in ranges.members(some)] == sorted(there)
    assert all(ranges.total(some) < 2 * size for some in portions)


@EXAMPLES
@given(absent=st.sets(st.integers(0, 40_000), max_size=300))
def test_reads_cover_what_is_absent_and_little_else(absent):
    planned = reads.reads_for(np.array(sorted(absent), np.int64))
    read = set(ranges.members(planned))
    assert absent <= read
    assert all(set(range(n - reads.GAP, n)) & absent for n in read - absent)
    assert ((planned[:, 1] - planned[:, 0]) <= reads.LONGEST).all()
    parts = list(reads.batches(planned))
    np.testing.assert_array_equal(np.concatenate([np.empty((0, 2)), *parts]), planned)


# --- what search and metadata say they read is all they read --------------------------------------


class OnlyWhatIsNeeded:
    """A disk on which a file is noise, but for the very bytes that are needed, while they are held."""

    whole = False

    def __init__(self, files: Mapping[Path, Path]) -> None:
        self._right = files
        self.bytes_needed = 0
        for path, right in files.items():
            path.write_bytes(b"\xff" * right.stat().st_size)

    @contextmanager
    def hold(self) -> Iterator["OnlyWhatIsNeeded"]:
        self._held: dict[Path, Ranges] = {}
        yield self
        for path, some in self._held.items():
            self.bytes_needed += ranges.total(some)
            for start, stop in some.tolist():
                self._put(path, start, b"\xff" * (stop - start))

    def need(self, needed: Mapping[Path, Ranges]) -> None:
        for path, some in needed.items():
            content = self._right[path].read_bytes()
            for start, stop in some.tolist():
                assert 0 <= start < stop <= len(content)
                self._put(path, start, content[start:stop])
            self._held[path] = ranges.union(self._held.get(path, ranges.NOTHING), some)

    def _put(self, path: Path, at: int, content: bytes) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(content)


def write_many_lists(folder: Path, rows: int, seed: int = 0) -> np.ndarray:
    """An index with 400 lists, some of them empty; returns its rows."""
    made = indices.random_rows(np.random.default_rng(seed), rows)
    indices.write_merged(folder, indices.faiss.clone_index(indices.trained(indices.MANY_LISTS)), made)
    return made


@pytest.fixture(scope="module")
def many_lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "index"
    write_many_lists(folder, 2000)
    return folder


@settings(EXAMPLES, max_examples=30)
@given(seed=st.integers(0, 1 << 30), k=st.integers(1, 300), nprobe=st.integers(1, 400))
def test_a_search_reads_no_byte_that_it_did_not_ask_for(many_lists, tmp_path, seed, k, nprobe):
    path, lists = indices.index_paths(many_lists)
    folder = tmp_path / str(next(numbers))
    folder.mkdir()
    shutil.copy(path, folder)
    disk = OnlyWhatIsNeeded({folder / lists.name: lists})
    queries = indices.random_rows(np.random.default_rng(seed), 20)
    sparse, whole = Index(folder / path.name, folder / lists.name, disk), Index(path, lists)
    found, expected = (index.search(queries, k, nprobe) for index in (sparse, whole))
    for ours, theirs in zip(vars(found).values(), vars(expected).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert 0 < disk.bytes_needed <= lists.stat().st_size
    assert nprobe > 20 or disk.bytes_needed < lists.stat().st_size
    for ours, theirs in zip(sparse.sample(20, 3), whole.sample(20, 3), strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])
    shutil.rmtree(folder)


def write_compressed(path: Path, table: pa.Table, batch: int) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as out:
        out.write_table(table.combine_chunks(), max_chunksize=batch)


@settings(EXAMPLES, max_examples=150)
@given(tables=metadata_files(), batch=st.integers(1, 4), compressed=st.booleans(), data=st.data())
def test_rows_are_taken_without_a_byte_that_was_not_asked_for(
    tmp_path_factory, tables, batch, compressed, data
):
    folder = tmp_path_factory.mktemp("metadata")
    right = write(folder / "right", tables, batch=batch)
    if compressed:
        for path, table in zip(right, tables, strict=True):
            write_compressed(path, table, batch)
    (folder / "sparse").mkdir()
    disk = OnlyWhatIsNeeded({folder / "sparse" / path.name: path for path in right})
    whole = Metadata(right)
    metadata = Metadata([folder / "sparse" / path.name for path in right], disk=disk)
    assert (len(metadata), metadata.schema) == (len(whole), whole.schema)
    ids = st.integers(0, len(whole) - 1)
    for wanted in data.draw(st.lists(st.lists(ids, max_size=6), max_size=3)) if len(whole) else [[]]:
        some = np.array(wanted, np.int64)
        assert metadata.take(some) == whole.take(some)
        assert metadata.take(some, ["url"]) == whole.take(some, ["url"])
        assert metadata.take(some, whole.schema.names) == whole.take(some, whole.schema.names)
    shutil.rmtree(folder)


def test_views_are_read_whole_and_right(tmp_path):
    texts = ["a", None, "a text that is too long to be inline"]
    table = pa.table({"url": pa.array(texts, pa.string_view())})
    (right,) = write(tmp_path / "right", [table])
    sparse = tmp_path / right.name
    metadata = Metadata([sparse], disk=OnlyWhatIsNeeded({sparse: right}))
    assert metadata.take(np.array([2, 1, 0]))["url"].to_pylist() == texts[::-1]


def test_little_is_read_of_metadata(tmp_path):
    rows = 50_000
    texts = pa.array(
        [f"https://example.org/{number}/{'x' * (number % 90)}.jpg" for number in range(rows)]
    )
    table = pa.table({"url": texts, "caption": texts, "WIDTH": np.arange(rows)})
    (right,) = write(tmp_path / "right", [table], batch=8192)
    sparse = tmp_path / right.name
    disk = OnlyWhatIsNeeded({sparse: right})
    metadata = Metadata([sparse], disk=disk)
    opened = disk.bytes_needed
    assert opened < 10_000
    ids = np.random.default_rng(0).permutation(rows)[:100]
    taken = metadata.take(ids)
    assert taken["url"].to_pylist() == texts.take(pa.array(ids)).to_pylist()
    values = 2 * sum(len(text) for text in taken["url"].to_pylist())
    headers = 3 * 7 * 1000  # of all batches, again
    assert disk.bytes_needed - opened <= values + 100 * (8 + 8 + 8) + headers


# --- the store ------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> float:
        return self.now


class Files:
    """Two files of noise at a source, and a cache in which they are laid out.

    Attributes:
        content: of each, by its path in the cache.
        cache: the directory.

    """

    def __init__(self, root: Path, sizes: Sequence[int] = (40 * PAGE + 17, 3 * PAGE)) -> None:
        self.cache = root / "cache"
        (root / "source").mkdir(parents=True)
        self.content: dict[Path, bytes] = {}
        self.clock = Clock()
        staged = []
        for number, size in enumerate(sizes):
            path = root / "source" / f"{number}.arrow"
            path.write_bytes(random.Random(number).randbytes(size).replace(b"\0", b"\1"))
            version = _version(fsspec.filesystem("file").info(str(path)))
            name = f"metadata/{number}.arrow"
            staged.append(StagedFile(name, name, f"file://{path}", size, version, "content", True))
            lay_out(self.cache / name, size, "content")
            self.content[self.cache / name] = path.read_bytes()
        self.manifest = Manifest("source", tuple(staged), True)

    @contextmanager
    def opened(self, budget: int = 1 << 30) -> Iterator[SparseFiles]:
        disk = SparseFiles(self.cache, self.manifest, budget, lambda _: None, self.clock)
        yield disk
        disk.close()

    def need(self, disk: SparseFiles, path: Path, start: int, stop: int) -> bytes:
        """Need a range and read it while it is held."""
        with disk.hold() as held:
            held.need({path: as_ranges([(start, stop - start)])})
            return path.read_bytes()[start:stop]

    def marked(self) -> dict[Path, list[int]]:
        """The pages that hold data by their maps; each is compared with the source."""
        found = {}
        for path, content in self.content.items():
            there = path.read_bytes()
            file = SparseFile(path, len(content))
            every = as_ranges([(0, file.pages)])
            absent = set(file.absent(every))
            file.close()
            found[path] = [number for number in range(file.pages) if number not in absent]
            for number in found[path]:
                page = slice(number * PAGE, (number + 1) * PAGE)
                assert there[page] == content[page], f"page {number} of {path.name} is marked, and wrong"
        return found

    def unmarked_data(self) -> int:
        """Pages with data that no map knows of."""
        marked = self.marked()
        return sum(
            any(path.read_bytes()[number * PAGE : (number + 1) * PAGE])
            for path, content in self.content.items()
            for number in set(range(-(-len(content) // PAGE))) - set(marked[path])
        )


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page is read but those that are needed."""
    monkeypatch.setattr(reads, "GAP", 0)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where durable costs nothing."""
    folder = Path("/dev/shm") / f"laion-sparse-{os.getpid()}-{next(numbers)}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


places = st.tuples(st.integers(0, 1), st.floats(0, 1), st.integers(1, 9 * PAGE))


def range_at(files: Files, place: tuple[int, float, int]) -> tuple[Path, int, int]:
    number, share, length = place
    path, content = list(files.content.items())[number]
    start = int(share * (len(content) - 1))
    return path, start, min(start + length, len(content))


@pytest.mark.usefixtures("fine")
@settings(EXAMPLES, max_examples=60)
@given(
    requests=st.lists(st.lists(places, min_size=1, max_size=3), max_size=12),
    budget=st.integers(32, 50),
)
def test_what_is_needed_is_there_and_what_was_idle_for_longest_goes(memory, requests, budget):
    files = Files(memory / str(next(numbers)))
    last_use: dict[tuple[Path, int], int] = {}
    present: set[tuple[Path, int]] = set()
    with files.opened(budget * PAGE) as disk:
        for request in requests:
            files.clock.now += 1
            used: set[tuple[Path, int]] = set()
            with disk.hold() as held:
                for path, start, stop in (range_at(files, place) for place in request):
                    held.need({path: as_ranges([(start, stop - start)])})
                    used |= {(path, page) for page in range(start // PAGE, -(-stop // PAGE))}
                    for needed in used:
                        page = slice(needed[1] * PAGE, (needed[1] + 1) * PAGE)
                        assert needed[0].read_bytes()[page] == files.content[needed[0]][page]
            now = {(path, page) for path, some in files.marked().items() for page in some}
            assert used <= now <= present | used
            assert len(now) <= budget
            gone, stayed = present - now, (present & now) - used
            if gone and stayed:
                assert max(last_use[page] for page in gone) <= min(last_use[page] for page in stayed)
            last_use |= dict.fromkeys(used, files.clock.now)
            present = now
    assert files.unmarked_data() == 0
    assert not list((files.cache / ".leases").glob("*"))


def test_what_was_fetched_stays_and_is_not_fetched_again(memory):
    files = Files(memory)
    path = next(iter(files.content))
    with files.opened() as disk:
        assert files.need(disk, path, 5000, 90_000) == files.content[path][5000:90_000]
        assert disk.tally.fetched == PAGE * len(files.marked()[path])
    with files.opened() as disk:
        assert files.need(disk, path, 6000, 80_000) == files.content[path][6000:80_000]
        assert disk.tally.reads == 0


@pytest.mark.usefixtures("fine")
def test_what_is_held_is_never_given_up_and_who_needs_its_room_waits(memory, monkeypatch):
    monkeypatch.setattr(store, "PAUSE", 0.01)
    files = Files(memory)
    path = next(iter(files.content))
    with files.opened(25 * PAGE) as disk, files.opened(25 * PAGE) as other:
        with disk.hold() as held:
            held.need({path: as_ranges([(0, 15 * PAGE)])})
            thread = threading.Thread(target=files.need, args=(other, path, 20 * PAGE, 40 * PAGE))
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
            assert set(range(15)) <= set(files.marked()[path])
        thread.join(10)
        assert not thread.is_alive()
    assert set(range(20, 40)) <= set(files.marked()[path])
    assert len(files.marked()[path]) <= 25


@pytest.mark.usefixtures("fine")
def test_two_that_need_more_and_more_do_not_wait_for_each_other(memory, monkeypatch):
    monkeypatch.setattr(store, "PAUSE", 0.01)
    files = Files(memory)
    path = next(iter(files.content))
    both_began = threading.Barrier(2)

    def grow(first: int) -> None:
        with files.opened(25 * PAGE) as disk, disk.hold() as held:
            held.need({path: as_ranges([(first * PAGE, 10 * PAGE)])})
            both_began.wait(10)
            held.need({path: as_ranges([((first + 10) * PAGE, 10 * PAGE)])})
            done.append(path.read_bytes()[first * PAGE : (first + 20) * PAGE])

    done: list[bytes] = []
    threads = [threading.Thread(target=grow, args=(first,)) for first in (0, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(done) == sorted(files.content[path][n * PAGE : (n + 20) * PAGE] for n in (0, 20))


def test_what_two_need_at_once_is_fetched_once(memory, monkeypatch):
    files = Files(memory)
    path, content = next(iter(files.content.items()))
    read = FsspecReader.read

    def slowly(*args: Any) -> Iterator[bytes]:
        time.sleep(0.2)
        yield from read(*args)

    monkeypatch.setattr(FsspecReader, "read", slowly)
    with files.opened() as one, files.opened() as other:
        threads = [
            threading.Thread(target=files.need, args=(disk, path, 0, len(content)))
            for disk in (one, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert one.tally.fetched + other.tally.fetched == len(content)


def test_more_than_the_budget_is_refused_with_both_numbers(memory):
    files = Files(memory)
    path, content = next(iter(files.content.items()))
    needed = f"{-(-len(content) // PAGE) * PAGE:,}"
    with files.opened(8 * PAGE) as disk:
        with pytest.raises(
            InputError, match=rf"needs {needed} bytes .*LAION_SPARSE_BUDGET allows 32,768: raise it, or"
        ):
            files.need(disk, path, 0, len(content))
        assert files.need(disk, path, 0, 8 * PAGE) == content[: 8 * PAGE]


def test_a_disk_that_is_smaller_than_the_budget_is_said_to_be(memory, monkeypatch):
    files = Files(memory)
    path, content = next(iter(files.content.items()))
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 6 * PAGE))
    with files.opened() as disk:
        with pytest.raises(InputError, match=rf"{files.cache} has room for 24,576: free some space"):
            files.need(disk, path, 0, len(content))
        assert files.need(disk, path, 0, PAGE) == content[:PAGE]


def test_a_disk_that_takes_no_more_is_told_of_and_leaves_nothing_wrong(memory, monkeypatch):
    files = Files(memory)
    path, content = next(iter(files.content.items()))

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with files.opened() as disk:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(InputError, match=r"cannot write to .* \(No space left on device\)"):
                files.need(disk, path, 0, len(content))
        assert files.marked()[path] == []
        assert files.need(disk, path, 0, len(content)) == content


def test_a_source_that_changes_meanwhile_is_noticed_though_it_keeps_no_versions(memory):
    files = Files(memory)
    path, content = next(iter(files.content.items()))
    source = memory / "source" / "0.arrow"
    with files.opened() as disk:
        files.need(disk, path, 0, PAGE)
        source.write_bytes(b"x" * len(content))
        os.utime(source, (1, 1))
        with pytest.raises(InputError, match=r"no longer what was staged.*staged_laion_index again"):
            files.need(disk, path, 0, 3 * PAGE)
        assert files.marked()[path] == [0]
        assert files.unmarked_data() == 0
    told = Manifest.read(files.cache)
    assert told is not None
    assert not told.complete


def test_what_is_there_is_not_written_again_where_a_read_may_be_of_another_version(memory):
    files = Files(memory)
    path, content = next(iter(files.content.items()))
    source = memory / "source" / "0.arrow"
    with files.opened() as disk:
        files.need(disk, path, 2 * PAGE, 3 * PAGE)
        source.write_bytes(b"x" * len(content))
        os.utime(source, (1, 1))
        with pytest.raises(InputError, match="no longer what was staged"):
            files.need(disk, path, PAGE, 4 * PAGE)
        assert path.read_bytes()[2 * PAGE : 3 * PAGE] == content[2 * PAGE : 3 * PAGE]


def test_nobody_writes_any_more_when_fetching_was_interrupted_however_often(monkeypatch):
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
    fetcher = Fetcher(FsspecReader(None), 1, print, Tally())
    with pytest.raises(KeyboardInterrupt):
        fetcher.run(iter([0]), work)
    assert ended


def test_a_server_that_sends_more_than_it_is_asked_for_is_refused(memory, monkeypatch):
    files = Files(memory)
    path, content = next(iter(files.content.items()))
    with files.opened() as disk, monkeypatch.context() as patch:
        patch.setattr(FsspecReader, "read", lambda *_: iter([content]))
        with pytest.raises(InputError, match="cannot be read in parts"):
            files.need(disk, path, 0, PAGE)
        assert files.marked()[path] == []


@pytest.mark.usefixtures("fine")
def test_what_was_written_and_never_marked_goes_when_room_is_needed(memory):
    files = Files(memory)
    path, content = next(iter(files.content.items()))
    lost = SparseFile(path, len(content))
    lost.write(content[: 20 * PAGE], 0)  # by a request of which nothing else is left
    lost.close()
    assert files.unmarked_data() == 20
    with files.opened(budget=25 * PAGE) as disk:
        assert files.need(disk, path, 25 * PAGE, 35 * PAGE) == content[25 * PAGE : 35 * PAGE]
    assert files.unmarked_data() == 0
    assert files.marked()[path] == list(range(25, 35))


def test_a_source_that_has_shrunk_is_no_end_of_file(memory):
    files = Files(memory)
    path, content = next(iter(files.content.items()))
    (memory / "source" / "0.arrow").write_bytes(content[: 5 * PAGE])
    with files.opened() as disk, pytest.raises(InputError, match="no longer what was staged"):
        files.need(disk, path, 0, len(content))
    assert files.marked()[path] == []


@pytest.mark.usefixtures("fine")
def test_what_was_fetched_before_an_error_stays(memory, monkeypatch):
    monkeypatch.setattr(reads, "AT_ONCE", 4)
    monkeypatch.setattr(reads, "LONGEST", 2)
    monkeypatch.setattr(store, "THREADS", 1)
    files = Files(memory)
    path, content = next(iter(files.content.items()))
    read = FsspecReader.read

    def refused_at_last(reader: FsspecReader, file: Any, start: int, stop: int) -> Iterator[bytes]:
        if start >= 30 * PAGE:
            raise InputError("no right to read it")
        return read(reader, file, start, stop)

    with files.opened() as disk:
        with monkeypatch.context() as patch:
            patch.setattr(FsspecReader, "read", refused_at_last)
            with pytest.raises(InputError, match="no right"):
                files.need(disk, path, 0, len(content))
        there = files.marked()[path]
        assert there == list(range(len(there)))
        assert 24 <= len(there) <= 30
        assert files.unmarked_data() == 0
        before = disk.tally.fetched
        assert files.need(disk, path, 0, len(content)) == content
        assert disk.tally.fetched - before == len(content) - len(there) * PAGE


@pytest.mark.usefixtures("fine")
def test_data_is_durable_before_it_is_marked_and_marks_are_gone_before_it_is(memory, monkeypatch):
    """What a power cut would show: after a kill, the system still holds what was not durable."""
    files = Files(memory)
    path = next(iter(files.content))
    done: list[tuple[str, int]] = []

    def tell(owner: Any, name: str, what: str) -> None:
        taken = getattr(owner, name)

        def and_note(*args: Any) -> Any:
            done.append((what, len(files.marked()[path])))
            return taken(*args)

        monkeypatch.setattr(owner, name, and_note)

    with files.opened(10 * PAGE) as disk:
        tell(os, "pwrite", "write")
        tell(os, "fdatasync", "data durable")
        tell(os, "fsync", "marks durable")
        tell(pages, "_fallocate", "gone")
        files.need(disk, path, 0, 10 * PAGE)
        assert done == [("write", 0), ("data durable", 0), ("marks durable", 10)]
        done.clear()
        files.need(disk, path, 20 * PAGE, 21 * PAGE)
        given_up = [("marks durable", 8), ("gone", 8)]
        assert done == [*given_up, ("write", 8), ("data durable", 8), ("marks durable", 9)]


# --- killed ---------------------------------------------------------------------------------------


def killed_at(step: int, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Do something in a process of its own that is killed before some step; whether it came that far."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left, turn = [step], threading.Lock()

    def counted(taken: Callable[..., Any]) -> Callable[..., Any]:
        def or_killed(*args: Any, **more: Any) -> Any:
            with turn:
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
            return taken(*args, **more)

        return or_killed

    steps = [(os, "pwrite"), (os, "fsync"), (os, "fdatasync"), (os, "ftruncate"), (pages, "_fallocate")]
    for owner, name in [*steps, (leases.Lease, "drop"), (SparseFile, "mark"), (SparseFile, "give_up")]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    try:
        call()
    finally:
        os._exit(0)


@pytest.mark.usefixtures("fine")
@settings(EXAMPLES, max_examples=40)
@given(
    rounds=st.lists(
        st.tuples(st.lists(places, min_size=1, max_size=4), st.integers(0, 20)), min_size=1, max_size=5
    )
)
def test_killed_at_any_step_nothing_wrong_is_ever_marked(memory, monkeypatch, rounds):
    files = Files(memory / str(next(numbers)))
    budget = 34 * PAGE

    def requests(some: Sequence[tuple[int, float, int]]) -> None:
        with files.opened(budget) as disk:
            for place in some:
                path, start, stop = range_at(files, place)
                assert files.need(disk, path, start, stop) == files.content[path][start:stop]

    for some, step in rounds:
        files.clock.now += 1
        killed_at(step, lambda some=some: requests(some), monkeypatch)
        files.marked()
        with files.opened(budget) as disk:  # whoever makes room clears up after the dead
            path, content = list(files.content.items())[1]
            file = SparseFile(path, len(content))
            file.give_up(as_ranges([(2, 1)]))
            file.close()
            assert files.need(disk, path, 2 * PAGE, 3 * PAGE) == content[2 * PAGE :]
        assert files.unmarked_data() == 0
        files.clock.now += 1
        requests(some)
        assert files.unmarked_data() == 0


@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize("step", range(13))
def test_giving_up_that_is_killed_is_finished_by_the_next(memory, monkeypatch, step):
    files = Files(memory)
    path = next(iter(files.content))

    def need(first: int, beyond: int) -> None:
        with files.opened(20 * PAGE) as disk:
            files.need(disk, path, first * PAGE, beyond * PAGE)

    need(0, 20)
    assert killed_at(step, lambda: need(25, 35), monkeypatch)
    need(36, 40)
    assert set(range(36, 40)) <= set(files.marked()[path])
    assert files.unmarked_data() == 0


MANY_REQUESTS = """
import hashlib, random, sys, time
from pathlib import Path
import numpy as np
import pyarrow as pa
from laion_assets.search.retrieval import Request, retrieve_table
from laion_assets.staging import open_staged
from laion_assets.staging.transfer.source import FsspecReader
from laion_assets.staging.sparse import reads
from laion_assets.staging.sparse import store

cache, budget, order = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
reads.GAP, store.PAUSE = 0, 0.01
read = FsspecReader.read

def slowly(*args):
    time.sleep(random.random() / 500)
    yield from read(*args)

FsspecReader.read = slowly
numbers = list(range(12))
random.Random(order).shuffle(numbers)
answers = {}
for number in numbers:
    with open_staged(cache, budget=budget) as opened:
        queries = np.random.default_rng(number).standard_normal((3, opened.index.dimension))
        request = Request(20 + number, 0.94, 3 + number)
        queries = queries.astype(np.float32)
        table, found = retrieve_table(opened.index, opened.metadata, queries, request, per_seed=True)
        answers[number] = hashlib.sha256(repr(table.to_pydict()).encode()).hexdigest()
print(hashlib.sha256(repr(sorted(answers.items())).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of many pages: 400 lists, and metadata in two files."""
    folder = tmp_path_factory.mktemp("scattered") / "source"
    rows = 30_000
    write_many_lists(folder, rows, seed=1)
    texts = pa.array([f"https://example.org/{n}/{'x' * (n % 97)}.jpg" for n in range(rows)])
    table = pa.table({"url": texts, "caption": texts, "punsafe": np.linspace(0, 1, rows)})
    indices.write_files(folder / "metadata", np.array_split(np.arange(rows), 2), table, batch=4096)
    return folder


def answers(cache: Path, budget: int, order: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", MANY_REQUESTS, str(cache), str(budget), str(order)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def digest(process: "subprocess.Popen[str]") -> str:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    return out


def test_several_processes_some_of_them_killed_all_find_what_a_full_copy_has(scattered, tmp_path):
    full, cache = tmp_path / "full", tmp_path / "cache"
    stage(str(scattered), None, full)
    expected = digest(answers(full, 0, 0))
    stage(str(scattered), None, cache, sparse=True)
    budget = 2_500_000
    whole = sum(path.stat().st_size for path in scattered.rglob("*") if path.is_file())
    assert budget < whole / 2
    chance = random.Random(0)
    for number in range(3):
        lucky = [answers(cache, budget, 10 * number + order) for order in range(2)]
        unlucky = [answers(cache, budget, 10 * number + order) for order in range(2, 4)]
        time.sleep(1)
        for process in unlucky:
            time.sleep(chance.random())
            process.kill()
            process.communicate()
        assert {digest(process) for process in lucky} == {expected}
    assert digest(answers(cache, budget, 99)) == expected
    manifest = verified_manifest(cache)
    wrong = 0
    for file in manifest.files:
        if file.sparse:
            there, right = (cache / file.path).read_bytes(), (scattered / file.name).read_bytes()
            sparse = SparseFile(cache / file.path, file.size)
            absent = set(sparse.absent(as_ranges([(0, sparse.pages)])))
            sparse.close()
            for number in set(range(sparse.pages)) - absent:
                page = slice(number * PAGE, (number + 1) * PAGE)
                wrong += there[page] != right[page]
    assert wrong == 0
    assert manifest.bytes_on_disk(cache) < budget * 1.2 + 100_000


# --- staging --------------------------------------------------------------------------------------


def everything(cache: Path) -> pa.Table:
    with open_staged(cache) as opened:
        return opened.metadata.take(np.arange(len(opened.metadata)))


def test_files_that_are_read_whole_are_copied_and_the_others_laid_out(tmp_path):
    source, cache = write_source(tmp_path / "source"), tmp_path / "cache"
    done = stage(str(source), None, cache, sparse=True)
    assert (done.fetched, done.bytes_fetched) == (5, (source / POPULATED).stat().st_size)
    assert {file.name for file in done.manifest.files if not file.sparse} == {POPULATED}
    assert stage(str(source), None, cache, sparse=True).bytes_fetched == 0
    assert everything(cache)["url"][7].as_py() == "https://example.org/0/7.jpg"


@pytest.mark.parametrize(
    ("form", "suffix"),
    [("Flat", indices.ARROW), ("single file", indices.PARQUET), (indices.MERGED, indices.PARQUET)],
)
def test_forms_that_cannot_be_read_in_parts_are_copied_whole(tmp_path, form, suffix):
    source, cache = write_source(tmp_path / "source", form, suffix), tmp_path / "cache"
    done = stage(str(source), None, cache, sparse=True)
    whole = {file.name for file in done.manifest.files if not file.sparse}
    names = {file.name for file in done.manifest.files}
    assert names - whole == {n for n in names if n.endswith(".arrow") or n == LISTS}
    query = np.eye(1, indices.DIMENSION, dtype=np.float32)
    with open_staged(cache) as opened:
        ids = opened.index.search(query, 40, opened.index.nlist or None).ids[0]
        urls = opened.metadata.take(ids)["url"].to_pylist()
    assert urls == [f"https://example.org/0/{number}.jpg" for number in ids]


def test_between_the_modes_nothing_is_lost_and_nothing_is_taken_for_whole(tmp_path):
    source, cache = write_source(tmp_path / "source"), tmp_path / "cache"
    stage(str(source), None, cache)
    kept = stage(str(source), None, cache, sparse=True)
    assert (kept.fetched, any(file.sparse for file in kept.manifest.files)) == (0, False)
    shutil.rmtree(cache)
    stage(str(source), None, cache, sparse=True)
    everything(cache)
    again = stage(str(source), None, cache)
    assert again.fetched == 4
    assert not any(file.sparse for file in again.manifest.files)
    assert {n for n in data(cache) if not n.startswith((".ledger", ".fetching"))} == {
        str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()
    }
    for name, held in data(cache).items():
        assert name.startswith(".") or held == (source / name).read_bytes()


def test_another_version_begins_empty_and_files_that_stayed_keep_what_they_have(tmp_path):
    source, cache = write_source(tmp_path / "source"), tmp_path / "cache"
    stage(str(source), None, cache, sparse=True)
    everything(cache)
    write_source(tmp_path / "other", seed=1)
    changed = source / "metadata" / "001.arrow"
    shutil.copy(tmp_path / "other" / "metadata" / "001.arrow", changed)
    stage(str(source), None, cache, sparse=True)
    with open_staged(cache) as opened:
        urls = opened.metadata.take(np.arange(40))["url"].to_pylist()
        assert opened.fetched.fetched == changed.stat().st_size
    assert [url.split("/")[3] for url in urls] == ["0"] * 14 + ["1"] * 13 + ["0"] * 13


@pytest.mark.parametrize("lost", [LISTS, f"{LISTS}.pages", "metadata/000.arrow.pages"])
def test_a_file_or_its_map_that_is_gone_is_laid_out_again(tmp_path, lost):
    source, cache = write_source(tmp_path / "source"), tmp_path / "cache"
    stage(str(source), None, cache, sparse=True)
    expected = everything(cache)
    (cache / lost).unlink()
    with pytest.raises(NotStagedError, match=re.escape(lost.removesuffix(".pages"))):
        verified_manifest(cache)
    stage(str(source), None, cache, sparse=True)
    assert everything(cache) == expected


@pytest.mark.parametrize("step", range(12))
def test_laying_out_that_is_killed_is_done_by_the_next(tmp_path, monkeypatch, step):
    source, cache = write_source(tmp_path / "source"), tmp_path / "cache"
    killed_at(step, lambda: stage(str(source), None, cache, sparse=True), monkeypatch)
    with suppress(NotStagedError):
        verified_manifest(cache)
        everything(cache)
    stage(str(source), None, cache, sparse=True)
    assert everything(cache)["url"][39].as_py() == "https://example.org/0/39.jpg"


def test_a_map_of_other_content_is_not_believed(tmp_path):
    path = tmp_path / "file"
    lay_out(path, 10 * PAGE, "one")
    assert pages.is_laid_out(path, 10 * PAGE, "one")
    assert not pages.is_laid_out(path, 10 * PAGE, "other")
    assert not pages.is_laid_out(path, 11 * PAGE, "one")
    os.truncate(map_of(path), pages.HEAD)
    assert not pages.is_laid_out(path, 10 * PAGE, "one")


# --- settings, and the whole graph ----------------------------------------------------------------


def test_a_bucket_is_read_sparse_and_a_folder_copied_unless_it_is_said_otherwise():
    def staging(**environment: str) -> str:
        return index_from(environment).staging

    assert staging() == staging(LAION_INDEX_URI="/data/index") == "full"
    assert staging(LAION_INDEX_URI="gs://b/index") == staging(LAION_INDEX_URI="s3://b/index") == "sparse"
    assert staging(LAION_INDEX_URI="gs://b/index", LAION_STAGING="full") == "full"


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
    assert read_bytes(text, "LAION_SPARSE_BUDGET") == expected
    assert index_from({"LAION_SPARSE_BUDGET": text}).sparse_budget == expected


@pytest.mark.parametrize("text", ["much", "3 XB", "-1GB", "GB"])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(InputError, match=r"LAION_SPARSE_BUDGET is .*like 300GB"):
        read_bytes(text, "LAION_SPARSE_BUDGET")


TABLES = ("knn_urls", "centroid_urls", "combined_urls")


def test_the_whole_graph_makes_the_same_tables(demo: Demo, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "sparse").mkdir()
    sparse_settings = {"LAION_STAGING": "sparse", "LAION_SPARSE_BUDGET": "1MB"}
    with (
        new_project(tmp_path / "full", demo.index, demo.seeds) as full,
        new_project(tmp_path / "sparse", demo.index, demo.seeds, **sparse_settings) as sparse,
    ):
        for seed_set in ("fruit", "flower"):
            results = [
                project.run(seed_set, nb_images_knn=20, nb_images_centroid=200, nprobe=2)
                for project in (full, sparse)
            ]
            assert [failures(result) for result in results] == [{}, {}]
            for name in TABLES:
                tables = [StoredTable(str(project.table(name, seed_set))) for project in (full, sparse)]
                assert tables[0].read() == tables[1].read()
        told = reported(results[1], "centroid_urls")
        assert told["recall of nprobe"].startswith("not measured")
        assert told["bytes fetched"] >= 0
        staged = reported(results[1], "staged_laion_index")
        assert staged["bytes on the disk"] < staged["bytes"]
        shutil.rmtree(sparse.cache)
        assert failures(sparse.run("flower", "knn_urls", nb_images_knn=20)) == {}


def test_what_a_notebook_finds_is_the_same_with_and_without_a_copy(scattered, tmp_path):
    queries = indices.random_rows(np.random.default_rng(5), 40)
    tables = []
    for sparse in (False, True):
        cache = tmp_path / str(sparse)
        stage(str(scattered), None, cache, sparse=sparse)
        with open_staged(cache) as opened:
            request = Request(50, 0.9)
            table, _ = retrieve_table(opened.index, opened.metadata, queries, request, per_seed=True)
            tables.append(table)
    assert tables[0] == tables[1]
