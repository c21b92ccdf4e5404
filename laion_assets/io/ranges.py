"""Byte ranges of a file, and the interface through which readers declare what they read.

Ranges are an (n, 2) int64 array of starts and stops, in ascending order. No range is empty, and no two
overlap or touch. Search and metadata declare ranges before they read them from a mapping: of incomplete
files they are fetched, of complete ones read ahead. What is read once is not declared, see `Disk.read`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from laion_assets.io.arrays import Ids, Mask

Ranges = Ids  # (n, 2)
NO_RANGES: Ranges = np.empty((0, 2), np.int64)
ADVISED_AT_ONCE = 128 << 10  # bytes; of a longer range Linux reads only the beginning


class Hold(Protocol):
    """Keeps ranges on the disk until a block ends."""

    def need(self, ranges: Mapping[Path, Ranges]) -> None:
        """Ensure that ranges are on the disk, and keep them there until the block ends.

        Args:
            ranges: bytes of each file, (n, 2).

        Raises:
            InputError: the ranges cannot be fetched.

        """


class Disk(Protocol):
    """The files of an index on the local disk.

    Attributes:
        whole: whether all files are complete on the disk.

    """

    whole: bool

    def hold(self) -> AbstractContextManager[Hold]:
        """Open a block in which ranges can be needed."""

    def read(self, path: Path, spans: Ids) -> list[bytes]:
        """Return spans of a file, which is not kept on the disk for them.

        Args:
            path: the file.
            spans: (n, 2) starts and stops within the file, which may be unordered, empty or overlapping.

        Raises:
            InputError: they cannot be fetched.

        """


class WholeFiles:
    """A disk that holds every byte of every file."""

    whole = True

    def hold(self) -> AbstractContextManager[Hold]:
        """Open a block in which ranges can be needed."""
        return nullcontext(self)

    def need(self, ranges: Mapping[Path, Ranges]) -> None:
        """Ask the kernel to read all ranges ahead, without waiting for it."""
        for path, some in ranges.items():
            read_ahead(path, some)

    def read(self, path: Path, spans: Ids) -> list[bytes]:
        """Read spans, not through a mapping: a fault takes longer than a read."""
        self.need({path: ranges_of(*spans.T)})
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return [os.pread(descriptor, stop - start, start) for start, stop in spans.tolist()]
        finally:
            os.close(descriptor)


def in_memory(path: Path, ranges: Ranges) -> bool:
    """Return whether the first byte of every range is in the page cache; false if nobody can tell."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for start in ranges[:, 0].tolist():
            os.preadv(descriptor, [bytearray(1)], start, os.RWF_NOWAIT)
    except OSError:  # it would have to wait, or the file system does not know
        return False
    finally:
        os.close(descriptor)
    return True


def read_ahead(path: Path, ranges: Ranges) -> None:
    """Ask the kernel to read ranges of a file ahead, without waiting for it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for start, stop in split(ranges, ADVISED_AT_ONCE).tolist():
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def ranges_of(starts: Ids, stops: Ids, gap: int = 0) -> Ranges:
    """Return the ranges that cover some spans, which may be unordered, empty or overlapping.

    Args:
        starts: (n,) int64.
        stops: (n,) int64, not below their starts.
        gap: ranges at most this far apart are merged.

    Returns:
        (m, 2) int64.

    """
    some = stops > starts
    starts, stops = starts[some], stops[some]
    if not len(starts):
        return NO_RANGES
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(stops[order])
    first = np.flatnonzero(np.concatenate([[True], starts[1:] > reach[:-1] + gap]))
    last = np.concatenate([first[1:], [len(starts)]]) - 1
    return np.stack([starts[first], reach[last]], axis=1)


def union(*some: Ranges, gap: int = 0) -> Ranges:
    """Return the union of ranges, merging those at most `gap` apart."""
    every = np.concatenate([NO_RANGES, *some])
    return ranges_of(every[:, 0], every[:, 1], gap)


def total(ranges: Ranges) -> int:
    """Return the sum of the lengths of ranges."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def members(ranges: Ranges) -> Ids:
    """Return every number in ranges, ascending: (total,) int64."""
    lengths = ranges[:, 1] - ranges[:, 0]
    ends = np.cumsum(lengths)
    return np.repeat(ranges[:, 0] - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def runs(numbers: Ids) -> Ranges:
    """Return the ranges of ascending, distinct numbers; the inverse of `members`."""
    return ranges_of(numbers, numbers + 1)


def outside(numbers: Ids, ranges: Ranges) -> Mask:
    """Return which of some numbers, none below 0, are in none of the ranges."""
    begun = np.searchsorted(ranges[:, 0], numbers, side="right")
    outside: Mask = numbers >= np.append(0, ranges[:, 1])[begun]
    return outside


def split(ranges: Ranges, longest: int) -> Ranges:
    """Cut ranges into parts of at most `longest`; the parts of one range touch."""
    counts = -(-(ranges[:, 1] - ranges[:, 0]) // longest)
    starts = members(np.stack([np.zeros_like(counts), counts], axis=1)[counts > 0]) * longest
    starts += np.repeat(ranges[:, 0], counts)
    return np.stack([starts, np.minimum(starts + longest, np.repeat(ranges[:, 1], counts))], axis=1)


def batched(ranges: Ranges, size: int) -> Iterator[Ranges]:
    """Yield ranges in batches of less than twice `size` members, cutting long ranges."""
    cut = split(ranges, size)
    number = np.cumsum(cut[:, 1] - cut[:, 0]) // size
    edges = np.flatnonzero(np.diff(number, prepend=-1, append=-1))
    for first, last in pairwise(edges):
        yield cut[first:last]
