"""Runs of killed commands are found, and leave nothing behind; tests/ui kills those of `make dev`."""

import fcntl
import os
import time

import dagster as dg
import pytest

from laion_assets.defs import launcher
from laion_assets.defs.launcher import LOCK_TAG, LOCKS, fail_abandoned_runs, process_lock


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_next_command_removes_the_files_of_killed_ones_and_no_others() -> None:
    LOCKS.mkdir(parents=True)
    killed, killed_early, starting, busy = (
        LOCKS / name for name in ("killed", "early.new", "starting.new", "busy")
    )
    for path in (killed, killed_early, starting, busy):
        path.touch()
    hours_ago = time.time() - 2 * launcher.ABANDONED
    os.utime(killed_early, (hours_ago, hours_ago))
    with busy.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with process_lock() as tags:
            assert {*LOCKS.absolute().iterdir()} == {
                busy.absolute(),
                starting.absolute(),
                LOCKS.absolute() / tags[LOCK_TAG],
            }
    assert {*LOCKS.iterdir()} == {busy, starting}


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTED])
def test_a_run_whose_command_was_killed_is_failed_whether_it_had_started(status) -> None:
    @dg.job
    def job() -> None: ...

    with dg.DagsterInstance.ephemeral() as instance, process_lock() as tags:
        killed = tags | {LOCK_TAG: tags[LOCK_TAG] + "gone"}
        alive, gone = (
            instance.create_run_for_job(job, status=status, tags=each) for each in (tags, killed)
        )
        queued = instance.create_run_for_job(job)  # of the UI; its daemon knows
        assert fail_abandoned_runs(instance) == [gone.run_id]
        statuses = {run.run_id: run.status for run in instance.get_runs()}
    assert statuses == {
        alive.run_id: status,
        gone.run_id: dg.DagsterRunStatus.FAILURE,
        queued.run_id: dg.DagsterRunStatus.NOT_STARTED,
    }
