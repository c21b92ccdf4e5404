"""`make dev` in its own folder, started and stopped as by a user, and the answers of its webserver."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from helpers.graphql import ask
from helpers.project import REPOSITORY
from PIL import Image

from laion_assets.defs.history import DETAILS
from laion_assets.demo import DEMO_SETS

REPOSITORY_SELECTOR = {"repositoryName": "__repository__", "repositoryLocationName": "laion_assets"}
RAN_BY_THE_DEMO, *OTHERS = ("fruit", *sorted({*DEMO_SETS} - {"fruit"}))
DROPPED = "dropped"
OWN_IMAGES, HALF_COPIED = "own images", "IMG_9999.JPG"
BROKEN = "broken"
IN_PROGRESS = {"NOT_STARTED", "QUEUED", "STARTING", "STARTED", "CANCELING"}

T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T | None], seconds: float = 600) -> T:
    """Poll until there is a result."""
    end = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < end, f"after {seconds} s still waiting for {what}"
        time.sleep(0.25)
    return seen


@dataclass(frozen=True)
class Run:
    """A run in the UI's list of runs."""

    id: str
    status: str
    seed_set: str | None
    by_sensor: bool
    created: float


class Webserver:
    """Queries of the UI's pages."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        return ask(self.url, query, **variables)

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/server_info", timeout=5):
                return True
        except OSError:
            return False

    def runs(self) -> list[Run]:
        """All runs, the newest first."""
        found = self.ask(
            "{ runsOrError { ... on Runs { results { runId status creationTime tags { key value } } } } }"
        )
        runs = []
        for run in found["runsOrError"]["results"]:
            tags = {tag["key"]: tag["value"] for tag in run["tags"]}
            partition, sensor = tags.get("dagster/partition"), "dagster/sensor_name" in tags
            runs.append(Run(run["runId"], run["status"], partition, sensor, run["creationTime"]))
        return runs

    def run(self, run_id: str) -> Run:
        return next(run for run in self.runs() if run.id == run_id)

    def retry_of(self, run_id: str) -> str | None:
        """The run that was started because a run was killed; None until then."""
        told = self.ask(
            "query($run: ID!) { runOrError(runId: $run) { ... on Run { tags { key value } } } }",
            run=run_id,
        )
        tags = {tag["key"]: tag["value"] for tag in told["runOrError"]["tags"]}
        return tags.get("dagster/auto_retry_run_id")

    def finished(self, run_id: str, seconds: float = 600) -> Run:
        """Wait until a run has finished, successfully or not."""
        wait_for(f"run {run_id}", lambda: self.run(run_id).status not in IN_PROGRESS, seconds)
        return self.run(run_id)

    def runs_of(self, seed_set: str) -> list[Run]:
        return [run for run in self.runs() if run.seed_set == seed_set]

    def launch(self, seed_set: str | None, **settings: Any) -> str:
        """Start the job as the Launchpad does; return the run."""
        tags = [{"key": "dagster/partition", "value": seed_set}] if seed_set else []
        told = self.ask(
            "mutation($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename"
            " ... on LaunchRunSuccess { run { runId } }"
            " ... on RunConfigValidationInvalid { errors { message } }"
            " ... on PythonError { message } } }",
            params={
                "selector": REPOSITORY_SELECTOR | {"jobName": "seed_set_job"},
                "runConfigData": {"resources": {"retrieval_config": {"config": settings}}},
                "executionMetadata": {"tags": tags},
            },
        )["launchRun"]
        assert told["__typename"] == "LaunchRunSuccess", told
        return told["run"]["runId"]

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """The events on the page of a run."""
        return self.ask(
            "query($run: ID!) { logsForRun(runId: $run) { ... on EventConnection { events { __typename"
            " ... on MessageEvent { message stepKey eventType }"
            " ... on DisplayableEvent { metadataEntries { label ... on TextMetadataEntry { text } } }"
            " ... on ExecutionStepFailureEvent { error { message } failureMetadata { description } }"
            " } } } }",
            run=run_id,
        )["logsForRun"]["events"]

    def step_events(self, run_id: str, step: str, kind: str) -> list[dict[str, Any]]:
        """The events of one kind of a step."""
        return [
            event
            for event in self.events(run_id)
            if event.get("stepKey") == step and event.get("eventType") == kind
        ]

    def process(self, run_id: str) -> int:
        """The process of a run, which executes all its steps."""
        told = [event["message"] for event in self.events(run_id) if "message" in event]
        (started,) = (text for text in told if text.startswith("Started process for run"))
        assert not any(event.get("eventType") == "STEP_WORKER_STARTED" for event in self.events(run_id))
        return int(*re.findall(r"\d+", started))

    def partitions(self, asset: str) -> dict[str, set[str]]:
        """The partitions of an asset: all, and those that were materialized."""
        node = self.ask(
            "query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode"
            " { partitionKeys assetPartitionStatuses { ... on DefaultPartitionStatuses"
            " { materializedPartitions } } } } }",
            key={"path": [asset]},
        )["assetNodeOrError"]
        done = node["assetPartitionStatuses"]["materializedPartitions"]
        return {"all": set(node["partitionKeys"]), "materialized": set(done)}

    def materialization(self, asset: str, seed_set: str) -> dict[str, Any]:
        """The latest materialization of a partition: its run, and its metadata by label."""
        (latest,) = self.ask(
            "query($key: AssetKeyInput!, $seed_sets: [String!]) { assetOrError(assetKey: $key)"
            " { ... on Asset { assetMaterializations(partitions: $seed_sets, limit: 1) { runId"
            " metadataEntries { label ... on IntMetadataEntry { intValue }"
            " ... on JsonMetadataEntry { jsonString }"
            " ... on TableMetadataEntry { table { records } } } } } } }",
            key={"path": [asset]},
            seed_sets=[seed_set],
        )["assetOrError"]["assetMaterializations"]
        entries = {}
        for entry in latest["metadataEntries"]:
            if entry["label"] == DETAILS:
                entries |= json.loads(entry["jsonString"])
            elif "intValue" in entry:
                entries[entry["label"]] = entry["intValue"]
            elif "table" in entry:
                entries[entry["label"]] = [json.loads(record) for record in entry["table"]["records"]]
        return {"run": latest["runId"]} | entries

    def check(self, asset: str, name: str) -> dict[str, str]:
        """How an asset check ended in each of the last runs."""
        found = self.ask(
            "query($key: AssetKeyInput!, $name: String!) { assetCheckExecutions(assetKey: $key,"
            " checkName: $name, limit: 20) { runId status } }",
            key={"path": [asset]},
            name=name,
        )["assetCheckExecutions"]
        return {execution["runId"]: execution["status"] for execution in found}

    def ticks(self) -> list[dict[str, Any]]:
        """The ticks of the sensor, the newest first."""
        return self.ask(
            "query($sensor: SensorSelector!) { sensorOrError(sensorSelector: $sensor)"
            " { ... on Sensor { sensorState { status ticks(limit: 100)"
            " { timestamp status skipReason runIds } } } } }",
            sensor=REPOSITORY_SELECTOR | {"sensorName": "seed_sets_sensor"},
        )["sensorOrError"]["sensorState"]["ticks"]

    def pool(self, name: str) -> tuple[int, list[str]]:
        """How many steps a pool has room for, and the runs that hold a place in it."""
        told = self.ask(
            "query($pool: String!) { instance { concurrencyLimit(concurrencyKey: $pool)"
            " { slotCount claimedSlots { runId } } } }",
            pool=name,
        )["instance"]["concurrencyLimit"]
        return told["slotCount"], [slot["runId"] for slot in told["claimedSlots"]]


class Dev:
    """A command that starts the UI in a folder, on a free port.

    Attributes:
        port: of the UI; takes the place of `PORT` in the command.

    """

    PORT = "{port}"

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.webserver = Webserver(self.port)
        self._folder, self._log = folder, folder.with_name(f"{folder.name}.log")
        self._command = [part.replace(self.PORT, str(self.port)) for part in command]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until its page can be opened."""
        with self._log.open("wb") as log:
            self._process = process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for("the UI", lambda: process.poll() is not None or self.webserver.is_up())
        assert process.poll() is None, self.said()

    def service(self, arguments: str) -> int:
        """The process of a service, by the first of its arguments."""
        assert self._process
        listed = subprocess.check_output(["ps", "-eo", "pid=,ppid=,args="], text=True).splitlines()
        processes = [(int(pid), int(parent), args) for pid, parent, args in map(_columns, listed)]
        family = {self._process.pid}
        for pid, parent, _ in processes:  # in the order of their ids, so that parents come first
            family |= {pid} if parent in family else set()
        (found,) = (pid for pid, _, args in processes if pid in family and f" -m {arguments} " in args)
        return found

    def press_ctrl_c(self) -> None:
        """Interrupt it as a terminal does, all processes at once, and wait until they have ended."""
        if self._process is None:
            return
        group, self._process = self._process, None
        os.killpg(group.pid, signal.SIGINT)
        group.wait(60)
        wait_for("the end of all processes", lambda: not _is_group(group.pid), 60)

    def said(self) -> str:
        """The output since it was started."""
        return self._log.read_text()


