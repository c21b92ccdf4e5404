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
(b) Sketch every row, and assign it to the cell whose sketch is nearest.
(c) Within each cell compare rows at full width. This finds nearly all links.
(d) Collect rows that are connected and were compared together in caps. Where a cap would not pay, its
    rows stay loose. Order the rows: those of the caps, then the loose ones.
(e) Compare each cap with all rows, and its own rows with those that it may be linked to.
(f) Compare loose rows with each other.

Steps (e) and (f) compare sketches in eight bits, in which a processor multiplies many times as fast as in
32; `rounded` says why that misses nothing. The few pairs that may be linked are compared in sixteen bits,
then at full width, unless they are connected already. Both steps are cut in blocks, which threads share,
or processes if there are many rows.
They may also be cut in stripes, see `caps.Comparison`: the components of a union of links do not depend
on where and in which order the links were found.

**No link is missed.** Two rows of one cap are connected by construction. Two rows of different caps, or
of a cap and a loose one, are visited in (e), two loose rows in (f). A pair is dropped only where both
rows are connected already, or where an upper bound of its cosine (facts 1 and 2) is below the threshold.

**No link is invented.** Every link is a full-width dot product above the threshold. Which links steps
(b) to (d) find affects the speed, never the result. Threads and processes do not affect it either:
one that reads connections late only checks a pair without need.

