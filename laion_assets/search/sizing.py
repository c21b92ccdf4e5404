"""How many images to request so that the wanted number is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

USUAL_SHARE = 0.3  # about 70 % of LAION's results are near-duplicates


def share_kept(kept: int, requested: int) -> float:
    """Return the share of requested images that was kept, to six digits; 0 if none was requested."""
    return round(kept / requested, 6) if requested else 0.0


@dataclass(frozen=True)
class Yield:
    """The share of requested images that remains in the combined table.

    Attributes:
        share: above 0, at most 1.
        basis: where the share comes from, in words.

    """

    share: float
    basis: str

    def __str__(self) -> str:
        return f"a yield of {self.share:.4g} ({self.basis})"


USUAL = Yield(
    USUAL_SHARE,
    "usual for LAION; no run of this set with these filters, block list and threshold has measured it",
)


@dataclass(frozen=True)
class Counts:
    """Images to request around each seed, and around the mean of the seeds."""

    nb_images_knn: int
    nb_images_centroid: int


def counts_for(target: int, seeds: int, share: float, rows: int | None = None) -> Counts:
    """Return how many images to request in order to keep `target`, half of them from each strategy.

    Args:
        target: images wanted in the combined table.
        seeds: number of seeds, at least 1.
        share: share of requested images that is kept, above 0.
        rows: rows of the index, at which requests are capped.

    """
    requested = target / 2 / share  # from each strategy
    most = math.inf if rows is None else rows
    return Counts(
        nb_images_knn=int(min(math.ceil(requested / seeds), most)),
        nb_images_centroid=int(min(math.ceil(requested), most)),
    )
