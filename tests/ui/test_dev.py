"""The platform in use: `make dev` with its sensor and daemon, a killed run, a restart.

All but the last test share one server, and stand in order: starting it takes longer than most of them.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pyarrow.parquet as pq
import pytest
from helpers.webserver import (
    BROKEN,
    DROPPED,
    IN_PROGRESS,
    OTHERS,
    OWN_IMAGES,
    RAN_BY_THE_DEMO,
    REPOSITORY_SELECTOR,
    Dev,
    Project,
    is_running,
    wait_for,
)

from laion_assets.demo import DEMO_SETS

SEARCH = "knn_urls.search[0000]"  # the step
SERVICES = {
    "dagster api grpc": "the code server",
    "dagster._daemon run": "the daemon",
    "laion_assets.defs.webserver": "the webserver",
}


@pytest.fixture(scope="module")
def project(running_project: Project) -> Project:
    return running_project


def test_the_history_of_the_command_line_is_there(project: Project) -> None:
    run = project.ran_by_the_demo
    assert (run.seed_set, run.status, run.by_sensor) == (RAN_BY_THE_DEMO, "SUCCESS", False)
    origin = project.ui.ask(
        "query($run: ID!) { runOrError(runId: $run) { ... on Run"
        " { repositoryOrigin { repositoryName repositoryLocationName } } } }",
        run=run.id,
    )["runOrError"]["repositoryOrigin"]
    assert origin == REPOSITORY_SELECTOR  # or Overview > Timeline and Jobs leave it out


@pytest.mark.parametrize("seed_set", [*OTHERS, DROPPED, OWN_IMAGES])
def test_a_seed_set_that_was_not_run_yet_is_run_untouched(project: Project, seed_set: str) -> None:
    (run,) = wait_for("the sensor", lambda: project.ui.runs_of(seed_set))
    assert run.by_sensor
    assert project.ui.finished(run.id).status == "SUCCESS"
    assert seed_set in project.ui.partitions("combined_urls")["materialized"]
    rows = pq.read_metadata(project.table("combined_urls", seed_set)).num_rows
    assert project.ui.materialization("combined_urls", seed_set)["kept"] == rows > 0


def test_a_seed_set_that_cannot_be_used_is_one_failed_run_with_the_reason(project: Project) -> None:
    ui = project.ui
    project.drop_broken()
    (run,) = wait_for("the sensor", lambda: ui.runs_of(BROKEN))
    assert ui.finished(run.id).status == "FAILURE"
    (failure,) = ui.step_events(run.id, "seed_embeddings", "STEP_FAILURE")
    assert "broken/1.npy" in failure["failureMetadata"]["description"]
    ticks = len(ui.ticks())
    wait_for("two more ticks", lambda: len(ui.ticks()) >= ticks + 2)
    assert ui.runs_of(BROKEN) == [ui.run(run.id)]


def test_what_the_demo_ran_is_not_run_again(project: Project) -> None:
    wait_for("three ticks", lambda: len(project.ui.ticks()) >= 3)
    assert {tick["status"] for tick in project.ui.ticks()} <= {"SUCCESS", "SKIPPED", "STARTED"}
    assert [run for run in project.ui.runs_of(RAN_BY_THE_DEMO) if run.by_sensor] == []


def test_numbers_given_in_the_launchpad_are_those_of_the_run(project: Project) -> None:
    assert project.ui.finished(project.with_numbers).status == "SUCCESS"
    told = project.ui.materialization("knn_urls", RAN_BY_THE_DEMO)
    seeds = pq.read_metadata(project.table("seed_embeddings", RAN_BY_THE_DEMO)).num_rows
    assert (told["run"], told["requested"]) == (project.with_numbers, 7 * seeds)
    assert {(row["setting"], row["value"], row["from"]) for row in told["settings"]} == {
        ("nb_images_knn", "7", "Launchpad or command line"),
        ("nb_images_centroid", "500", "default"),
        ("dedup_threshold", "0.94", "default"),
        ("max_bad_images", "0.05", "default"),
        ("nprobe", "5", "Launchpad or command line"),
    }


def test_a_run_without_a_partition_fails_in_a_sentence(project: Project) -> None:
    without_partition = project.ui.launch(None)
    assert project.ui.finished(without_partition).status == "FAILURE"
    failed = {
        event["stepKey"]: (event["failureMetadata"] or {}).get("description")
        for event in project.ui.events(without_partition)
        if event["__typename"] == "ExecutionStepFailureEvent"
    }
    # Dagster itself refuses seed_embeddings where the seed folder has a history.
    assert set(failed) == {"staged_laion_index", "seed_embeddings"}
    for fact in ("no seed set was chosen", "partition"):
        assert fact in failed["staged_laion_index"]


def test_a_killed_run_ends_entirely_and_is_run_again(project: Project) -> None:
    ui = project.ui
    killed = ui.launch(DROPPED, nb_images_knn=700)
    wait_for("knn_urls", lambda: ui.step_events(killed, SEARCH, "STEP_START"))
    process = ui.process(killed)
    assert ui.pool("retrieval") == (1, [killed])
    following = ui.launch(OTHERS[0])
    os.kill(process, signal.SIGKILL)
    wait_for("the end of the run", lambda: not is_running(process), 10)
    assert ui.finished(killed).status == "FAILURE"
    again = wait_for("a retry", lambda: ui.retry_of(killed), 60)
    assert ui.finished(again).status == "SUCCESS"
    assert project.ui.materialization("knn_urls", DROPPED)["requested"] == 700 * 2000
    assert ui.finished(following).status == "SUCCESS"
    assert ui.pool("retrieval") == (1, [])


@pytest.mark.parametrize("service", SERVICES)
def test_a_seed_set_has_its_table_whatever_service_is_killed(project: Project, service: str) -> None:
    seed_set = service.split()[0]
    project.drop(seed_set, seeds=2000)
    (run,) = wait_for("the sensor", lambda: project.ui.runs_of(seed_set))
    wait_for("knn_urls", lambda: project.ui.step_events(run.id, SEARCH, "STEP_START"))
    os.kill(project.dev.service(service), signal.SIGKILL)
    wait_for("the table", lambda: project.table("combined_urls", seed_set).exists(), 180)
    wait_for("the UI", project.ui.is_up)
    last, *_ = project.ui.runs_of(seed_set)
    assert project.ui.finished(last.id).status == "SUCCESS"
    assert f"{SERVICES[service]} was killed by SIGKILL: starting it again" in project.dev.said()


def test_another_site_launches_no_runs(project: Project) -> None:
    mutation = {
        "query": 'mutation { logTelemetry(action: "a", clientTime: "0", clientId: "0",'
        ' metadata: "{}") { __typename } }'
    }
    for refused in (
        Request(f"{project.ui.url}/graphql?{urlencode(mutation)}"),
        Request(f"{project.ui.url}/graphql", headers={"Host": "rebound.example"}),
        Request(
            f"{project.ui.url}/graphql",
            json.dumps(mutation).encode(),
            {"Content-Type": "application/json", "Origin": "http://elsewhere.example"},
        ),
    ):
        with pytest.raises(HTTPError) as answer:
            urlopen(refused)
        assert answer.value.status == 403


def test_another_dev_in_the_folder_is_refused_with_the_address_of_the_first(project: Project) -> None:
    command = [sys.executable, "-m", "laion_assets.cli", "dev", "--port", str(project.dev.port + 1)]
    done = subprocess.run(command, cwd=project.folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"already runs at http://127.0.0.1:{project.dev.port}" in done.stderr


def test_history_outlives_a_restart_and_only_what_was_interrupted_runs_again(project: Project) -> None:
    ui = project.ui
    wait_for("quiet", lambda: all(run.status not in IN_PROGRESS for run in ui.runs()))
    runs, partitions = ui.runs(), ui.partitions("combined_urls")
    interrupted = ui.launch(DROPPED, nb_images_knn=700)
    wait_for("knn_urls", lambda: ui.step_events(interrupted, SEARCH, "STEP_START"))
    process = ui.process(interrupted)
    project.dev.press_ctrl_c()
    assert not ui.is_up()
    assert not is_running(process)
    project.dev.start()
    ticks = len(ui.ticks())
    assert ui.finished(interrupted, 90).status == "FAILURE"
    again = wait_for("a retry", lambda: ui.retry_of(interrupted), 60)
    assert ui.finished(again).status == "SUCCESS"
    wait_for("two more ticks", lambda: len(ui.ticks()) >= ticks + 2)
    assert ui.runs()[2:] == runs
    assert ui.partitions("combined_urls") == partitions
    assert partitions["all"] >= {*DEMO_SETS, OWN_IMAGES, DROPPED, BROKEN}
    assert {*DEMO_SETS} <= partitions["materialized"]


def test_in_any_folder_the_ui_has_the_history_of_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "anywhere"
    folder.mkdir()
    demo = [sys.executable, "-m", "laion_assets.cli", "demo"]
    subprocess.run(demo, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    dev = Dev(folder, [sys.executable, "-m", "laion_assets.cli", "dev", "--port", Dev.PORT])
    try:
        dev.start()
        assert f"http://127.0.0.1:{dev.port}" in dev.said()
        (ran,) = [run for run in dev.webserver.runs() if not run.by_sensor]
        assert (ran.seed_set, ran.status) == (RAN_BY_THE_DEMO, "SUCCESS")
        assert RAN_BY_THE_DEMO in dev.webserver.partitions("combined_urls")["materialized"]
        run = dev.webserver.launch(RAN_BY_THE_DEMO, nb_images_knn=3)
        assert dev.webserver.finished(run).status == "SUCCESS"
        assert dev.webserver.pool("retrieval")[0] == 1
        wait_for("the sensor", lambda: dev.webserver.ticks())
    finally:
        dev.press_ctrl_c()
    assert not dev.webserver.is_up()
    assert [path.name for path in folder.iterdir()] == ["data"]
    planned = [sys.executable, "-m", "laion_assets.cli", "plan", "--target-images", "50"]
    told = subprocess.check_output([*planned, "--seed-set", RAN_BY_THE_DEMO], cwd=folder, text=True)
    assert f"measured by run {run[:8]}" in told