**Rounding.** The float32 dot product of two unit rows of d numbers has an error below d * 6e-8 (5e-5
for LAION-5B's 768; about 1e-6 in practice), which depends on the order of summation. Every bound is
therefore relaxed by SLACK, which exceeds that error up to d = 5,000. This covers the rounding of
`vectors.Coded`, which scales vectors after it multiplies them. A pair within SLACK of
the threshold is decided in float64, where the order does not matter, so the result is a function of the
vectors alone. The length of the remainder is the root of a difference of squares, which is inaccurate
near zero, so SLACK is added to its square. This adds SLACK to the square of every sketch's length, and
at least SLACK to the dot product of any two sketches (Cauchy-Schwarz again). As (c + SLACK) / (1 +
SLACK) >= c, it can only move sketches nearer to each other, which fact 1 allows. Radii are enlarged
likewise.

**Cost.** With sketches of w numbers, n * chunk * 768 multiplications for (c), caps * n * w for (e), and
loose rows^2 / 2 * w for (f): quadratic in the number of different images. The spread of the vectors
determines w. The more they have in common and the more evenly they differ in all directions, the more
axes are needed until sketches tell them apart. Pairs that no sketch tells apart are compared at full
width. Memory beside the vectors is some 80 bytes a row for components, orders and errors, and up to 45 MB
a thread. The sketches, 2 * w bytes a row, lie on the disk if they are large, see `spill`.

**Many short lists over the same vectors** (the results of each seed) share their sketches and the
decided links. In each list all sketches are compared. Each row that may be linked to others is first
compared with the lowest of them, because the same pair often occurs in many lists and is decided once.
Then it is compared with those to which it may be linked and is not connected yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from laion_assets.index.vectors import Vectors, as_vectors, held
from laion_assets.io.arrays import Bytes, Doubles, Floats, Ids
from laion_assets.io.parallel import in_threads, slices
from laion_assets.search.caps import find_all_links, joined
from laion_assets.search.links import SIZES, Forest, Links, Sizes, pairs_of_bits
from laion_assets.search.rounded import Rounded
from laion_assets.search.sketches import choose_axes, distinct_rows, near_pairs, sketch_all

DEDUP_THRESHOLD = 0.94  # the default cosine above which two images are near-duplicates


def components(
    vectors: Vectors | Floats,
    threshold: float,
    sizes: Sizes = SIZES,
    foreseen: Callable[[Ids], None] = lambda _: None,
) -> Ids:
    """Label each row with the lowest row of its component.

    Args:
        vectors: (n, d) float32 unit rows, best-ranked first. Rows of zeros are never linked.
        threshold: from 0 to 1, taken as float32. Rows are linked where their cosine is strictly above it;
            1 links none.
        sizes: how the work is divided.
        foreseen: called before the longest part of the work with all rows to keep and a few others,
            ascending. It is not called if all pairs are compared at once.

    Returns:
        (n,) int64; rows to keep are labelled with their own number.

    """
    everything = np.arange(len(vectors))
    if np.float32(threshold) >= 1 or not len(vectors):
        return everything
    links = Links(held(vectors, sizes.small), threshold, sizes)
    if len(vectors) <= sizes.small:
        links.find(everything, everything)
    else:
        find_all_links(links, lambda: foreseen(np.unique(links.forest.labels())))
    return links.forest.labels()


def components_of_lists(
    vectors: Vectors | Floats,
    members: Ids,
    lists: Ids,
    threshold: float,
    sizes: Sizes = SIZES,
    foreseen: Callable[[Ids], None] = lambda _: None,
) -> Ids:
    """Label each entry of many lists with the first entry of its component within its list.

    Args:
        vectors: (n, d), as for `components`, in any order.
        members: (m,) the row of `vectors` of each entry.
        lists: (m,) ascending numbers of the list of each entry.
        threshold: as for `components`.
        sizes: how the work is divided.
        foreseen: as for `components`, called with entries of each list that takes long.

    Returns:
        (m,) int64; entries to keep are labelled with their own number.

    """
    labels = np.arange(len(members))
    if np.float32(threshold) >= 1:
        return labels
    vectors = as_vectors(vectors)
    starts = np.flatnonzero(np.diff(lists, prepend=-1))
    ends = np.append(starts[1:], len(members))
    long = ends - starts > sizes.small

    def foreseen_from(start: int) -> Callable[[Ids], None]:
        return lambda rows: foreseen(start + rows)

    for start, end in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
        one = held(Gathered(vectors, members[start:end]))
        found = components(one, threshold, sizes, foreseen_from(start))
        labels[start:end] = start + found
    if not long.all():
        short = np.flatnonzero(np.repeat(~long, ends - starts))
        found = components_of_short_lists(vectors, members[short], lists[short], threshold, sizes)
        labels[short] = short[found]
    return labels


def components_of_short_lists(
    vectors: Vectors, members: Ids, lists: Ids, threshold: float, sizes: Sizes
) -> Ids:
    """Do what `components_of_lists` does, by comparing the sketches of all pairs of each list."""
    links = Links(held(vectors, sizes.small), threshold, sizes)
    forest = Forest(np.arange(len(members)))
    if len(vectors) <= sizes.small:
        rows = links.vectors[:]
        sketches = Rounded.of(rows, float(np.abs(rows).max(initial=0)) or 1)
    else:
        axes = choose_axes(links, distinct_rows(links, sizes.sample // 2))
        sketches = sketch_all(links, axes, Rounded)
    lowest = np.empty(len(members), np.int64)
    each = np.split(np.arange(len(members)), np.flatnonzero(np.diff(lists)) + 1)
    longest = max(map(len, each))
    before = np.packbits(np.tri(longest, k=-1, dtype=np.bool_), axis=1)  # so each pair comes once

    def compare(entries: Ids) -> tuple[Ids, list[Bytes]]:
        entries = entries[np.argsort(members[entries], kind="stable")]
        compared, packed = sketches[members[entries]], []
        for some in slices(len(entries), sizes.rows_of_list):
            near = near_pairs(links, compared[some], compared[: some.stop])
            lowest[entries[some]] = entries[near.argmax(axis=1)]
            packed.append(np.packbits(near, axis=1))
            packed[-1] &= before[some, : packed[-1].shape[1]]
        return entries, packed

    def still_apart(job: tuple[Ids, list[Bytes]]) -> tuple[Ids, Ids]:
        entries, packed = job
        roots = forest.roots(entries).astype(np.int32)
        pairs, number = [], 0
        for some, near in zip(slices(len(entries), sizes.rows_of_list), packed, strict=True):
            distinct, own = np.unique(roots[some], return_inverse=True)
            connected = np.packbits(distinct[:, None] == roots[: some.stop], axis=1)
            near &= ~connected[own]
            number += int(np.bitwise_count(near).sum())
            if number > sizes.many_of_row * len(entries):
                labels = components(Gathered(links.vectors, members[entries]), threshold, sizes)
                forest.connect(entries, entries[labels])
                return entries[:0], entries[:0]
            higher, lower = pairs_of_bits(near)
            pairs.append((entries[lower], entries[some][higher]))
        return joined(pairs)

    def decide(a: Ids, b: Ids) -> None:
        pairs, same = np.unique(members[a] * len(vectors) + members[b], return_inverse=True)
        linked = links.linked(*np.divmod(pairs, len(vectors)))[same]
        forest.connect(a[linked], b[linked])

    near = in_threads(compare, each)
    others = np.flatnonzero(lowest != np.arange(len(members)))
    decide(lowest[others], others)
    rest = in_threads(still_apart, near)
    decide(*joined(rest))
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

    def projection(self, axes: Floats) -> Callable[[slice | Ids], Floats]:
        """Return what computes the products of rows with axes."""
        projected = self.vectors.projection(axes)
        return lambda rows: projected(self.rows[rows])

    def cosines(self, a: Ids, b: Ids, limit: float) -> Floats:
        """Return the products of rows."""
        return self.vectors.cosines(self.rows[a], self.rows[b], limit)

    def exact_cosines(self, a: Ids, b: Ids) -> Doubles:
        """Return the products of rows in float64."""
        return self.vectors.exact_cosines(self.rows[a], self.rows[b])
