"""A run launcher for one machine that detects killed runs.

Dagster's default launcher cannot tell a killed run from a busy one. A killed run would stay "started" and
keep its pool slots.

Dagster's concept: https://docs.dagster.io/deployment/execution/run-monitoring
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dagster as dg

from laion_assets.defs.dagster_internals import (
    GRPC_INFO_TAG,
    HIDDEN_TAG_PREFIX,
    MAX_RETRIES_TAG,
    CheckRunHealthResult,
    ConfigurableClassData,
    DagsterGrpcClient,
    DagsterUserCodeUnreachableError,
    DefaultRunLauncher,
    GetCurrentRunsResult,
    WorkerStatus,
    deserialize_value,
)
from laion_assets.defs.places import DATA

LOCK_TAG = f"{HIDDEN_TAG_PREFIX}laion_assets_process"  # hidden in the UI's list of runs
GONE = "the process of this run has ended"
LOCKS = DATA / "dagster" / "processes"
UNFINISHED = ".new"  # suffix of a lock's file until it is locked
ABANDONED = 3600.0  # seconds after which such a file belongs to nobody
LOST_SECONDS = 30.0  # a code server may be restarting, and a run can be retried once it is back
STARTED = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]


class LocalRunLauncher(DefaultRunLauncher):
    """A DefaultRunLauncher that detects killed workers."""

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(inst_data)
        self._lost_since: dict[str, float] = {}

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Report that run monitoring may check workers."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Check whether the process of a run is alive, or was until a moment ago."""
        if is_worked_on(run):
            self._lost_since.pop(run.run_id, None)
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        lost_since = self._lost_since.setdefault(run.run_id, time.monotonic())
        if time.monotonic() - lost_since < LOST_SECONDS:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        del self._lost_since[run.run_id]
        return CheckRunHealthResult(WorkerStatus.FAILED, GONE)


def is_worked_on(run: dg.DagsterRun) -> bool:
    """Return whether the process of a run is alive, as named in its tags."""
    if LOCK_TAG in run.tags:
        return _is_locked(Path(run.tags[LOCK_TAG]))
    if GRPC_INFO_TAG in run.tags:
        server = json.loads(run.tags[GRPC_INFO_TAG])
        client = DagsterGrpcClient(
            port=server.get("port"),
            socket=server.get("socket"),
            host=server.get("host") or "localhost",
        )
        try:
            # A server that was started again does not know the runs of the one before.
            current = deserialize_value(client.get_current_runs(), GetCurrentRunsResult)
        except DagsterUserCodeUnreachableError:
            return False
        return run.run_id in current.current_runs
    return True


@contextmanager
def process_lock() -> Iterator[dict[str, str]]:
    """Hold a lock in the block and yield the run tags that name it.

    The operating system releases the lock however the process ends; the file of a killed process is
    removed by the next. The daemon does not retry these runs: whoever started the command sees it end.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    _sweep()
    path = LOCKS.absolute() / uuid.uuid4().hex[:12]  # the daemon may run in another folder
    unfinished = path.with_suffix(UNFINISHED)
    try:
        with unfinished.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            unfinished.rename(path)  # only now, because a sweep removes what is not locked
            yield {LOCK_TAG: str(path), MAX_RETRIES_TAG: "0"}
    finally:
        path.unlink(missing_ok=True)


def end_with_parent() -> None:
    """End this process when its parent process has ended for any reason.

    The code server starts a process for each run. Only these processes have a Python parent process; in
    others this has no effect. Without it, the runs of a killed code server would keep writing to tables
    and a cache that already belong to their retries.
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
    created = dg.RunsFilter(statuses=[dg.DagsterRunStatus.NOT_STARTED])
    ours = [run for run in instance.get_runs(created) if LOCK_TAG in run.tags]
    started = instance.get_runs(dg.RunsFilter(statuses=STARTED))
    gone = [run for run in (*ours, *started) if not is_worked_on(run)]
    for run in gone:
        instance.report_run_failed(run, GONE)
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return [run.run_id for run in gone]


def _sweep() -> None:
    """Remove the files of processes that were killed."""
    for path in LOCKS.iterdir():
        with suppress(FileNotFoundError):  # its process has just ended
            is_new = path.suffix == UNFINISHED and time.time() - path.stat().st_mtime < ABANDONED
            if not is_new and not _is_locked(path):
                path.unlink()


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
