"""`knn_urls` in shards: what a failed one repeats, and that the table is that of one search."""

from typing import Any

import dagster as dg
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.project import Demo, Project, contents, failures, new_project, reported

from laion_assets.defs.assets import knn_urls
from laion_assets.defs.dagster_internals import AssetPartitionStatus
from laion_assets.defs.forget import ASSETS
from laion_assets.defs.partitions import seed_sets
from laion_assets.io.errors import InputError
from laion_assets.search import retrieval
from laion_assets.search.shards import Shard

SEEDS = 24


@pytest.fixture
def project(tmp_path, demo: Demo, monkeypatch) -> Project:
    """Seeds that are searched four at once, in 6 shards of a batch each."""
    monkeypatch.setattr(retrieval, "query_bytes", lambda *_: retrieval.RESULT_BYTES // 4)
    with new_project(tmp_path, demo.index) as made:
        (made.seeds / "many").mkdir()
        np.save(made.seeds / "many" / "a.npy", np.random.default_rng(0).normal(size=(SEEDS, 256)))
        assert made.run("many", "staged_laion_index", "seed_embeddings", "centroid_vector").success
        yield made


def in_shards(monkeypatch, number: int) -> None:
    monkeypatch.setattr(knn_urls, "shards_for", lambda *_: number)


def fail_shard(patch: pytest.MonkeyPatch, number: int) -> None:
    write = knn_urls.SearchStep.write

    def failing(step: Any, origin: Any, part: Shard, uri: str | None) -> Any:
        if part.number == number:
            raise OSError("the node is gone")
        return write(step, origin, part, uri)

    patch.setattr(knn_urls.SearchStep, "write", failing)


def steps(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    records = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.STEP_SUCCESS).records
    return sorted(record.event_log_entry.dagster_event.step_key for record in records)


def failed(project: Project) -> set[str]:
    """The assets whose table of the set counts as failed."""
    statuses = {
        asset: project.instance.get_status_by_partition(dg.AssetKey(asset), ["many"], seed_sets) or {}
        for asset in ASSETS
    }
    return {name for name, found in statuses.items() if found.get("many") is AssetPartitionStatus.FAILED}


def test_a_failed_shard_alone_is_repeated_and_the_table_is_that_of_one_search(
    project, monkeypatch
) -> None:
    told = reported(project.run("many", "knn_urls", nb_images_knn=50), "knn_urls")
    path = project.table("knn_urls", "many")
    whole = pq.read_table(path)
    path.unlink()

    in_shards(monkeypatch, 6)
    with monkeypatch.context() as patch:
        fail_shard(patch, 3)
        first = project.run("many", "knn_urls", "centroid_urls", nb_images_knn=50)
    assert "the node is gone" in failures(first)["knn_urls"]
    assert not path.exists()
    assert len(steps(project.instance, first.run_id)) == 6  # one cuts, five search
    assert failed(project) == {"knn_urls"}  # and not what was never reached

    again = project.re_execute(first)
    assert again.success
    assert steps(project.instance, again.run_id) == [
        "centroid_urls",
        "knn_urls.join",
        "knn_urls.search[0003]",
    ]
    assert pq.read_table(path).equals(whole)
    figures = reported(again, "knn_urls")
    for name in ("requested", "received", "kept", "near duplicates", "recall of nprobe"):
        assert figures[name] == told[name]
    assert not [name for name in contents(project.output) if ".unfinished" in name]


def test_a_run_that_begins_no_search_says_what_to_do() -> None:
    with pytest.raises(
        InputError, match="ended before any shard was searched: materialize knn_urls again"
    ):
        knn_urls._check_whole([])


def test_shards_of_which_one_is_copied_over_another_are_refused(project, monkeypatch) -> None:
    in_shards(monkeypatch, 2)
    with monkeypatch.context() as patch:
        patch.setattr(knn_urls, "_join", lambda *_: 1 / 0)
        first = project.run("many", "knn_urls", nb_images_knn=50)
    folder = project.output / "knn_urls" / "many.unfinished" / first.run_id
    one, other = sorted(folder.glob("search*.json"))
    other.write_bytes(one.read_bytes())
    said = failures(project.re_execute(first))["knn_urls"]
    assert "not those of one search: materialize knn_urls again" in said


def test_shards_that_cut_the_seeds_differently_are_refused(project, monkeypatch) -> None:
    in_shards(monkeypatch, 2)
    with monkeypatch.context() as patch:
        fail_shard(patch, 1)
        first = project.run("many", "knn_urls", nb_images_knn=50)
    monkeypatch.setattr(retrieval, "query_bytes", lambda *_: retrieval.RESULT_BYTES // 5)
    said = failures(project.re_execute(first))["knn_urls"]
    assert "the shards cut the seeds differently: materialize knn_urls again" in said


@pytest.mark.parametrize(
    ("before", "after"), [("caption=category", "caption=caption"), ("category", ""), ("", "category")]
)
@pytest.mark.parametrize("step", ["write", "_join"])
def test_a_search_that_began_with_other_columns_is_refused(
    project, monkeypatch, before, after, step
) -> None:
    def with_columns(columns: str) -> Project:
        return project.with_environment(LAION_METADATA_COLUMNS=columns) if columns else project

    in_shards(monkeypatch, 2)
    with monkeypatch.context() as patch:
        if step == "write":
            fail_shard(patch, 1)
        else:
            patch.setattr(knn_urls, "_join", lambda *_: 1 / 0)
        first = with_columns(before).run("many", "knn_urls", nb_images_knn=50)
    said = failures(with_columns(after).re_execute(first))["knn_urls"]
    expected = "LAION_METADATA_COLUMNS has changed since this search began: materialize knn_urls again"
    assert expected in said


def test_a_search_that_another_version_began_is_refused(project, monkeypatch) -> None:
    in_shards(monkeypatch, 2)
    with monkeypatch.context() as patch:
        patch.setattr(knn_urls, "_join", lambda *_: 1 / 0)
        first = project.run("many", "knn_urls", nb_images_knn=50)
    monkeypatch.setattr(knn_urls, "SEARCH_VERSION", "a later one")
    said = failures(project.re_execute(first))["knn_urls"]
    assert "another version of laion_assets began this: materialize knn_urls again" in said
