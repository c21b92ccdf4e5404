"""The sparse files of an index: fetches the pages that requests need, and evicts others.

Two locks order the processes. The ledger is locked briefly: to see which pages are present, to take a
lease, to evict. Fetching is locked while it lasts, so pages that two requests need are fetched once. A
process that waits for either lock holds no lease, so there is no deadlock.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np

from laion_assets.io.arrays import Ids
from laion_assets.io.errors import InputError
from laion_assets.io.progress import Progress
from laion_assets.io.ranges import NO_RANGES, Hold, Ranges, batched, runs, total, union
from laion_assets.staging.sparse.budget import LeastRecentlyUsed, count_last_uses, pages_to_evict
from laion_assets.staging.sparse.leases import Lease, OtherLeases, Pages, read_leases
from laion_assets.staging.sparse.pages import MAP_BLOCK, SparseFile
from laion_assets.staging.sparse.reads import MERGE_GAP, PAGE_SIZE, pages_of, read_batches, reads_for
from laion_assets.staging.transfer import locks
from laion_assets.staging.transfer.disk import DISK_FULL_ERRORS, allocated_bytes, cannot_write
from laion_assets.staging.transfer.fetch import Fetcher, TransferStats
from laion_assets.staging.transfer.files import SourceFile
from laion_assets.staging.transfer.range_readers import ChangedError, RangeReader

READ_THREADS = 64  # 2,000 reads a second at 30 ms each
EVICTION_MARGIN = 0.05  # of the budget, evicted beyond what is needed, since scanning the maps takes time
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
        self._files = [SparseFile(cache / file.name, file.size) for file in files]
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
        """Ensure that pages are on the disk, and hold them.

        Raises:
            InputError: they exceed the budget, or cannot be fetched or written.

        """
        try:
            if self._hold_if_present(pages, lease):
                return
            lease.release()  # a process that waits holds nothing
            with locks.fetching(self._cache, self._log):
                reads = self._make_room(pages, lease)
                if reads:  # or another request has fetched them meanwhile
                    self._fetch(reads)
        except OSError as error:
            if error.errno not in {*DISK_FULL_ERRORS, errno.EACCES}:
                raise
            raise cannot_write(self._cache, error) from error
        if self._missing(pages):
            raise AssertionError("pages that were fetched are not marked")

    def _hold_if_present(self, pages: Pages, lease: Lease) -> bool:
        with locks.ledger(self._cache):
            if self._missing(pages):
                return False
            self._hold(pages, lease)
            return True

    def _missing(self, pages: Pages) -> dict[int, Ids]:
        missing = {number: self._files[number].missing(some) for number, some in pages.items()}
        return {number: some for number, some in missing.items() if len(some)}

    def _hold(self, pages: Pages, lease: Lease) -> None:
        lease.hold(pages)
        for number, some in pages.items():
            self._files[number].touch(some, self._now())

    def _now(self) -> int:
        return max(int(self._clock()), 1)

    # --- room -------------------------------------------------------------------------------------

    def _make_room(self, pages: Pages, lease: Lease) -> Pages:
        """Hold pages once they fit into the budget, and return the pages to read.

        Raises:
            InputError: they exceed the budget or the disk.

        """
        waiting = False
        while True:
            with locks.ledger(self._cache):
                others = read_leases(self._cache)
                self._clean_up(others)
                reads = {n: reads_for(some, self._gap) for n, some in self._missing(pages).items()}
                wanted = {n: union(some, reads.get(n, NO_RANGES)) for n, some in pages.items()}
                if self._fits(wanted, reads, others, lease):
                    self._hold(wanted, lease)
                    return reads
            if not waiting:
                self._log(f"waiting for other requests to release pages of {self._cache}")
                waiting = True
            time.sleep(POLL_INTERVAL)

    def _clean_up(self, others: OtherLeases) -> None:
        """Free what dead processes wrote and did not mark."""
        for number, pages in others.abandoned.items():
            self._files[number].evict_unmarked(pages)
        for path in others.dead:
            path.unlink(missing_ok=True)

    def _fits(self, wanted: Pages, reads: Pages, others: OtherLeases, lease: Lease) -> bool:
        """Evict pages if necessary; False if other requests have to release pages first."""
        used = sum(allocated_bytes(file.path) for file in self._files)
        free = shutil.disk_usage(self._cache).free
        limit = min(self._budget, used + free)
        needed = PAGE_SIZE * sum(map(total, wanted.values()))
        if needed > limit:
            raise self._too_much(needed, limit)
        excess = used + PAGE_SIZE * sum(map(total, reads.values())) - limit
        if excess <= 0:
            return True
        freed = self._evict(excess, lease, wanted, others.held)
        if freed < excess and not others.running:
            self._evict_all_unmarked()
        return freed >= excess or not others.running

    def _evict_all_unmarked(self) -> None:
        """Free everything that was written but never marked, such as by a request cut off by a power cut.

        No map counts it, but it occupies the disk. Nobody else fetches, so none of it is in progress.
        """
        for file in self._files:
            for some in batched(np.array([[0, file.pages]]), MAP_BLOCK):
                file.evict_unmarked(some)

    def _too_much(self, needed: int, limit: int) -> InputError:
        what = f"this request needs {needed:,} bytes of the index at once"
        less = "request fewer results or a lower nprobe"
        if limit == self._budget:
            return InputError(f"{what}, the budget is {limit:,}: raise it, or {less}", "sparse_budget")
        return InputError(
            f"{what}, {self._cache} has room for {limit:,}: free some space, or {less}", "cache_dir"
        )

    def _evict(self, excess: int, lease: Lease, *kept: Pages) -> int:
        """Evict the least recently used pages, plus a margin; returns bytes."""
        held = [
            union(*(pages.get(number, NO_RANGES) for pages in kept)) for number in range(len(self._files))
        ]
        files = list(zip(self._files, held, strict=True))
        counts = count_last_uses(stamps for file, some in files for _, stamps in file.evictable(some))
        lru = LeastRecentlyUsed(counts, int(excess + EVICTION_MARGIN * self._budget) // PAGE_SIZE + 1)
        evicted = {
            number: union(*map(runs, pages_to_evict(file.evictable(some), lru)))
            for number, (file, some) in enumerate(files)
        }
        lease.hold(evicted)  # if this process dies, the next one finishes the eviction
        for number, pages in evicted.items():
            self._files[number].evict(pages)
        lease.release()
        freed = PAGE_SIZE * sum(map(total, evicted.values()))
        if freed:
            self._log(f"evicted {freed:,} bytes of the index, the least recently used")
        return freed

    # --- fetching ---------------------------------------------------------------------------------

    def _fetch(self, reads: Pages) -> None:
        """Read pages from the source, write them, make them durable, and mark them."""
        started, before = time.monotonic(), replace(self.stats)
        threads = min(READ_THREADS, sum(map(len, reads.values())))
        fetcher = Fetcher(self._reader, threads, self._log, self.stats)
        size = PAGE_SIZE * sum(map(total, reads.values()))

        def read(job: tuple[_Batch, int, int]) -> None:
            batch, start, stop = job
            for data, at in fetcher.read(batch.source, start, stop):
                batch.file.write(data, at)
                progress.advance(len(data))
            batch.finish_read(self._now())

        try:
            with Progress("fetching", size, "B", fetcher.log) as progress:
                fetcher.run(self._jobs(reads), read)
        except BaseException as error:
            for number, some in reads.items():
                self._files[number].evict_unmarked(some)
            if isinstance(error, ChangedError):
                raise self._changed(error) from error
            raise
        for number in reads:
            self._files[number].sync_marks()
        self._log(
            f"fetched {self.stats.fetched - before.fetched:,} bytes of the index in "
            f"{self.stats.reads - before.reads:,} reads and {time.monotonic() - started:.1f} s"
        )

    def _jobs(self, reads: Pages) -> Iterator[tuple[_Batch, int, int]]:
        for number, ranges in reads.items():
            file = self._files[number]
            for some in read_batches(ranges):
                batch = _Batch(file, self._sources[number], self._reader, some)
                for first, stop in some.tolist():
                    yield batch, first * PAGE_SIZE, min(stop * PAGE_SIZE, file.size)

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

    def __init__(self, file: SparseFile, source: SourceFile, reader: RangeReader, pages: Ranges) -> None:
        self.file = file
        self.source = source
        self._reader = reader
        self._pages = pages
        self._left = len(pages)
        self._lock = Lock()

    def finish_read(self, now: int) -> None:
        """Record that one read is complete."""
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self._reader.check(self.source)
        self.file.mark(union(self._pages), now)
