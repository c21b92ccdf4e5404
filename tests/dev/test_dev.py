"""The platform as people run it: `make dev` with its sensor and daemon, a killed run, a real browser.

The tests stand in order and share one server: starting it takes longer than most of them.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from playwright.sync_api import Page, sync_playwright
from webserver import IN_PROGRESS, MakeDev, Webserver, is_running, wait_for

from laion_assets.demo.build import SEED_SETS

RAN_BY_THE_DEMO, *OTHERS = ("fruit", *sorted({*SEED_SETS} - {"fruit"}))
DROPPED = "dropped"
BROKEN = "broken"
# In an image of its own a browser is root and has no sandbox; it asks for nothing outside.
CHROMIUM = (
    "--no-sandbox",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Project:
    """A folder like a fresh checkout, in which `make dev` runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("dagster.yaml", "workspace.yaml"):
            shutil.copy(REPOSITORY / name, folder)
        self.dev = MakeDev(folder)

    def start(self) -> None:
        """Run the demo, start the server, and start all that takes a while and can go on together."""
        subprocess.run([sys.executable, "-m", "laion_assets.cli", "demo"], cwd=self.folder, check=True)
        self.dev.start()
        (self.ran_by_the_demo,) = self.ui.runs()
        self.drop(DROPPED, seeds=2000)
        self.drop(BROKEN, seeds=2)
        (self.folder / "data" / "seeds" / BROKEN / "1.npy").write_bytes(b"no array")
        self.with_numbers = self.ui.launch(RAN_BY_THE_DEMO, nb_images_knn=7, nprobe=5)
        self.without_partition = self.ui.launch(None)

    @property
    def ui(self) -> Webserver:
        return self.dev.webserver

    def drop(self, seed_set: str, seeds: int) -> None:
        """Copy a folder of seeds into the seeds folder, file by file."""
        folder = self.folder / "data" / "seeds" / seed_set
        folder.mkdir()
        random = np.random.default_rng(0)
        for part in range(2):
            np.save(folder / f"{part}.npy", random.standard_normal((seeds // 2, 256), np.float32))

    def table(self, asset: str, seed_set: str) -> Path:
        return self.folder / "data" / "output" / asset / f"{seed_set}.parquet"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    made = Project(tmp_path_factory.mktemp("project"))
    try:
        made.start()
        yield made
    finally:
        made.dev.press_ctrl_c()


def test_the_history_of_the_command_line_is_there(project: Project) -> None:
    run = project.ran_by_the_demo
    assert (run.seed_set, run.status, run.by_sensor) == (RAN_BY_THE_DEMO, "SUCCESS", False)


@pytest.mark.parametrize("seed_set", [*OTHERS, DROPPED])
def test_a_seed_set_that_was_not_run_yet_is_run_untouched(project: Project, seed_set: str) -> None:
    (run,) = wait_for("the sensor", lambda: project.ui.runs_of(seed_set))
    assert run.by_sensor
    assert project.ui.finished(run.id).status == "SUCCESS"
    assert seed_set in project.ui.partitions("combined_urls")["materialized"]
    rows = pq.read_metadata(project.table("combined_urls", seed_set)).num_rows
    assert project.ui.materialization("combined_urls", seed_set)["kept"] == rows > 0


def test_a_seed_set_that_cannot_be_used_is_one_failed_run_with_the_reason(project: Project) -> None:
    ui = project.ui
    (run,) = wait_for("the sensor", lambda: ui.runs_of(BROKEN))
    assert ui.finished(run.id).status == "FAILURE"
    (failure,) = ui.step_events(run.id, "seed_embeddings", "STEP_FAILURE")
    assert "broken/1.npy is not a whole .npy file" in failure["failureMetadata"]["description"]
    ticks = len(ui.ticks())
    wait_for("three more ticks", lambda: len(ui.ticks()) >= ticks + 3)
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
    assert told["settings"] == {
        "nb_images_knn": "7 (Launchpad or command line)",
        "nb_images_centroid": "500 (default)",
        "dedup_threshold": "0.94 (default)",
        "nprobe": "5 (Launchpad or command line)",
    }


def test_a_run_without_a_partition_fails_in_a_sentence(project: Project) -> None:
    assert project.ui.finished(project.without_partition).status == "FAILURE"
    failed = {
        event["stepKey"]: (event["failureMetadata"] or {}).get("description")
        for event in project.ui.events(project.without_partition)
        if event["__typename"] == "ExecutionStepFailureEvent"
    }
    # Dagster itself refuses seed_embeddings where the seed folder has a history.
    assert set(failed) == {"staged_laion_index", "seed_embeddings"}
    sentence = "no seed set was chosen: launch the run for a partition, each is a seed set"
    assert failed["staged_laion_index"] == sentence


def test_a_killed_run_ends_entirely_and_the_next_seed_set_takes_its_place(project: Project) -> None:
    ui = project.ui
    before = project.table("knn_urls", DROPPED).read_bytes()
    killed = ui.launch(DROPPED, nb_images_knn=3000)  # minutes of work
    wait_for("knn_urls", lambda: ui.step_events(killed, "knn_urls", "STEP_START"))
    run_process, step_process = ui.processes(killed, "knn_urls")
    assert is_running(step_process)
    assert ui.pool("retrieval") == (1, [killed])
    following = ui.launch(OTHERS[0])
    os.kill(run_process, signal.SIGKILL)
    wait_for("the end of the step", lambda: not is_running(step_process), 10)
    assert ui.finished(killed).status == "FAILURE"
    assert ui.finished(following).status == "SUCCESS"
    assert ui.pool("retrieval") == (1, [])
    assert project.table("knn_urls", DROPPED).read_bytes() == before


def test_history_outlives_a_restart_and_nothing_runs_again(project: Project) -> None:
    ui = project.ui
    wait_for("quiet", lambda: all(run.status not in IN_PROGRESS for run in ui.runs()))
    runs = ui.runs()
    interrupted = ui.launch(DROPPED, nb_images_knn=3000)
    wait_for("knn_urls", lambda: ui.step_events(interrupted, "knn_urls", "STEP_START"))
    project.dev.press_ctrl_c()
    assert not ui.is_up()
    project.dev.start()
    ticks = len(ui.ticks())
    assert ui.finished(interrupted, 60).status == "FAILURE"
    wait_for("three more ticks", lambda: len(ui.ticks()) >= ticks + 3)
    assert ui.runs()[1:] == runs
    assert ui.partitions("combined_urls")["all"] == {*SEED_SETS, DROPPED, BROKEN}
    assert {*SEED_SETS} <= ui.partitions("combined_urls")["materialized"]


@pytest.fixture
def page(project: Project, tmp_path: Path) -> Iterator[Page]:
    """A browser on the UI; what it shows in the end is kept as a picture in the test's folder."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        opened = browser.new_page(base_url=project.ui.url, viewport={"width": 1440, "height": 1000})
        opened.set_default_timeout(60_000)
        yield opened
        opened.screenshot(path=tmp_path / "page.png")
        browser.close()


def test_a_browser_materializes_a_partition_and_shows_its_contact_sheet(
    project: Project, page: Page
) -> None:
    before = project.ui.runs()[0]
    page.goto(f"/assets/combined_urls?view=partitions&partition={RAN_BY_THE_DEMO}")
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_role("button", name="Launch 1 run").click()
    wait_for("the run", lambda: project.ui.runs()[0].id != before.id)
    launched = project.ui.runs()[0].id
    assert project.ui.finished(launched).status == "SUCCESS"
    assert project.ui.materialization("combined_urls", RAN_BY_THE_DEMO)["run"] == launched
    page.reload()
    page.get_by_text(launched[:8]).first.wait_for()
    page.get_by_text("Show Markdown").first.click()
    sheet = page.get_by_role("img", name="contact sheet")
    sheet.wait_for()
    assert sheet.evaluate("picture => picture.naturalWidth > 100")
    shown, dialog = sheet.bounding_box(), page.get_by_role("dialog").bounding_box()
    assert shown
    assert dialog
    assert dialog["x"] < shown["x"]
    assert shown["x"] + shown["width"] < dialog["x"] + dialog["width"]


def test_the_list_of_ticks_says_what_each_saw(project: Project, page: Page) -> None:
    (project.folder / "data" / "seeds" / BROKEN).rename(project.folder / "away")
    page.goto("/locations/laion_assets/sensors/seed_sets_sensor")
    page.get_by_role("row", name="removed, tables kept: broken").first.wait_for()
    assert BROKEN in project.ui.partitions("combined_urls")["all"]
