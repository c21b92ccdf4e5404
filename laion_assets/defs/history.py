"""Read the measurements of a seed set's past runs from Dagster's history.

Dagster's concept: https://docs.dagster.io/guides/build/assets/metadata-and-tags
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from laion_assets.defs.dagster_internals import DATA_VERSION_TAG
from laion_assets.defs.settings import BLOCK_LIST, ResolvedSettings
from laion_assets.search.sizing import EXPECT_ALIVE, USUAL, Yield

MATERIALIZATIONS_READ = 20  # the latest first
PAGE = 20  # materializations in memory at a time; each may hold an image
YIELD, RECEIVED = "yield", "received"
FOR_THE_TARGET = "images for the target"
CHECKSUM = "crc32c"  # of a table's file
URLS_ALIVE = "URLs that work"  # a share
LEAST_ALIVE = 0.2  # a smaller share rather means that this machine's network failed
MOST_OF = 0.9  # share of the requested images; a search that returns fewer ran out of rows
PROVENANCE = "provenance"
SETTINGS = "settings"  # a table; `PROVENANCE` leaves out what it shows
NODE = "node"  # metadata of a staged index on a cluster: the node that holds the copy
FINGERPRINT = "fingerprint"  # of a staged index
ROW_COUNT = "dagster/row_count"  # of an index; the UI shows it
DETAILS = "details"  # metadata: all figures that a page does not show in a row
DECIDE_THE_YIELD = ("dedup_threshold", "filters", BLOCK_LIST)


@dataclass(frozen=True)
class PastMaterialization:
    """One materialization of an asset for a seed set.

    Attributes:
        run: id of its run.
        figures: its metadata, as plain values.

    """

    run: str
    figures: Mapping[str, Any]

    @property
    def index(self) -> str | None:
        """The fingerprint of the index that was searched."""
        return (self.figures.get(PROVENANCE) or {}).get("index")

    @property
    def asked(self) -> Mapping[str, Any] | None:
        """The settings, as requested or computed; None if another release did not record them."""
        try:
            rows = [record.data for record in self.figures[SETTINGS].records]
            return ResolvedSettings.from_rows(rows).asked()
        except (AttributeError, KeyError, ValueError):
            return None


def figures_of(metadata: Mapping[str, dg.MetadataValue]) -> dict[str, Any]:
    """Return the metadata of a materialization as plain values, with those of its details."""
    plain: dict[str, Any] = {name: value.value for name, value in metadata.items()}
    details: Mapping[str, Any] = plain.pop(DETAILS, {})
    return {**plain, **details}


def materializations(
    instance: dg.DagsterInstance, asset: str, seed_set: str | None = None
) -> Iterator[PastMaterialization]:
    """Yield the last materializations of an asset, the latest first.

    Args:
        instance: the instance with the history.
        asset: name of the asset.
        seed_set: the partition; None for an asset without partitions.

    """
    wanted = dg.AssetRecordsFilter(dg.AssetKey(asset), seed_set and [seed_set])
    cursor = None
    for _ in range(MATERIALIZATIONS_READ):
        # Read one at a time: most callers need only the first, and each may hold an image.
        page = instance.fetch_materializations(wanted, limit=1, cursor=cursor)
        for record in page.records:
            made = record.asset_materialization
            if made is not None:
                yield PastMaterialization(record.run_id, figures_of(made.metadata))
        if not page.has_more:
            return
        cursor = page.cursor


def asset_of_step(step: str) -> str:
    """Return the asset of a step, whose key may be like `knn_urls.search[0003]`."""
    return step.partition(".")[0]


def staged_indices(instance: dg.DagsterInstance) -> list[Mapping[str, Any]]:
    """Return the figures of the last stagings, the latest first.

    Materializations that were reported manually in the UI have no figures and are left out.
    """
    found = (past.figures for past in materializations(instance, "staged_laion_index"))
    return [figures for figures in found if FINGERPRINT in figures]


def rows_of_the_index(staged: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the number of rows of the index that was staged last; None if unknown.

    A step that restaged the index did not count its rows, but an earlier one did.
    """
    rows = (
        each[ROW_COUNT]
        for each in staged
        if ROW_COUNT in each and each[FINGERPRINT] == staged[0][FINGERPRINT]
    )
    return next(rows, None)


def nodes_with_a_copy(instance: dg.DagsterInstance) -> list[str]:
    """Return the cluster's nodes on which the current index was staged or found, the latest first.

    It is a record, not the state of their disks: a node may be gone or empty.
    """
    staged = dg.AssetKey("staged_laion_index")
    records = instance.fetch_materializations(staged, limit=MATERIALIZATIONS_READ).records
    made = [record.asset_materialization for record in records if record.asset_materialization]
    versions = [(one.tags or {}).get(DATA_VERSION_TAG) for one in made]
    nodes = [
        str(one.metadata[NODE].value)
        for one, version in zip(made, versions, strict=True)
        if version == versions[0] and NODE in one.metadata
    ]
    return list(dict.fromkeys(nodes))


def received_since(instance: dg.DagsterInstance, asset: str, since: float, other_than: str) -> int:
    """Return how many images the finished searches of an asset received.

    Args:
        instance: the instance with the history.
        asset: name of the asset.
        since: seconds since 1970; earlier searches do not count.
        other_than: id of a run whose searches do not count.

    """
    wanted = dg.AssetRecordsFilter(dg.AssetKey(asset), after_timestamp=since)
    found, cursor, has_more = 0, None, True
    while has_more:
        page = instance.fetch_materializations(wanted, limit=PAGE, cursor=cursor)
        for record in page.records:
            made = record.asset_materialization
            if made is not None and record.run_id != other_than:
                found += int(figures_of(made.metadata).get(RECEIVED, 0))
        cursor, has_more = page.cursor, page.has_more
    return found


def measured_yield(
    instance: dg.DagsterInstance, seed_set: str, asked: Mapping[str, Any], indices: Collection[str]
) -> Yield:
    """Return the yield of a set's last run with the same threshold, filters and block list.

    Runs that kept nothing are skipped. So are runs that requested more than the index holds, because
    their yield says nothing about smaller requests. If no run is left, the usual yield is returned.

    Args:
        instance: the instance with the history.
        seed_set: the partition.
        asked: the current request, see `ResolvedSettings.asked`.
        indices: fingerprints of the index; runs on others do not count.

    """
    wanted = {name: asked[name] for name in DECIDE_THE_YIELD}
    for past in materializations(instance, "combined_urls", seed_set):
        then = past.asked
        if (
            then
            and past.index in indices
            and past.figures.get(YIELD)
            and not _exhausted_the_index(past)
            and {name: then.get(name) for name in wanted} == wanted
        ):
            return Yield(past.figures[YIELD], f"measured by run {past.run[:8]}")
    return USUAL


def _exhausted_the_index(past: PastMaterialization) -> bool:
    figures = past.figures
    return "received" in figures and figures["received"] < MOST_OF * figures["requested"]


def expected_alive(instance: dg.DagsterInstance, seed_set: str | None) -> tuple[float, str]:
    """Return the share of a set's URLs that is expected to work, and where it comes from.

    Args:
        instance: the instance with the history.
        seed_set: the partition; None for a set that is not known yet.

    """
    for past in materializations(instance, "combined_urls", seed_set) if seed_set else ():
        if past.figures.get(URLS_ALIVE, 0) >= LEAST_ALIVE:
            return past.figures[URLS_ALIVE], f"measured by run {past.run[:8]}"
    return EXPECT_ALIVE, "default"
