"""Near-duplicates: rows that are connected by links, where a link is a cosine above a threshold.

**Small inputs** take one matrix product, which compares all pairs of rows.

**Large inputs** would need n^2 products of 768 numbers. The algorithm below finds the same components
with a small fraction of them. It rests on three facts.

1. *A sketch never moves two rows apart.* The sketch of a row has its coordinates on a few orthonormal
   axes and, as one more coordinate, the length of its remainder, the part orthogonal to these axes. The
   remainders of two rows may point anywhere, but their product is at most the product of their lengths
   (Cauchy-Schwarz). So ``sketch(x) . sketch(y) >= x . y``: the angle between two sketches is at most
   the angle between the rows. On the axes of greatest variance, 95 coordinates tell most rows apart.
2. *A cap stands for all its rows.* Rows that are known to be connected are collected in a cap. Its
   centre is the direction of their mean sketch, its radius r the largest angle from the centre to one
   of their sketches. Angles on a sphere obey the triangle inequality. So if the angle between a row of
   cap A and a row of cap B is below theta, the threshold's angle, then the angle between the centres is
   below ``theta + r_A + r_B``.
3. *That test is a dot product.* Let ``s = theta/2 + r`` for each cap, and let no cap be so wide that s
   exceeds pi/2. Then ``s_A + s_B`` is at most pi, and the cosine falls strictly from 0 to pi. So the
   angle between the centres is below ``s_A + s_B`` exactly where ``c_A . c_B > cos(s_A + s_B)``, which
   is ``cos(s_A) cos(s_B) - sin(s_A) sin(s_B)``; that is, where ``[c_A, -cos s_A, sin s_A] . [c_B, cos
   s_B, sin s_B] > 0``. One matrix product over all caps finds every pair of caps that may contain a
   link.

The steps are:

(a) Choose axes and a few thousand cells from a sample of rows, none of them near-duplicates of each
    other: otherwise a group of thousands of duplicates would determine the axes.
(b) Sketch every row, and assign it to the nearest cell.
(c) Within each cell compare rows at full width. This finds nearly all links.
(d) Collect rows that are connected and were compared together in caps. Where a cap would be too wide,
    each of its rows becomes a cap of its own, with radius zero.
(e) Compare caps. For each pair of caps that may contain a link and is not connected yet, compare the
    sketches of their rows. For each pair of rows that may still be linked, compare the rows themselves.

**No link is missed.** Two rows of one cap are connected by construction. For rows of different caps,
(e) visits the pair of caps once. It skips a pair of rows only where both are connected already, or
where an upper bound of the cosine (facts 1 to 3) is below the threshold.

**No link is invented.** Every link is a full-width dot product above the threshold. Which links steps
(b) to (d) find affects the speed, never the result. Threads do not affect it either:
one that reads connections late only checks a pair without need.

**Rounding.** The float32 dot product of two unit rows of d numbers has an error below d * 6e-8 (5e-5
for LAION-5B's 896; about 1e-6 in practice), which depends on the order of summation. Every bound is
therefore relaxed by SLACK, which exceeds that error up to d = 1,600. A pair within SLACK of the
threshold is decided in float64, where the order does not matter, so the result is a function of the
vectors alone. The length of the remainder is the root of a difference of squares, which is inaccurate
near zero, so SLACK is added to its square. This adds SLACK to the square of every sketch's length, and
at least SLACK to the dot product of any two sketches (Cauchy-Schwarz again). As (c + SLACK) / (1 +
SLACK) >= c, it can only move sketches nearer to each other, which fact 1 allows. Radii are enlarged
likewise.

**Cost.** n * cell size * 768 multiplications for (c), and caps^2 / 2 * 98 for (e): quadratic in the
number of different images, not of rows.

**Many short lists over the same vectors** (the results of each seed) share their sketches and the
decided links. In each list all sketches are compared. Each row that may be linked to others is first
compared with the lowest of them, because the same pair often occurs in many lists and is decided once.
Then it is compared with those to which it may be linked and is not connected yet.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from laion_assets.index.vectors import Vectors, unit
from laion_assets.io.arrays import Bytes, Floats, Ids, Mask
from laion_assets.io.parallel import in_threads, one_blas_thread

DEDUP_THRESHOLD = 0.94  # the default cosine above which two images are near-duplicates
SLACK = 1e-4  # relaxes every bound by more than float32's rounding, see above


@dataclass(frozen=True)
class Sizes:
    """How the work is divided. The sizes affect the speed, never the result."""

    small: int = 4096  # up to this many rows, all pairs are compared
    sample: int = 2048  # rows from which axes and cells are chosen
    width: int = 96  # coordinates of a sketch
    cell_width: int = 32  # coordinates of a sketch that determine the cell
    chunk: int = 384  # rows of a cell of which all pairs are compared
    widest_cap: float = 0.25  # radians; rows that need a wider cap become caps of their own
    tile: tuple[int, int] = (1024, 2048)  # caps that are compared in one product
    # Above these numbers of pairs, one product is cheaper than single dot products: `many_pairs` for the
    # rows of two caps or the caps of a tile, `many_of_row` for each row of a short list.
    many_pairs: int = 4096
    many_of_row: int = 8
    batch: int = 1024  # rows, or pairs of rows, that are fetched at once


SIZES = Sizes()


def components(vectors: Vectors, threshold: float, sizes: Sizes = SIZES) -> Ids:
    """Label each row with the lowest row of its component.

    Args:
        vectors: (n, d) float32 unit rows, best-ranked first. Zero and non-finite rows are never linked.
        threshold: from 0 to 1, taken as float32. Rows are linked where their cosine is strictly above it;
            1 links none.
        sizes: how the work is divided.

    Returns:
        (n,) int64; rows to keep are labelled with their own number.

    """
    links = Links(vectors, threshold, sizes)
    everything = np.arange(len(vectors))
    if links.limit >= 1 or not len(vectors):
        return everything
    if len(vectors) <= sizes.small:
        links.find(everything, everything)
    else:
        find_links_by_caps(links)
    return links.forest.labels()


def components_of_lists(
    vectors: Vectors, members: Ids, lists: Ids, threshold: float, sizes: Sizes = SIZES
) -> Ids:
    """Label each entry of many lists with the first entry of its component within its list.

    Args:
        vectors: (n, d), as for `components`, in any order.
        members: (m,) the row of `vectors` of each entry.
        lists: (m,) ascending numbers of the list of each entry.
        threshold: as for `components`.
        sizes: how the work is divided.

    Returns:
        (m,) int64; entries to keep are labelled with their own number.

    """
    labels = np.arange(len(members))
    starts = np.flatnonzero(np.diff(lists, prepend=-1))
    ends = np.append(starts[1:], len(members))
    long = ends - starts > sizes.small
    for start, end in zip(starts[long], ends[long], strict=True):
        one = Gathered(vectors, members[start:end])
        labels[start:end] = start + components(one, threshold, sizes)
    if threshold < 1 and not long.all():
        short = np.flatnonzero(np.repeat(~long, ends - starts))
        found = components_of_short_lists(vectors, members[short], lists[short], threshold, sizes)
        labels[short] = short[found]
    return labels


def components_of_short_lists(
    vectors: Vectors, members: Ids, lists: Ids, threshold: float, sizes: Sizes
) -> Ids:
    """Do what `components_of_lists` does, by comparing the sketches of all pairs of each list."""
    links = Links(vectors, threshold, sizes)
    forest = Forest(len(members))
    if len(vectors) <= sizes.small:
        sketches = links.fetch(slice(None))
    else:
        sketches = sketch_all(links, distinct_rows(links))
    by_member = np.lexsort((members, lists))
    each = np.split(by_member, np.flatnonzero(np.diff(lists)) + 1)
    lowest = np.empty_like(by_member)

    def compare(entries: Ids) -> Bytes:
        compared = sketches[members[entries]]
        near = compared @ compared.T > links.limit - SLACK
        lowest[entries] = entries[near.argmax(axis=1)]
        return np.packbits(near, axis=1)

    def still_apart(job: tuple[Ids, Bytes]) -> tuple[Ids, Ids]:
        entries, packed = job
        roots = np.unique(forest.roots(entries), return_inverse=True)[1].astype(np.int32)
        near = np.unpackbits(packed, axis=1, count=len(entries)).view(np.bool_)
        near &= roots[:, None] < roots
        if np.count_nonzero(near) > sizes.many_of_row * len(entries):
            labels = components(Gathered(vectors, members[entries]), threshold, sizes)
            forest.connect(entries, entries[labels])
            return entries[:0], entries[:0]
        i, j = pairs_of(near)
        return entries[i], entries[j]

    def decide(a: Ids, b: Ids) -> None:
        pairs, same = np.unique(members[a] * len(vectors) + members[b], return_inverse=True)
        linked = links.linked(*np.divmod(pairs, len(vectors)))[same]
        forest.connect(a[linked], b[linked])

    near = in_threads(compare, each)
    others = np.flatnonzero(lowest != np.arange(len(members)))
    decide(lowest[others], others)
    rest = in_threads(still_apart, zip(each, near, strict=True))
    decide(*map(np.concatenate, zip(*rest, strict=True)))
    return forest.labels()


@dataclass(frozen=True)
class Gathered:
    """Some rows of other vectors."""

    vectors: Vectors
    rows: Ids

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | Ids, /) -> Floats:
        return self.vectors[self.rows[rows]]


class Forest:
    """A disjoint-set forest of connected rows; the root of a component is its lowest row."""

    def __init__(self, rows: int) -> None:
        self.parents = np.arange(rows)
        self.lock = threading.Lock()

    def roots(self, rows: Ids) -> Ids:
        """Return the root of each row; it may be outdated while other threads connect rows."""
        roots = self.parents[rows]
        while not np.array_equal(parents := self.parents[roots], roots):
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

    def labels(self) -> Ids:
        """Return the root of every row."""
        self.parents = self.roots(self.parents)
        return self.parents


class Links:
    """The links found so far. Only `find` and `linked` decide whether two rows are linked."""

    def __init__(self, vectors: Vectors, threshold: float, sizes: Sizes) -> None:
        self.vectors, self.sizes = vectors, sizes
        self.limit = float(np.float32(threshold))
        self.forest = Forest(len(vectors))

    def fetch(self, rows: slice | Ids) -> Floats:
        """Return the vectors of some rows; non-finite ones as zeros, which are never linked."""
        vectors = self.vectors[rows]
        finite = np.isfinite(squares(vectors))
        return vectors if finite.all() else np.where(finite[:, None], vectors, np.float32(0))

    def find(self, a: Ids, b: Ids) -> None:
        """Find the links between the rows of a and the rows of b, with one product."""
        left = self.fetch(a)
        cosines = left @ (left if b is a else self.fetch(b)).T
        certain = cosines > self.limit + SLACK
        first = certain.argmax(axis=1)  # one link per row connects most rows
        sure = np.flatnonzero(certain[np.arange(len(a)), first])
        self.forest.connect(a[sure], b[first[sure]])
        apart = self.forest.roots(a)[:, None] != self.forest.roots(b)
        i, j = pairs_of(apart & (cosines > self.limit - SLACK))
        self.check(a[i], b[j])

    def find_in_blocks(self, a: Ids, b: Ids) -> None:
        """Find the links between any number of rows of a and of b."""
        size = self.sizes.batch
        for i in range(0, len(a), size):
            for j in range(0, len(b), size):
                self.find(a[i : i + size], b[j : j + size])

    def check(self, a: Ids, b: Ids) -> None:
        """Find the links among the pairs of a[i] and b[i]."""
        for start in range(0, len(a), self.sizes.batch):
            batch = slice(start, start + self.sizes.batch)
            apart = self.forest.apart(a[batch], b[batch])
            i, j = a[batch][apart], b[batch][apart]
            linked = self.linked(i, j)
            self.forest.connect(i[linked], j[linked])

    def linked(self, a: Ids, b: Ids) -> Mask:
        """Return which pairs of a[i] and b[i] are linked, decided in float64."""
        linked = np.empty(len(a), np.bool_)

        def decide_batch(start: int) -> None:
            batch = slice(start, start + self.sizes.batch)
            left, right = self.fetch(a[batch]), self.fetch(b[batch])
            linked[batch] = np.einsum("ij,ij->i", left, right, dtype=np.float64) > self.limit

        if len(a) <= self.sizes.batch:  # the caller may be one of many threads
            decide_batch(0)
        else:
            in_threads(decide_batch, range(0, len(a), self.sizes.batch))
        return linked


def find_links_by_caps(links: Links) -> None:
    """Find the links among all rows."""
    sample = distinct_rows(links)
    sketches = sketch_all(links, sample)
    chunks = cut_into_chunks(*nearest_cells(links, sketches, sample), links.sizes.chunk)
    in_threads(lambda chunk: links.find(chunk, chunk), chunks)
    caps = Caps(links, sketches, chunks)
    del sketches  # the caps hold them in their own order
    find_links_between_caps(links, caps)


def distinct_rows(links: Links) -> Ids:
    """Return evenly spaced rows, none of them near-duplicates of each other."""
    rows = np.unique(np.linspace(0, len(links.vectors) - 1, links.sizes.sample).astype(np.int64))
    labels = components(links.fetch(rows), links.limit, Sizes(small=len(rows)))
    distinct: Ids = rows[labels == np.arange(len(rows))]
    return distinct


def sketch_all(links: Links, sample: Ids) -> Floats:
    """Return the sketch of every row, on the axes of greatest variance of the sample."""
    sizes, rows = links.sizes, len(links.vectors)
    axes = principal_axes(links.fetch(sample), sizes.width - 1)
    sketches = np.empty((rows, axes.shape[1] + 1), np.float32)

    def sketch_batch(start: int) -> None:
        batch = slice(start, start + sizes.batch)
        vectors = links.fetch(batch)
        seen = vectors @ axes
        rest = np.sqrt(np.maximum(squares(vectors) - squares(seen), 0) + np.float32(SLACK))
        sketches[batch] = unit(np.column_stack([seen, rest]))

    in_threads(sketch_batch, range(0, rows, sizes.batch))
    return sketches


def principal_axes(sample: Floats, count: int) -> Floats:
    """Return (d, count) orthonormal columns, close to the directions of greatest variance of the sample.

    A few steps of subspace iteration (Golub and Van Loan, Matrix Computations, 8.2.4). It need not
    converge, because any orthonormal axes give the right result.
    """
    shape = (sample.shape[1], min(count, sample.shape[1]))
    axes = np.random.default_rng(0).standard_normal(shape, np.float32)
    with one_blas_thread():
        for _ in range(3):
            axes = np.linalg.qr(sample.T @ (sample @ axes))[0]
    return axes


def nearest_cells(links: Links, sketches: Floats, sample: Ids) -> tuple[Ids, Floats]:
    """Return the cell of each row, and the row's nearness to the centre of the cell."""
    sizes, rows = links.sizes, len(sketches)
    centres = unit(sketches[sample, : sizes.cell_width])
    cells, nearness = np.empty(rows, np.int64), np.empty(rows, np.float32)

    def assign_batch(start: int) -> None:
        batch = slice(start, start + sizes.batch)
        to_centres = sketches[batch, : sizes.cell_width] @ centres.T
        cells[batch] = to_centres.argmax(axis=1)
        nearness[batch] = to_centres.max(axis=1)

    in_threads(assign_batch, range(0, rows, sizes.batch))
    return cells, nearness


