"""The partitions: a seed set is a data set with a history of its own, a shard a part of a built index.

Dagster's concept: https://docs.dagster.io/guides/build/partitions-and-backfills
"""

import dagster as dg

from laion_assets.io.errors import InputError

SEED_SETS = "seed_sets"
seed_sets = dg.DynamicPartitionsDefinition(name=SEED_SETS)
SHARDS = "index_shards"
index_shards = dg.DynamicPartitionsDefinition(name=SHARDS)


def require_seed_set(context: dg.AssetExecutionContext) -> None:
    """Refuse a run that makes tables of a seed set and was launched for none.

    Called by the steps that begin a run: Dagster starts such a run, and fails without a remedy in the
    first step whose input has a history.

    Raises:
        InputError: says what to choose.

    """
    layer = context.job_def.asset_layer
    of_seed_sets = any(layer.get(key).partitions_def for key in layer.selected_asset_keys)
    if of_seed_sets and not context.has_partition_key:
        raise InputError("no seed set was chosen: launch the run for a partition; each is a seed set")