def make_dev(folder: Path) -> Dev:
    """`make dev` in a project folder, with the environment of the tests."""
    make = ["make", f"--makefile={REPOSITORY / 'Makefile'}", f"--assume-old={sys.prefix}/.ready"]
    return Dev(folder, [*make, "dev", f"VENV={sys.prefix}", f"PORT={Dev.PORT}"])


class Project:
    """A folder like a fresh checkout, in which `make dev` runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("dagster.yaml", "workspace.yaml"):
            shutil.copy(REPOSITORY / name, folder)
        self.dev = make_dev(folder)

    def start(self) -> None:
        """Run the demo, start the server, and start everything slow that can run in parallel."""
        subprocess.run([sys.executable, "-m", "laion_assets.cli", "demo"], cwd=self.folder, check=True)
        self.dev.start()
        (self.ran_by_the_demo,) = self.ui.runs()
        self.drop(DROPPED, seeds=2000)
        self.drop_images(OWN_IMAGES)
        self.with_numbers = self.ui.launch(RAN_BY_THE_DEMO, nb_images_knn=7, nprobe=5)

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

    def drop_broken(self, seed_set: str = BROKEN) -> None:
        """Add a folder of seeds, one of them unreadable."""
        self.drop(seed_set, seeds=2)
        (self.folder / "data" / "seeds" / seed_set / "1.npy").write_bytes(b"no array")

    def drop_images(self, seed_set: str) -> None:
        """Add JPEGs to the seeds folder, nested as by a camera, one of them only half copied."""
        folder = self.folder / "data" / "seeds" / seed_set / "2026" / "07"
        folder.mkdir(parents=True)
        for number, seed in enumerate(sorted(self.folder.glob(f"data/seeds/{OTHERS[0]}/*.webp")) * 2):
            with Image.open(seed) as image:
                turned = image.convert("RGB").rotate(number, fillcolor="white")
            turned.save(folder / f"IMG_{number:04}.JPG", "JPEG")
        (folder / HALF_COPIED).write_bytes((folder / "IMG_0000.JPG").read_bytes()[:2000])

    def table(self, asset: str, seed_set: str) -> Path:
        return self.folder / "data" / "output" / asset / f"{seed_set}.parquet"


def _columns(line: str) -> list[str]:
    return line.split(maxsplit=2)


def _is_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def is_running(process: int) -> bool:
    """Return whether a process is alive; a zombie is not."""
    told = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return bool(told.stdout.strip()) and not told.stdout.startswith("Z")