def cut_into_chunks(cells: Ids, nearness: Floats, size: int) -> list[Ids]:
    """Divide the rows of each cell into chunks of similar nearness to its centre."""
    order = np.lexsort((-nearness, cells))
    borders = [*np.flatnonzero(np.diff(cells[order], prepend=-1)), len(order)]
    return [
        order[start : min(start + size, stop)]
        for first, stop in pairwise(borders)
        for start in range(first, stop, size)
    ]


class Caps:
    """Caps on the sphere of sketches, each of connected rows of one chunk.

    Attributes:
        table: (caps, width + 2) centre, cos(s) and sin(s) of each cap, see fact 3.
        rows: all rows, in order of their cap.
        sketches: of `rows`.
        members: the slice of `rows` in each cap.
        first_rows: (caps,) one row of each cap.

    """

    def __init__(self, links: Links, sketches: Floats, chunks: list[Ids]) -> None:
        group = links.forest.labels() * len(chunks)
        for chunk_number, rows in enumerate(chunks):
            group[rows] += chunk_number
        self.rows = np.argsort(group, kind="stable")
        self.sketches = sketches[self.rows]
        theta = np.arccos(links.limit)
        starts_group = np.diff(group[self.rows], prepend=-1) > 0
        centres, radii = enclose(self.sketches, np.flatnonzero(starts_group))
        wide = radii > min(links.sizes.widest_cap, (np.pi - theta) / 2)
        number = np.cumsum(starts_group) - 1
        starts = np.flatnonzero(starts_group | wide[number])
        alone = wide[number[starts]]
        centres = np.where(alone[:, None], self.sketches[starts], centres[number[starts]])
        reach = theta / 2 + np.where(alone, 0, radii[number[starts]])
        self.table = np.column_stack([centres, np.cos(reach), np.sin(reach)]).astype(np.float32)
        self.first_rows = self.rows[starts]
        self.members = [slice(*ends) for ends in pairwise([*starts, len(self.rows)])]

    def __len__(self) -> int:
        return len(self.table)

    def rows_of(self, caps: Ids) -> Ids:
        """Return the rows of some caps."""
        rows: Ids = np.concatenate([self.rows[self.members[cap]] for cap in caps])
        return rows

    def meeting(self, above: slice, beside: slice) -> tuple[Ids, Ids]:
        """Return the pairs of caps, one from each slice, that may contain a link."""
        left, right = self.table[above].copy(), self.table[beside]
        left[:, -2] *= -1
        a, b = pairs_of(left @ right.T > -SLACK)
        a, b = a + above.start, b + beside.start
        return a[a < b], b[a < b]


