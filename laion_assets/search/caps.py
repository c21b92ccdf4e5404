"""Find the links among many rows by sketches and caps; `near_duplicates` explains the method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from laion_assets.index.vectors import unit
from laion_assets.io.arrays import Floats, Ids, Mask
from laion_assets.io.int8 import Numbers, products
from laion_assets.io.machine import free_memory
from laion_assets.io.parallel import SHORT_CALLS, in_threads, slices, thread_count
from laion_assets.io.processes import in_processes
from laion_assets.io.ranges import members
from laion_assets.search.links import SLACK, Links, pairs_of
from laion_assets.search.rounded import (
    Rounded,
    RoundedTwice,
    Tiles,
    each_may_exceed,
    may_exceed,
    where_may_exceed,
)
from laion_assets.search.sketches import choose_axes, distinct_rows, near_pairs, reach_of, sketch_all

Pairs: TypeAlias = tuple[Ids, Ids]  # a[i] and b[i]
Part: TypeAlias = tuple[int, Tiles]  # the place of the first of some rows, and their sketches

WHOLE = (0, 1)  # the only stripe
MEMORY_OF_A_PROCESS, MEMORY_OF_A_ROW = 150 << 20, 8  # bytes, of one that shares the comparison


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


def find_all_links(links: Links, foreseen: Callable[[], None]) -> None:
    """Find all links; `foreseen` is called when most of them are found, before the longest part."""
    comparison, sketches = plan_comparison(links)
    foreseen()
    sketches = sketches.in_order(comparison.rows)
    find_links(links, Caps.of(links, comparison, sketches), WHOLE)


def find_links_of_stripe(links: Links, comparison: Comparison, stripe: tuple[int, int]) -> None:
    """Find the links of every m-th block of caps, and of loose rows, with all rows after it.

    Args:
        links: those found so far.
        comparison: the plan.
        stripe: number of the first block, and m.

    """
    sketches = sketch_all(links, comparison.axes, RoundedTwice, comparison.rows)
    find_links(links, Caps.of(links, comparison, sketches), stripe)


def plan_comparison(links: Links) -> tuple[Comparison, RoundedTwice]:
    """Find the links within cells, gather connected rows in caps, and return the sketches of all rows."""
    sample = distinct_rows(links, links.sizes.sample)
    axes = choose_axes(links, sample)
    sketches = sketch_all(links, axes, RoundedTwice)
    order, borders = cut_into_chunks(*nearest_cells(links, sketches, sample), links.sizes.chunk)
    chunks = [order[start:end] for start, end in pairwise(borders)]
    in_threads(lambda chunk: links.find(chunk, chunk), chunks, SHORT_CALLS)
    chunk_of = np.empty(len(order), np.int32)
    chunk_of[order] = np.repeat(np.arange(len(chunks), dtype=np.int32), np.diff(borders))
    order, borders = connected_groups(links.forest.labels(), chunk_of)
    return Comparison(axes, *gather_in_caps(links, sketches, order, borders, sample)), sketches


def nearest_cells(links: Links, sketches: RoundedTwice, sample: Ids) -> tuple[Numbers, Numbers]:
    """Return the cell of each row and the row's nearness to the cell's centre, a row of the sample."""
    centres = sketches[sample].coarse().right
    cells, nearness = np.empty(len(sketches), np.int32), np.empty(len(sketches), np.int32)

    def assign(batch: slice) -> None:
        to_centres = products(sketches[batch].coarse().left, centres)
        cells[batch] = to_centres.argmax(axis=1)
        nearness[batch] = to_centres.max(axis=1)

    in_threads(assign, slices(len(sketches), links.sizes.batch))
    return cells, nearness


def cut_into_chunks(cells: Numbers, nearness: Numbers, size: int) -> tuple[Ids, Ids]:
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


def gather_in_caps(
    links: Links, sketches: RoundedTwice, order: Ids, borders: Ids, sample: Ids
) -> tuple[Ids, Ids]:
    """Return `rows` and `starts` of a `Comparison`, given the rows in order of their group.

    A cap saves comparisons of its rows with others, but each row that it meets costs some. A cap of few
    rows that meets many does not pay; the sample shows how many it meets.
    """
    labels, least = links.forest.labels(), links.sizes.cap
    sampled, sampled_labels = sketches[sample].coarse(), labels[sample]
    sizes = np.diff(borders)
    large = np.flatnonzero(sizes >= least)
    large = large[np.argsort(-sizes[large], kind="stable")]  # each is compared with the rows after it
    rows, starts = laid_out(order, borders, large)
    pays = np.empty(len(large), np.bool_)

    def choose(batch: slice) -> None:
        inside = starts[batch.start : batch.stop + 1]
        centres, reach = enclose(links, sketches[rows[inside[0] : inside[-1]]], inside - inside[0])
        met = may_exceed(sampled, centres, reach)
        met &= sampled_labels[:, None] != labels[rows[inside[:-1]]]
        pays[batch] = np.diff(inside) >= least * (1 + np.count_nonzero(met, axis=0))

    in_threads(choose, batches_of(starts, links.sizes.batch))
    rows, starts = laid_out(order, borders, large[pays])
    loose = np.ones(len(order), np.bool_)
    loose[rows] = False
    return np.append(rows, order[loose[order]]), starts


def laid_out(order: Ids, borders: Ids, groups: Ids) -> tuple[Ids, Ids]:
    """Return the rows of some groups concatenated, with the start of each group, and the end."""
    return order[places(borders, groups)], np.append(0, np.cumsum(np.diff(borders)[groups]))


def places(borders: Ids, groups: Ids) -> Ids:
    """Return the places of some groups, group by group, given where each starts, and the end."""
    return members(np.stack([borders[groups], borders[groups + 1]], axis=1))


def batches_of(starts: Ids, rows: int) -> list[slice]:
    """Divide groups into batches of about `rows` rows, given the start of each group, and the end."""
    borders = np.flatnonzero(np.diff(starts[:-1] // rows, prepend=-1, append=-1))
    return [slice(int(first), int(end)) for first, end in pairwise(borders)]


def enclose(links: Links, sketches: RoundedTwice, starts: Ids) -> tuple[Rounded, Floats]:
    """Return the caps of groups of connected rows, see fact 2.

    Args:
        links: the links.
        sketches: of all rows of the groups.
        starts: (g + 1,) place at which each group starts, and n.

    Returns:
        The direction of the mean sketch of each group; and (g,) a lower bound of its cosine with the
        sketch of any row that is linked to one of the group.

    """
    rows = sketches.floats()
    centres = unit(np.add.reduceat(rows, starts[:-1], axis=0))
    cosines = (
        np.einsum("ij,ij->i", rows, np.repeat(centres, np.diff(starts), axis=0)) - sketches.fine_error
    )
    radius = np.arccos(np.clip(np.minimum.reduceat(cosines, starts[:-1]) - SLACK, -1, 1))
    widest = np.minimum(np.arccos(links.limit) + radius, np.pi)  # beyond pi the cosine rises again
    return Rounded.of(centres, reach_of(centres.shape[1])), np.cos(widest) - SLACK


@dataclass(frozen=True)
class Caps:
    """The caps of a comparison.

    Attributes:
        rows: see `Comparison`.
        starts: see `Comparison`.
        sketches: of the rows, in their order.
        centres: (c,) directions of the mean sketches.
        reach: (c,) see `enclose`.

    """

    rows: Ids
    starts: Ids
    sketches: RoundedTwice
    centres: Rounded
    reach: Floats

    @classmethod
    def of(cls, links: Links, comparison: Comparison, sketches: RoundedTwice) -> Caps:
        """Compute the caps from the sketches of all rows, in their order."""
        starts, number = comparison.starts, len(comparison.starts) - 1
        every = Rounded.empty(number, sketches.fine.shape[1], sketches.scale)
        reach = np.empty(number, np.float32)

        def gather(batch: slice) -> None:
            inside = starts[batch.start : batch.stop + 1]
            every[batch], reach[batch] = enclose(
                links, sketches[inside[0] : inside[-1]], inside - inside[0]
            )

        in_threads(gather, batches_of(starts, links.sizes.batch))
        return cls(comparison.rows, starts, sketches, every, reach)


def processes_for(rows: int) -> int:
    """Return how many processes share the comparison: one a core, if half the free memory has room."""
    room = free_memory() // 2 // (MEMORY_OF_A_PROCESS + MEMORY_OF_A_ROW * rows)
    return min(thread_count(), room)


def find_links(links: Links, caps: Caps, stripe: tuple[int, int]) -> None:
    """Find the links of a stripe. Of many rows, each process takes every p-th block of the stripe."""
    (number, step), rows = stripe, len(caps.rows)
    if rows <= links.sizes.shared or (processes := processes_for(rows)) < 2:
        find_links_here(links, caps, stripe)
        return
    shares = [(links, caps, (number + step * place, step * processes)) for place in range(processes)]
    for found in in_processes(links_of_share, shares):
        links.forest.connect(*found)


def links_of_share(share: tuple[Links, Caps, tuple[int, int]]) -> Pairs:
    """Return links that connect what a share of the work connects."""
    forest = share[0].forest
    before = forest.are_roots()
    find_links_here(*share)
    rows = np.flatnonzero(before & ~forest.are_roots())
    return rows, forest.roots(rows)


def find_links_here(links: Links, caps: Caps, stripe: tuple[int, int]) -> None:
    """Find the links of a stripe, in panels of rows, which stay in memory while all blocks meet them."""
    sizes, (number, step) = links.sizes, stripe
    starts, rows = caps.starts, len(caps.rows)
    # Each block has the place of its first row, and either caps or loose rows.
    blocks = [(int(starts[block.start]), block, True) for block in slices(len(starts) - 1, sizes.block)]
    for start in range(int(starts[-1]), rows, sizes.block):
        blocks.append((start, slice(start, min(start + sizes.block, rows)), False))
    for panel in slices(rows, sizes.panel):
        tiles = Tiles.of(caps.sketches[panel], sizes.tile)

        def compare(
            block: tuple[int, slice, bool], begin: int = panel.start, tiles: Tiles = tiles
        ) -> None:
            start, some, are_caps = block
            after = [
                (begin + part * sizes.tile, tiles.part(part, sizes.tiles))
                for part in range(max(0, start - begin) // sizes.tile, len(tiles.codes), sizes.tiles)
            ]
            found = (compare_caps if are_caps else compare_loose_rows)(links, caps, some, after)
            for a, b in together(found, sizes.together):
                links.check(a, b)

        some = [block for block in blocks[number::step] if block[0] < panel.stop]
        in_threads(compare, some, SHORT_CALLS)


def compare_caps(links: Links, caps: Caps, block: slice, after: Iterable[Part]) -> Iterator[Pairs]:
    """Yield pairs of rows of some caps and rows of tiles that may be linked."""
    centres, reach = caps.centres[block], caps.reach[block, None]

    def met() -> Iterator[Pairs]:
        for first, tiles in after:
            cap, place, near = where_may_exceed(centres, tiles, reach)
            cap, place = block.start + cap, first + place
            connect_some(links, caps.rows[caps.starts[cap]], caps.rows[place], near)
            i, j = pairs_of(near)
            yield cap[i], place[j]

    for pairs in together(met(), links.sizes.met):
        yield from near_rows(links, caps, *pairs)


def compare_loose_rows(links: Links, caps: Caps, block: slice, after: Iterable[Part]) -> Iterator[Pairs]:
    """Yield pairs of some loose rows and rows of tiles that may be linked."""
    sketches = caps.sketches[block].coarse()
    for first, tiles in after:
        loose, place, near = where_may_exceed(sketches, tiles, links.limit - SLACK)
        yield few_pairs(links, caps, block.start + loose, first + place, near)


def together(found: Iterable[Pairs], least: int) -> Iterator[Pairs]:
    """Concatenate pairs until they are so many: most work is cheaper for many at once."""
    waiting: list[Pairs] = []
    number = 0
    for pairs in found:
        waiting.append(pairs)
        number += len(pairs[0])
        if number >= least:
            yield joined(waiting)
            waiting, number = [], 0
    if number:
        yield joined(waiting)


def joined(pairs: Iterable[Pairs]) -> Pairs:
    """Concatenate pairs."""
    a, b = map(np.concatenate, zip(*pairs, strict=True))
    return a, b


def near_rows(links: Links, caps: Caps, cap: Ids, place: Ids) -> Iterator[Pairs]:
    """Yield the pairs of a row of cap[i] and the row at place[i] that may be linked.

    The rows of a cap are compared with all that it meets in one product, unless they are so few that the
    product takes longer to start than to compute.
    """
    apart = np.flatnonzero(links.forest.apart(caps.rows[caps.starts[cap]], caps.rows[place]))
    order = apart[np.argsort(cap[apart], kind="stable")]
    cap, place = cap[order], place[order]
    edges = np.flatnonzero(np.diff(cap, prepend=-1, append=-1))
    number = np.diff(edges)
    sizes = np.diff(caps.starts)[cap[edges[:-1]]]
    many = number * sizes > links.sizes.many
    for start, end in zip(edges[:-1][many].tolist(), edges[1:][many].tolist(), strict=True):
        mine = np.arange(*caps.starts[cap[start] : cap[start] + 2])
        for some in range(start, end, links.sizes.batch):
            theirs = place[some : min(some + links.sizes.batch, end)]
            near = near_pairs(links, caps.sketches[mine].coarse(), caps.sketches[theirs].coarse())
            yield few_pairs(links, caps, mine, theirs, near)
    few = np.repeat(~many, number)
    sizes, cap, place = np.repeat(sizes, number)[few], cap[few], place[few]
    yield nearer(links, caps, places(caps.starts, cap), np.repeat(place, sizes))


def few_pairs(links: Links, caps: Caps, a: Ids, b: Ids, near: Mask) -> Pairs:
    """Return pairs of rows that may be linked; if there are many, decide them.

    Args:
        links: those found so far.
        caps: the caps.
        a: places of rows.
        b: places of other rows.
        near: (a, b) which pairs may be linked by the first eight bits; changed.

    """
    connect_some(links, caps.rows[a], caps.rows[b], near)
    count, least = np.count_nonzero(near), max(links.sizes.batch, near.size // links.sizes.single)
    if count <= max(least, near.size // links.sizes.fine):
        i, j = pairs_of(near)
        found = nearer(links, caps, a[i], b[j])
        if len(found[0]) <= least:
            return found
    links.find(caps.rows[a[near.any(axis=1)]], caps.rows[b[near.any(axis=0)]])
    return a[:0], b[:0]


def nearer(links: Links, caps: Caps, a: Ids, b: Ids) -> Pairs:
    """Return the pairs of the rows at a[i] and b[i] that may be linked by all bits of their sketches."""
    near = np.empty(len(a), np.bool_)
    for some in slices(len(a), links.sizes.batch):
        sketches = caps.sketches[a[some]], caps.sketches[b[some]]
        near[some] = each_may_exceed(*sketches, links.limit - SLACK)
    return caps.rows[a[near]], caps.rows[b[near]]


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
