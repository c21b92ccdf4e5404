"""Centres of inverted lists: spherical k-means, with many centres in two levels."""

from __future__ import annotations

import math

import numpy as np

from laion_assets.build.nearest import Centres, mean_directions, moved, nearest, unit_or_zero
from laion_assets.io.arrays import Floats, Ids
from laion_assets.io.parallel import in_threads

ONE_LEVEL = 256  # lists up to which all centres are placed at once
ROUNDS = 10
ROWS_PER_HEAD = 256
HEAD_ROUNDS = 6
GROUP_ROUNDS = 8
LAST_ROUNDS = 3


def centres_of(rows: Floats, count: int, random: np.random.Generator) -> Floats:
    """Return (count, d) unit centres.

    Rows are first divided among about `sqrt(count)` heads, and each head's rows among centres of their
    own, as many as its share of the rows. A few rounds with all rows and all centres then move the
    centres over the borders between heads.

    Args:
        rows: (n, d) float32 of length 1, in random order.
        count: of centres, at most n.
        random: draws the first centres.

    """
    if count <= ONE_LEVEL:
        return mean_directions(rows, count, ROUNDS, random)
    heads = math.isqrt(count)
    centres = _in_groups(
        rows, count, mean_directions(rows[: heads * ROWS_PER_HEAD], heads, HEAD_ROUNDS, random)
    )
    for _ in range(LAST_ROUNDS):
        centres = moved(rows, Centres(centres).nearest(rows), centres, random)
    return centres


def _in_groups(rows: Floats, count: int, heads: Floats) -> Floats:
    """Return centres that are placed for the rows of each head alone."""
    group = nearest(rows, heads)
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group, minlength=len(heads))
    stops = np.cumsum(sizes)
    shares = _shares(sizes, count)

    def place(head: int) -> Floats:
        members = rows[order[stops[head] - sizes[head] : stops[head]]]
        return _few_centres(members, int(shares[head]))

    # Each group of rows is copied: not all at once.
    return np.concatenate(in_threads(place, np.flatnonzero(shares).tolist()))


def _shares(sizes: Ids, count: int) -> Ids:
    """Divide a number of centres among groups of rows, none more than it has rows."""
    exact = sizes * (count / sizes.sum())
    shares: Ids = np.minimum(np.maximum(np.floor(exact), sizes > 0), sizes).astype(np.int64)
    while (missing := count - int(shares.sum())) != 0:
        step = np.sign(missing)
        possible = shares < sizes if step > 0 else shares > 1
        order = np.argsort(-step * np.where(possible, exact - shares, -step * np.inf), kind="stable")
        shares[order[: min(abs(missing), int(possible.sum()))]] += step
    return shares


def _few_centres(rows: Floats, count: int) -> Floats:
    """Return (count, d) unit centres of rows, in the calling thread."""
    centres = unit_or_zero(rows[:count])
    for _ in range(GROUP_ROUNDS if count > 1 else 1):
        belongs = np.zeros((count, len(rows)), np.float32)
        belongs[np.argmax(rows @ centres.T, axis=1), np.arange(len(rows))] = 1
        filled = belongs.any(axis=1)
        centres[filled] = unit_or_zero((belongs @ rows)[filled])
    return centres
