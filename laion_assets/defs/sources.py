"""The sources of the graph, and their versions, from which Dagster derives what is stale.

Dagster's concept: https://docs.dagster.io/guides/build/assets/external-assets
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import dagster as dg

from laion_assets.defs.dagster_internals import DATA_VERSION_TAG, extract_data_version_from_entry
from laion_assets.defs.failures import sentence
from laion_assets.defs.partitions import seed_sets
from laion_assets.defs.settings import Defaults, ResolvedSettings, RetrievalConfig, changes
from laion_assets.defs.terminal import count, some
from laion_assets.io.errors import InputError
from laion_assets.io.text import as_bytes
from laion_assets.seeds import Seeds, SeedSet

REMOVED = "removed"  # data version of a seed set whose folder is gone or empty
SETTINGS = "settings"  # metadata of an observation: the settings that a run would use
FIRST = "first observation"
OBSERVATIONS_READ = 5  # the latest first; observations of unusable settings have no settings
CHANGED = "changed"  # metadata of an observation: differences from the previous one

laion_index_source = dg.AssetSpec(
    "laion_index_source",
    group_name="sources",
    kinds={"faiss", "arrow"},
    description="The published index and its metadata at LAION_INDEX_URI. External: a sensor lists it "
    "every few minutes; if it has changed, `staged_laion_index` is stale.",
)
seed_folder = dg.AssetSpec(
    "seed_folder",
    group_name="sources",
    kinds={"image"},
    partitions_def=seed_sets,
    description="A folder of seeds under LAION_SEEDS_URI for each seed set. External: a sensor lists it "
    "and runs new and changed seed sets.",
)
retrieval_settings = dg.AssetSpec(
    "retrieval_settings",
    group_name="sources",
    kinds={"yaml"},
    partitions_def=seed_sets,
    description="The current settings of the seed set: its settings.yaml, the environment and the block "
    "list. External: if they change, the URL tables are stale, and the observation says what changed. "
    "Values from the Launchpad apply to one run and are not part of them.",
)
embedding_files = dg.AssetSpec(
    "embedding_files",
    group_name="build",
    kinds={"numpy", "parquet"},
    description="The published embeddings and their metadata at LAION_EMBEDDINGS_URI. External: a sensor "
    "lists them and adds new ones to the index.",
)
SOURCES = (seed_folder, retrieval_settings)


@dataclass(frozen=True)
class Version:
    """A version of a source or of one of its partitions.

    Attributes:
        source: key of the source.
        value: the data version.
        seed_set: the partition; None for a source without partitions.
        metadata: metadata of the observation.

    """

    source: dg.AssetKey
    value: str
    seed_set: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def events(self) -> tuple[dg.AssetObservation, dg.AssetMaterialization]:
        """Return the events that report the version.

        Dagster compares observations of a partitioned source, but materializations of other sources. The
        UI counts a partition as filled only if it is materialized. So both events are reported.
        """
        tags = {DATA_VERSION_TAG: self.value}
        metadata = {**self.metadata, "fingerprint": self.value}
        return (
            dg.AssetObservation(self.source, partition=self.seed_set, metadata=metadata, tags=tags),
            dg.AssetMaterialization(self.source, partition=self.seed_set, metadata=metadata, tags=tags),
        )


def seeds_version(seed_set: SeedSet, read: Seeds | None = None) -> Version:
    """Return the version of a set's seeds, with its files, and with what was read from them."""
    lists = {
        "files": [file.name for file in seed_set.files + seed_set.settings_files],
        "images not embedded, the set has embeddings": seed_set.not_embedded,
        "ignored files, no seeds": seed_set.ignored,
    }
    listed = {what: some(names) for what, names in lists.items() if names}
    size = sum(file.size for file in seed_set.files)
    told = {"about": f"{seed_set.contents()}, {as_bytes(size)}"}
    if read is not None:
        seeds, dimension = read.embeddings.shape
        told["seeds"] = f"{count(seeds, 'vector')} of {count(dimension, 'dimension')}"
    return Version(seed_folder.key, seed_set.fingerprint, seed_set.name, {**told, **listed})


