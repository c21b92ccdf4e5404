"""Which pages to read from the source, given those that are needed and those that are present."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from laion_assets.io.arrays import Ids
from laion_assets.io.ranges import Ranges, ranges_of, runs, split, union

PAGE_SIZE = 4096  # bytes; the unit in which file systems allocate and free
MERGE_GAP = 4  # pages: closer reads are merged, since a request costs more than 16 KiB
MAX_READ = 2048  # pages, 8 MiB: longer reads are split, and read in parallel
BATCH_PAGES = 32_768  # pages, 128 MiB, that are made durable and marked together
BATCH_READS = 4_096  # limits a batch of short reads, and so what is left to sync after the last


def pages_of(ranges: Ranges) -> Ranges:
    """Return the pages that contain byte ranges."""
    return ranges_of(ranges[:, 0] // PAGE_SIZE, -(-ranges[:, 1] // PAGE_SIZE))


def reads_for(missing: Ids, gap: int = MERGE_GAP) -> Ranges:
    """Return the page ranges to read so that no page is missing, in order.

    Args:
        missing: (n,) page numbers, ascending.
        gap: reads at most this many pages apart are merged; the pages between them are read again.

    """
    return split(union(runs(missing), gap=gap), MAX_READ)


def spans_of_reads(spans: Ids) -> list[Ids]:
    """Group spans of bytes that are read together, because little or nothing is between them.

    Args:
        spans: (n, 2) starts and stops, which may be unordered, empty or overlapping.

    Returns:
        The numbers of the spans of each read; empty spans are in none.

    """
    order = np.argsort(spans[:, 0], kind="stable")
    order = order[spans[order, 1] > spans[order, 0]]
    near = ranges_of(spans[:, 0], spans[:, 1], MERGE_GAP * PAGE_SIZE)
    reads = split(near, MAX_READ * PAGE_SIZE)
    begins_in = np.searchsorted(reads[:, 0], spans[order, 0], side="right")
    edges = np.flatnonzero(np.diff(begins_in, prepend=0))
    return np.split(order, edges[1:]) if len(order) else []


def read_batches(reads: Ranges) -> Iterator[Ranges]:
    """Group reads into batches that are made durable and marked together."""
    pages = np.cumsum(reads[:, 1] - reads[:, 0])
    number = np.maximum(pages // BATCH_PAGES, np.arange(len(reads)) // BATCH_READS)
    edges = np.flatnonzero(np.diff(number, prepend=-1, append=-1))
    for first, last in pairwise(edges):
        yield reads[first:last]
