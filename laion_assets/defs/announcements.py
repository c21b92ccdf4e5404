"""What a run announces, so that the UI shows as failed only what was tried and failed.

Dagster announces all tables and checks of a run when the run starts. If the run fails, the UI counts each
that is missing as failed, also those of steps that were never reached: one unusable seed set would turn
the boxes of five assets red. So checks are not announced, and a failed step withdraws the tables that
depend on it. Its own table stays failed until the set is run again, removed or forgotten.

Dagster's concept: https://docs.dagster.io/guides/build/partitions-and-backfills
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Set
from typing import Any

import dagster as dg

from laion_assets.defs.dagster_internals import (
    PARTITION_NAME_TAG,
    RUNLESS_JOB_NAME,
    RUNLESS_RUN_ID,
    AssetMaterializationPlannedData,
    AssetPartitionStatus,
    DagsterEvent,
    ExecutionPlanSnapshot,
)
from laion_assets.defs.history import asset_of_step
from laion_assets.defs.partitions import seed_sets


class Unannounced(dg.AssetsDefinition):
    """An asset whose checks are evaluated by its step, but not announced when a run starts.

    Dagster accepts evaluations that were not planned, so the plan leaves them out.
    """

    @classmethod
    def of(cls, asset: dg.AssetsDefinition) -> Unannounced:
        """Return the asset with unannounced checks."""
        return cls.dagster_internal_init(**asset.get_attributes_dict())

    @staticmethod
    def dagster_internal_init(**attributes: Any) -> Unannounced:
        """Copy the asset; Dagster calls this when it adds owners or selects assets."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dg.BetaWarning)
            return Unannounced(**attributes)

    @property
    def asset_and_check_keys(self) -> Set[dg.AssetKey]:
        """The keys of which a plan announces the outputs."""
        return self.keys


@dg.failure_hook
def withdraw_unreached(context: dg.HookContext) -> None:
    """Withdraw the tables that depend on a failed step."""
    run = context.instance.get_run_by_id(context.run_id)
    if run is None or run.execution_plan_snapshot_id is None or PARTITION_NAME_TAG not in run.tags:
        return
    plan = context.instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id)
    for asset in _made_after(plan, context.step_key):
        _withdraw(context.instance, asset, run.tags[PARTITION_NAME_TAG])


def withdraw_failed(instance: dg.DagsterInstance, assets: Collection[str], seed_set: str) -> None:
    """Withdraw the tables of a seed set that failed; used when its folder is removed."""
    for asset in map(dg.AssetKey, assets):
        statuses = instance.get_status_by_partition(asset, [seed_set], seed_sets) or {}
        if statuses.get(seed_set) is AssetPartitionStatus.FAILED:
            _withdraw(instance, asset, seed_set)
            instance.event_log_storage.wipe_asset_cached_status(asset)  # or it stays failed there


def _made_after(plan: ExecutionPlanSnapshot, failed: str) -> list[dg.AssetKey]:
    """Return the other assets of a plan whose steps depend on a step, directly or transitively."""
    own = dg.AssetKey(asset_of_step(failed))
    failed = re.sub(r"\[.+\]", "[?]", failed)  # a plan has one step for all shards
    needs = {
        step.key: {handle.step_key for needed in step.inputs for handle in needed.upstream_output_handles}
        for step in plan.steps
    }
    unreached = {failed}
    while more := {key for key, needed in needs.items() if needed & unreached} - unreached:
        unreached |= more
    return [
        output.properties.asset_key
        for step in plan.steps
        if step.key in unreached - {failed} and step.key in plan.step_keys_to_execute
        for output in step.outputs
        if output.properties and output.properties.asset_key not in (None, own)
    ]


def _withdraw(instance: dg.DagsterInstance, asset: dg.AssetKey, partition: str) -> None:
    """Let no run announce a table, so that it is neither failed nor in progress."""
    announced = AssetMaterializationPlannedData(asset, partition=partition)
    instance.report_dagster_event(
        DagsterEvent.build_asset_materialization_planned_event(
            RUNLESS_JOB_NAME, asset.to_python_identifier(), announced
        ),
        run_id=RUNLESS_RUN_ID,
    )
