"""An index is built on the stand-in for a cluster, with parallel shards, one of which is killed."""

from collections.abc import Iterator

import dagster as dg
import pytest
from helpers.cluster import wait_until
from helpers.installation import Platform, installed
from helpers.published import publish_all

from laion_assets.defs.build_sensor import ENCODE_JOB, PUBLISH_JOB, TRAIN_JOB
from laion_assets.defs.kubernetes.placement import BUILDING_RESOURCES

SHARDS = ["000000", "000001"]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    root = tmp_path_factory.mktemp("platform")
    publish_all(root / "embeddings", "laion", (600, 600))
    places = {
        "LAION_EMBEDDINGS_URI": str(root / "embeddings"),
        "LAION_INDEX_URI": str(root / "bucket" / "built"),
        "LAION_BUILD_URI": str(root / "bucket" / "work"),
        "LAION_SHARD_ROWS": "600",
    }
    with installed(root, **places) as platform:
        platform.stop_sensor("embedding_files_sensor")  # the tests start the runs
        yield platform


def test_shards_are_encoded_in_parallel_and_only_one_that_was_killed_is_done_again(platform: Platform):
    cores = int(BUILDING_RESOURCES["requests"]["cpu"])
    for name in ("any-1", "any-2"):  # room for one shard each, and for the pods of runs
        platform.cluster.add_node(name, nvme=False, cpu=2 * cores - 1)
    platform.succeed(platform.launch_job(TRAIN_JOB))
    platform.instance.event_log_storage.set_concurrency_slots("building", 2)
    platform.instance.add_dynamic_partitions("index_shards", SHARDS)
    runs = [platform.launch_job(ENCODE_JOB, shard) for shard in SHARDS]

    def at_once() -> list[dict[str, object]] | None:
        running = platform.cluster.pods_of("index_shards", "Running")
        return running if len(running) == 2 else None

    pods = wait_until(at_once, "both shards are being encoded")
    assert {pod["spec"]["nodeName"] for pod in pods} == {"any-1", "any-2"}
    killed = pods[1]["metadata"]
    platform.cluster.kill(killed["name"], "OOMKilled")
    for run in runs:
        platform.succeed(run)
    retries = {run: platform.events(run, dg.DagsterEventType.STEP_UP_FOR_RETRY) for run in runs}
    (again,) = [run for run in runs if retries[run]]
    assert killed["labels"]["dagster/run-id"] == again
    assert "OOMKilled" in retries[again][0].dagster_event.step_retry_data.error.message
    assert len(platform.cluster.pods_of("index_shards")) == 3

    platform.succeed(platform.launch_job(PUBLISH_JOB))
    (record,) = platform.instance.fetch_materializations(dg.AssetKey("laion_index"), limit=5).records
    assert record.asset_materialization
    assert record.asset_materialization.metadata["dagster/row_count"].value == 1200
    assert (platform.root / "bucket" / "built" / "image.index").exists()
