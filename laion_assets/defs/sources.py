"""What Dagster is told of the sources: which version is there, so that it knows what is stale.

What must not live here: looking at the sources.
Dagster's concept: https://docs.dagster.io/guides/build/assets/external-assets
"""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg
from dagster._core.definitions.data_version import DATA_VERSION_TAG, extract_data_version_from_entry


def observation(source: dg.AssetKey, version: str, seed_set: str | None = None) -> dg.AssetObservation:
    """Return the event that says which version of a source, or of one seed set of it, was seen."""
    return dg.AssetObservation(source, partition=seed_set, tags={DATA_VERSION_TAG: version})


def arrival(source: dg.AssetKey, version: str, seed_set: str | None = None) -> dg.AssetMaterialization:
    """Return the event that says that a source, or one seed set of it, is there in this version.

    Dagster takes the two for different things: of a partitioned source it compares what was observed, of
    any other, and for what its pages call filled, what was materialized, by whomever. So a seed set
    whose seeds were removed is told of in this way as well: its pages would go on to show the last ones.
    """
    return dg.AssetMaterialization(
        source,
        partition=seed_set,
        metadata={"fingerprint": version},
        tags={DATA_VERSION_TAG: version},
    )


def sighting(
    source: dg.AssetKey, version: str, seed_set: str | None = None
) -> tuple[dg.AssetObservation, dg.AssetMaterialization]:
    """Return both events, of what a sensor saw."""
    return observation(source, version, seed_set), arrival(source, version, seed_set)


def last_version(
    instance: dg.DagsterInstance, asset: dg.AssetKey, seed_set: str | None = None
) -> str | None:
    """Data version of an asset that Dagster was last told of."""
    record = instance.get_latest_data_version_record(asset, partition_key=seed_set)
    version = extract_data_version_from_entry(record.event_log_entry) if record else None
    return version.value if version else None


def is_known(
    instance: dg.DagsterInstance, source: dg.AssetKey, version: str, seed_set: str | None = None
) -> bool:
    """Tell whether this version of a source is the last that Dagster was told of, by both events."""
    for is_source in (True, False):  # observed, materialized
        record = instance.get_latest_data_version_record(source, is_source, seed_set)
        known = extract_data_version_from_entry(record.event_log_entry) if record else None
        if known is None or known.value != version:
            return False
    return True


def last_versions(
    instance: dg.DagsterInstance, asset: dg.AssetKey, event: dg.DagsterEventType
) -> Mapping[str, str]:
    """Data version of each partition that Dagster was last told of; one query for all."""
    found = instance.event_log_storage.get_latest_tags_by_partition(asset, event, [DATA_VERSION_TAG])
    return {partition: tags[DATA_VERSION_TAG] for partition, tags in found.items()}


def observe(
    context: dg.AssetExecutionContext, source: dg.AssetKey, version: str, seed_set: str | None = None
) -> None:
    """Tell Dagster what a step is about to read, so that what it makes counts as made from that.

    Dagster has noted the sources' versions already when a step begins; it looks again for those that
    turn out to be others.
    """
    if not is_known(context.instance, source, version, seed_set):
        context.log_event(observation(source, version, seed_set))
        context.instance.report_runless_asset_event(arrival(source, version, seed_set))
        context.get_step_execution_context().wipe_input_asset_version_info(source)
