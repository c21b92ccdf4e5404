"""A project with its own index and seeds, and the reports of its runs and sensors."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.definitions.node_definition import NodeDefinition
from dagster._core.execution.api import _reexecute_job
from dagster._core.loader import LoadingContextForTest

from laion_assets.definitions import build_defs
from laion_assets.defs.history import asset_of_step, figures_of
from laion_assets.defs.partitions import JOB
from laion_assets.demo import DemoReport

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Demo:
    """The demo data, built once a session: read it, copy it, do not write to it.

    Attributes:
        index: its folder.
        images: folder of the seed sets as they are, images.
        seeds: the same sets embedded already, as Parquet, for tests that are about something else.

    """

    index: Path
    images: Path
    seeds: Path
    report: DemoReport


class Project:
    """The code location with its own index and seeds, and an instance with its history."""

    def __init__(self, root: Path, index: Path, instance: dg.DagsterInstance, **more: str) -> None:
        self.root, self.index, self.instance, self.more = root, index, instance, more
        self.seeds, self.cache, self.output = root / "seeds", root / "cache", root / "output"
        self.seeds.mkdir(exist_ok=True)
        environment = {
            "LAION_INDEX_URI": str(index),
            "LAION_SEEDS_URI": str(self.seeds),
            "LAION_CACHE_DIR": str(self.cache),
            "LAION_OUTPUT_URI": str(self.output),
        } | more
        self.defs = build_defs(environment)
        self.job = self.defs.resolve_job_def(JOB)

    def with_environment(self, **more: str) -> Project:
        """The same project, started with other variables."""
        return Project(self.root, self.index, self.instance, **{**self.more, **more})

    def run(self, seed_set: str | None, *assets: str, **settings: Any) -> dg.ExecuteInProcessResult:
        """Run the job, or only some of its assets; settings as they are given in the Launchpad."""
        if seed_set is not None:
            self.instance.add_dynamic_partitions("seed_sets", [seed_set])
        return self.job.execute_in_process(
            partition_key=seed_set,
            instance=self.instance,
            asset_selection=[dg.AssetKey(name) for name in assets] or None,
            run_config={"resources": {"retrieval_config": {"config": settings}}},
            raise_on_error=False,
        )

    def re_execute(self, failed: dg.ExecutionResult) -> dg.JobExecutionResult:
        """Run again what failed, as the button "from failure" does."""
        run = self.instance.get_run_by_id(failed.run_id)
        return _reexecute_job(
            InMemoryJob(self.job),
            run_config=run.run_config,
            reexecution_options=dg.ReexecutionOptions.from_failure(failed.run_id, self.instance),
            tags=run.tags,
            instance=self.instance,
            raise_on_error=False,
        )

    def table(self, asset: str, seed_set: str) -> Path:
        return self.output / asset / f"{seed_set}.parquet"


class Ticks:
    """What Dagster's daemon does with a sensor: ticks, partitions, and no run key twice."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.cursor: str | None = None
        self.reported: list[tuple[str, str | None]] = []
        self.run_keys: list[str] = []
        self.said = ""

    def evaluate(self, sensor: str, cursor: str | None) -> dg.SensorResult:
        repository = self.project.defs.get_repository_def()
        context = dg.build_sensor_context(
            self.project.instance,
            cursor,
            repository_def=repository,
            resources={
                name: repository.get_top_level_resources()[name]
                for name in repository.get_sensor_def(sensor).required_resource_keys
            },
        )
        with context:
            seen = repository.get_sensor_def(sensor)(context)
        for event in seen.asset_events:
            self.project.instance.report_runless_asset_event(event)
            if isinstance(event, dg.AssetObservation):
                self.reported.append((event.asset_key.to_user_string(), event.partition))
        return seen

    def look_at_index(self) -> str:
        """Evaluate the sensor of the index once; return what it says."""
        return self.evaluate("laion_index_sensor", None).cursor or ""

    def tick(self) -> list[str]:
        """Evaluate the sensor once; return the seed sets for which a run is launched."""
        seen = self.evaluate("seed_sets_sensor", self.cursor)
        self.cursor = seen.cursor or ""
        self.said = self.cursor.split("\n")[0]
        assert not seen.skip_reason or seen.skip_reason.skip_message == self.said
        for request in seen.dynamic_partitions_requests or []:
            names = list(request.partition_keys)
            if isinstance(request, dg.AddDynamicPartitionsRequest):
                self.project.instance.add_dynamic_partitions("seed_sets", names)
            for name in [] if isinstance(request, dg.AddDynamicPartitionsRequest) else names:
                self.project.instance.delete_dynamic_partition("seed_sets", name)
        requests = seen.run_requests or []
        launched = [request for request in requests if request.run_key not in self.run_keys]
        self.run_keys += [request.run_key or "" for request in launched]
        for request in launched:
            assert self.project.instance.has_dynamic_partition("seed_sets", request.partition_key or "")
        return [request.partition_key or "" for request in launched]

    def tick_and_work(self) -> list[str]:
        """Tick, and let the runs read their seeds."""
        launched = self.tick()
        for name in launched:
            assert self.project.run(name, "seed_embeddings").success
        return launched


