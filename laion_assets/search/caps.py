"""Find the links among many rows by sketches and caps; `near_duplicates` explains the method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from laion_assets.index.vectors import unit
from laion_assets.io.arrays import Floats, Ids, Mask
from laion_assets.io.parallel import in_threads, slices
from laion_assets.search.links import SLACK, Links, pairs_of
from laion_assets.search.sketches import choose_axes, distinct_rows, near_pairs, sketch, sketch_all

Numbers: TypeAlias = NDArray[np.int32]
Pairs: TypeAlias = tuple[Ids, Ids]  # rows a[i] and b[i]

WHOLE = (0, 1)  # the only stripe


@dataclass(frozen=True)
class Comparison:
    """What is compared with what: each cap and each loose row with all rows after it.

    Stripes of a comparison may be compared in any order, also by different processes: together their
    links connect the same components. Each process needs this plan and the links that were found before
    it. It computes sketches and caps itself, because their last bits depend on the machine.

    Attributes:
        axes: (d, width) axes of the sketches.
        rows: (n,) all rows in the order of their comparison: those of the caps, then the loose ones.
        starts: (c + 1,) place in `rows` at which each cap starts, and at which the loose rows start.

    """

    axes: Floats
    rows: Ids
    starts: Ids

    @classmethod
    def plan(cls, links: Links) -> Comparison:
        """Choose axes, find the links within cells, and gather connected rows in caps."""
        sample = distinct_rows(links)
        axes = choose_axes(links, sample)
        order, borders = cut_into_chunks(*nearest_cells(links, axes, sample), links.sizes.chunk)
        chunks = [order[start:end] for start, end in pairwise(borders)]
        in_threads(lambda chunk: links.find(chunk, chunk), chunks)
        chunk_of = np.empty(len(order), np.int32)
        chunk_of[order] = np.repeat(np.arange(len(chunks), dtype=np.int32), np.diff(borders))
        order, borders = connected_groups(links.forest.labels(), chunk_of)
        return cls(axes, *gather_in_caps(links, axes, order, borders, sample))


def nearest_cells(links: Links, axes: Floats, sample: Ids) -> tuple[Numbers, Floats]:
    """Return the cell of each row, and the row's nearness to the centre of the cell."""
    sizes, rows = links.sizes, len(links.vectors)
    axes = np.ascontiguousarray(axes[:, : sizes.cell_width])
    centres = unit(links.vectors[sample] @ axes)
    cells, nearness = np.empty(rows, np.int32), np.empty(rows, np.float32)

    def assign(batch: slice) -> None:
        to_centres = links.vectors[batch] @ axes @ centres.T
        cells[batch] = to_centres.argmax(axis=1)
        nearness[batch] = to_centres.max(axis=1)

    in_threads(assign, slices(rows, sizes.batch))
    return cells, nearness


def cut_into_chunks(cells: Numbers, nearness: Floats, size: int) -> tuple[Ids, Ids]:
    """Divide the rows of each cell into chunks of similar nearness to its centre.

    Returns:
        (n,) the rows in order of their chunk; and the place at which each chunk starts, and n.

    """
    order = np.lexsort((-nearness, cells))
    first = np.flatnonzero(np.diff(cells[order], prepend=-1))
    in_cell = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return order, np.append(np.flatnonzero(in_cell % size == 0), len(order))


def connected_groups(labels: Ids, chunk_of: Numbers) -> tuple[Ids, Ids]:
    """Group the rows of each chunk that are connected.

    Returns:
        (n,) the rows in order of their group; and the place at which each group starts, and n.

    """
    order = np.lexsort((chunk_of, labels, chunk_of[labels]))
    new = np.diff(labels[order], prepend=-1) != 0
    new |= np.diff(chunk_of[order], prepend=-1) != 0
    return order, np.append(np.flatnonzero(new), len(order))


