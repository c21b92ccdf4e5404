"""Dagster as the chart installs it, on the stand-in for a cluster, with a PostgreSQL of its own."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.chart import DEPLOYMENT, IMAGE, VALUES, instance_config
from helpers.cluster import Cluster, running_cluster, wait_until
from helpers.graphql import ask

from laion_assets.defs.history import NODE, asset_of_step, figures_of
from laion_assets.defs.partitions import JOB
from laion_assets.demo import DEMO_MODEL
from laion_assets.demo.build import build_demo

BIN = Path(sys.executable).parent
LOCATION = DEPLOYMENT["name"]
PASSWORD = "not a secret"  # of a database that lives for one test run
PENDING_SECONDS = 15


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@contextmanager
def postgres() -> Iterator[dict[str, Any]]:
    """A real PostgreSQL, run by its own user when the tests run as root, which it refuses to be."""
    root = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's folders are closed to other users
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.fail("PostgreSQL is not installed: apt-get install postgresql")
    data, port = root / "data", free_port()
    as_postgres = []
    if os.getuid() == 0:
        shutil.chown(root, "postgres")
        as_postgres = ["runuser", "-u", "postgres", "--"]
    pg_ctl = [*as_postgres, str(programs[-1] / "pg_ctl"), "-D", str(data), "-w"]
    run = {"check": True, "cwd": "/", "stdout": subprocess.DEVNULL}
    subprocess.run(
        [
            *as_postgres,
            str(programs[-1] / "initdb"),
            *("-D", str(data), "-A", "trust", "-U", "dagster", "--no-sync"),
        ],
        **run,
    )
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={root} -c fsync=off"
    subprocess.run([*pg_ctl, "-l", str(root / "log"), "-o", options, "start"], **run)
    try:
        createdb = [
            str(programs[-1] / "createdb"),
            *("-h", "127.0.0.1", "-p", str(port), "-U", "dagster"),
        ]
        subprocess.run([*createdb, "dagster"], **run)
        yield {
            "hostname": "127.0.0.1",
            "port": port,
            "username": "dagster",
            "password": {"env": "DAGSTER_PG_PASSWORD"},
            "db_name": "dagster",
        }
    finally:
        subprocess.run([*pg_ctl, "-m", "immediate", "stop"], **run)
        shutil.rmtree(root)


@dataclass
class Platform:
    """Dagster as installed by the chart on the stand-in, from an operator's view."""

    cluster: Cluster
    instance: dg.DagsterInstance
    webserver: str
    root: Path

    def launch(self, seed_set: str, *assets: str, **tags: str) -> str:
        """Launch the job for a seed set, or only some of its assets; return the run's id."""
        self.instance.add_dynamic_partitions("seed_sets", [seed_set])
        return self.launch_job(JOB, seed_set, *assets, **tags)

    def launch_job(self, job: str, partition: str | None = None, *assets: str, **tags: str) -> str:
        """Launch a job, for a partition where it has them; return the run's id."""
        if partition:
            tags["dagster/partition"] = partition
        chosen = [{"path": [asset]} for asset in assets] or None
        told = self.ask(
            "mutation($p: ExecutionParams!) { launchRun(executionParams: $p) "
            "{ __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }",
            p={
                "selector": {
                    "repositoryLocationName": LOCATION,
                    "repositoryName": "__repository__",
                    "jobName": job,
                    "assetSelection": chosen,
                },
                "executionMetadata": {
                    "tags": [{"key": key, "value": value} for key, value in tags.items()]
                },
            },
        )["launchRun"]
        return str(told["run"]["runId"])

    def reexecute(self, run: str) -> str:
        """Re-execute a run from failure, as the button does."""
        told = self.ask(
            "mutation($p: ReexecutionParams!) { launchRunReexecution(reexecutionParams: $p) "
            "{ __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }",
            p={"parentRunId": run, "strategy": "FROM_FAILURE"},
        )["launchRunReexecution"]
        return str(told["run"]["runId"])

    def stop_sensor(self, name: str = "seed_sets_sensor") -> None:
        sensor = {
            "repositoryLocationName": LOCATION,
            "repositoryName": "__repository__",
            "sensorName": name,
        }
        found = self.ask(
            "query($s: SensorSelector!) { sensorOrError(sensorSelector: $s) "
            "{ ... on Sensor { id } ... on PythonError { message } } }",
            s=sensor,
        )["sensorOrError"]
        self.ask("mutation($i: String!) { stopSensor(id: $i) { __typename } }", i=found["id"])

    def cancel(self, run: str) -> None:
        self.ask("mutation($r: String!) { terminateRun(runId: $r) { __typename } }", r=run)

    def ask(self, query: str, **variables: Any) -> Any:
        return ask(self.webserver, query, **variables)

    def wait(self, run: str, seconds: float = 300) -> dg.DagsterRunStatus:
        """Wait for the end of a run."""

        def ended() -> dg.DagsterRunStatus | None:
            found = self.instance.get_run_by_id(run)
            return found.status if found and found.is_finished else None

        status: dg.DagsterRunStatus = wait_until(ended, f"run {run} has ended", seconds)
        return status

    def children(self, run: str) -> list[dg.DagsterRun]:
        """The runs that were started to repeat a run."""
        return list(self.instance.get_runs(dg.RunsFilter(tags={"dagster/parent_run_id": run})))

    def succeed(self, run: str) -> None:
        """Wait until a run succeeds."""
        assert self.wait(run) == dg.DagsterRunStatus.SUCCESS, self.sentences(run)

    def events(self, run: str, kind: dg.DagsterEventType, asset: str | None = None) -> list[Any]:
        """The events of a kind, with the time of each."""
        logs = self.instance.all_logs(run, of_type=kind)
        return [log for log in logs if asset in (None, asset_of_step(log.dagster_event.step_key))]

    def sentences(self, run: str) -> dict[str, str]:
        """The assets of a run that failed, with their messages."""
        found = {}
        for log in self.events(run, dg.DagsterEventType.STEP_FAILURE):
            failure = log.dagster_event.step_failure_data
            told = failure.user_failure_data and failure.user_failure_data.description
            found[asset_of_step(log.dagster_event.step_key)] = told or failure.error.message
        return found

    def running_pod(self, step: str, *, at_least: int = 1) -> str:
        """Wait until at least this many pods of a step run, and return the name of the oldest."""

        def running() -> list[dict[str, Any]] | None:
            pods = self.cluster.pods_of(step, "Running")
            return pods if len(pods) >= at_least else None

        pod, *_ = wait_until(running, f"{step} runs in {at_least} or more pods")
        return str(pod["metadata"]["name"])

    def stagings(self) -> list[tuple[str, str]]:
        """Node and description of the stagings that copied anything, newest first."""
        records = self.instance.fetch_materializations(
            dg.AssetKey("staged_laion_index"), limit=50
        ).records
        made = [record.asset_materialization for record in records if record.asset_materialization]
        return [
            (str(one.metadata[NODE].value), one.description or "")
            for one in made
            if figures_of(one.metadata)["bytes fetched"]
        ]

    def table(self, asset: str, seed_set: str) -> pa.Table:
        """A table as a run wrote it."""
        return pq.read_table(self.root / "bucket" / "tables" / asset / f"{seed_set}.parquet")


