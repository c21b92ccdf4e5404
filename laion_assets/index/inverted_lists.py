"""Locate each inverted list in the file of on-disk lists."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from laion_assets.io.arrays import Ids
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import in_threads, slices, thread_count
from laion_assets.io.ranges import Ranges, ranges_of, read_ahead, union

ID_SIZE = 8  # bytes of an id in a list
SIZE_T_OF_A_LIST = 3  # faiss's OnDiskOneList: size, capacity, offset
QUERIES_AT_ONCE = 16
BYTES_AT_ONCE = 64 << 20  # of lists, unless one query alone probes more
WORTH_READING_AHEAD = (
    8 << 20
)  # bytes of lists for each query; the kernel's own readahead is enough for less
MOST_AHEAD = 2 << 30  # bytes of lists that are read before they are searched
THREADS_OF_FAISS = 32  # its default, that read the lists of a search ahead
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True)
class InvertedLists:
    """The location of each list in the file. A list holds all its codes, then all its ids.

    Attributes:
        path: the file.
        offset: (lists,) first byte of each list.
        capacity: (lists,) number of rows that each list has room for.
        size: (lists,) number of rows in each list.
        code_size: size of a code in bytes.

    """

    path: Path
    offset: Ids
    capacity: Ids
    size: Ids
    code_size: int

    @classmethod
    def read(cls, ivf: Any, path: Path) -> InvertedLists | None:
        """Read the locations from an IVF index; None if its lists are not on disk."""
        stored = faiss.downcast_InvertedLists(ivf.invlists)
        if not isinstance(stored, faiss.OnDiskInvertedLists):
            return None
        size, capacity, offset = _table(stored, ivf.nlist).T
        # A list without capacity has an arbitrary offset.
        return cls(path, np.where(capacity > 0, offset, 0), capacity, size, stored.code_size)

    def check(self, rows: int) -> None:
        """Check that the table can be right and the file is long enough.

        A read where a wrong table leads, or past the end, would kill the process.

        Args:
            rows: rows of the index.

        Raises:
            InputError: the table contradicts itself, or the file is too short.

        """
        has_room, largest = self.capacity > 0, np.iinfo(np.int64).max // 4
        possible = (self.size >= 0) & (self.size <= self.capacity) & (self.offset >= 0)
        possible &= self.capacity <= (largest - self.offset) // (self.code_size + ID_SIZE)
        if not possible.all() or self.size.sum() != rows:
            raise InputError(
                f"the table of the inverted lists in {self.path} is damaged: it does not describe "
                f"{rows:,} rows; stage the index again, and if that does not help, replace the index at "
                "the source",
                "staged_index",
            )
        ends = (self.offset + self.capacity * (self.code_size + ID_SIZE))[has_room]
        size, needed = self.path.stat().st_size, int(ends.max(initial=0))
        if size < needed:
            raise InputError(
                f"{self.path} is truncated: it has {size:,} bytes, its inverted lists need {needed:,}; "
                "stage the index again, and if that does not help, replace the file at the source",
                "staged_index",
            )

    def ranges(self, numbers: Ids, rows: Ids | int | None = None) -> Ranges:
        """Return the byte ranges of some lists.

        Args:
            numbers: (n,) numbers of the lists.
            rows: number of rows from the beginning of each list; None takes all.

        """
        codes, size = self.offset[numbers], self.size[numbers]
        wanted = size if rows is None else np.minimum(size, rows)
        ids = codes + self.capacity[numbers] * self.code_size
        return union(
            ranges_of(codes, codes + wanted * self.code_size), ranges_of(ids, ids + wanted * ID_SIZE)
        )

    def are_long(self, nprobe: int) -> bool:
        """Return whether the lists of a query are worth reading ahead and sharing between threads.

        It depends on nprobe alone: heaps break ties otherwise than rounds, and the rows of a query must
        not depend on the others.
        """
        of_a_list = float(self.size.mean()) * (self.code_size + ID_SIZE)
        return nprobe * of_a_list >= WORTH_READING_AHEAD

    def visit_short(self, ivf: Any, search: Callable[[slice], None], lists: Ids) -> None:
        """Search lists in threads, each a few queries at a time.

        Args:
            ivf: the index.
            search: searches the lists of a slice of the queries.
            lists: (q, nprobe) the lists of each query, the nearest first; -1 for none.

        """
        prepare(ivf, threads=THREADS_OF_FAISS, all_ahead=False)
        in_threads(search, slices(len(lists), QUERIES_AT_ONCE))

    def visit_long(self, ivf: Any, search: Callable[[slice], None], lists: Ids) -> None:
        """Search lists in threads, a few queries at a time, while those that follow are read ahead.

        Few queries are searched in turn, and all threads share the lists of each.

        Args:
            ivf: the index.
            search: searches the lists of a slice of the queries.
            lists: (q, nprobe) the lists of each query, the nearest first; -1 for none.

        """
        of_query = self._bytes_of(lists).sum(axis=1)
        # faiss's own threads lock each list that they read: queries that share lists wait for each other.
        prepare(ivf, threads=0, all_ahead=of_query.max(initial=0) <= MOST_AHEAD)
        a_query = int(of_query.sum()) // max(len(lists), 1)
        at_once = max(1, min(QUERIES_AT_ONCE, BYTES_AT_ONCE // max(a_query, 1)))
        batches = slices(len(lists), at_once)
        threads = thread_count()
        with ThreadPoolExecutor(1, "read-ahead") as reader:
            reads = [reader.submit(self._read_ahead, lists[batch]) for batch in batches[:threads]]

            def read_and_search(number: int) -> None:
                for batch in batches[number + threads : number + threads + 1]:
                    reads.append(reader.submit(self._read_ahead, lists[batch]))
                search(batches[number])

            if len(batches) < threads:
                for number in range(len(batches)):
                    read_and_search(number)
            else:
                in_threads(read_and_search, range(len(batches)))
        for read in reads:
            read.result()

    def _read_ahead(self, lists: Ids) -> None:
        """Let the kernel begin to read the lists of some queries; the farthest wait if they are many."""
        nearest_first = lists.T.ravel()
        _, first = np.unique(nearest_first, return_index=True)
        numbers = nearest_first[np.sort(first)]
        self.read_ahead(numbers[numbers >= 0])

    def read_ahead(self, numbers: Ids) -> None:
        """Let the kernel begin to read lists, as many of the first as are worth it."""
        read_ahead(self.path, self.ranges(numbers[np.cumsum(self._bytes_of(numbers)) <= MOST_AHEAD]))

    def all_fit_ahead(self, numbers: Ids) -> bool:
        """Return whether `read_ahead` reads all of some lists."""
        return int(self._bytes_of(numbers).sum()) <= MOST_AHEAD

    def _bytes_of(self, lists: Ids) -> Ids:
        return np.where(lists >= 0, self.size[lists], 0) * (self.code_size + ID_SIZE)


def prepare(ivf: Any, *, threads: int, all_ahead: bool) -> None:
    """Choose how the mapped lists are read, until the next call.

    Args:
        ivf: an index whose lists are on the disk.
        threads: threads of faiss that read the lists of a search ahead.
        all_ahead: whether we read all of them ahead. The kernel then reads nothing around a page that is
            missing: on some disks that is megabytes, mostly of other lists.

    Raises:
        OSError: the kernel refuses.

    """
    stored = faiss.downcast_InvertedLists(ivf.invlists)
    stored.prefetch_nthread = threads
    advice = mmap.MADV_RANDOM if all_ahead else mmap.MADV_NORMAL
    if stored.totsize and _madvise(int(stored.ptr), stored.totsize, advice):
        raise OSError(ctypes.get_errno(), "the lists of the index cannot be read at random")


def _table(stored: Any, lists: int) -> Ids:
    """Copy faiss's table of the lists, (lists, 3), at once: a call per list takes half a second."""
    if not lists:
        return np.empty((0, SIZE_T_OF_A_LIST), np.int64)
    memory = (ctypes.c_int64 * (SIZE_T_OF_A_LIST * lists)).from_address(int(stored.lists.data().this))
    table: Ids = np.ctypeslib.as_array(memory).reshape(lists, SIZE_T_OF_A_LIST).copy()
    return table
