"""How many images to request in order to keep a target number."""

from __future__ import annotations

import math
from dataclasses import dataclass

USUAL_SHARE = 0.3  # about 70 % of LAION's results are near-duplicates
EXPECT_ALIVE = 0.75  # share of LAION's URLs that still work
MARGIN = 1.1  # of a larger request, because the share that is kept falls with the rank
LEAST_GROWTH, MOST_GROWTH = 1.5, 8.0  # of a larger request


def share_kept(kept: int, requested: int) -> float:
    """Return the share of requested images that was kept, to six digits; 0 if none was requested."""
    return round(kept / requested, 6) if requested else 0.0


def further(k: int, kept: float, keep: int) -> int:
    """Return how many images to request after a request for k kept too few.

    Args:
        k: images requested so far.
        kept: images kept of them, on average.
        keep: images to keep.

    """
    expected = MARGIN * keep / kept if kept else math.inf
    return math.ceil(k * min(max(expected, LEAST_GROWTH), MOST_GROWTH))


def images_wanted(target: int, expect_alive: float) -> int:
    """Return how many images the combined table must hold for `target` of their URLs to work."""
    return math.ceil(target / expect_alive)


def kept_by_each(images: int, queries: int) -> int:
    """Return how many images each query of a search keeps, which has half of the images wanted."""
    return math.ceil(images / 2 / queries)


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
        return f"{100 * self.share:.4g}% are kept ({self.basis})"


USUAL = Yield(
    USUAL_SHARE,
    "usual for LAION; not yet measured for this set with these filters, block list and threshold",
)


@dataclass(frozen=True)
class Counts:
    """Numbers of images that are requested around each seed and around the centroid."""

    nb_images_knn: int
    nb_images_centroid: int


def expected_counts(images: int, seeds: int, share: float, rows: int | None = None) -> Counts:
    """Return how many images a search is expected to request, half of them around the seeds.

    Args:
        images: number of images wanted in the combined table.
        seeds: number of seeds, at least 1.
        share: share of requested images that is kept, above 0.
        rows: number of rows in the index, which caps requests.

    """
    requested = images / 2 / share  # by each search
    most = math.inf if rows is None else rows
    return Counts(
        nb_images_knn=int(min(math.ceil(requested / seeds), most)),
        nb_images_centroid=int(min(math.ceil(requested), most)),
    )
