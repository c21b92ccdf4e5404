"""What past runs of a seed set have measured, as Dagster's history has it.

What must not live here: what is made of it; what tables say of themselves.
Dagster's concept: https://docs.dagster.io/guides/build/assets/metadata-and-tags
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from laion_assets.defs.settings import BLOCK_LIST
from laion_assets.search.sizing import USUAL, Yield

LOOKED_AT = 20  # materializations, the latest first
YIELD = "yield"
MADE_WITH = "made with"  # the settings that were asked for: what follows from them is no difference
OWN_SETTINGS = "settings of its own"
THAT_CHANGE_THE_YIELD = ("dedup_threshold", "filters", BLOCK_LIST)


@dataclass(frozen=True)
class Materialized:
    """One materialization of an asset for a seed set.

    Attributes:
        run: id of the run that made it.
        storage_id: of the event, by which Dagster tells it from others.
        timestamp: of the event, seconds since 1970.
        figures: its metadata, as plain values.

    """

    run: str
    storage_id: int
    timestamp: float
    figures: Mapping[str, Any]


def materializations(
    instance: dg.DagsterInstance, asset: str, seed_set: str | None = None, before: float | None = None
) -> Iterator[Materialized]:
    """Yield what was reported of the last materializations, the latest first.

    Args:
        instance: whose history to look into.
        asset: name.
        seed_set: partition; None for an asset that has none.
        before: seconds since 1970; what came later does not count.

    """
    asked = dg.AssetRecordsFilter(dg.AssetKey(asset), seed_set and [seed_set], before_timestamp=before)
    cursor = None
    for _ in range(LOOKED_AT):
        # One by one, as most callers need no other, and each may hold a picture.
        page = instance.fetch_materializations(asked, limit=1, cursor=cursor)
        for record in page.records:
            made = record.asset_materialization
            if made is not None:
                figures = {name: value.value for name, value in made.metadata.items()}
                yield Materialized(record.run_id, record.storage_id, record.timestamp, figures)
        if not page.has_more:
            return
        cursor = page.cursor


def measured_yield(
    instance: dg.DagsterInstance, seed_set: str, asked: Mapping[str, Any], before: float | None = None
) -> Yield:
    """Return the combined yield of the last run of a set with settings that give the same one.

    A run that kept nothing, or that had another threshold, other filters or another block list, tells
    nothing; without any other the yield is the one that is usual.

    Args:
        instance: whose history to look into.
        seed_set: partition.
        asked: settings and block list, as `Settings.recorded` has them.
        before: seconds since 1970; what came later does not count.

    """
    wanted = {name: asked[name] for name in THAT_CHANGE_THE_YIELD}
    for past in materializations(instance, "combined_urls", seed_set, before):
        made_with = past.figures.get(MADE_WITH, {})
        if past.figures.get(YIELD) and {name: made_with.get(name) for name in wanted} == wanted:
            return Yield(past.figures[YIELD], f"measured by run {past.run[:8]}")
    return USUAL


def yield_for(context: dg.AssetExecutionContext, seed_set: str, asked: Mapping[str, Any]) -> Yield:
    """Return the yield that a run counts on: the same in all its steps, whatever ends meanwhile."""
    record = context.instance.get_run_record_by_id(context.run.run_id)
    began = record.create_timestamp.timestamp() if record else None
    return measured_yield(context.instance, seed_set, asked, began)