def enclose(sketches: Floats, starts: Ids) -> tuple[Floats, NDArray[np.float64]]:
    """Return centre and radius of the caps that begin at these rows."""
    sizes = np.diff(starts, append=len(sketches))
    centres = unit(np.add.reduceat(sketches, starts))
    cosines = np.einsum("ij,ij->i", sketches, np.repeat(centres, sizes, axis=0))
    farthest = np.minimum.reduceat(cosines, starts).astype(np.float64) - SLACK
    return centres, np.where(sizes == 1, 0, np.arccos(np.clip(farthest, -1, 1)))


def find_links_between_caps(links: Links, caps: Caps) -> None:
    """Find the links between rows of different caps."""
    height, width = links.sizes.tile

    def compare(top: int) -> None:
        for start in range(top, len(caps), width):
            a, b = caps.meeting(slice(top, top + height), slice(start, start + width))
            apart = links.forest.apart(caps.first_rows[a], caps.first_rows[b])
            a, b = a[apart], b[apart]
            if len(a) > links.sizes.many_pairs:
                links.find_in_blocks(caps.rows_of(np.unique(a)), caps.rows_of(np.unique(b)))
            elif len(a):
                pairs = [candidates(links, caps, *ab) for ab in zip(a, b, strict=True)]
                links.check(*map(np.concatenate, zip(*pairs, strict=True)))

    in_threads(compare, range(0, len(caps), height))


def candidates(links: Links, caps: Caps, a: int, b: int) -> tuple[Ids, Ids]:
    """Return the pairs of rows of two caps that may be linked; many pairs are decided at once instead."""
    rows_a, rows_b = caps.rows[caps.members[a]], caps.rows[caps.members[b]]
    near = caps.sketches[caps.members[a]] @ caps.sketches[caps.members[b]].T > links.limit - SLACK
    i, j = pairs_of(near)
    if len(i) > links.sizes.many_pairs:
        links.find(rows_a[near.any(axis=1)], rows_b[near.any(axis=0)])
        return rows_a[:0], rows_b[:0]
    return rows_a[i], rows_b[j]


def pairs_of(mask: Mask) -> tuple[Ids, Ids]:
    """Return row and column of true elements, four times as fast as a two-dimensional `nonzero`."""
    return np.divmod(np.flatnonzero(mask), mask.shape[1])


def squares(vectors: Floats) -> Floats:
    """Return the squared length of each vector."""
    found: Floats = np.einsum("ij,ij->i", vectors, vectors)
    return found
