"""Ranges of a file, and who sees to it that they are on the disk.

Ranges are an (n, 2) int64 array of starts and stops, ascending, none empty, none touching the next.
Search and metadata say what they are about to read; where the whole file is on the disk, that is nothing
to anybody. What must not live here: reading or writing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from laion_assets.io.arrays import Ids

Ranges = Ids  # (n, 2)
NOTHING: Ranges = np.empty((0, 2), np.int64)


class Hold(Protocol):
    """Ranges that stay on the disk for as long as a block lasts."""

    def need(self, ranges: Mapping[Path, Ranges]) -> None:
        """See that these ranges of these files are on the disk, and stay there until the block ends.

        Raises:
            InputError: they cannot be had.

        """


class Disk(Protocol):
    """What holds the files of an index.

    Attributes:
        whole: whether all of every file is there.

    """

    whole: bool

    def hold(self) -> AbstractContextManager[Hold]:
        """Begin a block in which some ranges are needed."""


class WholeFiles:
    """A disk with all of every file: everything is there, always."""

    whole = True

    def hold(self) -> AbstractContextManager[Hold]:
        """Hold everything, which takes nothing."""
        return nullcontext(self)

    def need(self, ranges: Mapping[Path, Ranges]) -> None:
        """Do nothing: they are there."""


def ranges_of(starts: Ids, stops: Ids, gap: int = 0) -> Ranges:
    """Bring spans in any order, which may be empty or overlap, into the form of ranges.

    Args:
        starts: (n,) int64.
        stops: (n,) int64, not below their starts.
        gap: what lies at most this far apart becomes one.

    """
    some = stops > starts
    starts, stops = starts[some], stops[some]
    if not len(starts):
        return NOTHING
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(stops[order])
    first = np.flatnonzero(np.concatenate([[True], starts[1:] > reach[:-1] + gap]))
    last = np.concatenate([first[1:], [len(starts)]]) - 1
    return np.stack([starts[first], reach[last]], axis=1)


def union(*some: Ranges, gap: int = 0) -> Ranges:
    """All that is in any of some ranges, and what lies between where they are at most `gap` apart."""
    every = np.concatenate([NOTHING, *some])
    return ranges_of(every[:, 0], every[:, 1], gap)


def total(ranges: Ranges) -> int:
    """How much it is."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def members(ranges: Ranges) -> Ids:
    """Every number in the ranges, ascending."""
    lengths = ranges[:, 1] - ranges[:, 0]
    ends = np.cumsum(lengths)
    return np.repeat(ranges[:, 0] - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def runs(numbers: Ids) -> Ranges:
    """The ranges that ascending, distinct numbers make up."""
    return ranges_of(numbers, numbers + 1)


def pieces(ranges: Ranges, longest: int) -> Ranges:
    """Cut ranges so that none is longer; the pieces touch where a range was cut."""
    counts = -(-(ranges[:, 1] - ranges[:, 0]) // longest)
    starts = members(np.stack([np.zeros_like(counts), counts], axis=1)[counts > 0]) * longest
    starts += np.repeat(ranges[:, 0], counts)
    return np.stack([starts, np.minimum(starts + longest, np.repeat(ranges[:, 1], counts))], axis=1)


def in_portions(ranges: Ranges, size: int) -> Iterator[Ranges]:
    """Go through ranges in portions of about `size`, cut where need be, so that their members are few."""
    cut = pieces(ranges, size)
    portion = np.cumsum(cut[:, 1] - cut[:, 0]) // size
    edges = np.flatnonzero(np.diff(portion, prepend=-1, append=-1))
    for first, last in pairwise(edges):
        yield cut[first:last]
