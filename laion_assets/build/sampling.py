"""Which rows a sample of many files holds, so that few bytes are read for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from laion_assets.io.arrays import Ids
from laion_assets.io.ranges import Ranges, ranges_of

SHORTEST_RUN, LONGEST_RUN = 64, 1024  # consecutive rows that are read together
RUNS_PER_FILE = 16  # runs are shorter than `LONGEST_RUN` for the sake of this many
READ_PER_ROW = 4  # rows that are read for each row of a sample where units are read as a whole


def shares(sizes: Ids, rows: int, random: np.random.Generator) -> Ids:
    """Divide a number of rows in proportion to sizes; which of two gets a remainder is drawn.

    Args:
        sizes: (n,) int64.
        rows: at most the sum of the sizes.
        random: draws.

    Returns:
        (n,) int64, none above its size, whose sum is `rows`.

    """
    total = int(sizes.sum())
    if not total:
        return np.zeros_like(sizes)
    ends = np.cumsum(sizes)
    # In floating point, whole numbers could be rounded to either side.
    offset = int(random.integers(total))
    reached = np.array([(int(end) * rows + offset) // total for end in ends], np.int64)
    return np.diff(reached, prepend=0)


def draw_runs(size: int, rows: int, random: np.random.Generator) -> Ranges:
    """Draw runs of consecutive rows of one file; each row is as likely as every other.

    Args:
        size: rows of the file.
        rows: at most as many.
        random: draws.

    Returns:
        (m, 2) int64, see `laion_assets.io.ranges`.

    """
    length = int(np.clip(rows // RUNS_PER_FILE, SHORTEST_RUN, LONGEST_RUN))
    lengths = np.full(-(-rows // length), length, np.int64)
    lengths[-1:] -= int(lengths.sum()) - rows
    # Runs that do not overlap are distinct numbers once each is shortened to one row.
    short = np.sort(random.choice(size - rows + len(lengths), len(lengths), replace=False))
    starts = short + np.cumsum(lengths - 1) - (lengths - 1)
    starts += int(random.integers(size))  # or rows near both ends would be less likely
    starts %= size
    stops = starts + lengths
    return ranges_of(
        np.concatenate([starts, np.zeros_like(starts)]),
        np.concatenate([np.minimum(stops, size), np.maximum(stops - size, 0)]),
    )


def draw_units(
    files: Sequence[Sequence[int]], rows: int, random: np.random.Generator
) -> list[tuple[int, int, Ids]]:
    """Draw rows from units that are each read as a whole, such as row groups.

    About `READ_PER_ROW` times as many rows are read as are drawn, from as many files as possible.

    Args:
        files: rows of each unit of each file.
        rows: to draw; at most the rows of all units.
        random: draws.

    Returns:
        File, unit, and the rows of the unit that are drawn, ascending, of each drawn unit.

    """
    units = [(file, unit) for file, sizes in enumerate(files) for unit in range(len(sizes))]
    sizes = np.array([files[file][unit] for file, unit in units], np.int64)
    # Every beginning of this order has about the same part of the units of each file.
    places = [(random.permutation(len(sizes)) + random.random()) / len(sizes) for sizes in files if sizes]
    order = np.argsort(np.concatenate(places or [np.empty(0)]), kind="stable")
    enough = int(np.searchsorted(np.cumsum(sizes[order]), min(rows * READ_PER_ROW, int(sizes.sum()))))
    drawn = np.sort(order[: enough + 1]) if rows else order[:0]
    return [
        (*units[number], np.sort(random.choice(sizes[number], share, replace=False)))
        for number, share in zip(drawn, shares(sizes[drawn], rows, random), strict=True)
        if share
    ]
