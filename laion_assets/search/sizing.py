"""How many images to ask for, so that as many as are wanted stay.

What must not live here: where a yield was measured, searching.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

USUAL_SHARE = 0.3  # of what is requested from LAION, which is full of near-copies

# What benchmarks/results.md measured: images looked for around seeds and written, a second; seconds of a
# search around one centroid, by the number of images; rows combined, a second.
KNN_A_SECOND = 75_176
CENTROID_SECONDS = {10_000: 0.28, 30_000: 0.76, 100_000: 2.08, 300_000: 10.30, 1_000_000: 88.86}
COMBINED_A_SECOND = 283_255


def share_kept(kept: int, requested: int) -> float:
    """Return which share of the images requested was kept: none of none, and six digits of any other."""
    return round(kept / requested, 6) if requested else 0.0


@dataclass(frozen=True)
class Yield:
    """Which share of the images requested stays in the combined table.

    Attributes:
        share: over 0 up to 1.
        basis: what it rests on, in words.

    """

    share: float
    basis: str

    def __str__(self) -> str:
        return f"a yield of {self.share:.4g} ({self.basis})"


USUAL = Yield(
    USUAL_SHARE,
    "usual for LAION, no run of this set with these filters, block list and threshold has measured it",
)


@dataclass(frozen=True)
class Counts:
    """Images to ask for: around each seed, and around the mean of the seeds."""

    nb_images_knn: int
    nb_images_centroid: int


def counts_for(target: int, seeds: int, share: float, rows: int | None = None) -> Counts:
    """Return how many images to ask for to keep `target`, half of them from each strategy.

    Args:
        target: images wanted in the combined table.
        seeds: how many there are, at least 1.
        share: of the images requested that stay, over 0.
        rows: of the index, more than which are never asked for.

    """
    requested = target / 2 / share  # from each strategy
    most = math.inf if rows is None else rows
    return Counts(
        nb_images_knn=int(min(math.ceil(requested / seeds), most)),
        nb_images_centroid=int(min(math.ceil(requested), most)),
    )


def as_measured(knn: int, centroid: int) -> tuple[float, float, float]:
    """Return the seconds that the benchmark's machine needs for each of the three tables.

    For the centroid a line through the logarithms of what was measured, and on beyond both its ends; for
    the combined table at most, as if all that is requested came to it.

    Args:
        knn: images requested around all seeds together.
        centroid: images requested around the mean.

    """
    sizes, seconds = (np.log(side) for side in zip(*CENTROID_SECONDS.items(), strict=True))
    place = int(np.clip(np.searchsorted(sizes, math.log(centroid)), 1, len(sizes) - 1))
    slope = (seconds[place] - seconds[place - 1]) / (sizes[place] - sizes[place - 1])
    of_centroid = math.exp(seconds[place] + slope * (math.log(centroid) - sizes[place]))
    return knn / KNN_A_SECOND, of_centroid, (knn + centroid) / COMBINED_A_SECOND
