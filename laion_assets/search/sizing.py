"""Compute how many images to request in order to keep a target number."""

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
        share: the share, above 0 and at most 1.
        basis: a description of where the share comes from.

    """

    share: float
    basis: str

    def __str__(self) -> str:
        return f"a yield of {self.share:.4g} ({self.basis})"


USUAL = Yield(
    USUAL_SHARE,
    "usual for LAION; not yet measured for this set with these filters, block list and threshold",
)


@dataclass(frozen=True)
class Counts:
    """Numbers of images to request around each seed and around the centroid."""

    nb_images_knn: int
    nb_images_centroid: int


def counts_for(target: int, seeds: int, share: float, rows: int | None = None) -> Counts:
    """Return how many images to request in order to keep `target`, half of them from each strategy.

    Args:
        target: number of images wanted in the combined table.
        seeds: number of seeds, at least 1.
        share: share of requested images that is kept, above 0.
        rows: number of rows in the index, which caps requests.

    """
    requested = target / 2 / share  # from each strategy
    most = math.inf if rows is None else rows
    return Counts(
        nb_images_knn=int(min(math.ceil(requested / seeds), most)),
        nb_images_centroid=int(min(math.ceil(requested), most)),
    )
