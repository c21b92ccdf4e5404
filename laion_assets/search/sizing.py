"""How many images to ask for, so that as many as are wanted stay.

What must not live here: where a yield was measured, searching.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

USUAL_SHARE = 0.3  # of what is requested from LAION, which is full of near-copies


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
