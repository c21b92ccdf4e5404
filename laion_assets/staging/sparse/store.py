"""The sparse files of an index: brings what is needed to the disk, keeps it there, stays in the budget.

Two locks order the processes. The ledger is locked for moments: to see what is there, to take a lease, to
give pages up. Fetching is locked for as long as it lasts, so that what two requests need comes once. Who
waits for either holds no lease, so nobody waits for somebody who waits.
What must not live here: what the bytes mean.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np

from laion_assets.io.arrays import Ids
from laion_assets.io.errors import InputError
from laion_assets.io.progress import Progress
from laion_assets.io.ranges import NOTHING, Hold, Ranges, in_portions, runs, total, union
from laion_assets.staging.manifest import STAGE_AGAIN, Manifest
from laion_assets.staging.plan import SourceFile
from laion_assets.staging.sparse.budget import LongestIdle, last_uses, portions_to_give_up
from laion_assets.staging.sparse.leases import Lease, Others, Pages, leases_of_others
from laion_assets.staging.sparse.pages import PORTION, SparseFile
from laion_assets.staging.sparse.reads import GAP, PAGE, batches, pages_of, reads_for
from laion_assets.staging.transfer import locks
from laion_assets.staging.transfer.disk import TAKES_NO_MORE, bytes_held, cannot_write
from laion_assets.staging.transfer.errors import ChangedError
from laion_assets.staging.transfer.fetch import Fetcher, Tally
from laion_assets.staging.transfer.source import RangeReader, reader_of

DEFAULT_BUDGET = 100 * 10**9  # bytes
THREADS = 64  # 2,000 reads a second at 30 ms each
SPARE = 0.05  # of the budget is given up beyond what is needed: to look for idle pages takes a while
PAUSE = 0.5  # seconds between looks whether others are done


class SparseFiles:
    """The sparse files of a staged index, for one reader; a `Disk`.

    Args:
        cache: the directory that they are in, which nobody stages to meanwhile.
        manifest: of it.
        budget: bytes that they may take together.
        log: takes lines about the progress.
        clock: tells seconds since 1970.

    Attributes:
        tally: what reading from the source took so far.

    """

    whole = False

    def __init__(
        self,
        cache: Path,
        manifest: Manifest,
        budget: int,
        log: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cache = cache
        self._manifest = manifest
        self._budget = budget
        self._log = log
        self._clock = clock
        self.tally = Tally()
        staged = [file for file in manifest.files if file.sparse]
        self._reader, self._sources = reader_of(staged)
        self._files = [SparseFile(cache / file.path, file.size) for file in staged]
        # Where a read may be of another version than was listed, no page that is marked is written again.
        self._gap = GAP if self._reader.pins else 0
        self._numbers = {file.path: number for number, file in enumerate(self._files)}

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    @contextmanager
    def hold(self) -> Iterator[Hold]:
        """Begin a block in which some ranges are needed; they are held until it ends."""
        lease = Lease(self._cache)
        try:
            yield _Hold(self, lease)
        finally:
            lease.drop()

    def pages_needed(self, ranges: Mapping[Path, Ranges]) -> dict[int, Ranges]:
        """The pages of ranges, by the number of their file; other files are whole, and need nothing."""
        known = {path: some for path, some in ranges.items() if path in self._numbers}
        return {self._numbers[path]: pages_of(some) for path, some in known.items()}

    def bring(self, pages: Pages, lease: Lease) -> None:
        """See that pages are on the disk, and hold them from now on.

        Raises:
            InputError: they do not fit into the budget, or cannot be had.

        """
        try:
            if self._take_if_all_there(pages, lease):
                return
            lease.drop()  # while it waits, it holds nothing
            with locks.fetching(self._cache, self._log):
                reads = self._make_room(pages, lease)
                if reads:  # or another request has fetched them meanwhile
                    self._fetch(reads)
        except OSError as error:
            if error.errno not in {*TAKES_NO_MORE, errno.EACCES}:
                raise
            raise cannot_write(self._cache, error) from error
        if self._absent(pages):
            raise AssertionError("pages that were fetched are not marked")

    def _take_if_all_there(self, pages: Pages, lease: Lease) -> bool:
        with locks.ledger(self._cache):
            if self._absent(pages):
                return False
            self._take(pages, lease)
            return True

    def _absent(self, pages: Pages) -> dict[int, Ids]:
        absent = {number: self._files[number].absent(some) for number, some in pages.items()}
        return {number: some for number, some in absent.items() if len(some)}

    def _take(self, pages: Pages, lease: Lease) -> None:
        lease.take(pages)
        for number, some in pages.items():
            self._files[number].touch(some, self._now())

    def _now(self) -> int:
        return max(int(self._clock()), 1)

    # --- room -------------------------------------------------------------------------------------

    def _make_room(self, pages: Pages, lease: Lease) -> Pages:
        """Take a lease on pages once they fit; returns what has to be read, in pages.

        Raises:
            InputError: they are more than may be there at all.

        """
        waited = False
        while True:
            with locks.ledger(self._cache):
                others = leases_of_others(self._cache)
                for number, some in others.left.items():
                    self._files[number].give_up_unmarked(some)
                for ended in others.ended:
                    ended.unlink(missing_ok=True)
                reads = {n: reads_for(some, self._gap) for n, some in self._absent(pages).items()}
                wanted = {n: union(some, reads.get(n, NOTHING)) for n, some in pages.items()}
                if self._fits(wanted, reads, others, lease):
                    self._take(wanted, lease)
                    return reads
            if not waited:
                self._log(f"waiting until other requests need less of {self._cache}")
                waited = True
            time.sleep(PAUSE)

    def _fits(self, wanted: Pages, reads: Pages, others: Others, lease: Lease) -> bool:
        """Give up what is idle if need be; false where room has to be waited for."""
        taken = sum(bytes_held(file.path) for file in self._files)
        free = shutil.disk_usage(self._cache).free
        limit = min(self._budget, taken + free)
        needed = PAGE * sum(map(total, wanted.values()))
        if needed > limit:
            raise InputError(self._too_much(needed, limit))
        excess = taken + PAGE * sum(map(total, reads.values())) - limit
        if excess <= 0:
            return True
        freed = self._give_up(excess, lease, wanted, others.pages)
        if freed < excess and not others.leases:
            self._give_up_leftovers()
        return freed >= excess or not others.leases

    def _give_up_leftovers(self) -> None:
        """Give back what was written and never marked, as by a request that a power cut ended.

        No map tells of it, but it takes room; nobody fetches meanwhile, so none of it is under way.
        """
        for file in self._files:
            for some in in_portions(np.array([[0, file.pages]]), PORTION):
                file.give_up_unmarked(some)

    def _too_much(self, needed: int, limit: int) -> str:
        told = f"this request needs {needed:,} bytes of the index at once, "
        less = "ask for fewer images or set a lower nprobe"
        if limit == self._budget:
            return f"{told}LAION_SPARSE_BUDGET allows {limit:,}: raise it, or {less}"
        return f"{told}{self._cache} has room for {limit:,}: free some space, or {less}"

    def _give_up(self, excess: int, lease: Lease, *kept: Pages) -> int:
        """Give up the pages that were idle for longest, some more than need be; returns bytes."""
        keep = [
            union(*(some.get(number, NOTHING) for some in kept)) for number in range(len(self._files))
        ]
        files = list(zip(self._files, keep, strict=True))
        counts = last_uses(stamps for file, held in files for _, stamps in file.idle(held))
        longest_idle = LongestIdle(counts, int(excess + SPARE * self._budget) // PAGE + 1)
        going = {
            number: union(*map(runs, portions_to_give_up(file.idle(held), longest_idle)))
            for number, (file, held) in enumerate(files)
        }
        lease.take(going)  # so that the next one finishes it if this process dies in the middle
        for number, pages in going.items():
            self._files[number].give_up(pages)
        lease.drop()
        freed = PAGE * sum(map(total, going.values()))
        if freed:
            self._log(f"gave up {freed:,} bytes of the index that had been idle for longest")
        return freed

    # --- fetching ---------------------------------------------------------------------------------

    def _fetch(self, reads: Pages) -> None:
        """Read pages from the source, write them, make them durable, and mark them."""
        started, before = time.monotonic(), replace(self.tally)
        threads = min(THREADS, sum(map(len, reads.values())))
        fetcher = Fetcher(self._reader, threads, self._log, self.tally)
        size = PAGE * sum(map(total, reads.values()))

        def read(job: tuple[_Batch, int, int]) -> None:
            batch, start, stop = job
            for data, at in fetcher.pieces(batch.source, start, stop):
                batch.file.write(data, at)
                progress.advance(len(data))
            batch.done(self._now())

        try:
            with Progress("fetching", size, "B", fetcher.say) as progress:
                fetcher.run(self._jobs(reads), read)
        except BaseException as error:
            for number, some in reads.items():
                self._files[number].give_up_unmarked(some)
            if isinstance(error, ChangedError):
                raise self._changed(error) from error
            raise
        for number in reads:
            self._files[number].sync_marks()
        self._log(
            f"fetched {self.tally.fetched - before.fetched:,} bytes of the index in "
            f"{self.tally.reads - before.reads:,} reads and {time.monotonic() - started:.1f} s"
        )

    def _jobs(self, reads: Pages) -> Iterator[tuple[_Batch, int, int]]:
        for number, ranges in reads.items():
            file = self._files[number]
            for some in batches(ranges):
                batch = _Batch(file, self._sources[number], self._reader, some)
                for first, beyond in some.tolist():
                    yield batch, first * PAGE, min(beyond * PAGE, file.size)

    def _changed(self, changed: ChangedError) -> InputError:
        """Let nobody open what is there any more, for the source has another index."""
        replace(self._manifest, complete=False).write(self._cache)
        return InputError(
            f"{changed.file.url} is no longer what was staged ({changed}): {STAGE_AGAIN}, then what "
            "needs it"
        )


class _Hold:
    """What one block needs, more and more."""

    def __init__(self, store: SparseFiles, lease: Lease) -> None:
        self._store = store
        self._lease = lease
        self._pages: dict[int, Ranges] = {}

    def need(self, ranges: Mapping[Path, Ranges]) -> None:
        """See that ranges are on the disk, besides those that were needed before."""
        for number, pages in self._store.pages_needed(ranges).items():
            self._pages[number] = union(self._pages.get(number, NOTHING), pages)
        self._store.bring(self._pages, self._lease)


class _Batch:
    """Reads of a file that are made durable and marked together, once all of them are done."""

    def __init__(self, file: SparseFile, source: SourceFile, reader: RangeReader, pages: Ranges) -> None:
        self.file = file
        self.source = source
        self._reader = reader
        self._pages = pages
        self._left = len(pages)
        self._lock = Lock()

    def done(self, now: int) -> None:
        """Count one read as done."""
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self._reader.check(self.source)
        self.file.mark(union(self._pages), now)
