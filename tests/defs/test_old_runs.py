"""Old runs are deleted with their events, but none that an asset's page or a sensor needs."""

from datetime import UTC, datetime, timedelta

import dagster as dg
import numpy as np
import pytest
from helpers.project import Demo, Project, Ticks, new_project

from laion_assets.definitions import build_defs
from laion_assets.defs.history import materializations
from laion_assets.defs.old_runs import (
    DELETE_JOB,
    DELETE_STEP,
    MOST_DAYS,
    SCHEDULE,
    DeleteOldRuns,
    old_runs,
)
from laion_assets.defs.seed_set_states import states_of

ASSETS = ("seed_embeddings", "centroid_vector")


def delete(project: Project, days: int) -> bool:
    job = project.defs.resolve_job_def(DELETE_JOB)
    config = {"ops": {DELETE_STEP: {"config": {"older_than_days": days}}}}
    return job.execute_in_process(run_config=config, instance=project.instance).success


def test_old_runs_go_but_for_those_whose_events_the_ui_and_the_sensor_need(demo: Demo, tmp_path):
    with new_project(tmp_path, demo.index) as project:
        instance, sets = project.instance, ["broken", "usable"]
        for name in sets:
            (project.seeds / name).mkdir()
            np.save(project.seeds / name / "a.npy", np.random.default_rng(0).normal(size=(4, 256)))
        (project.seeds / "broken" / "b.npy").write_bytes(b"no array")
        observed, repeated, last = (project.run("usable", *ASSETS).run_id for _ in range(3))
        one = project.run("usable", "seed_embeddings").run_id
        failed = [project.run("broken", *ASSETS).run_id for _ in range(3)]
        ticks, states = Ticks(project), states_of(instance, sets)
        before = [ticks.tick() for _ in range(3)]

        assert delete(project, 1)
        assert {observed, repeated, last, one, *failed} <= {run.run_id for run in instance.get_runs()}
        old = [run.run_id for run in old_runs(instance, datetime.now(UTC) + timedelta(hours=1))]
        assert old == [repeated, failed[1]]  # the first of each observed its folder
        for run in old:
            instance.delete_run(run)

        def made_by(asset: str) -> list[str]:
            return [past.run for past in materializations(instance, asset, "usable")]

        assert made_by("seed_embeddings") == [one, last, observed]
        assert made_by("centroid_vector") == [last, observed]
        assert states_of(instance, sets) == states
        assert [ticks.tick() for _ in range(3)] == before == [[]] * 3


@pytest.mark.parametrize("days", [-1, 0, 10**9])
def test_days_that_have_not_passed_are_refused(days):
    with pytest.raises(ValueError, match="older_than_days"):
        DeleteOldRuns(older_than_days=days)


def test_runs_of_a_hundred_years_ago_are_looked_for():
    with dg.DagsterInstance.ephemeral() as instance:
        assert not list(old_runs(instance, datetime.now(UTC) - timedelta(days=MOST_DAYS)))


def test_nothing_is_deleted_until_the_schedule_is_turned_on():
    schedule = build_defs({}).resolve_schedule_def(SCHEDULE)
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    assert schedule.job_name == DELETE_JOB
