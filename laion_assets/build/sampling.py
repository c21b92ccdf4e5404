"""Choose the rows of a sample from many files so that few bytes are read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from laion_assets.io.arrays import Ids
from laion_assets.io.ranges import Ranges, ranges_of

SHORTEST_RUN, LONGEST_RUN = 64, 1024  # consecutive rows read together
RUNS_PER_FILE = 16  # runs are shortened below `LONGEST_RUN` to have this many per file
READ_PER_ROW = 4  # rows read per row of the sample if units must be read whole


def shares(sizes: Ids, rows: int, random: np.random.Generator) -> Ids:
    """Divide a number of rows in proportion to sizes; remainders are assigned at random.

    Args:
        sizes: (n,) int64 sizes.
        rows: number of rows, at most the sum of the sizes.
        random: random generator.

    Returns:
        (n,) int64 shares that sum to `rows`; none exceeds its size.

    """
    total = int(sizes.sum())
    if not total:
        return np.zeros_like(sizes)
    ends = np.cumsum(sizes)
    # Floating point could round whole numbers up or down.
    offset = int(random.integers(total))
    reached = np.array([(int(end) * rows + offset) // total for end in ends], np.int64)
    return np.diff(reached, prepend=0)


def draw_runs(size: int, rows: int, random: np.random.Generator) -> Ranges:
    """Draw runs of consecutive rows of one file; all rows are equally likely.

    Args:
        size: number of rows in the file.
        rows: number of rows to draw, at most `size`.
        random: random generator.

    Returns:
        (m, 2) int64, see `laion_assets.io.ranges`.

    """
    length = int(np.clip(rows // RUNS_PER_FILE, SHORTEST_RUN, LONGEST_RUN))
    lengths = np.full(-(-rows // length), length, np.int64)
    lengths[-1:] -= int(lengths.sum()) - rows
    # Disjoint runs become distinct numbers if each run is shortened to one row.
    short = np.sort(random.choice(size - rows + len(lengths), len(lengths), replace=False))
    starts = short + np.cumsum(lengths - 1) - (lengths - 1)
    starts += int(random.integers(size))  # otherwise rows near both ends would be less likely
    starts %= size
    stops = starts + lengths
    return ranges_of(
        np.concatenate([starts, np.zeros_like(starts)]),
        np.concatenate([np.minimum(stops, size), np.maximum(stops - size, 0)]),
    )


def draw_units(
    files: Sequence[Sequence[int]], rows: int, random: np.random.Generator
) -> list[tuple[int, int, Ids]]:
    """Draw rows from units that must be read whole, such as row groups.

    About `READ_PER_ROW` times the drawn rows are read, from as many files as possible.

    Args:
        files: number of rows in each unit of each file.
        rows: number of rows to draw, at most the rows of all units.
        random: random generator.

    Returns:
        For each drawn unit, its file, the unit, and the drawn rows of the unit, ascending.

    """
    units = [(file, unit) for file, sizes in enumerate(files) for unit in range(len(sizes))]
    sizes = np.array([files[file][unit] for file, unit in units], np.int64)
    # Every prefix of this order holds about the same share of each file's units.
    places = [(random.permutation(len(sizes)) + random.random()) / len(sizes) for sizes in files if sizes]
    order = np.argsort(np.concatenate(places or [np.empty(0)]), kind="stable")
    enough = int(np.searchsorted(np.cumsum(sizes[order]), min(rows * READ_PER_ROW, int(sizes.sum()))))
    drawn = np.sort(order[: enough + 1]) if rows else order[:0]
    return [
        (*units[number], np.sort(random.choice(sizes[number], share, replace=False)))
        for number, share in zip(drawn, shares(sizes[drawn], rows, random), strict=True)
        if share
    ]