def materialization(result: dg.ExecuteInProcessResult, asset: str) -> dg.AssetMaterialization:
    """What a run reported of an asset."""
    events = result.get_asset_materialization_events()
    (made,) = (event.materialization for event in events if event.asset_key == dg.AssetKey(asset))
    return made


def working_op(node: NodeDefinition) -> dg.OpDefinition:
    """The op of an asset; of a graph the one that does the work of a usual set."""
    found = node
    if isinstance(node, dg.GraphDefinition):
        found = node.node_named({"knn_urls": "search", "combined_urls": "unite"}[node.name]).definition
    assert isinstance(found, dg.OpDefinition)
    return found


def reported(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    """What a materialization tells the UI, as plain values; the settings by name, with their origin."""
    told = figures_of(materialization(result, asset).metadata)
    if "settings" in told:
        rows = [record.data for record in told["settings"].records]
        told["settings"] = {row["setting"]: f"{row['value']} ({row['from']})" for row in rows}
    return told


def failures(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """The assets of the failed steps, and the sentence that the UI shows for each."""
    found = {}
    for event in result.filter_events(lambda event: event.is_step_failure):
        failure = event.step_failure_data
        told = failure.user_failure_data and failure.user_failure_data.description
        found[asset_of_step(event.step_key)] = told or f"no sentence, but {failure.error_display_string}"
    return found


def stale(project: Project, seed_set: str) -> set[str]:
    """The assets that the UI would show as stale for a seed set or any shard; none may be missing."""
    graph = project.defs.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(
        project.instance, graph, LoadingContextForTest(project.instance)
    )
    found = []
    for key in graph.materializable_asset_keys:
        by = graph.get(key).partitions_def
        partitions: list[str | None] = [None]
        if isinstance(by, dg.DynamicPartitionsDefinition):
            of_seeds = by.name == "seed_sets"
            partitions = [seed_set] if of_seeds else [*project.instance.get_dynamic_partitions(by.name)]
        found += [(key.to_user_string(), resolver.get_status(key, each)) for each in partitions]
    assert StaleStatus.MISSING not in dict(found).values()
    return {name for name, status in found if status is StaleStatus.STALE}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder by its relative path, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let every write beyond a size fail, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextmanager
def new_project(root: Path, index: Path, seeds: Path | None = None, **more: str) -> Iterator[Project]:
    """A project in a folder, with a copy of some seed sets; `more` is added to its environment.

    Its history is in SQLite in memory: on a disk, a connection an event is half of a test's time.
    The tests of the command line, the UI and Kubernetes have theirs where users have it.
    """
    (root / "dagster").mkdir()
    with dg.DagsterInstance.ephemeral(str(root / "dagster")) as instance:
        made = Project(root, index, instance, **more)
        if seeds:
            shutil.copytree(seeds, made.seeds, dirs_exist_ok=True)
        yield made