def gather_in_caps(links: Links, axes: Floats, order: Ids, borders: Ids, sample: Ids) -> tuple[Ids, Ids]:
    """Return `rows` and `starts` of a `Comparison`, given the rows in order of their group.

    A cap saves comparisons of its rows with others, but each row that it meets costs some. A cap of few
    rows that meets many does not pay; the sample shows how many it meets.
    """
    labels, least = links.forest.labels(), links.sizes.cap
    sampled, sampled_labels = sketch_all(links, axes, sample), labels[sample]
    sizes = np.diff(borders)
    large = np.flatnonzero(sizes >= least)
    large = large[np.argsort(-sizes[large], kind="stable")]  # each is compared with the rows after it
    rows, starts = laid_out(order, borders, large)
    pays = np.empty(len(large), np.bool_)

    def choose(batch: slice) -> None:
        inside = starts[batch.start : batch.stop + 1]
        sketches = sketch(links.vectors[rows[inside[0] : inside[-1]]], axes)
        centres, reach = enclose(links, sketches, inside - inside[0])
        met = sampled @ centres.T > reach
        met &= sampled_labels[:, None] != labels[rows[inside[:-1]]]
        pays[batch] = np.diff(inside) >= least * (1 + np.count_nonzero(met, axis=0))

    in_threads(choose, batches_of(starts, links.sizes.batch))
    rows, starts = laid_out(order, borders, large[pays])
    loose = np.ones(len(order), np.bool_)
    loose[rows] = False
    return np.append(rows, order[loose[order]]), starts


def laid_out(order: Ids, borders: Ids, groups: Ids) -> tuple[Ids, Ids]:
    """Return the rows of some groups concatenated, with the start of each group, and the end."""
    sizes = np.diff(borders)[groups]
    starts = np.append(0, np.cumsum(sizes))
    return order[np.repeat(borders[groups] - starts[:-1], sizes) + np.arange(starts[-1])], starts


