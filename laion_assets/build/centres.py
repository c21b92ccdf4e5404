"""Centres of inverted lists: spherical k-means from random rows.

Placing centres in two levels, of few heads and then of each head's rows, is faster but finds less: at the
same nprobe, 6 % fewer of the nearest 1,000 rows were in the probed lists, after as many rounds over all.
"""

from __future__ import annotations

import numpy as np

from laion_assets.build.nearest import Centres, moved, unit_or_zero
from laion_assets.io.arrays import Floats

ROUNDS = 6  # the probed lists of 10 rounds held as many of the nearest rows


def centres_of(rows: Floats, count: int, random: np.random.Generator) -> Floats:
    """Return (count, d) unit centres.

    Args:
        rows: (n, d) float32 of length 1.
        count: of centres, at most n.
        random: draws the first centres.

    """
    centres = unit_or_zero(rows[np.sort(random.permutation(len(rows))[:count])])
    for _ in range(ROUNDS):
        centres = moved(rows, Centres(centres).nearest(rows), centres, random)
    return centres
