"""What Dagster misses is done by the next tick: a retry, and the turn of a step that waits."""

import time
from datetime import timedelta

import dagster as dg
import pytest

from laion_assets.definitions import build_defs
from laion_assets.defs import retries
from laion_assets.defs.dagster_internals import AUTO_RETRY_RUN_ID_TAG, WILL_RETRY_TAG


def tick(instance: dg.DagsterInstance) -> str:
    """Evaluate the sensor, which is on even where that of the seeds is off; return what it says."""
    repository = build_defs({"LAION_INDEX_URI": "gs://bucket/index"}).get_repository_def()
    sensor = repository.get_sensor_def("missed_retries_sensor")
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
    assert not sensor.has_jobs
    with dg.build_sensor_context(instance, repository_def=repository) as context:
        skipped = sensor(context)
    assert isinstance(skipped, dg.SkipReason)
    return skipped.skip_message or ""


@dg.job
def empty() -> None: ...


@pytest.mark.parametrize(
    ("tags", "seconds", "reports"),
    [
        ({WILL_RETRY_TAG: "true"}, -1, 2),
        ({WILL_RETRY_TAG: "true"}, 60, 1),
        ({WILL_RETRY_TAG: "true", AUTO_RETRY_RUN_ID_TAG: "another"}, -1, 1),
        ({WILL_RETRY_TAG: "false"}, -1, 1),
        ({}, -1, 1),
    ],
)
def test_a_failure_is_reported_again_if_its_retry_was_missed(tags, seconds, reports, monkeypatch) -> None:
    monkeypatch.setattr(retries, "MISSED_AFTER", seconds)
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(empty)
        instance.report_run_failed(run)
        instance.add_run_tags(run.run_id, tags)
        said = tick(instance)
        assert (run.run_id in said) == (reports == 2)
        kinds = [entry.dagster_event_type for entry in instance.all_logs(run.run_id)]
        assert kinds.count(dg.DagsterEventType.PIPELINE_FAILURE) == reports


def test_a_retry_that_never_comes_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(retries, "MISSED_AFTER", -1)
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(empty)
        instance.report_run_failed(run)
        instance.add_run_tags(run.run_id, {WILL_RETRY_TAG: "true"})
        time.sleep(1)
        assert run.run_id in tick(instance)  # which updates the run
        monkeypatch.setattr(retries, "GIVEN_UP_AFTER", timedelta(seconds=1))
        assert run.run_id not in tick(instance)


def test_a_step_that_nobody_assigned_a_place_gets_it(tmp_path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        storage = instance.event_log_storage
        storage.set_concurrency_slots("staging", 1)
        assert storage.claim_concurrency_slot("staging", "first", "step").is_claimed
        assert not storage.claim_concurrency_slot("staging", "second", "step").is_claimed
        tick(instance)
        assert not storage.claim_concurrency_slot("staging", "second", "step").is_claimed
        storage._free_concurrency_slots("first")
        storage._remove_pending_steps("first")  # and assigns nothing: the second was not in the queue yet
        assert not storage.claim_concurrency_slot("staging", "second", "step").is_claimed
        tick(instance)
        assert storage.claim_concurrency_slot("staging", "second", "step").is_claimed
