"""Repeat what Dagster has missed: the retry of a run, and the turn of a step that waits for its pool.

Dagster stores the event of a failure before the run's new status. Its daemon that retries runs looks at
each event once: if it comes between the two, it finds a run that has not failed, and never looks again.

A step that finds its pool full waits until the step that leaves the pool assigns it the place. If one
joins the queue while the other leaves, nobody assigns it, and it would wait for ever.

Dagster's concept: https://docs.dagster.io/guides/automate/sensors
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from laion_assets.defs.dagster_internals import AUTO_RETRY_RUN_ID_TAG, WILL_RETRY_TAG
from laion_assets.defs.terminal import some

MISSED_AFTER = 60.0  # seconds; the daemon looks for failures every few seconds
GIVEN_UP_AFTER = timedelta(hours=1)
INTERVAL = 15  # seconds between ticks


def build_missed_retries_sensor() -> dg.SensorDefinition:
    """Return the sensor that repeats what Dagster has missed; it is on, whatever other sensors are."""

    @dg.sensor(
        name="missed_retries_sensor",
        minimum_interval_seconds=INTERVAL,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Retries killed runs whose failure Dagster has missed, and assigns places in pools "
        "that it has not assigned. It starts nothing that was not requested.",
    )
    def missed_retries_sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        assign_missed_places(context.instance)
        retried = report_missed_retries(context.instance)
        return dg.SkipReason(f"retries again: {some(retried)}" if retried else "no retry was missed")

    return missed_retries_sensor


def report_missed_retries(instance: dg.DagsterInstance) -> list[str]:
    """Report the failure of runs again that are to be retried, but were not; return their ids."""
    missed = []
    waiting = dg.RunsFilter(
        statuses=[dg.DagsterRunStatus.FAILURE],
        tags={WILL_RETRY_TAG: "true"},
        updated_after=datetime.now(UTC) - GIVEN_UP_AFTER,
    )
    for record in instance.get_run_records(waiting):
        run = record.dagster_run
        if AUTO_RETRY_RUN_ID_TAG not in run.tags and _is_missed(instance, run.run_id):
            instance.report_run_failed(
                run, "the retry of this run was missed: the failure is reported again"
            )
            missed.append(run.run_id)
    return missed


def _is_missed(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Return whether a failure is old enough to be missed, but not so old that it is given up.

    Reporting a failure again changes the end of the run, so only its events say when it first failed.
    """
    reports = instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
    if not reports:
        return False
    first, last = (time.time() - reports[place].timestamp for place in (0, -1))
    return last > MISSED_AFTER and first < GIVEN_UP_AFTER.total_seconds()


def assign_missed_places(instance: dg.DagsterInstance) -> None:
    """Assign the free places of pools to steps that wait for them."""
    storage: Any = instance.event_log_storage  # one in SQL, if it has pools
    for pool in storage.get_concurrency_keys() if storage.supports_global_concurrency_limits else ():
        if storage.has_unassigned_slots(pool):
            storage.assign_pending_steps([pool])
