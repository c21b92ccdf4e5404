"""How many images may be requested: by one run, and in a day."""

from __future__ import annotations

import time
from dataclasses import dataclass

import dagster as dg

from laion_assets.defs.history import received_since, rows_of_the_index, staged_indices
from laion_assets.defs.places import Places
from laion_assets.defs.settings import COUNTS, ResolvedSettings
from laion_assets.io.errors import InputError
from laion_assets.io.text import count
from laion_assets.search.sizing import kept_by_each

DAY = 24 * 60 * 60.0  # seconds
SEARCHES = ("knn_urls", "centroid_urls")


@dataclass(frozen=True)
class Bounds:
    """The most images that may be requested, so that a misprint does not cost hours and gigabytes.

    Attributes:
        run: by one run; None without a bound.
        day: by all runs within 24 hours, including the one that asks; None without a bound.

    """

    run: int | None
    day: int | None

    @classmethod
    def at(cls, places: Places) -> Bounds:
        """Return the bounds that the environment sets."""
        return cls(places.max_images, places.max_images_per_day)

    def check(self, context: dg.AssetExecutionContext, settings: ResolvedSettings, seeds: int) -> None:
        """Check what the run of a step requests, before anything is opened or searched.

        No query returns more than the rows of the index, so no more are counted if the index was staged
        before.

        Args:
            context: the step of one of the two searches.
            settings: with both numbers of images.
            seeds: number of seeds.

        Raises:
            InputError: it is too much; the message says how much is requested and allowed.

        """
        if self.run is None and self.day is None:
            return
        requested = _requested(context, settings, seeds)
        if self.run is not None and requested > self.run:
            raise InputError(
                f"this run requests {count(requested, 'image')}, but LAION_MAX_IMAGES allows {self.run:,}"
                ": request fewer, or raise it"
            )
        if self.day is None:
            return
        before = sum(
            received_since(context.instance, name, time.time() - DAY, context.run.run_id)
            for name in SEARCHES
        )
        if before + requested > self.day:
            raise InputError(
                f"this run requests {count(requested, 'image')} after {before:,} in the last 24 hours, "
                f"but LAION_MAX_IMAGES_PER_DAY allows {self.day:,}: wait, request fewer, or raise it"
            )


def _requested(context: dg.AssetExecutionContext, settings: ResolvedSettings, seeds: int) -> int:
    """Return the number of images that the searches of this run request together.

    With a target, these are the images to keep, from which the searches start.
    """
    selected = context.job_def.asset_layer.selected_asset_keys
    per_seed, around_the_mean = (
        kept_by_each(settings.images, queries) if settings.images else getattr(settings.values, name) or 0
        for name, queries in zip(COUNTS, (seeds, 1), strict=True)
    )
    rows = rows_of_the_index(staged_indices(context.instance))
    if rows is not None:
        per_seed, around_the_mean = min(per_seed, rows), min(around_the_mean, rows)
    both = zip(SEARCHES, (per_seed * seeds, around_the_mean), strict=True)
    return sum(images for name, images in both if dg.AssetKey(name) in selected)
