"""The whole platform on a stand-in for a cluster: real Dagster, real PostgreSQL, a process for each pod.

One cluster and one Dagster serve all tests, in this order; each leaves a node with the index on it.
"""

from collections.abc import Iterator
from itertools import pairwise

import dagster as dg
import pytest
from helpers.cluster import wait_until
from helpers.installation import Platform, installed

from laion_assets.defs.kubernetes.placement import NvmeNode
from laion_assets.defs.kubernetes.step_pods import RENEW

NAMES = (
    "staged_laion_index", "seed_embeddings", "centroid_vector",
    "knn_urls", "centroid_urls", "combined_urls",
)  # fmt: skip
ON_NVME = {"staged_laion_index", "knn_urls", "centroid_urls"}
RETRY = dg.DagsterEventType.STEP_UP_FOR_RETRY


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with installed(tmp_path_factory.mktemp("platform")) as platform:
        yield platform


def test_each_step_is_a_pod_and_those_that_need_the_index_are_where_the_claim_is(platform: Platform):
    cluster = platform.cluster
    cluster.add_node("any", nvme=False)
    cluster.add_node("nvme-1", nvme=True)
    cluster.add_node("nvme-2", nvme=True)
    cluster.create("persistentvolumeclaims", "laion", platform.claim)
    platform.succeed(platform.launch("fruit"))
    hosts = {name: [pod["spec"]["nodeName"] for pod in cluster.pods_of(name)] for name in NAMES}
    assert hosts == {name: ["nvme-1" if name in ON_NVME else "any"] for name in NAMES}
    assert (cluster.disk("nvme-1") / "manifest.json").exists()
    assert not any(cluster.disk("nvme-2").iterdir())
    assert (platform.root / "bucket" / "tables" / "combined_urls" / "fruit.parquet").exists()
    assert len(platform.stagings()) == 1
    (claim,) = cluster.of("persistentvolumeclaims")
    assert claim["metadata"]["name"] == NvmeNode().claim
    assert claim["spec"]["volumeName"] == "local-nvme-1"


def test_a_node_that_comes_back_empty_is_staged_again_or_the_step_says_so(platform: Platform):
    platform.cluster.replace_node("nvme-1")
    platform.cluster.environment["LAION_LOST_INDEX"] = "fail"
    run = platform.launch("fruit", "knn_urls")
    assert platform.wait(run) == dg.DagsterRunStatus.FAILURE
    told = platform.sentences(run)["knn_urls"]
    assert told.startswith("nothing is staged in")
    assert "materialize staged_laion_index" in told
    assert not platform.events(run, RETRY), "an error of ours is not tried again"
    del platform.cluster.environment["LAION_LOST_INDEX"]
    platform.succeed(platform.reexecute(run))
    newest = platform.stagings()[0]
    assert "staged again by knn_urls" in (newest.description or "")
    assert len(platform.stagings()) == 2


def test_a_node_that_is_gone_ends_the_run_with_a_sentence_until_the_claim_is_renewed(platform: Platform):
    platform.cluster.remove_node("nvme-1")
    run = platform.launch("fruit", "knn_urls")
    assert platform.wait(run) == dg.DagsterRunStatus.FAILURE
    told = platform.sentences(run)
    assert set(told) == {"knn_urls"}
    for fact in ("claim laion-index", "node nvme-1, which is gone", RENEW, "re-execute from failure"):
        assert fact in told["knn_urls"]
    assert not platform.events(run, RETRY)
    assert not platform.cluster.pods_of("knn_urls", "Pending"), "it might start beside a later try"
    assert "was recreated" in platform.renew_claim()
    assert "is usable" in platform.renew_claim()
    again = platform.reexecute(run)
    platform.succeed(again)
    assert platform.cluster.pods_of("knn_urls")[-1]["spec"]["nodeName"] == "nvme-2"
    assert len(platform.stagings()) == 3


def test_a_step_that_waits_for_a_node_that_is_gone_goes_on_once_the_claim_is_renewed(platform: Platform):
    platform.cluster.remove_node("nvme-2")
    platform.cluster.add_node("nvme-3", nvme=True)
    run = platform.launch("fruit", "centroid_urls")
    wait_until(lambda: platform.cluster.pods_of("centroid_urls", "Pending"), "centroid_urls waits")
    assert "was recreated" in platform.renew_claim()
    platform.succeed(run)
    assert platform.cluster.pods_of("centroid_urls")[-1]["spec"]["nodeName"] == "nvme-3"
    assert len(platform.events(run, dg.DagsterEventType.STEP_START)) == 1


def test_two_seed_sets_at_once_stage_once_and_search_in_turn(platform: Platform):
    platform.cluster.replace_node("nvme-3")
    before = len(platform.stagings())
    runs = [platform.launch(seed_set) for seed_set in ("flower", "house")]
    for run in runs:
        platform.succeed(run)
    assert len(platform.stagings()) == before + 1
    searches = sorted(
        (start.timestamp, end.timestamp)
        for run in runs
        for step in ("knn_urls", "centroid_urls")
        for start, end in zip(
            platform.events(run, dg.DagsterEventType.STEP_START, step),
            platform.events(run, dg.DagsterEventType.STEP_SUCCESS, step),
            strict=True,
        )
    )
    assert len(searches) == 4
    assert all(first[1] <= second[0] for first, second in pairwise(searches))
    hosts = {pod["spec"]["nodeName"] for name in ON_NVME for pod in platform.cluster.pods_of(name)[-2:]}
    assert hosts == {"nvme-3"}


def test_a_step_that_was_killed_evicted_or_out_of_memory_is_tried_again(platform: Platform):
    run = platform.launch("fruit", "staged_laion_index", "centroid_vector", "combined_urls")
    platform.cluster.kill(platform.running_pod("staged_laion_index"), "OOMKilled")
    platform.cluster.kill(platform.running_pod("centroid_vector"))
    platform.cluster.delete("pods", platform.running_pod("combined_urls"))
    platform.succeed(run)
    retries = {
        log.dagster_event.step_key: log.dagster_event.step_retry_data.error.message
        for log in platform.events(run, RETRY)
    }
    assert retries.keys() == {"staged_laion_index", "centroid_vector", "combined_urls"}
    assert "OOMKilled, exit code 137" in retries["staged_laion_index"]
    assert "exit code 137" in retries["centroid_vector"]


def test_a_run_that_was_cancelled_gives_its_place_to_the_next(platform: Platform):
    first = platform.launch("fruit", "knn_urls")
    pod = platform.running_pod("knn_urls")
    second = platform.launch("fruit", "centroid_urls")
    platform.cancel(first)
    assert platform.wait(first) == dg.DagsterRunStatus.CANCELED
    wait_until(lambda: ("pods", pod) not in platform.cluster.objects, "its step is gone too")
    platform.succeed(second)


def test_a_run_whose_own_pod_was_lost_starts_again_from_where_it_was(platform: Platform):
    run = platform.launch("fruit", "knn_urls", "combined_urls")
    platform.running_pod("knn_urls")
    (own,) = [name for name in platform.cluster.running if name.startswith(f"dagster-run-{run}")]
    platform.cluster.kill(own)
    assert platform.wait(run) == dg.DagsterRunStatus.FAILURE
    (again,) = wait_until(lambda: platform.children(run), "the run starts again", 60)
    platform.succeed(again.run_id)
    assert platform.events(again.run_id, dg.DagsterEventType.STEP_SUCCESS, "combined_urls")
