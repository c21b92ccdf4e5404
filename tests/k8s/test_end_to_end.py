"""The whole platform on a stand-in for a cluster: real Dagster, real PostgreSQL, a process for each pod.

One cluster and one Dagster serve all tests, in this order; each leaves nodes with the index on them.
"""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest
from dagster_k8s.utils import sanitize_k8s_label
from helpers.cluster import wait_until
from helpers.installation import Platform, installed
from helpers.project import REPOSITORY, new_project

from laion_assets.search import retrieval

STEPS = (
    "staged_laion_index", "seed_embeddings", "centroid_vector",
    "knn_urls.shards", "knn_urls.search", "knn_urls.join", "centroid_urls",
    "combined_urls.stripes", "combined_urls.unite",
)  # fmt: skip
ON_NVME = {"staged_laion_index", "knn_urls.search", "centroid_urls"}
SMALL_PARTS = """
from laion_assets.search import retrieval, shards
retrieval.query_bytes = lambda *_: retrieval.RESULT_BYTES // 2  # two seeds a batch, of 11 or 12
shards.NOMINAL_ROW, shards.BATCHES = shards.RESULT_BYTES // 2 // 50, 1
from laion_assets.search import needs
needs.stripes_of = lambda images: 3
"""
RETRY = dg.DagsterEventType.STEP_UP_FOR_RETRY


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with installed(tmp_path_factory.mktemp("platform")) as platform:
        platform.cluster.add_node("any", nvme=False)
        platform.cluster.pool_size = 1
        yield platform


def node_of(platform: Platform, step: str) -> str:
    """The node on which the newest pod of a step runs or ran."""
    return str(platform.cluster.pods_of(step)[-1]["spec"]["nodeName"])


