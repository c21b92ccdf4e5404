"""Links between near-duplicates, and the components that they connect; see `near_duplicates`."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from laion_assets.index.vectors import Vectors, as_vectors
from laion_assets.io.arrays import Bytes, Floats, Ids, Mask
from laion_assets.io.parallel import in_threads, slices

ROWS_NUMBERED = 1 << 20  # at a time: the numbers of all rows take memory
# `SLACK` must stay below `vectors.NEAR`: products within it of the threshold must be right to float32.
SLACK = 3e-4  # relaxes every bound by more than float32's rounding, see `near_duplicates`


@dataclass(frozen=True)
class Sizes:
    """How the work is divided. The sizes affect the speed, never the result."""

    small: int = 4096  # up to this many rows, all pairs are compared
    sample: int = 2048  # rows from which axes and cells are chosen
    widths: tuple[int, ...] = (63, 127, 191, 255, 383)  # numbers of axes to choose from
    chunk: int = 384  # rows of a cell of which all pairs are compared
    cap: int = 2  # rows that are worth a cap, and as many more for each row of the sample that it meets
    block: int = 512  # caps or loose rows that a thread compares with all rows after them
    tile: int = 256  # rows that these are compared with in one product: it stays in the processor's cache
    tiles: int = 16  # that are compared before their near pairs are looked at
    panel: int = 1 << 18  # rows that all caps and rows before them are compared with before the next
    shared: int = 1 << 17  # rows above which processes share the comparison of caps and loose rows
    met: int = 1 << 16  # pairs of a cap and a row that are collected before the rows of caps are compared
    many: int = 4096  # pairs of rows of a cap and those that it meets that are worth a product
    fine: int = 10  # pairs that one product compares in the time of one pair of sketches in sixteen bits
    single: int = 80  # pairs that one product compares in the time of one pair that is fetched alone
    rows_of_list: int = 1024  # of a short list in one product: threads wait in shorter calls
    many_of_row: int = 8  # near pairs for each row of a short list above which one product is cheaper
    batch: int = 1024  # rows fetched, or pairs checked, at once
    pairs: int = 4096  # pairs that a thread decides at once, where short lists have many
    together: int = 4096  # pairs of a block that are collected before they are checked


SIZES = Sizes()


class Forest:
    """A disjoint-set forest of connected rows; the root of a component is its lowest row.

    Args:
        parents: (n,) a row of the same component, not above the row itself; it changes.

    """

    def __init__(self, parents: Ids) -> None:
        self.parents = parents
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Forest], tuple[Ids]]:
        """Pickle the parents; another process has a lock of its own."""
        return Forest, (self.parents,)

    def roots(self, rows: Ids) -> Ids:
        """Return the root of each row; it may be outdated while other threads connect rows."""
        roots = self.parents[rows]
        while ((parents := self.parents[roots]) != roots).any():
            roots = parents
        return roots

    def apart(self, a: Ids, b: Ids) -> Mask:
        """Return which pairs of a[i] and b[i] are not known to be connected."""
        apart: Mask = self.roots(a) != self.roots(b)
        return apart

    def connect(self, a: Ids, b: Ids) -> None:
        """Connect each a[i] with b[i]."""
        with self.lock:
            while len(a):
                a, b = self.roots(a), self.roots(b)
                a, b = a[a != b], b[a != b]
                np.minimum.at(self.parents, np.maximum(a, b), np.minimum(a, b))

    def are_roots(self) -> Mask:
        """Return which rows are the root of their component."""
        every = slices(len(self.parents), ROWS_NUMBERED)
        return np.concatenate(
            [np.empty(0, np.bool_)]
            + [self.parents[some] == np.arange(some.start, some.stop) for some in every]
        )

    def count(self) -> int:
        """Return the number of components."""
        return int(np.count_nonzero(self.are_roots()))

    def labels(self) -> Ids:
        """Return the root of every row."""
        self.parents = self.roots(self.parents)
        return self.parents


class Links:
    """The links found so far. Only `find` and `linked` decide whether two rows are linked."""

    def __init__(self, vectors: Vectors | Floats, threshold: float, sizes: Sizes) -> None:
        self.vectors, self.sizes = as_vectors(vectors), sizes
        self.limit = float(np.float32(threshold))
        self.forest = Forest(np.arange(len(vectors)))

    def find(self, a: Ids, b: Ids) -> None:
        """Find the links between the rows of a and the rows of b, with one product."""
        left = self.vectors[a]
        cosines = left @ (left if b is a else self.vectors[b]).T
        certain = cosines > self.limit + SLACK
        first = certain.argmax(axis=1)  # one link per row connects most rows
        sure = np.flatnonzero(certain[np.arange(len(a)), first])
        self.forest.connect(a[sure], b[first[sure]])
        i, j = pairs_of(self.apart(a, b) & (cosines > self.limit - SLACK))
        self.check(a[i], b[j])

    def apart(self, a: Ids, b: Ids) -> Mask:
        """Return (a, b), which rows of a are not known to be connected with which rows of b."""
        left, right = (self.forest.roots(rows).astype(np.int32) for rows in (a, b))
        apart: Mask = left[:, None] != right
        return apart

    def check(self, a: Ids, b: Ids) -> None:
        """Find the links among the pairs of a[i] and b[i]."""
        for start in range(0, len(a), self.sizes.batch):
            batch = slice(start, start + self.sizes.batch)
            apart = self.forest.apart(a[batch], b[batch])
            i, j = a[batch][apart], b[batch][apart]
            linked = self.linked(i, j)
            self.forest.connect(i[linked], j[linked])

    def linked(self, a: Ids, b: Ids) -> Mask:
        """Return which pairs of a[i] and b[i] are linked; float64 decides near the threshold."""
        linked = np.empty(len(a), np.bool_)

        def decide_batch(start: int) -> None:
            batch = slice(start, start + self.sizes.pairs)
            cosines = self.vectors.cosines(a[batch], b[batch], self.limit)
            linked[batch] = cosines > self.limit
            unsure = start + np.flatnonzero(~(np.abs(cosines - self.limit) > SLACK))  # or NaN
            for some in slices(len(unsure), self.sizes.batch):
                pairs = unsure[some]
                linked[pairs] = self.vectors.exact_cosines(a[pairs], b[pairs]) > self.limit

        # Without `in_threads`, whose limit on BLAS takes time, and holds in a worker thread already.
        if len(a) <= self.sizes.pairs:
            decide_batch(0)
        else:
            in_threads(decide_batch, range(0, len(a), self.sizes.pairs))
        return linked


def pairs_of(mask: Mask) -> tuple[Ids, Ids]:
    """Return row and column of true elements, four times as fast as a two-dimensional `nonzero`."""
    return np.divmod(np.flatnonzero(mask), mask.shape[1])


def pairs_of_bits(packed: Bytes) -> tuple[Ids, Ids]:
    """Return row and column of the bits that `np.packbits` packed along each row, where few are set."""
    some = np.flatnonzero(packed.ravel() != 0)
    row, byte = np.divmod(some, packed.shape[1])
    place, bit = pairs_of(np.unpackbits(packed.ravel()[some, None], axis=1).view(np.bool_))
    return row[place], byte[place] * 8 + bit
