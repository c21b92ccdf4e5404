"""A sparse file and its page map: which pages hold data, their checksums, and when each was last used.

The map is a log: a header that names the content of the file, then 12 bytes for each time that a page is
fetched, used or evicted. The last record of a page counts. So the map grows with the pages on the disk,
not with the size of the file, and to mark pages that lie apart is one short write.

Two orders keep the map right across crashes: data is durable before its pages are marked, and marks are
cleared, durably, before holes are punched. Disks also lose data, and files are copied and cut by hand, so
a page is compared with its checksum before a process first reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from laion_assets.io.arrays import Ids, Mask
from laion_assets.io.checksums import PartChecksums
from laion_assets.io.errors import InputError
from laion_assets.io.ranges import NO_RANGES, Ranges, WholeFiles, batched, members, outside, runs, split
from laion_assets.staging.sparse.reads import MAX_READ, PAGE_SIZE
from laion_assets.staging.transfer.disk import (
    allocated_bytes,
    fill_hole,
    punch_hole,
    sync_folder,
    write_at,
)

MAP_SUFFIX = ".pages"
NEW_SUFFIX = ".new"  # of a map that is being written
NO_CHECKSUM = 0  # of a page that holds no data
RECORD = np.dtype([("page", "<u4"), ("checksum", "<u4"), ("used", "<u4")])
RECORDS_AT_ONCE = 1 << 22  # that are read from a map
SPARE_RECORDS = 1 << 16  # outdated ones, besides as many as there are pages, before a map is rewritten
PAGES_AT_ONCE = 1 << 15  # that are read to compare them, 128 MiB
UNLISTED_SHARE, UNLISTED_BYTES = 0.02, 1 << 20  # that file systems may add to what a file holds

Records = NDArray[np.void]
Stamps = NDArray[np.uint32]  # seconds since 1970


def map_path(path: Path) -> Path:
    """Return the path of the page map of a file."""
    return path.with_name(f"{path.name}{MAP_SUFFIX}")


def allocate(path: Path, size: int, content: str) -> None:
    """Create an empty sparse file and its page map, durably.

    Killed at any point, the file does not count as allocated.

    Args:
        path: of the file; an existing one is replaced.
        size: bytes.
        content: identifies the content among all that the file may have had.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    map_path(path).unlink(missing_ok=True)
    sync_folder(path.parent)
    with path.open("wb") as file:
        file.truncate(size)
        os.fsync(file.fileno())
    _write_map(path, _map_header(path, size, content))


def is_allocated(path: Path, size: int, content: str) -> bool:
    """Whether a file has a page map for this size and content."""
    header = _map_header(path, size, content)
    with suppress(FileNotFoundError), map_path(path).open("rb") as file:
        return file.read(len(header)) == header
    return False