def batches_of(starts: Ids, rows: int) -> list[slice]:
    """Divide groups into batches of about `rows` rows, given the start of each group, and the end."""
    borders = np.flatnonzero(np.diff(starts[:-1] // rows, prepend=-1, append=-1))
    return [slice(int(first), int(end)) for first, end in pairwise(borders)]


def enclose(links: Links, sketches: Floats, starts: Ids) -> tuple[Floats, Floats]:
    """Return the caps of groups of connected rows, see fact 2.

    Args:
        links: the links.
        sketches: (n, width + 1) of all rows of the groups.
        starts: (g + 1,) place at which each group starts, and n.

    Returns:
        (g, width + 1) the direction of the mean sketch of each group; and (g,) a lower bound of its
        cosine with the sketch of any row that is linked to one of the group.

    """
    sizes = np.diff(starts)
    centres = unit(np.add.reduceat(sketches, starts[:-1], axis=0))
    cosines = np.einsum("ij,ij->i", sketches, np.repeat(centres, sizes, axis=0))
    radius = np.arccos(np.clip(np.minimum.reduceat(cosines, starts[:-1]) - SLACK, -1, 1))
    widest = np.minimum(np.arccos(links.limit) + radius, np.pi)  # beyond pi the cosine rises again
    return centres, (np.cos(widest) - SLACK).astype(np.float32)


@dataclass(frozen=True)
class Sketched:
    """Rows and their sketches."""

    rows: Ids
    sketches: Floats

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, some: slice | Mask) -> Sketched:
        return Sketched(self.rows[some], self.sketches[some])


@dataclass(frozen=True)
class Caps:
    """Caps of a comparison.

    Attributes:
        members: the rows of all of them, one cap after the other.
        starts: (c + 1,) place at which each cap starts, and the number of rows.
        centres: (c, width + 1) direction of the mean sketch of each.
        reach: (c,) see `enclose`.

    """

    members: Sketched
    starts: Ids
    centres: Floats
    reach: Floats


def find_links_of_stripe(links: Links, comparison: Comparison, stripe: tuple[int, int]) -> None:
    """Find the links of every m-th block of caps, and of loose rows, with all rows after it.

    The rows are compared in panels, which stay in memory while all blocks are compared with them.

    Args:
        links: those found so far.
        comparison: the plan.
        stripe: number of the first block, and m.

    """
    (height, width), (first, step) = links.sizes.tile, stripe
    sketched = Sketched(comparison.rows, sketch_all(links, comparison.axes, comparison.rows))
    starts = comparison.starts
    # Each block has the place of its first row, and either caps or loose rows.
    blocks = [(int(starts[block.start]), block, True) for block in slices(len(starts) - 1, height)]
    for start in range(int(starts[-1]), len(sketched), height):
        blocks.append((start, slice(start, start + height), False))
    blocks = blocks[first::step]
    for panel in slices(len(sketched), links.sizes.panel):

        def compare(block: tuple[int, slice, bool], panel: slice = panel) -> None:
            start, some, are_caps = block
            tiles = range(max(start, panel.start), panel.stop, width)
            beside = [sketched[tile : min(tile + width, panel.stop)] for tile in tiles]
            if are_caps:
                caps = caps_of(links, sketched, starts[some.start : some.stop + 1])
                check_together(links, compare_caps(links, caps, beside))
            else:
                check_together(links, compare_loose_rows(links, sketched[some], beside))

        in_threads(compare, [block for block in blocks if block[0] < panel.stop])


def caps_of(links: Links, sketched: Sketched, starts: Ids) -> Caps:
    """Return the caps that start at these places, the last of which is the end of the last cap."""
    members, starts = sketched[int(starts[0]) : int(starts[-1])], starts - starts[0]
    return Caps(members, starts, *enclose(links, members.sketches, starts))


def compare_caps(links: Links, caps: Caps, tiles: Iterable[Sketched]) -> Iterator[Pairs]:
    """Yield pairs of rows of caps and tiles of rows that may be linked.

    Small caps are compared in groups with all rows that one of them meets: a product of a few rows takes
    longer to start than to compute.
    """
    starts, first_rows = caps.starts, caps.members.rows[caps.starts[:-1]]
    groups = batches_of(starts, links.sizes.group)
    for beside in tiles:
        met = caps.centres @ beside.sketches.T > caps.reach[:, None]
        met &= links.apart(first_rows, beside.rows)
        connect_some(links, first_rows, beside.rows, met)
        for group in groups:
            meets = np.logical_or.reduce(met[group])
            if meets.any():
                borders = starts[group.start : group.stop + 1]
                members = caps.members[int(borders[0]) : int(borders[-1])]
                may = np.repeat(met[group][:, meets], np.diff(borders), axis=0)
                yield candidates(links, members, beside[meets], may)


def compare_loose_rows(links: Links, rows: Sketched, tiles: Iterable[Sketched]) -> Iterator[Pairs]:
    """Yield pairs of loose rows and tiles of rows that may be linked."""
    for beside in tiles:
        if links.apart(rows.rows[:1], np.append(rows.rows, beside.rows)).any():
            yield candidates(links, rows, beside)


def check_together(links: Links, found: Iterable[Pairs]) -> None:
    """Check pairs, many at a time: each row is then fetched once for several of its pairs."""
    waiting: list[Pairs] = []
    number = 0
    for pairs in found:
        waiting.append(pairs)
        number += len(pairs[0])
        if number >= links.sizes.together:
            links.check(*map(np.concatenate, zip(*waiting, strict=True)))
            waiting, number = [], 0
    if waiting:
        links.check(*map(np.concatenate, zip(*waiting, strict=True)))


def candidates(links: Links, a: Sketched, b: Sketched, may: Mask | None = None) -> tuple[Ids, Ids]:
    """Return the pairs of rows of a and b that may be linked; if there are many, decide them at once.

    Args:
        links: those found so far.
        a: some rows.
        b: other rows.
        may: (a, b) pairs that are not ruled out before; all if None.

    """
    near = near_pairs(links, a.sketches, b.sketches)
    if may is not None:
        near &= may
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
