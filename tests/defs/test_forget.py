"""A failed run leaves no failed check behind, and a forgotten seed set leaves nothing."""

import shutil
from collections.abc import Iterator
from itertools import chain

import dagster as dg
import numpy as np
import pytest
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionResolvedStatus
from dagster._core.storage.partition_status_cache import get_and_update_asset_status_cache_value
from helpers.project import Demo, Project, Ticks, contents, failures, new_project

from laion_assets.defs.checks import CENTROID
from laion_assets.defs.forget import ASSETS, FORGET_JOB, FORGET_STEP

KEPT = "fruit.v2"  # begins like the forgotten set
FAILED = (
    AssetCheckExecutionResolvedStatus.FAILED,
    AssetCheckExecutionResolvedStatus.EXECUTION_FAILED,
)


@pytest.fixture
def project(demo: Demo, tmp_path) -> Iterator[Project]:
    with new_project(tmp_path, demo.index) as made:
        shutil.copytree(demo.seeds / "fruit", made.seeds / "fruit")
        yield made


def unlike(project: Project, seed_set: str) -> None:
    """Add seeds that have nothing in common, of which a check warns."""
    (project.seeds / seed_set).mkdir()
    np.save(project.seeds / seed_set / "a.npy", np.eye(64, 256, dtype=np.float32))


def failed_checks(project: Project) -> dict[str, set[str]]:
    """The seed sets for which the UI shows each check as failed."""
    graph = project.defs.resolve_asset_graph()
    keys = [(key, graph.get_check_spec(key).partitions_def) for key in graph.asset_check_keys]
    with partition_loading_context(dynamic_partitions_store=project.instance):
        states = project.instance.event_log_storage.get_asset_check_state(keys)
    found = {
        key.name: {
            *chain.from_iterable(
                state.subsets[status].subset_value.get_partition_keys() for status in FAILED
            )
        }
        for key, state in states.items()
        if state.subsets and graph.get_check_spec(key).partitions_def
    }
    return {name: sets for name, sets in found.items() if sets}


def red(project: Project) -> set[tuple[str, str]]:
    """The assets that the graph shows in red, each with the seed set because of which it is."""
    sets = project.instance.get_dynamic_partitions("seed_sets")
    found = set()
    for asset in ASSETS:
        cached = get_and_update_asset_status_cache_value(
            project.instance, dg.AssetKey(asset), CENTROID[0].partitions_def
        )
        if cached:
            failed = cached.deserialize_failed_partition_subsets(CENTROID[0].partitions_def)
            found |= {(asset, name) for name in failed.get_partition_keys()}
            assert {name for _, name in found} <= {*sets}
    return found


def forget(project: Project, seed_set: str) -> dg.ExecuteInProcessResult:
    return project.defs.resolve_job_def(FORGET_JOB).execute_in_process(
        run_config={"ops": {FORGET_STEP: {"config": {"seed_set": seed_set}}}},
        instance=project.instance,
        raise_on_error=False,
    )


def test_a_check_fails_for_the_set_that_was_measured_and_for_no_other(project):
    unlike(project, "noise")
    broken = project.seeds / "broken" / "a.npy"
    broken.parent.mkdir()
    broken.write_bytes(b"no array")
    assert project.run("fruit", "seed_embeddings", "centroid_vector").success
    assert failed_checks(project) == {}
    assert set(failures(project.run("broken", *ASSETS))) == {"seed_embeddings"}
    assert failed_checks(project) == {}
    assert red(project) == {("seed_embeddings", "broken")}
    project.run("noise", "seed_embeddings", "centroid_vector")
    assert failed_checks(project) == {"seeds_are_coherent": {"noise"}}


def test_a_removed_set_leaves_no_red(project):
    names = ("never made", "made before")
    ticks = Ticks(project)
    for name in names:
        unlike(project, name)
    assert project.run("made before", "seed_embeddings", "centroid_vector").success
    for name in names:
        (project.seeds / name / "b.npy").write_bytes(b"no array")
        assert not project.run(name, *ASSETS).success
    assert red(project) == {("seed_embeddings", name) for name in names}
    for name in names:
        shutil.rmtree(project.seeds / name)
    assert ticks.tick() == []
    assert red(project) == set()
    assert project.instance.get_dynamic_partitions("seed_sets") == ["made before"]
    unlike(project, "never made")
    assert [ticks.tick() for _ in range(2)] == [["fruit"], ["never made"]]
    assert red(project) == set()


def test_a_forgotten_set_leaves_nothing_and_starts_anew(project):
    (project.seeds / "fruit").rename(project.seeds / KEPT)
    unlike(project, "fruit")
    ticks = Ticks(project)
    for name in ("fruit", KEPT):
        assert project.run(name, "seed_embeddings", "centroid_vector").success
    assert sum(len(ticks.tick()) for _ in range(3)) == 0
    assert failed_checks(project) == {"seeds_are_coherent": {"fruit"}}
    (project.output / "seed_embeddings" / "fruit.unfinished").mkdir()
    (project.output / "combined_urls").mkdir()
    for file in ("knn_urls/fruit.0123abcd.decoder", "combined_urls/fruit.png"):
        (project.output / file).parent.mkdir(exist_ok=True)
        (project.output / file).write_bytes(b"")

    assert forget(project, "fruit").success
    assert {name.rpartition("/")[2] for name in contents(project.output)} == {f"{KEPT}.parquet"}
    assert project.instance.get_dynamic_partitions("seed_sets") == [KEPT]
    assert {run.tags.get("dagster/partition") for run in project.instance.get_runs()} == {None, KEPT}
    assert failed_checks(project) == {}
    latest = project.instance.event_log_storage.get_latest_asset_check_execution_by_key(
        [spec.key for spec in CENTROID]
    )
    assert all(record.evaluation.passed for record in latest.values())

    assert [ticks.tick() for _ in range(3)] == [[], ["fruit"], []]
    statuses = project.instance.get_status_by_partition(
        dg.AssetKey("centroid_vector"), ["fruit", KEPT], CENTROID[0].partitions_def
    )
    assert statuses["fruit"] is None
    assert statuses[KEPT] is not None


def test_what_cannot_be_forgotten_is_said_and_nothing_is_deleted(project):
    assert project.run("fruit", "seed_embeddings").success
    before = contents(project.output)
    assert (
        "nothing is stored of 'friut'; the seed sets are fruit"
        in failures(forget(project, "friut"))[FORGET_STEP]
    )
    project.instance.create_run_for_job(
        project.job, tags={"dagster/partition": "fruit"}, status=dg.DagsterRunStatus.STARTED
    )
    assert "is queued or running" in failures(forget(project, "fruit"))[FORGET_STEP]
    assert contents(project.output) == before