def preferred_by(pod: dict[str, Any]) -> list[str]:
    """The nodes that a pod prefers."""
    affinity = pod["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = term["preference"]["matchExpressions"]
    nodes: list[str] = expression["values"]
    return nodes


def test_each_step_is_a_pod_and_those_that_need_the_index_run_on_a_pool_that_grows_from_zero(
    platform: Platform,
):
    cluster = platform.cluster
    platform.succeed(platform.launch("fruit"))
    hosts = {name: [pod["spec"]["nodeName"] for pod in cluster.pods_of(name)] for name in STEPS}
    assert hosts == {name: ["pool-1" if name in ON_NVME else "any"] for name in STEPS}
    assert (cluster.disk("pool-1") / "manifest.json").exists()
    assert platform.table("combined_urls", "fruit").num_rows
    assert platform.stagings() == [("pool-1", "")]


def test_two_seed_sets_at_once_search_on_two_nodes_and_each_has_a_copy(
    platform: Platform, tmp_path: Path
):
    for pool in ("retrieval", "staging"):
        platform.instance.event_log_storage.set_concurrency_slots(pool, 2)
    platform.cluster.pool_size = 2
    runs = [platform.launch(seed_set) for seed_set in ("flower", "house")]
    for run in runs:
        platform.succeed(run)
    assert platform.cluster.nodes() == ["any", "pool-1", "pool-2"]
    assert [node for node, _ in platform.stagings()] == ["pool-2", "pool-1"]
    assert (platform.cluster.disk("pool-2") / "manifest.json").exists()
    assert "pool-1" in preferred_by(platform.cluster.pods_of("knn_urls.search")[-1])
    bucket = platform.root / "bucket"
    with new_project(tmp_path, bucket / "index", bucket / "seeds") as one_machine:
        for seed_set in ("flower", "house"):
            assert one_machine.run(seed_set).success
            expected = pq.read_table(one_machine.table("combined_urls", seed_set))
            assert platform.table("combined_urls", seed_set).equals(expected)


def test_shards_are_searched_on_two_nodes_and_only_a_shard_or_stripe_that_was_killed_again(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "sitecustomize.py").write_text(SMALL_PARTS)
    path = f"{tmp_path / 'small'}:{REPOSITORY}"
    monkeypatch.setitem(platform.cluster.environment, "PYTHONPATH", path)
    platform.instance.event_log_storage.set_concurrency_slots("combining", 3)
    run = platform.launch("flower", "knn_urls", "combined_urls")
    for step in ("knn_urls.search", "combined_urls.compare"):
        # A pod that is killed keeps its slot; killed too early, the others would run one at a time.
        platform.cluster.kill(platform.running_pod(step, at_least=2))
    platform.succeed(run)
    retried = [sanitize_k8s_label(e.dagster_event.step_key) for e in platform.events(run, RETRY)]
    assert len(retried) == 2
    for step, number in (("knn_urls.search", 6), ("combined_urls.compare", 3)):
        pods = [
            pod
            for pod in platform.cluster.pods_of(step)
            if pod["metadata"]["labels"]["dagster/run-id"] == run
        ]
        nodes = {pod["spec"]["nodeName"] for pod in pods}
        assert nodes == ({"any"} if step == "combined_urls.compare" else {"pool-1", "pool-2"})
        tries = Counter(pod["metadata"]["labels"]["dagster/op"] for pod in pods)
        assert len(tries) == number
        assert [name for name in tries if tries[name] > 1] == [name for name in tries if name in retried]
    bucket = platform.root / "bucket"
    two_at_once = retrieval.RESULT_BYTES // 2
    monkeypatch.setattr(retrieval, "query_bytes", lambda *_: two_at_once)  # and one shard of 6 batches
    with new_project(tmp_path, bucket / "index", bucket / "seeds") as one_machine:
        assert one_machine.run("flower").success
        for asset in ("knn_urls", "combined_urls"):
            expected = pq.read_table(one_machine.table(asset, "flower"))
            assert platform.table(asset, "flower").equals(expected)
            unfinished = list((bucket / "tables" / asset).glob("*.unfinished"))
            assert not unfinished, "shards and stripes are gone"


def test_a_node_that_dies_in_a_search_costs_one_retry_and_no_operator(platform: Platform):
    before = platform.table("knn_urls", "fruit")
    run = platform.launch("fruit", "knn_urls")
    platform.running_pod("knn_urls.search")
    platform.cluster.remove_node(node_of(platform, "knn_urls.search"))
    platform.succeed(run)
    assert len(platform.events(run, RETRY, "knn_urls")) == 1
    assert platform.table("knn_urls", "fruit").equals(before)


def test_a_node_that_comes_back_empty_gets_a_copy_from_the_step_that_needs_it(platform: Platform):
    (left,) = [node for node in platform.cluster.nodes() if node != "any"]
    platform.cluster.pool_size = 0
    platform.cluster.replace_node(left)
    before = len(platform.stagings())
    run = platform.launch("fruit", "centroid_urls")
    platform.succeed(run)
    assert platform.stagings()[0] == (left, "staged by centroid_urls, whose disk had no current copy")
    assert len(platform.stagings()) == before + 1
    assert not platform.events(run, RETRY)


def test_a_step_without_a_node_ends_with_a_sentence_and_can_go_on_when_there_is_one(platform: Platform):
    (left,) = [node for node in platform.cluster.nodes() if node != "any"]
    platform.cluster.remove_node(left)
    run = platform.launch("fruit", "knn_urls")
    assert platform.wait(run) == dg.DagsterRunStatus.FAILURE
    told = platform.sentences(run)
    assert set(told) == {"knn_urls"}
    for fact in ("0/1 nodes are available", "Add a node that fits", "LAION_NVME_PENDING_SECONDS"):
        assert fact in told["knn_urls"]
    assert not platform.events(run, RETRY)
    assert not platform.cluster.pods_of("knn_urls", "Pending"), "it might start beside a later try"
    platform.cluster.pool_size = 1
    platform.succeed(platform.reexecute(run))


def test_a_run_may_not_change_its_pods(platform: Platform):
    config = {"pod_spec_config": {"host_network": True}}
    run = platform.launch("fruit", "centroid_vector", **{"dagster-k8s/config": json.dumps(config)})
    assert platform.wait(run) == dg.DagsterRunStatus.FAILURE
    told = [str(log.dagster_event) for log in platform.instance.all_logs(run)]
    assert any("violated the allowed list: pod_spec_config.host_network" in text for text in told)
    assert not [name for kind, name in platform.cluster.objects if kind == "jobs" and run in name]


def test_a_step_that_was_killed_evicted_or_out_of_memory_is_tried_again(platform: Platform):
    run = platform.launch("fruit", "staged_laion_index", "centroid_vector", "combined_urls")
    platform.cluster.kill(platform.running_pod("staged_laion_index"), "OOMKilled")
    platform.cluster.kill(platform.running_pod("centroid_vector"))
    platform.cluster.delete("pods", platform.running_pod("combined_urls.unite"))
    platform.succeed(run)
    retries = {
        log.dagster_event.step_key: log.dagster_event.step_retry_data.error.message
        for log in platform.events(run, RETRY)
    }
    assert retries.keys() == {"staged_laion_index", "centroid_vector", "combined_urls.unite"}
    assert "OOMKilled, exit code 137" in retries["staged_laion_index"]
    assert "exit code 137" in retries["centroid_vector"]


def test_a_run_that_was_cancelled_gives_its_place_to_the_next(platform: Platform):
    platform.instance.event_log_storage.set_concurrency_slots("retrieval", 1)
    first = platform.launch("fruit", "knn_urls")
    pod = platform.running_pod("knn_urls.search")
    second = platform.launch("fruit", "centroid_urls")
    platform.cancel(first)
    assert platform.wait(first) == dg.DagsterRunStatus.CANCELED
    wait_until(lambda: ("pods", pod) not in platform.cluster.objects, "its step is gone too")
    platform.succeed(second)


def test_a_run_whose_own_pod_was_lost_starts_again_from_where_it_was(platform: Platform):
    run = platform.launch("fruit", "knn_urls", "combined_urls")
    platform.running_pod("knn_urls.search")
    searching = partial(platform.events, run, dg.DagsterEventType.STEP_START, "knn_urls")
    wait_until(lambda: len(searching()) > 1, "the search has begun, after the shards were cut")
    (own,) = [name for name in platform.cluster.running if name.startswith(f"dagster-run-{run}")]
    platform.cluster.kill(own)
    assert platform.wait(run) == dg.DagsterRunStatus.FAILURE
    (again,) = wait_until(lambda: platform.children(run), "the run starts again", 60)
    platform.succeed(again.run_id)
    assert platform.events(again.run_id, dg.DagsterEventType.STEP_SUCCESS, "combined_urls")


def test_no_pod_writes_outside_its_volumes(platform: Platform):
    assert {name: files for name, files in platform.cluster.written.items() if files} == {}
    home = {path.name for path in (platform.root / "home").iterdir()}
    assert home == {"dagster.yaml", "workspace.yaml"}, "the webserver and the daemon may not write here"
