"""A sparse file and its page map: which pages hold data, and when each was last used.

The map has a header that names the content of the file, then a number for each page: the second of its
last use, or 0 if it holds no data. Two orders keep the map right across crashes: data is durable before
its pages are marked, and marks are cleared, durably, before holes are punched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from laion_assets.io.arrays import Ids
from laion_assets.io.ranges import NO_RANGES, Ranges, batched, members, runs
from laion_assets.staging.sparse.reads import PAGE_SIZE
from laion_assets.staging.transfer.disk import punch_hole, sync_folder, write_at

MAP_SUFFIX = ".pages"
MAP_HEADER_SIZE = 4096  # bytes
MAP_BLOCK = 1 << 22  # pages of the map in memory at a time

Stamps = NDArray[np.uint32]


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
    new = path.with_name(f"{map_path(path).name}.new")
    with new.open("wb") as file:
        # Without holes, since the map is written through memory: a full disk would kill the process.
        os.posix_fallocate(file.fileno(), 0, MAP_HEADER_SIZE + 4 * _page_count(size))
        file.write(_map_header(size, content))
        file.flush()
        os.fsync(file.fileno())
    new.replace(map_path(path))
    sync_folder(path.parent)


def is_allocated(path: Path, size: int, content: str) -> bool:
    """Whether a file is allocated for this size and content."""
    try:
        with map_path(path).open("rb") as file:
            intact = os.fstat(file.fileno()).st_size == MAP_HEADER_SIZE + 4 * _page_count(size)
            return intact and file.read(MAP_HEADER_SIZE) == _map_header(size, content)
    except FileNotFoundError:
        return False


class SparseFile:
    """An allocated file, open; several processes may have it open.

    Args:
        path: of the file.
        size: bytes.

    Attributes:
        path: as given.
        size: as given.
        pages: number of pages.

    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.pages = _page_count(size)

    @cached_property
    def _file(self) -> int:
        return os.open(self.path, os.O_RDWR)

    @cached_property
    def _map(self) -> int:
        return os.open(map_path(self.path), os.O_RDWR)

    @cached_property
    def _stamps(self) -> Stamps:
        return np.memmap(map_path(self.path), np.uint32, "r+", MAP_HEADER_SIZE, (self.pages,))

    def close(self) -> None:
        """Close what is open."""
        for name in ("_file", "_map"):
            if name in self.__dict__:
                os.close(self.__dict__.pop(name))
        self.__dict__.pop("_stamps", None)

    def write(self, data: bytes, at: int) -> None:
        """Write bytes at an offset."""
        write_at(self._file, data, at)

    def mark(self, pages: Ranges, now: int) -> None:
        """Make the data of pages durable, then mark them as present."""
        os.fdatasync(self._file)
        for some in batched(pages, MAP_BLOCK):
            self._stamps[members(some)] = now

    def sync_marks(self) -> None:
        """Make marks durable. Without it a power cut loses marks, and their pages are fetched again."""
        os.fsync(self._map)

    def missing(self, pages: Ranges) -> Ids:
        """Return the numbers of those pages that hold no data, ascending."""
        numbers = (members(some) for some in batched(pages, MAP_BLOCK))
        return np.concatenate([NO_RANGES[:, 0], *(some[self._stamps[some] == 0] for some in numbers)])

    def touch(self, pages: Ranges, now: int) -> None:
        """Record that pages are used now, as far as they hold data."""
        for some in batched(pages, MAP_BLOCK):
            numbers = members(some)
            self._stamps[numbers[self._stamps[numbers] > 0]] = now

    def evictable(self, held: Ranges) -> Iterator[tuple[int, Stamps]]:
        """Yield the last uses of all pages that may be evicted, block by block.

        Args:
            held: pages that may not; they are reported as holding no data.

        Yields:
            The number of the first page of a block, and (n,) last uses of its pages.

        """
        for first in range(0, self.pages, MAP_BLOCK):
            stamps = np.array(self._stamps[first : first + MAP_BLOCK])
            if not stamps.any():
                continue
            here = (held - first).clip(0, len(stamps))
            stamps[members(here[here[:, 1] > here[:, 0]])] = 0
            yield first, stamps

    def evict(self, pages: Ranges) -> None:
        """Clear marks durably, then punch holes."""
        if not len(pages):
            return
        for some in batched(pages, MAP_BLOCK):
            self._stamps[members(some)] = 0
        os.fsync(self._map)
        for first, stop in pages:
            punch_hole(self._file, int(first) * PAGE_SIZE, int(stop - first) * PAGE_SIZE, self.path)

    def evict_unmarked(self, pages: Ranges) -> None:
        """Free pages that were written but never marked; only while nobody fetches."""
        self.evict(runs(self.missing(pages)))


def _page_count(size: int) -> int:
    return -(-size // PAGE_SIZE)


def _map_header(size: int, content: str) -> bytes:
    header = json.dumps({"page": PAGE_SIZE, "size": size, "content": content}) + "\n"
    return header.encode().ljust(MAP_HEADER_SIZE, b"\0")
