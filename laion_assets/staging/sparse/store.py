"""The sparse files of an index: fetches the pages that requests need, and evicts others.

Two locks order the processes. The ledger is locked briefly: to see which pages are present, to take a
lease, to mark and unmark. Fetching and evicting are locked while they last, so pages that two requests
need are fetched once. A process that waits, for a lock or for room, holds no lease, so there is no
deadlock; one that waits for room holds no lock either, so others can fetch meanwhile.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock

import numpy as np

from laion_assets.io.arrays import Ids
from laion_assets.io.checksums import PartChecksums
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import slices
from laion_assets.io.progress import Progress
from laion_assets.io.ranges import (
    NO_RANGES,
    Hold,
    Ranges,
    WholeFiles,
    batched,
    members,
    outside,
    ranges_of,
    runs,
    total,
    union,
)
from laion_assets.staging.sparse.budget import least_recently_used
from laion_assets.staging.sparse.leases import LEASES, Lease, Pages, read_leases
from laion_assets.staging.sparse.pages import (
    PAGES_AT_ONCE,
    RECORD,
    SparseFile,
    leftover_maps,
    map_path,
    page_checksums,
    page_records,
)
from laion_assets.staging.sparse.reads import (
    MAX_READ,
    MERGE_GAP,
    PAGE_SIZE,
    pages_of,
    read_batches,
    reads_for,
    spans_of_reads,
)
from laion_assets.staging.transfer import locks
from laion_assets.staging.transfer.disk import DISK_FULL_ERRORS, allocated_bytes, cannot_write
from laion_assets.staging.transfer.fetch import Fetcher, TransferStats, read_range
from laion_assets.staging.transfer.files import SourceFile
from laion_assets.staging.transfer.range_readers import ChangedError, RangeReader

READ_THREADS = 64  # 2,000 reads a second at 30 ms each
JOB_READS = 32  # at most, that a thread reads before it hands on what it has read
JOBS_LEFT = 4 * READ_THREADS  # at least: jobs become shorter, so that all threads end at the same time
WRITTEN_AT_ONCE = 256 << 10  # bytes that a thread holds back
EVICTION_MARGIN = 0.05  # of the budget, evicted beyond what is needed, so that not every request evicts
EVICTION_STEP = 1 << 16  # pages that are evicted at a time
POLL_INTERVAL = 0.5  # seconds between checks whether other requests have released pages


class SparseFiles:
    """The sparse files of a staged index, for one reader; a `Disk`.

    Args:
        cache: the cache directory, which nobody stages to meanwhile.
        files: the sparse files; the name of each is its path in the cache.
        reader: reads them at the source.
        budget: bytes of disk that they may occupy together.
        log: takes lines about progress, retries and evictions.
        on_change: called when a file at the source is no longer as it was staged.
        clock: returns seconds since 1970.

    Attributes:
        stats: counts what was read from the source.

    """

    whole = False

    def __init__(
        self,
        cache: Path,
        files: Sequence[SourceFile],
        reader: RangeReader,
        *,
        budget: int,
        log: Callable[[str], None],
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cache = cache
        self._sources = files
        self._reader = reader
        self._budget = budget
        self._log = log
        self._on_change = on_change
        self._clock = clock
        self.stats = TransferStats()
        self._files = [SparseFile(cache / file.name, file.size, file.checksum or "") for file in files]
        # A reader that pins no version may return another: then no page that is marked is written again.
        self._gap = MERGE_GAP if reader.pins else 0
        self._numbers = {file.path: number for number, file in enumerate(self._files)}

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    @contextmanager
    def hold(self) -> Iterator[Hold]:
        """Open a block in which ranges can be needed; they are held until it ends."""
        lease = Lease(self._cache)
        try:
            yield _Hold(self, lease)
        finally:
            lease.release()

    def pages_needed(self, ranges: Mapping[Path, Ranges]) -> dict[int, Ranges]:
        """Return the pages of byte ranges, by file number; files that are not sparse are left out."""
        known = {path: some for path, some in ranges.items() if path in self._numbers}
        return {self._numbers[path]: pages_of(some) for path, some in known.items()}

    def ensure(self, pages: Pages, lease: Lease) -> None:
        """Ensure that pages are on the disk, intact, and hold them.

        Raises:
            InputError: they exceed the budget, or cannot be fetched or written, or the files were
                replaced.

        """
        damaged: Pages = {}
        log = _once(self._log)
        try:
            while True:
                if self._hold_if_present(pages, lease):
                    damaged = self._damaged(pages)
                    if not damaged:
                        return
                lease.release()  # a process that waits holds nothing
                with locks.fetching(self._cache, log):
                    self._unmark_damaged(damaged)
                    fits = self._fetch_missing(pages, lease)
                if not fits:  # another request may, and can fetch meanwhile
                    log(f"waiting for other requests to release pages of {self._cache}")
                    time.sleep(POLL_INTERVAL)
        except OSError as error:
            if error.errno not in {*DISK_FULL_ERRORS, errno.EACCES}:
                raise
            raise cannot_write(self._cache, error) from error

    def _hold_if_present(self, pages: Pages, lease: Lease) -> bool:
        with locks.ledger(self._cache):
            self._refresh(pages)
            if self._missing(pages):
                return False
            self._hold(pages, lease)
            return True

    def _refresh(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._files[number].refresh()

    def _missing(self, pages: Pages) -> dict[int, Ids]:
        missing = {number: self._files[number].missing(some) for number, some in pages.items()}
        return {number: some for number, some in missing.items() if len(some)}

    def _hold(self, pages: Pages, lease: Lease) -> None:
        lease.hold(pages)
        for number, some in pages.items():
            self._files[number].touch(some, self._now())

    def _now(self) -> int:
        return max(int(self._clock()), 1)

    # --- damage -----------------------------------------------------------------------------------

    def find_damage(self, name: str, advance: Callable[[int], object] = lambda _: None) -> Ranges:
        """Read all pages of a file that are on the disk, and return the ranges of bytes that are damaged.

        Args:
            name: name of the file.
            advance: called with the bytes read since the last call.

        """
        number = [source.name for source in self._sources].index(name)
        file, lease = self._files[number], Lease(self._cache)
        wrong = [NO_RANGES[:, 0]]
        with locks.ledger(self._cache):
            file.refresh()
        for some in batched(file.present(), PAGES_AT_ONCE):
            try:
                with locks.ledger(self._cache):
                    lease.hold({number: some})  # or another process evicts them meanwhile
                    file.refresh()
                wrong.append(file.damaged(some))
            finally:
                lease.release()
            advance(PAGE_SIZE * total(some))
        return runs(np.concatenate(wrong)) * PAGE_SIZE

    def present(self, name: str) -> Ranges:
        """Return the ranges of bytes of a file that are on the disk, in whole pages."""
        number = [source.name for source in self._sources].index(name)
        with locks.ledger(self._cache):
            self._files[number].refresh()
        return self._files[number].present() * PAGE_SIZE

    def differs_from_source(self, name: str, count: int) -> bool:
        """Read a few pages of a file from the source again; whether one differs from that on the disk.

        The source has no checksums of pages, so this is the only way to find that a server has lied.

        Args:
            name: name of the file.
            count: number of random pages to read.

        Raises:
            ChangedError: the file at the source has changed since it was staged.
            InputError: the source cannot be read.

        """
        number = [source.name for source in self._sources].index(name)
        file, source = self._files[number], self._sources[number]
        with locks.ledger(self._cache):
            file.refresh()
        present = members(file.present())
        chosen = np.sort(np.random.default_rng().permutation(present)[:count])
        for page, checksum in zip(chosen.tolist(), file.checksums(chosen).tolist(), strict=True):
            start, found = page * PAGE_SIZE, PartChecksums(PAGE_SIZE)
            stop = min(start + PAGE_SIZE, file.size)
            for data, _ in read_range(self._reader, source, start, stop, Event(), self._log, self.stats):
                found.add(data)
            if page_checksums(found.finish()) != [checksum]:
                return True
        return False

    def fetch_again(self, ranges: Mapping[Path, Ranges]) -> None:
        """Fetch pages again, whatever is on the disk.

        Raises:
            InputError: see `ensure`.

        """
        pages, lease = self.pages_needed(ranges), Lease(self._cache)
        try:
            with locks.fetching(self._cache, self._log):
                with locks.ledger(self._cache):
                    for number, some in pages.items():
                        self._files[number].unmark(some)
                self._fetch_missing(pages, lease)
            self.ensure(pages, lease)
        finally:
            lease.release()

    def _damaged(self, pages: Pages) -> Pages:
        found = {number: self._files[number].damaged(some) for number, some in pages.items()}
        return {number: runs(some) for number, some in found.items() if len(some)}

    def _unmark_damaged(self, pages: Pages) -> None:
        """Unmark damaged pages, except those that another request has fetched again meanwhile."""
        with locks.ledger(self._cache):
            self._refresh(pages)
        for number, some in self._damaged(pages).items():
            file = self._files[number]
            self._log(
                f"{total(some):,} pages of {file.path} differ from the checksums in its page map: one of "
                "the two was damaged; fetching the pages again"
            )
            with locks.ledger(self._cache):
                file.unmark(some)

    # --- room -------------------------------------------------------------------------------------

    def _fetch_missing(self, pages: Pages, lease: Lease) -> bool:
        """Fetch missing pages and hold all; False if other requests have to release pages first.

        Nobody else fetches or evicts meanwhile, so pages that are not marked are nobody else's, and can
        be freed without the ledger.

        Raises:
            InputError: they exceed the budget or the disk, or cannot be fetched.

        """
        self._clean_up()
        freed = True
        while True:
            with locks.ledger(self._cache):
                self._refresh(range(len(self._files)))
                reads = {n: reads_for(some, self._gap) for n, some in self._missing(pages).items()}
                wanted = _united(pages, reads)
                kept = _united(wanted, read_leases(self._cache).held)
                excess = self._excess(wanted, reads, kept)
                if excess is None:
                    return False
                if excess <= 0 or not freed:
                    self._hold(wanted, lease)
                    break
            freed = self._evict(excess, kept, lease) or self._free_unmarked()
        if reads:  # or another request has fetched them meanwhile
            self._fetch(reads)
        if self._missing(pages):
            raise AssertionError("pages that were fetched are not marked")
        return True

    def _clean_up(self) -> None:
        """Free what dead processes wrote and did not mark, what maps have lost, and maps of no file."""
        with locks.ledger(self._cache):
            self._refresh(range(len(self._files)))
            others = read_leases(self._cache)
            for path in leftover_maps(self._cache, [file.path for file in self._files]):
                self._log(f"removing {path}, which belongs to no file of the index")
                path.unlink()
        for number, pages in others.abandoned.items():
            self._files[number].free_unmarked(pages)
        for path in others.dead:
            path.unlink(missing_ok=True)
        for file in self._files:
            if unlisted := file.unlisted():
                self._log(
                    f"{file.path} holds {unlisted:,} bytes that its page map does not list: freeing "
                    "them; what is needed is fetched again"
                )
                file.free(file.unmarked())

    def _excess(self, wanted: Pages, reads: Pages, kept: Pages) -> int | None:
        """Return the bytes to evict so that pages fit; None if other requests hold too much.

        Args:
            wanted: pages to hold.
            reads: those of them to write.
            kept: pages that are wanted or held by others.

        Raises:
            InputError: they do not fit, whatever others hold.

        """
        maps = sum(allocated_bytes(map_path(file.path)) for file in self._files)
        leases = self._bytes_of_leases()
        used = maps + leases + sum(allocated_bytes(file.path) for file in self._files)
        limit = min(self._budget, used + shutil.disk_usage(self._cache).free)
        if maps + _bytes(wanted) > limit:
            raise self._too_much(_bytes(wanted), maps, limit)
        if maps + leases + _bytes(kept) > limit:
            return None
        recorded = RECORD.itemsize * sum(map(total, reads.values()))
        return used + _bytes(reads) + recorded - limit

    def _bytes_of_leases(self) -> int:
        found = 0
        for path in (self._cache / LEASES).glob("*"):
            with suppress(FileNotFoundError):  # released just now
                found += allocated_bytes(path)
        return found

    def _free_unmarked(self) -> bool:
        """Free everything that was written but never marked, such as by a request cut off by a power cut.

        No map counts it, but it occupies the disk.
        """
        before = sum(allocated_bytes(file.path) for file in self._files)
        for file in self._files:
            file.free(file.unmarked())
        return sum(allocated_bytes(file.path) for file in self._files) < before

    def _too_much(self, needed: int, maps: int, limit: int) -> InputError:
        what = f"this request needs {needed:,} bytes of the index at once, and page maps {maps:,}"
        less = "request fewer results or a lower nprobe"
        if limit == self._budget:
            return InputError(f"{what}; the budget is {limit:,}: raise it, or {less}", "sparse_budget")
        room = f"{self._cache} has room for {limit - maps:,}"
        return InputError(f"{what}; {room}: free some space, or {less}", "cache_dir")

    def _evict(self, excess: int, kept: Pages, lease: Lease) -> bool:
        """Evict the least recently used pages, plus a margin; whether there were any.

        They are chosen without the ledger, and evicted in steps, so that other requests are not held up.
        """
        last_uses = [
            file.last_uses(kept.get(number, NO_RANGES)) for number, file in enumerate(self._files)
        ]
        wanted = int(excess + EVICTION_MARGIN * self._budget) // PAGE_SIZE + 1
        chosen = least_recently_used([used for _, used in last_uses], wanted)
        evicted = 0
        for number, ((pages, _), some) in enumerate(zip(last_uses, chosen, strict=True)):
            for step in batched(runs(pages[some]), EVICTION_STEP):
                evicted += self._evict_step(number, step, lease)
        if evicted:
            self._log(f"evicted {evicted * PAGE_SIZE:,} bytes of the index, the least recently used")
        return bool(evicted)

    def _evict_step(self, number: int, pages: Ranges, lease: Lease) -> int:
        """Evict those pages of a file that nobody holds; returns their number."""
        file = self._files[number]
        with locks.ledger(self._cache):
            held = read_leases(self._cache).held.get(number, NO_RANGES)
            numbers = members(pages)
            pages = runs(numbers[outside(numbers, held)])
            lease.hold({number: pages})  # if this process dies, the next one finishes the eviction
            file.unmark(pages)
        file.free(pages)
        lease.release()
        return total(pages)

    # --- fetching ---------------------------------------------------------------------------------

    def _fetch(self, reads: Pages) -> None:
        """Read pages from the source, write them, make them durable, and mark them."""
        jobs = list(self._jobs(reads))  # cut here: threads would cut one at a time, under a lock
        with self._fetching(sum(map(len, reads.values())), _bytes(reads)) as (fetcher, progress):

            def read(job: tuple[_Batch, Ranges]) -> None:
                batch, some = job
                checksums = PartChecksums(PAGE_SIZE)
                for pieces in _held_back(self._pieces(fetcher, batch, some)):
                    for data, at in pieces:
                        batch.file.write(data, at)
                    content = b"".join(data for data, _ in pieces)
                    checksums.add(content)
                    progress.advance(len(content))
                if batch.finish(some, page_checksums(checksums.finish())):
                    self._mark(batch)

            try:
                fetcher.run(iter(jobs), read)
            except BaseException:
                for number, some in reads.items():
                    self._files[number].free_unmarked(some)
                raise
            for number in reads:
                self._files[number].sync_marks()

    @contextmanager
    def _fetching(self, count: int, size: int) -> Iterator[tuple[Fetcher, Progress]]:
        """Yield threads that read from the source, and their progress; then log how much it was.

        Args:
            count: number of reads.
            size: bytes of all.

        Raises:
            InputError: the files were replaced.

        """
        started, before = time.monotonic(), replace(self.stats)
        fetcher = Fetcher(self._reader, min(READ_THREADS, count), self._log, self.stats)
        try:
            with Progress("fetching", size, "B", fetcher.log) as progress:
                yield fetcher, progress
        except ChangedError as error:
            raise self._changed(error) from error
        self._log(
            f"fetched {self.stats.fetched - before.fetched:,} bytes of the index in "
            f"{self.stats.reads - before.reads:,} reads and {time.monotonic() - started:.1f} s"
        )

    def read(self, path: Path, spans: Ids) -> list[bytes]:
        """Read spans of a file from the source, and keep nothing on the disk: see `Disk.read`.

        It takes no lock, so what two requests read at once is fetched twice.
        """
        if path not in self._numbers:
            return WholeFiles().read(path, spans)
        source, edges = self._sources[self._numbers[path]], spans.tolist()
        reads = [some.tolist() for some in spans_of_reads(spans)]
        found = [b""] * len(edges)
        if not reads:
            return found
        with self._fetching(len(reads), total(ranges_of(*spans.T))) as (fetcher, progress):

            def read(job: slice) -> None:
                for numbers in reads[job]:
                    start, stop = edges[numbers[0]][0], max(edges[number][1] for number in numbers)
                    content = b"".join(data for data, _ in fetcher.read(source, start, stop))
                    for number in numbers:
                        first, last = edges[number]
                        found[number] = content[first - start : last - start]
                progress.advance(sum(len(found[number]) for some in reads[job] for number in some))

            fetcher.run(iter(slices(len(reads), _reads_of_a_job(len(reads)))), read)
            self._reader.check(source)
        return found

    def _jobs(self, reads: Pages) -> Iterator[tuple[_Batch, Ranges]]:
        left = sum(map(len, reads.values()))
        for number, ranges in reads.items():
            for some in read_batches(ranges):
                batch = _Batch(self._files[number], self._sources[number], len(some))
                while len(some):
                    count = min(_reads_of_a_job(left), len(some))
                    count = min(count, max(1, MAX_READ * len(some) // total(some)))  # of usual length
                    yield batch, some[:count]
                    some = some[count:]
                    left -= count

    def _pieces(self, fetcher: Fetcher, batch: _Batch, reads: Ranges) -> Iterator[tuple[bytes, int]]:
        """Yield what some reads return, each piece with its offset."""
        for start, stop in np.minimum(reads * PAGE_SIZE, batch.file.size).tolist():
            yield from fetcher.read(batch.source, start, stop)

    def _mark(self, batch: _Batch) -> None:
        """Make a batch durable, then mark its pages."""
        self._reader.check(batch.source)
        batch.file.sync()
        with locks.ledger(self._cache):
            batch.file.mark(page_records(*batch.pages_and_checksums(), self._now()))

    def _changed(self, changed: ChangedError) -> InputError:
        self._on_change()
        return InputError(
            f"{changed.file.url} is no longer what was staged ({changed}): stage the index again",
            "staged_index",
        )


class _Hold:
    """What one block needs so far."""

    def __init__(self, files: SparseFiles, lease: Lease) -> None:
        self._files = files
        self._lease = lease
        self._pages: dict[int, Ranges] = {}

    def need(self, ranges: Mapping[Path, Ranges]) -> None:
        """Ensure that ranges are on the disk, besides those that were needed before."""
        for number, pages in self._files.pages_needed(ranges).items():
            self._pages[number] = union(self._pages.get(number, NO_RANGES), pages)
        self._files.ensure(self._pages, self._lease)


class _Batch:
    """Reads of one file that are made durable and marked together, after the last of them."""

    def __init__(self, file: SparseFile, source: SourceFile, reads: int) -> None:
        self.file = file
        self.source = source
        self._left = reads
        self._done: list[tuple[Ranges, list[int]]] = []  # pages, and the checksum of each
        self._lock = Lock()

    def finish(self, reads: Ranges, checksums: list[int]) -> bool:
        """Record that some reads are complete; whether they were the last."""
        with self._lock:
            self._done.append((reads, checksums))
            self._left -= len(reads)
            return not self._left

    def pages_and_checksums(self) -> tuple[Ids, list[int]]:
        """Return the numbers of all pages, ascending, and their checksums."""
        self._done.sort(key=lambda done: int(done[0][0, 0]))
        pages = members(np.concatenate([reads for reads, _ in self._done]))
        return pages, [checksum for _, some in self._done for checksum in some]


def _reads_of_a_job(left: int) -> int:
    """Return how many of the reads that are left a thread takes: fewer when few are."""
    return min(max(left // JOBS_LEFT, 1), JOB_READS)


def _held_back(pieces: Iterable[tuple[bytes, int]]) -> Iterator[list[tuple[bytes, int]]]:
    """Yield pieces together, once there are enough of them to be written, and at the end."""
    held: list[tuple[bytes, int]] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece[0])
        if size >= WRITTEN_AT_ONCE:
            yield held
            held, size = [], 0
    if held:
        yield held


def _once(log: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that logs each line once."""
    logged: set[str] = set()

    def log_once(line: str) -> None:
        if line not in logged:
            logged.add(line)
            log(line)

    return log_once


def _united(*some: Pages) -> Pages:
    numbers = {number for pages in some for number in pages}
    return {number: union(*(pages.get(number, NO_RANGES) for pages in some)) for number in numbers}


def _bytes(pages: Pages) -> int:
    return PAGE_SIZE * sum(map(total, pages.values()))
