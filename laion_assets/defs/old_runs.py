"""Delete old runs with their events; Dagster keeps them forever.

Deleting a run deletes its events, also those on the pages of assets. So a run stays if it holds the last
materialization or observation of an asset or of one of its partitions. The last run of each job and
partition stays too: it says that a set has failed, and keeps sensors from starting it again.

Dagster's concept: https://docs.dagster.io/guides/automate/schedules
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg
from pydantic import Field

from laion_assets.defs.dagster_internals import PARTITION_NAME_TAG, DagsterEvent
from laion_assets.defs.failures import as_failures
from laion_assets.defs.history import MATERIALIZATIONS_READ
from laion_assets.defs.terminal import count

DELETE_JOB, DELETE_STEP = "delete_old_runs", "delete"
SCHEDULE = "delete_old_runs_weekly"
DAYS, MOST_DAYS = 90, 36_500
PAGE = 100  # runs in memory at a time
ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
EVENTS_OF_ASSETS = {dg.DagsterEventType.ASSET_MATERIALIZATION, dg.DagsterEventType.ASSET_OBSERVATION}


def old_runs(instance: dg.DagsterInstance, before: datetime) -> Iterator[dg.DagsterRun]:
    """Yield the runs that ended before a time and are not needed, the oldest first."""
    wanted = dg.RunsFilter(statuses=ENDED, updated_before=before)
    cursor = None
    while runs := instance.get_runs(wanted, cursor=cursor, limit=PAGE, ascending=True):
        cursor = runs[-1].run_id
        yield from (run for run in runs if not is_needed(instance, run))


def is_needed(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Return whether a run is the last of its kind, or holds the last event of an asset."""
    if _is_last(instance, run):
        return True
    events = (
        record.event_log_entry.dagster_event
        for record in instance.get_records_for_run(run.run_id, of_type=EVENTS_OF_ASSETS).records
    )
    return any(run.run_id in _runs_of_last(instance, event) for event in events if event)


def _is_last(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Return whether no later run is of the same job and partition."""
    partition = run.tags.get(PARTITION_NAME_TAG)
    tags = {PARTITION_NAME_TAG: partition} if partition else {}
    same = dg.RunsFilter(job_name=run.job_name, tags=tags)
    return [last.run_id for last in instance.get_runs(same, limit=1)] == [run.run_id]


def _runs_of_last(instance: dg.DagsterInstance, event: DagsterEvent) -> set[str]:
    """Return the runs with the last events of the same asset and partition.

    Of an asset without partitions, they are the last few that requests read: each node has its staging.
    """
    asset, partition = event.asset_key, event.partition
    if asset is None:
        return set()
    wanted = dg.AssetRecordsFilter(asset, [partition] if partition else None)
    limit = 1 if partition else MATERIALIZATIONS_READ
    is_made = event.event_type is dg.DagsterEventType.ASSET_MATERIALIZATION
    fetch = instance.fetch_materializations if is_made else instance.fetch_observations
    return {record.run_id for record in fetch(wanted, limit=limit).records}


class DeleteOldRuns(dg.Config):
    """What the job is asked to delete."""

    older_than_days: int = Field(
        DAYS, ge=1, le=MOST_DAYS, description="delete runs that ended so many days ago"
    )


def delete_old_runs_job() -> dg.JobDefinition:
    """Return the job that deletes old runs."""

    @dg.op(name=DELETE_STEP)
    def delete(context: dg.OpExecutionContext, config: DeleteOldRuns) -> None:
        """Delete old runs with their events."""
        with as_failures():
            before = datetime.now(UTC) - timedelta(days=config.older_than_days)
            runs = [run.run_id for run in old_runs(context.instance, before)]
            for run in runs:
                context.instance.delete_run(run)
            context.log.info(f"deleted {count(len(runs), 'run')} that ended before {before:%b %d %Y}")

    @dg.job(
        name=DELETE_JOB,
        description="Deletes runs that ended long ago, with their events. The last run of each job and "
        "seed set stays, and so do runs with the last materialization of an asset.",
    )
    def job() -> None:
        delete()

    return job


def weekly(job: dg.JobDefinition) -> dg.ScheduleDefinition:
    """Return the schedule of the job, which is off until it is turned on."""
    return dg.ScheduleDefinition(
        name=SCHEDULE, job=job, cron_schedule="0 4 * * 0", default_status=dg.DefaultScheduleStatus.STOPPED
    )
