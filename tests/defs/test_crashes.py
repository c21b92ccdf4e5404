"""A signal that kills a step while it reads the mapped index is reported as what it is."""

import os
import resource
import signal
import subprocess
import sys
import time

import dagster as dg
import pytest

from laion_assets.defs.crashes import describe

STEP = """
import mmap, os, sys
import dagster as dg
from laion_assets.defs.crashes import reported

@dg.op
def knn_urls(context):
    with reported("knn_urls", context.run_id), open(sys.argv[1], "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        file.truncate(0)
        mapped[5000]

@dg.job
def job():
    knn_urls()

with dg.DagsterInstance.get() as instance:
    job.execute_in_process(instance=instance)
"""


@pytest.mark.faults
def test_a_step_that_dies_under_a_mapping_says_of_what_and_how_to_mend_it(tmp_path, monkeypatch):
    home, mapped = tmp_path / "home", tmp_path / "mapped"
    home.mkdir()
    mapped.write_bytes(bytes(10_000))
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    command = [sys.executable, "-c", STEP, str(mapped)]
    died = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=60)
    assert died.returncode == -signal.SIGBUS
    (told,) = [line for line in died.stderr.splitlines() if line.startswith("error: ")]
    assert "knn_urls was killed while it read the index, by SIGBUS" in told
    assert "laion-assets verify --repair" in told
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            events = [entry.dagster_event for entry in instance.all_logs(run.run_id)]
            logged = [(event.step_key, event.message) for event in events if event]
            if logged[-1] == ("knn_urls", told.removeprefix("error: ")):
                return
            time.sleep(0.2)
    raise AssertionError(logged)


def test_other_ends_are_not_blamed_on_the_index():
    assert describe("Fatal Python error: Aborted", "knn_urls") is None
    assert "SIGSEGV" in (describe("Fatal Python error: Segmentation fault", "knn_urls") or "")


def test_a_limit_of_memory_is_named_beside_a_damaged_file(monkeypatch):
    assert "ulimit" not in (describe("Fatal Python error: Segmentation fault", "knn_urls") or "")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2_500_000 << 10, 0))
    told = describe("Fatal Python error: Segmentation fault", "knn_urls")
    assert told
    assert "`ulimit -v 2500000` leaves too little memory: raise it" in told
