"""What the Launchpad shows for a seed set before anything is typed: its current settings.

Dagster's concept: https://docs.dagster.io/guides/build/partitions-and-backfills/partitioning-assets
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from laion_assets.defs.partitions import seed_sets
from laion_assets.defs.resources import SeedFolder
from laion_assets.defs.settings import Defaults, RetrievalConfig
from laion_assets.io.errors import InputError


def run_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run with settings of its own."""
    return {"resources": {"retrieval_config": {"config": dict(settings)}}}


def prefilled(seeds: SeedFolder, defaults: Defaults) -> dg.PartitionedConfig[Any]:
    """Return the configuration of the job by seed set: the settings that a run would use.

    A value that is left unchanged is no value of the run, see `RetrievalConfig.resolve`.
    """

    def of_seed_set(name: str) -> dict[str, Any]:
        try:
            own = seeds.settings(seeds.find(name))
            values = RetrievalConfig().resolve(defaults, own, name).values
        except InputError:
            return run_config({})  # the run fails with the sentence; an error here would hide it
        return run_config(values.model_dump(exclude_none=True))

    return dg.PartitionedConfig(seed_sets, run_config_for_partition_key_fn=of_seed_set)