def leftover_maps(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Return the page maps in a folder that are not those of some files, and unfinished ones of any."""
    found = {*folder.rglob(f"*{MAP_SUFFIX}"), *folder.rglob(f"*{MAP_SUFFIX}{NEW_SUFFIX}")}
    return sorted(found - set(map(map_path, paths)))


def page_checksums(found: Iterable[int]) -> list[int]:
    """Return checksums as the map records them, in which 0 means that a page holds no data."""
    return [checksum or 1 for checksum in found]


def page_records(pages: Ids, checksums: Iterable[int], used: int) -> Records:
    """Return the records of pages.

    Args:
        pages: (n,) numbers.
        checksums: of each.
        used: second of their last use.

    """
    records = np.empty(len(pages), RECORD)
    records["page"], records["used"] = pages, used
    records["checksum"] = np.fromiter(checksums, np.uint32, len(pages))
    return records


class SparseFile:
    """An allocated file, open; several processes may have it open.

    Methods that read the map see it as of the last `refresh`. Those that change it refresh it first; they
    and `refresh` require the ledger lock.

    Args:
        path: of the file.
        size: bytes.
        content: what identified its content when it was allocated.

    Attributes:
        path: as given.
        size: as given.
        pages: number of pages.

    """

    def __init__(self, path: Path, size: int, content: str) -> None:
        self.path = path
        self.size = size
        self.pages = -(-size // PAGE_SIZE)
        self._header = _map_header(path, size, content)
        self._syncing = Lock()  # held while data becomes durable; writes then wait for the disk
        self._map = -1
        self._forget()

    def _forget(self) -> None:
        """Begin at the start of the map."""
        self._end = len(self._header)  # bytes of the map that were read
        self._present = np.empty(0, RECORD)  # by page
        self._compared = np.empty(0, np.bool_)  # whether each was compared with its checksum

    @cached_property
    def _file(self) -> int:
        return os.open(self.path, os.O_RDWR)

    def close(self) -> None:
        """Close what is open."""
        if "_file" in self.__dict__:
            os.close(self.__dict__.pop("_file"))
        self._close_map()

    # --- data -------------------------------------------------------------------------------------

    def write(self, data: bytes, at: int) -> None:
        """Write bytes at an offset."""
        fill_hole(self._file, data, at, self.path, wait=self._syncing.locked())

    def sync(self) -> None:
        """Make what was written durable."""
        with self._syncing:
            os.fdatasync(self._file)

    def free(self, pages: Ranges) -> None:
        """Make the map durable, then punch holes for pages that it no longer marks.

        Only while nobody else fetches: what lies between two of these pages, and is not marked either, is
        freed with them, since one hole takes as long as many.
        """
        if not len(pages):
            return
        self.sync_marks()
        marked_before, _ = self._find(pages[:, 0])
        first = np.flatnonzero(np.diff(marked_before, prepend=-1))
        last = np.append(first[1:], len(pages)) - 1
        holes = np.stack([pages[first, 0], pages[last, 1]], axis=1) * PAGE_SIZE
        for start, stop in holes.tolist():
            punch_hole(self._file, start, stop - start, self.path)

    def free_unmarked(self, pages: Ranges) -> None:
        """Free those pages that are not marked; only while nobody fetches."""
        self.free(runs(self.missing(pages)))

    def damaged(self, pages: Ranges) -> Ids:
        """Return those present pages whose bytes differ from their checksums, ascending.

        A page that was fetched by this object, or compared before, is not compared again.
        """
        wrong = [NO_RANGES[:, 0]]
        for some in batched(pages, PAGES_AT_ONCE):
            at, present = self._find(members(some))
            at = at[present]
            due = at[~self._compared[at]]
            equal = self._read_checksums(due) == self._present["checksum"][due]
            self._compared[due] = equal
            wrong.append(self._present["page"][due[~equal]].astype(np.int64))
        return np.concatenate(wrong)

    def _read_checksums(self, positions: Ids) -> Stamps:
        """Return the checksums of the bytes on the disk of present pages, by position."""
        reads = split(runs(self._present["page"][positions].astype(np.int64)), MAX_READ) * PAGE_SIZE
        WholeFiles().need({self.path: reads})  # all at a time: one by one, a cold disk takes minutes
        found: list[int] = []
        for start, stop in reads.tolist():
            pages = PartChecksums(PAGE_SIZE)
            pages.add(os.pread(self._file, stop - start, start))
            found += page_checksums(pages.finish())
        return np.array(found, np.uint32)

    # --- the map ----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read what other processes have recorded since.

        Raises:
            InputError: the file or its map was removed, cut or replaced while it is in use.

        """
        try:
            self._open_map()
            found = self.path.stat()
        except FileNotFoundError as error:
            raise _replaced(error.filename) from error
        opened = "_file" in self.__dict__
        if found.st_size != self.size or (opened and found.st_ino != os.fstat(self._file).st_ino):
            raise _replaced(self.path)
        while len(records := self._read_records()):
            self._apply(records)
            self._end += records.nbytes

    def _open_map(self) -> None:
        """Open the map, again if another process has rewritten it, or if it lost what was read."""
        path = map_path(self.path)
        if self._map >= 0:
            found = path.stat()
            if found.st_ino == os.fstat(self._map).st_ino and found.st_size >= self._end:
                return
            self._close_map()
        self._map = os.open(path, os.O_RDWR)
        self._forget()
        if os.pread(self._map, self._end, 0) != self._header:
            raise _replaced(path)

    def _close_map(self) -> None:
        if self._map >= 0:
            os.close(self._map)
            self._map = -1

    def _read_records(self) -> Records:
        read = os.pread(self._map, RECORDS_AT_ONCE * RECORD.itemsize, self._end)
        whole = len(read) // RECORD.itemsize  # a writer may have been killed within a record
        return np.frombuffer(read, RECORD, whole)

    def _apply(self, records: Records) -> None:
        """Apply records to what is present."""
        records = _last_of_each_page(records[records["page"] < self.pages])
        at, present = self._find(records["page"])
        old, new = at[present], records[present]
        self._compared[old] &= self._present["checksum"][old] == new["checksum"]
        self._present[old] = new
        gone = old[new["checksum"] == NO_CHECKSUM]
        if len(gone):
            self._present = np.delete(self._present, gone)
            self._compared = np.delete(self._compared, gone)
        added = records[~present]
        added = added[added["checksum"] != NO_CHECKSUM]
        if len(added):
            at, _ = self._find(added["page"])
            self._present = np.insert(self._present, at, added)
            self._compared = np.insert(self._compared, at, False)

    def _find(self, pages: Ids) -> tuple[Ids, Mask]:
        """Return where pages are, or belong, among those that are present, and which are."""
        at = np.searchsorted(self._present["page"], pages.astype(np.uint32))  # else all are converted
        present = np.zeros(len(at), np.bool_)
        inside = at < len(self._present)
        present[inside] = self._present["page"][at[inside]] == pages[inside]
        return at, present

    def _record(self, records: Records) -> None:
        """Add records to the map."""
        if not len(records):
            return
        write_at(self._map, records.tobytes(), self._end)
        self._end += records.nbytes
        self._apply(records)
        if self._end > RECORD.itemsize * (2 * len(self._present) + SPARE_RECORDS):
            self._rewrite()

    def _rewrite(self) -> None:
        """Replace the map by one without outdated records."""
        present, compared = self._present, self._compared
        _write_map(self.path, self._header + present.tobytes())
        self._open_map()
        self._end += present.nbytes
        self._present, self._compared = present, compared

    def mark(self, records: Records) -> None:
        """Mark pages as present, whose data is durable."""
        self.refresh()
        self._record(records)
        self._compared[self._find(records["page"])[0]] = True

    def unmark(self, pages: Ranges) -> None:
        """Mark pages as not present; to be followed by `free`."""
        self.refresh()
        numbers = members(pages)
        numbers = numbers[self._find(numbers)[1]]
        self._record(page_records(numbers, np.full(len(numbers), NO_CHECKSUM), used=0))

    def touch(self, pages: Ranges, now: int) -> None:
        """Record that pages are used now, as far as they hold data."""
        self.refresh()
        for some in batched(pages, RECORDS_AT_ONCE):
            at, present = self._find(members(some))
            records = self._present[at[present]]
            records = records[records["used"] < now]
            records["used"] = now
            self._record(records)

    def sync_marks(self) -> None:
        """Make marks durable. Without it a power cut loses marks, and their pages are fetched again."""
        os.fsync(self._map)

    def missing(self, pages: Ranges) -> Ids:
        """Return the numbers of those pages that hold no data, ascending."""
        numbers = (members(some) for some in batched(pages, RECORDS_AT_ONCE))
        return np.concatenate([NO_RANGES[:, 0], *(some[~self._find(some)[1]] for some in numbers)])

    def checksums(self, pages: Ids) -> Stamps:
        """Return the checksums in the map of present pages, by number."""
        return self._present["checksum"][self._find(pages)[0]]

    def present(self) -> Ranges:
        """Return the ranges of pages that hold data."""
        return runs(self._present["page"].astype(np.int64))

    def unmarked(self) -> Ranges:
        """Return the ranges of pages that hold no data."""
        edges = np.concatenate([[0], self.present().ravel(), [self.pages]]).reshape(-1, 2)
        return edges[edges[:, 0] < edges[:, 1]]

    def unlisted(self) -> int:
        """Return the bytes on the disk that the map does not list, beyond what file systems add."""
        held = allocated_bytes(self.path)
        more = held - PAGE_SIZE * len(self._present)
        return more if more > max(UNLISTED_SHARE * held, UNLISTED_BYTES) else 0

    def last_uses(self, kept: Ranges) -> tuple[Ids, Stamps]:
        """Return the numbers of all present pages except for some, ascending, and their last uses."""
        numbers = self._present["page"].astype(np.int64)
        others = outside(numbers, kept)
        return numbers[others], self._present["used"][others]


def _last_of_each_page(records: Records) -> Records:
    """Return the last record of each page, by page."""
    records = records[np.argsort(records["page"], kind="stable")]
    last: Records = records[np.diff(records["page"], append=-1) != 0]
    return last


def _replaced(path: Path | str) -> InputError:
    return InputError(
        f"{path} was removed, cut or replaced while it is in use: stage the index again", "staged_index"
    )


def _map_header(path: Path, size: int, content: str) -> bytes:
    header = {"file": path.name, "size": size, "content": content, "page": PAGE_SIZE}
    header |= {"record": RECORD.itemsize}
    return (json.dumps(header) + "\n").encode()


def _write_map(path: Path, content: bytes) -> None:
    """Replace a page map atomically and durably."""
    new = map_path(path).with_name(f"{map_path(path).name}{NEW_SUFFIX}")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(map_path(path))
    sync_folder(path.parent)
