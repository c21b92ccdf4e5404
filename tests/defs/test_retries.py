"""A run that was killed is retried even where Dagster's daemon has missed its failure."""

import dagster as dg
import pytest

from laion_assets.defs import retries
from laion_assets.defs.dagster_internals import AUTO_RETRY_RUN_ID_TAG, WILL_RETRY_TAG
from laion_assets.defs.retries import report_missed_retries


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
        report_missed_retries(instance)
        kinds = [entry.dagster_event_type for entry in instance.all_logs(run.run_id)]
        assert kinds.count(dg.DagsterEventType.PIPELINE_FAILURE) == reports
