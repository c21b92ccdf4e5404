"""Near-duplicates: rows that are connected by links, where a link is a cosine above a threshold.

**Small inputs** take one matrix product, which compares all pairs of rows.

**Large inputs** would need n^2 products of 768 numbers. The algorithm below finds the same components
with a small fraction of them. It rests on two facts.

1. *A sketch never moves two rows apart.* The sketch of a row has its coordinates on a few orthonormal
   axes and, as one more coordinate, the length of its remainder, the part orthogonal to these axes. The
   remainders of two rows may point anywhere, but their product is at most the product of their lengths
   (Cauchy-Schwarz). So ``sketch(x) . sketch(y) >= x . y``: the angle between two sketches is at most
   the angle between the rows. On the axes of greatest variance, few coordinates tell most rows apart.
2. *A cap stands for all its rows.* A cap holds rows that are known to be connected. Its centre is the
   direction of their mean sketch, its radius r the largest angle from the centre to one of their
   sketches. Angles on a sphere obey the triangle inequality. So if a row is linked to a row of the cap,
   the angle between its sketch and the centre is below ``theta + r``, where theta is the threshold's
   angle. One dot product decides for all rows of the cap.

The steps are:

(a) Choose axes and up to a few thousand cells from a sample of rows, none of them near-duplicates of each
    other: otherwise a group of thousands of duplicates would determine the axes.
(b) Sketch every row, and assign it to the nearest cell.
(c) Within each cell compare rows at full width. This finds nearly all links.
(d) Collect rows that are connected and were compared together in caps. Where a cap would not pay, its
    rows stay loose.
(e) Compare each cap with all rows, and its own rows with those that it may be linked to.
(f) Compare loose rows with each other.

Steps (e) and (f) compare the sketches first. Of the pairs that may be linked, they drop those that are
connected already, and compare the others at full width.

**No link is missed.** Two rows of one cap are connected by construction. Two rows of different caps, or
of a cap and a loose one, are visited in (e), two loose rows in (f). A pair is dropped only where both
rows are connected already, or where an upper bound of its cosine (facts 1 and 2) is below the threshold.

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

**Cost.** With sketches of w numbers, n * chunk * 768 multiplications for (c), caps * n * w for (e), and
loose rows^2 / 2 * w for (f): quadratic in the number of different images. The spread of the vectors
determines w. The more they have in common and the more evenly they differ in all directions, the more
axes are needed until sketches tell them apart. Pairs that no sketch tells apart are compared at full
width. Memory beside the vectors is at most 8 * w bytes a row for the sketches, in the order of the rows
and in that of the comparisons; some 60 bytes a row for components and orders; and 30 MB a thread.

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
    widths: tuple[int, ...] = (64, 96, 128, 160, 192, 256, 384)  # numbers of axes to choose from
    cell_width: int = 32  # coordinates of a sketch that determine the cell
    chunk: int = 384  # rows of a cell of which all pairs are compared
    cap: int = 3  # rows that are worth a cap, and as many more for each row of the sample that it meets
    tile: tuple[int, int] = (512, 2048)  # sketches that are compared in one product
    single: int = 80  # pairs that one product compares in the time of one pair that is fetched alone
    many_of_row: int = 8  # near pairs for each row of a short list above which one product is cheaper
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
        sketches = sketch_all(links, choose_axes(links, distinct_rows(links)))
    by_member = np.lexsort((members, lists))
    each = np.split(by_member, np.flatnonzero(np.diff(lists)) + 1)
    lowest = np.empty_like(by_member)

    def compare(entries: Ids) -> Bytes:
        compared = sketches[members[entries]]
        near = near_pairs(links, compared, compared)
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
    sketches = sketch_all(links, choose_axes(links, sample))
    chunks = cut_into_chunks(*nearest_cells(links, sketches, sample), links.sizes.chunk)
    in_threads(lambda chunk: links.find(chunk, chunk), chunks)
    caps, loose = gather_in_caps(links, sketches, chunks, sample)
    rows = np.concatenate([*(cap.rows for cap in caps), loose])
    sketched = Sketched(rows, sketches[rows])
    del sketches  # `sketched` holds them in the order in which they are compared
    find_links_of_caps(links, sketched, caps)
    find_links_of_loose_rows(links, sketched[len(rows) - len(loose) :])


def distinct_rows(links: Links) -> Ids:
    """Return evenly spaced rows, none of them near-duplicates of each other."""
    rows = np.unique(np.linspace(0, len(links.vectors) - 1, links.sizes.sample).astype(np.int64))
    labels = components(links.fetch(rows), links.limit, Sizes(small=len(rows)))
    distinct: Ids = rows[labels == np.arange(len(rows))]
    return distinct


def choose_axes(links: Links, sample: Ids) -> Floats:
    """Return (d, width) orthonormal columns: the directions of greatest variance of half the sample.

    A wider sketch costs more in every product, a narrower one leaves more pairs to compare at full width.
    The other half of the sample shows how many: on the rows that determine the axes, it would be too few.
    """
    fitted, tried = links.fetch(sample[::2]), links.fetch(sample[1::2])
    with one_blas_thread():
        axes = np.linalg.eigh(fitted.T @ fitted)[1][:, ::-1]
        widths = [width for width in links.sizes.widths if width < len(axes)] or [len(axes)]
        left = np.array([share_near(links, tried, axes[:, :width]) for width in widths])
    cost = widths + len(axes) * links.sizes.single * left
    return np.ascontiguousarray(axes[:, : widths[cost.argmin()]])


def share_near(links: Links, vectors: Floats, axes: Floats) -> float:
    """Return the share of pairs of different vectors whose sketches do not rule out a link."""
    sketches = sketch(vectors, axes)
    near = np.count_nonzero(near_pairs(links, sketches, sketches)) - len(vectors)
    return near / max(1, len(vectors) * (len(vectors) - 1))


def near_pairs(links: Links, a: Floats, b: Floats) -> Mask:
    """Return (a, b), which sketches of a and b do not rule out a link."""
    near: Mask = a @ b.T > links.limit - SLACK
    return near


def sketch_all(links: Links, axes: Floats) -> Floats:
    """Return (n, width + 1) the sketch of every row."""
    rows, size = len(links.vectors), links.sizes.batch
    sketches = np.empty((rows, axes.shape[1] + 1), np.float32)

    def sketch_batch(start: int) -> None:
        batch = slice(start, start + size)
        sketches[batch] = sketch(links.fetch(batch), axes)

    in_threads(sketch_batch, range(0, rows, size))
    return sketches


def sketch(vectors: Floats, axes: Floats) -> Floats:
    """Return coordinates on the axes and the length of the remainder, see facts 1 and *Rounding*."""
    seen = vectors @ axes
    rest = np.sqrt(np.maximum(squares(vectors) - squares(seen), 0) + np.float32(SLACK))
    return unit(np.column_stack([seen, rest]))


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


@dataclass(frozen=True)
class Cap:
    """Connected rows, and a cap of the sphere that holds their sketches.

    Attributes:
        rows: (m,) connected with each other.
        centre: (width + 1,) the direction of their mean sketch.
        reach: a lower bound of the cosine of the centre with the sketch of any row linked to one of them.

    """

    rows: Ids
    centre: Floats
    reach: np.float32


def enclose(links: Links, sketches: Floats, rows: Ids) -> Cap:
    """Return the cap of connected rows, see fact 2."""
    members = sketches[rows]
    centre = unit(members.mean(axis=0, keepdims=True))[0]
    radius = np.arccos(np.clip((members @ centre).min() - SLACK, -1, 1))
    widest = np.minimum(np.arccos(links.limit) + radius, np.pi)  # beyond pi the cosine rises again
    return Cap(rows, centre, np.float32(np.cos(widest) - SLACK))


def gather_in_caps(
    links: Links, sketches: Floats, chunks: list[Ids], sample: Ids
) -> tuple[list[Cap], Ids]:
    """Return caps, each of connected rows of one chunk, and all other rows in order of their component.

    A cap saves comparisons of its rows with others, but each row that it meets costs some. A cap of few
    rows that meets many does not pay; the sample shows how many it meets.
    """
    labels, least = links.forest.labels(), links.sizes.cap
    sampled, sampled_labels = sketches[sample], labels[sample]
    chunk_of = np.empty_like(labels)
    for number, rows in enumerate(chunks):
        chunk_of[rows] = number
    order = np.lexsort((chunk_of, labels, chunk_of[labels]))
    group = labels[order] * len(chunks) + chunk_of[order]
    borders = np.flatnonzero(np.diff(group, prepend=-1, append=-1))
    loose, caps = np.ones(len(order), np.bool_), []
    for first in np.flatnonzero(np.diff(borders) >= least):
        members = slice(borders[first], borders[first + 1])
        cap = enclose(links, sketches, order[members])
        met = (sampled @ cap.centre > cap.reach) & (sampled_labels != labels[cap.rows[0]])
        if len(cap.rows) >= least * (1 + np.count_nonzero(met)):
            caps.append(cap)
            loose[members] = False
    caps.sort(key=lambda cap: -len(cap.rows))  # each is compared with the rows of those after it
    return caps, order[loose]


@dataclass(frozen=True)
class Sketched:
    """Rows and their sketches."""

    rows: Ids
    sketches: Floats

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, some: slice | Mask) -> Sketched:
        return Sketched(self.rows[some], self.sketches[some])


def find_links_of_caps(links: Links, sketched: Sketched, caps: list[Cap]) -> None:
    """Find the links between the rows of each cap, with which all rows begin, and the rows after them."""
    height, width = links.sizes.tile
    borders = np.cumsum([0, *(len(cap.rows) for cap in caps)])
    members = [sketched[start:end] for start, end in pairwise(borders)]
    first_rows = sketched.rows[borders[:-1]]

    def compare(top: int) -> None:
        block = slice(top, top + height)
        centres = np.stack([cap.centre for cap in caps[block]])
        reach = np.array([[cap.reach] for cap in caps[block]])
        for start in range(borders[top], len(sketched), width):
            beside = sketched[start : start + width]
            met = centres @ beside.sketches.T > reach
            met &= links.apart(first_rows[block], beside.rows)
            connect_some(links, first_rows[block], beside.rows, met)
            pairs = [
                candidates(links, members[top + number], beside[met[number]])
                for number in np.flatnonzero(met.any(axis=1))
            ]
            if pairs:
                links.check(*map(np.concatenate, zip(*pairs, strict=True)))

    in_threads(compare, range(0, len(caps), height))


def find_links_of_loose_rows(links: Links, sketched: Sketched) -> None:
    """Find the links among rows, by tiles of the matrix of all pairs."""
    height, width = links.sizes.tile

    def compare(top: int) -> None:
        for start in range(top, len(sketched), width):
            above, beside = sketched[top : top + height], sketched[start : start + width]
            if links.apart(above.rows[:1], np.append(above.rows, beside.rows)).any():
                links.check(*candidates(links, above, beside))

    in_threads(compare, range(0, len(sketched), height))


def candidates(links: Links, a: Sketched, b: Sketched) -> tuple[Ids, Ids]:
    """Return the pairs of rows of a and b that may be linked; if there are many, decide them at once."""
    near = near_pairs(links, a.sketches, b.sketches)
    connect_some(links, a.rows, b.rows, near)
    count = np.count_nonzero(near)
    if count > links.sizes.batch and count * links.sizes.single > near.size:
        links.find(a.rows[near.any(axis=1)], b.rows[near.any(axis=0)])
        return a.rows[:0], b.rows[:0]
    i, j = pairs_of(near)
    return a.rows[i], b.rows[j]


def connect_some(links: Links, a: Ids, b: Ids, near: Mask) -> None:
    """Where rows have many near pairs, check one of each row, and drop the pairs that are connected then.

    In a clump this connects nearly all rows.
    """
    if np.count_nonzero(near) <= near.shape[0] + near.shape[1]:
        return
    near &= links.apart(a, b)
    i = np.append(np.arange(len(a)), near.argmax(axis=0))
    j = np.append(near.argmax(axis=1), np.arange(len(b)))
    some = near[i, j]
    links.check(a[i[some]], b[j[some]])
    near &= links.apart(a, b)


def pairs_of(mask: Mask) -> tuple[Ids, Ids]:
    """Return row and column of true elements, four times as fast as a two-dimensional `nonzero`."""
    return np.divmod(np.flatnonzero(mask), mask.shape[1])


def squares(vectors: Floats) -> Floats:
    """Return the squared length of each vector."""
    found: Floats = np.einsum("ij,ij->i", vectors, vectors)
    return found
