"""A run launcher for one machine that detects killed runs and ends all their steps.

Dagster's default launcher cannot tell a killed run from a busy one. A killed run would stay "started",
keep its pool slots, and its steps would continue.

Dagster's concept: https://docs.dagster.io/deployment/execution/run-monitoring
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from laion_assets.defs.dagster_internals import (
    GRPC_INFO_TAG,
    HIDDEN_TAG_PREFIX,
    CheckRunHealthResult,
    DagsterGrpcClient,
    DagsterUserCodeUnreachableError,
    DefaultRunLauncher,
    WorkerStatus,
)
from laion_assets.defs.places import DATA

LOCK_TAG = f"{HIDDEN_TAG_PREFIX}laion_assets_process"  # hidden in the UI's list of runs
GONE = "the process of this run has ended"
LOCKS = DATA / "dagster" / "processes"


class LocalRunLauncher(DefaultRunLauncher):
    """A DefaultRunLauncher that detects killed workers."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Report that run monitoring may check workers."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Check whether the process of a run is alive."""
        if is_worked_on(run.tags):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.FAILED, GONE)


def is_worked_on(tags: Mapping[str, str]) -> bool:
    """Return whether the process named in a run's tags is alive."""
    if LOCK_TAG in tags:
        return _is_locked(Path(tags[LOCK_TAG]))
    if GRPC_INFO_TAG in tags:
        server = json.loads(tags[GRPC_INFO_TAG])
        client = DagsterGrpcClient(
            port=server.get("port"),
            socket=server.get("socket"),
            host=server.get("host") or "localhost",
        )
        try:
            client.ping("")
        except DagsterUserCodeUnreachableError:
            return False
    return True  # the code server monitors its own runs


@contextmanager
def process_lock() -> Iterator[dict[str, str]]:
    """Hold a lock in the block and yield the run tags that name it.

    The operating system releases the lock however the process ends.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    path = (
        LOCKS.absolute() / uuid.uuid4().hex[:12]
    )  # absolute, because the daemon may run in another folder
    try:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield {LOCK_TAG: str(path)}
    finally:
        path.unlink(missing_ok=True)


def end_with_parent() -> None:
    """End this process when its parent process has ended for any reason.

    Dagster starts a process for each run, which starts one for each step. Only these processes have a
    Python parent process; in others this has no effect. Without it, the steps of a killed run would keep
    writing to tables and a cache that already belong to the next run.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)  # immediately, whatever other threads are doing

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def fail_abandoned_runs(instance: dg.DagsterInstance) -> list[str]:
    """Fail the runs whose process has ended and free their pool slots; return their ids.

    Dagster's daemon does this continuously. This function is for a machine without a running daemon.
    """
    started = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
    gone = [run for run in instance.get_runs(started) if not is_worked_on(run.tags)]
    for run in gone:
        instance.report_run_failed(run, GONE)
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return [run.run_id for run in gone]


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