@contextmanager
def installed(root: Path, **more: str) -> Iterator[Platform]:
    """The demo's data in a bucket, an empty cluster, and Dagster installed on it; and other variables."""
    for name in ("bucket", "cluster", "home", "logs"):
        (root / name).mkdir()
    bucket = root / "bucket"
    build_demo(bucket / "index", root / "seeds")
    model = shutil.copytree(DEMO_MODEL, bucket / "models" / "demo")
    places = {
        "LAION_INDEX_URI": str(bucket / "index"),
        "LAION_SEEDS_URI": str(bucket / "seeds"),
        "LAION_MODEL": str(model),
        "LAION_OUTPUT_URI": str(bucket / "tables"),
        "LAION_NVME_PENDING_SECONDS": str(PENDING_SECONDS),
    } | more
    with ExitStack() as stack:
        database = stack.enter_context(postgres())
        cluster = stack.enter_context(
            running_cluster(
                root / "cluster",
                secrets={VALUES["global"]["postgresqlSecretName"]: {"postgresql-password": PASSWORD}},
            )
        )
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("DAGSTER_PG_PASSWORD", PASSWORD)
        config = instance_config(cluster.kubeconfig, database, root / "logs", **places)
        config["run_monitoring"]["poll_interval_seconds"] = 5
        config["run_monitoring"]["free_slots_after_run_end_seconds"] = 1
        (root / "home" / "dagster.yaml").write_text(yaml.safe_dump(config))
        webserver = start_dagster(stack, root, places)
        instance = stack.enter_context(dg.DagsterInstance.from_config(str(root / "home")))
        platform = Platform(cluster, instance, webserver, root)
        platform.stop_sensor()  # seeds that arrive start runs here too, and the tests start their own
        shutil.copytree(root / "seeds", bucket / "seeds")
        yield platform


def start_dagster(stack: ExitStack, root: Path, places: dict[str, str]) -> str:
    """Start the code server, the daemon and the webserver; return the webserver's address."""
    code, web = free_port(), free_port()
    workspace = root / "home" / "workspace.yaml"
    server = {"grpc_server": {"host": "127.0.0.1", "port": code, "location_name": LOCATION}}
    workspace.write_text(yaml.safe_dump({"load_from": [server]}))
    environment = os.environ | {
        "DAGSTER_HOME": str(root / "home"),
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "DAGSTER_CURRENT_IMAGE": IMAGE,
        **places,
    }
    commands = {
        "code": ["dagster", "api", "grpc", "-h", "127.0.0.1", "-p", str(code)]
        + DEPLOYMENT["dagsterApiGrpcArgs"],
        "daemon": ["dagster-daemon", "run", "-w", str(workspace)],
        "web": ["dagster-webserver", "-w", str(workspace), "-h", "127.0.0.1", "-p", str(web)],
    }
    for name, (program, *arguments) in commands.items():
        log = stack.enter_context((root / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            [str(BIN / program), *arguments],
            cwd=root,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        stack.callback(stop, process)
        if name == "code":
            wait_until(lambda: is_open(code), "the code server answers", 120)
    wait_until(lambda: is_open(web), "the webserver answers", 120)
    return f"http://127.0.0.1:{web}"


def is_open(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
