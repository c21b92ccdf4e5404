"""A sparse file and its page map: which pages hold data, and when each was last used.

The map is a file of one number for each page, the second of its last use, or 0 where there is no data,
after a head that names the content that the pages are of. Two orders make it right after any crash: data
is durable before its pages are marked, and marks are gone, durably, before data is.
What must not live here: which pages to fetch or to give up.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laion_assets.io.arrays import Ids
from laion_assets.io.errors import InputError
from laion_assets.io.ranges import NOTHING, Ranges, in_portions, members, runs
from laion_assets.staging.sparse.reads import PAGE
from laion_assets.staging.transfer.disk import sync_folder

PAGE_MAP = ".pages"
HEAD = 4096  # bytes
PORTION = 1 << 22  # pages looked at as one, so that memory stays small
KEEP_SIZE, PUNCH_HOLE = 1, 2  # of Linux' fallocate

Stamps = NDArray[np.uint32]


def map_of(path: Path) -> Path:
    """Return where the page map of a file is."""
    return path.with_name(f"{path.name}{PAGE_MAP}")


def lay_out(path: Path, size: int, content: str) -> None:
    """Make an empty sparse file of a size, durably; killed at any point, it does not count as laid out.

    Args:
        path: of the file; what is there goes.
        size: bytes it seems to have.
        content: tells the content from any other that the file may have had.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    map_of(path).unlink(missing_ok=True)
    sync_folder(path.parent)
    with path.open("wb") as file:
        file.truncate(size)
        os.fsync(file.fileno())
    new = path.with_name(f"{map_of(path).name}.new")
    with new.open("wb") as file:
        # All of it, for it is written to in memory, and a disk that is full then kills the process.
        os.posix_fallocate(file.fileno(), 0, HEAD + 4 * _pages(size))
        file.write(_head(size, content))
        file.flush()
        os.fsync(file.fileno())
    new.replace(map_of(path))
    sync_folder(path.parent)


def is_laid_out(path: Path, size: int, content: str) -> bool:
    """Tell whether a file is laid out for this content."""
    try:
        with map_of(path).open("rb") as file:
            whole = os.fstat(file.fileno()).st_size == HEAD + 4 * _pages(size)
            return whole and file.read(HEAD) == _head(size, content)
    except FileNotFoundError:
        return False


class SparseFile:
    """A laid-out file, open; several processes may have it open.

    Args:
        path: of the file.
        size: bytes it seems to have.

    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.pages = _pages(size)

    @cached_property
    def _file(self) -> int:
        return os.open(self.path, os.O_RDWR)

    @cached_property
    def _map(self) -> int:
        return os.open(map_of(self.path), os.O_RDWR)

    @cached_property
    def _stamps(self) -> Stamps:
        return np.memmap(map_of(self.path), np.uint32, "r+", HEAD, (self.pages,))

    def close(self) -> None:
        """Close what is open."""
        for name in ("_file", "_map"):
            if name in self.__dict__:
                os.close(self.__dict__.pop(name))
        self.__dict__.pop("_stamps", None)

    def write(self, data: bytes, at: int) -> None:
        """Write bytes at an offset."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, at)
            view, at = view[written:], at + written

    def mark(self, pages: Ranges, now: int) -> None:
        """Make what was written durable, then say that it is there."""
        os.fdatasync(self._file)
        for some in in_portions(pages, PORTION):
            self._stamps[members(some)] = now

    def sync_marks(self) -> None:
        """Make marks survive a power cut; without this nothing wrong is read, but some fetched again."""
        os.fsync(self._map)

    def absent(self, pages: Ranges) -> Ids:
        """Which of some pages hold no data, ascending."""
        numbers = (members(some) for some in in_portions(pages, PORTION))
        return np.concatenate([NOTHING[:, 0], *(some[self._stamps[some] == 0] for some in numbers)])

    def touch(self, pages: Ranges, now: int) -> None:
        """Note that those of some pages that hold data are used now."""
        for some in in_portions(pages, PORTION):
            numbers = members(some)
            self._stamps[numbers[self._stamps[numbers] > 0]] = now

    def idle(self, held: Ranges) -> Iterator[tuple[int, Stamps]]:
        """Go through the map: the number of the first page of each portion and when the pages were used.

        Args:
            held: pages to be told as if they held no data.

        """
        for first in range(0, self.pages, PORTION):
            stamps = np.array(self._stamps[first : first + PORTION])
            if not stamps.any():
                continue
            here = (held - first).clip(0, len(stamps))
            stamps[members(here[here[:, 1] > here[:, 0]])] = 0
            yield first, stamps

    def give_up(self, pages: Ranges) -> None:
        """Give pages back to the disk: first nobody believes in them any more, then they go."""
        if not len(pages):
            return
        for some in in_portions(pages, PORTION):
            self._stamps[members(some)] = 0
        os.fsync(self._map)
        for first, beyond in pages:
            _punch(self._file, int(first) * PAGE, int(beyond - first) * PAGE, self.path)

    def give_up_unmarked(self, pages: Ranges) -> None:
        """Give back what was written to pages but never marked; while nobody fetches."""
        self.give_up(runs(self.absent(pages)))


def _pages(size: int) -> int:
    return -(-size // PAGE)


def _head(size: int, content: str) -> bytes:
    told = json.dumps({"page": PAGE, "size": size, "content": content}) + "\n"
    return told.encode().ljust(HEAD, b"\0")


def _punch(file: int, start: int, length: int, path: Path) -> None:
    """Give a part of a file back to the disk; it reads as zeros then."""
    number = _fallocate(file, PUNCH_HOLE | KEEP_SIZE, start, length)
    if number == errno.EOPNOTSUPP:
        raise InputError(
            f"the file system of {path} cannot give back parts of a file: set LAION_CACHE_DIR to a "
            "folder on ext4, XFS or tmpfs"
        )
    if number:
        raise OSError(number, os.strerror(number), str(path))


def _fallocate(file: int, mode: int, start: int, length: int) -> int:
    """Linux' own call, which Python does not offer; returns the number of the error, 0 for none."""
    return ctypes.get_errno() if _libc_fallocate()(file, mode, start, length) else 0


@cache
def _libc_fallocate() -> Any:
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return call
