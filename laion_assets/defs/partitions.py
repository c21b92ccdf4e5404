"""The partitions: one per seed set, and one per shard of a built index.

Dagster's concept: https://docs.dagster.io/guides/build/partitions-and-backfills
"""

import dagster as dg

from laion_assets.io.errors import InputError

SEED_SETS = "seed_sets"
JOB = "seed_set_job"  # runs all assets of one seed set
seed_sets = dg.DynamicPartitionsDefinition(name=SEED_SETS)
SHARDS = "index_shards"
index_shards = dg.DynamicPartitionsDefinition(name=SHARDS)


def require_seed_set(context: dg.AssetExecutionContext) -> None:
    """Fail a run of a seed set's assets that was launched without a partition.

    The first steps of a run call this. Dagster starts such a run, but then fails without a remedy in the
    first step with a partitioned input.

    Raises:
        InputError: the run has no partition.

    """
    layer = context.job_def.asset_layer
    of_seed_sets = any(layer.get(key).partitions_def for key in layer.selected_asset_keys)
    if of_seed_sets and not context.has_partition_key:
        raise InputError("no seed set was chosen: launch the run for a partition, which is a seed set")