def settings_version(seed_set: str, settings: ResolvedSettings | str) -> Version:
    """Return the version of the settings of a seed set.

    Args:
        seed_set: the partition.
        settings: the current settings, or the reason why they cannot be used. A reason is a version too:
            it makes the tables stale, and the observation shows it.

    """
    key = retrieval_settings.key
    if isinstance(settings, str):
        return Version(key, _fingerprint(settings), seed_set, {CHANGED: f"cannot be used: {settings}"})
    asked = settings.asked()
    given = {name: value for name, value in asked.items() if value is not None}
    return Version(key, _fingerprint(asked), seed_set, {SETTINGS: dg.MetadataValue.json(given)})


def current_settings(
    defaults: Defaults, of_seed_set: Mapping[str, Any], seed_set: str, block_list: str | None
) -> ResolvedSettings | str:
    """Return the current settings of a seed set, or the reason why they cannot be used.

    Args:
        defaults: settings of the environment.
        of_seed_set: contents of its settings.yaml.
        seed_set: the partition.
        block_list: description of the block list.

    """
    try:
        return RetrievalConfig().resolve(defaults, of_seed_set, seed_set, block_list)
    except InputError as error:
        return sentence(error)


def with_changes(instance: dg.DagsterInstance, version: Version) -> Version:
    """Add the differences from the previous observation to a version of the settings."""
    now = version.metadata.get(SETTINGS)
    if now is None:
        return version
    before = _last_settings(instance, version.seed_set or "")
    changed = FIRST if before is None else "; ".join(changes(before, now.value))
    return replace(version, metadata={CHANGED: changed or "as before", **version.metadata})


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _last_settings(instance: dg.DagsterInstance, seed_set: str) -> Mapping[str, Any] | None:
    wanted = dg.AssetRecordsFilter(retrieval_settings.key, [seed_set])
    records = instance.fetch_observations(wanted, limit=OBSERVATIONS_READ).records
    observed = (record.asset_observation for record in records)
    found = (each.metadata[SETTINGS].value for each in observed if each and SETTINGS in each.metadata)
    return next(found, None)  # type: ignore[return-value]  # JSON of `ResolvedSettings.asked`


def last_version(
    instance: dg.DagsterInstance,
    asset: dg.AssetKey,
    seed_set: str | None = None,
    *,
    observed: bool | None = None,
) -> str | None:
    """Return the last reported data version of an asset.

    Args:
        instance: the instance with the history.
        asset: key of the asset.
        seed_set: the partition; None for an asset without partitions.
        observed: True reads observations, False materializations, None the events that Dagster compares.

    """
    record = instance.get_latest_data_version_record(asset, observed, seed_set)
    version = extract_data_version_from_entry(record.event_log_entry) if record else None
    return version.value if version else None


def is_known(instance: dg.DagsterInstance, version: Version) -> bool:
    """Return whether a version of a source is the last reported one, in both events."""
    return all(
        last_version(instance, version.source, version.seed_set, observed=observed) == version.value
        for observed in (True, False)
    )


def last_versions(
    instance: dg.DagsterInstance, asset: dg.AssetKey, event: dg.DagsterEventType
) -> Mapping[str, str]:
    """Return the last reported data version of each partition, in one query."""
    found = instance.event_log_storage.get_latest_tags_by_partition(asset, event, [DATA_VERSION_TAG])
    return {partition: tags[DATA_VERSION_TAG] for partition, tags in found.items()}


def observe(context: dg.AssetExecutionContext, version: Version) -> None:
    """Report the version of a source that a step is about to read, as the input version of its output.

    Dagster takes a snapshot of the input versions when a step starts. If a source turns out to have
    another version, its snapshot is dropped and taken again.
    """
    if is_known(context.instance, version):
        return
    observation, materialization = with_changes(context.instance, version).events()
    context.log_event(observation)
    context.instance.report_runless_asset_event(materialization)
    context.get_step_execution_context().wipe_input_asset_version_info(version.source)


def show_seeds(context: dg.AssetExecutionContext, seed_set: SeedSet, read: Seeds) -> None:
    """Show on the seed folder's page what only reading reveals; its version stays the same."""
    _, materialization = seeds_version(seed_set, read).events()
    context.instance.report_runless_asset_event(materialization)
