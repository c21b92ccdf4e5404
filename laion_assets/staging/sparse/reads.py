"""What to read of a source, from what is needed and what is there: pure functions.

What must not live here: reading, and the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from laion_assets.io.arrays import Ids
from laion_assets.io.ranges import Ranges, pieces, ranges_of, runs, union

PAGE = 4096  # bytes; what file systems keep and give back as one
GAP = 4  # pages: what lies this near to each other is one read, for a request costs more than 16 KiB
LONGEST = 2048  # pages, 8 MiB: more is read as several, side by side
AT_ONCE = 32_768  # pages, 128 MiB, that are made durable and marked as one
READS_AT_ONCE = 16_384  # or so many reads, whatever their size


def pages_of(ranges: Ranges) -> Ranges:
    """The pages that hold some bytes."""
    return ranges_of(ranges[:, 0] // PAGE, -(-ranges[:, 1] // PAGE))


def reads_for(absent: Ids, gap: int = GAP) -> Ranges:
    """The ranges of pages to read so that some pages are there, in order.

    Args:
        absent: (n,) numbers of pages, ascending.
        gap: pages between two of them, which may be there, that are read again to save a read.

    """
    return pieces(union(runs(absent), gap=gap), LONGEST)


def batches(reads: Ranges) -> Iterator[Ranges]:
    """Part reads into those that are made durable and marked together."""
    pages = np.cumsum(reads[:, 1] - reads[:, 0])
    number = np.maximum(pages // AT_ONCE, np.arange(len(reads)) // READS_AT_ONCE)
    edges = np.flatnonzero(np.diff(number, prepend=-1, append=-1))
    for first, last in pairwise(edges):
        yield reads[first:last]
