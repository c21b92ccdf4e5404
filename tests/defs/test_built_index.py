"""An index is built from published embeddings by the sensor's ticks and runs, then searched."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import gcsfs
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.project import Ticks, failures, new_project, reported, stale
from helpers.published import (
    LAYOUTS,
    Building,
    publish,
    publish_all,
    vectors_of,
    write_seeds,
)

from laion_assets.build import Built
from laion_assets.build import builder as building
from laion_assets.build.input_files import InputFiles
from laion_assets.definitions import build_defs
from laion_assets.defs import checks
from laion_assets.defs.build_sensor import SHARDS_AT_ONCE
from laion_assets.defs.resources import IndexBuilder
from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage

KEY = "IVF16,Flat"
SHARDS = ["000000", "000001", "000002", "000003"]


@contextmanager
def new_building(root: Path, layout: str = "clip-retrieval", **more: str) -> Iterator[Building]:
    """A project with 2,400 rows in 4 files, each a shard; nothing is built."""
    if not (root / "embeddings").exists():
        publish_all(root / "embeddings", layout)
    environment = {
        "LAION_EMBEDDINGS_URI": str(root / "embeddings"),
        "LAION_INDEX_KEY": KEY,
        "LAION_SHARD_ROWS": "600",
    }
    with new_project(root, root / "index", **environment | more) as project:
        yield Building(project)


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Building]:
    with new_building(tmp_path) as made:
        yield made


def restarted(build: Building, **more: str) -> Building:
    """The same project and history after a restart with other variables."""
    again = Building(build.project.with_environment(**more))
    again.cursor, again.run_keys = build.cursor, build.run_keys
    return again


def checks_of(result: dg.ExecuteInProcessResult) -> dict[str, bool]:
    return {found.check_name: found.passed for found in result.get_asset_check_evaluations()}


# --- from files to tables -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_embeddings_become_an_index_that_a_seed_set_is_searched_in(layout, tmp_path):
    with new_building(tmp_path, layout) as build:
        assert build.tick_build() == [], "files may still arrive"
        assert "still changing" in build.said
        assert build.settle() == ["train", *SHARDS, "publish"]
        assert "nothing new" in build.said
        assert "2,400 rows in 4 shards" in build.said
        trained = reported(build.results["train"], "trained_index")
        assert (trained["index key"], trained["rows planned"], trained["shards planned"]) == (
            KEY, 2400, 4,
        )  # fmt: skip
        shard = reported(build.results["000002"], "index_shards")
        assert (shard["dagster/row_count"], shard["first id"]) == (600, 1200)
        index = reported(build.results["publish"], "laion_index")
        assert (index["dagster/row_count"], index["index key"]) == (2400, KEY)
        assert "image/svg+xml" in index["recall chart"]
        last = index["recall"].records[-1].data  # all lists, and vectors as they are
        assert (last["lists probed"], last["recall@100"]) == ("16 (of a search)", "100.0%")
        assert index["recall@100"] == 1.0
        assert set(checks_of(build.results["publish"]).values()) == {True}

        write_seeds(build.project.seeds / "mine")
        result = build.project.run("mine", nb_images_knn=30, nb_images_centroid=50)
        assert not failures(result)
        found = pq.read_table(build.project.table("combined_urls", "mine")).to_pylist()
        assert len(found) > 60
        of_topic = [row for row in found if row["caption"].startswith("topic3 ")]
        assert len(of_topic) / len(found) > 0.9
        for row in found[:50]:
            assert row["url"] == f"https://example.org/{row['id']}.jpg"
        assert stale(build.project, "mine") == set()


def test_new_files_cost_their_own_shards_and_a_merge_and_make_the_staged_index_stale(build):
    write_seeds(build.project.seeds / "mine")
    assert build.settle() == ["train", *SHARDS, "publish"]
    assert build.project.run("mine", nb_images_knn=10, nb_images_centroid=10).success
    trained = build.project.root / "index.build" / "trained" / "trained.index"
    before = trained.stat().st_mtime_ns
    publish(build.project.root / "embeddings", "clip-retrieval", 4, 500, 2400)
    assert build.settle() == ["train", "000004", "publish"]
    assert trained.stat().st_mtime_ns == before, "training is for the first files"
    assert "2,900 rows in 5 shards" in build.said
    assert stale(build.project, "mine") == {"staged_laion_index"}
    result = build.project.run("mine", nb_images_knn=10, nb_images_centroid=10)
    assert reported(result, "staged_laion_index")["dagster/row_count"] == 2900
    assert stale(build.project, "mine") == set()


def test_steps_that_are_done_are_not_done_again(build):
    build.settle()
    written = {path: path.stat().st_mtime_ns for path in build.project.root.glob("index*/**/*")}
    for job in ("train_index_job", "publish_index_job"):
        assert build.run(dg.RunRequest(run_key="again", job_name=job)).success
    again = dg.RunRequest(run_key="again", job_name="encode_shard_job", partition_key="000001")
    assert build.run(again).success
    assert {path: path.stat().st_mtime_ns for path in build.project.root.glob("index*/**/*")} == written
    assert build.settle() == []


def test_seed_sets_wait_for_the_first_index(build):
    write_seeds(build.project.seeds / "mine")
    seeds = Ticks(build.project)
    assert [seeds.tick() for _ in range(3)] == [[], [], []]
    assert "waiting for the index: mine" in seeds.said
    build.settle()
    assert seeds.tick() == ["mine"]


def test_settings_that_come_back_are_built_again(build):
    assert build.settle() == ["train", *SHARDS, "publish"]
    other = restarted(build, LAION_INDEX_KEY="IVF8,Flat")
    assert other.settle() == ["train", *SHARDS, "publish"]
    assert reported(other.results["publish"], "laion_index")["index key"] == "IVF8,Flat"
    again = restarted(other, LAION_INDEX_KEY=KEY)
    assert again.settle() == ["train", *SHARDS, "publish"]
    assert reported(again.results["publish"], "laion_index")["index key"] == KEY


def test_embeddings_workspace_and_index_may_all_be_in_a_bucket(new_bucket, tmp_path, monkeypatch):
    folders = publish_all(tmp_path / "embeddings", "clip-retrieval")[0].parents[1]
    bucket, name = open_storage(new_bucket, "")
    bucket.put(f"{folders}/", f"{name}/embeddings/", recursive=True)
    listings: list[str] = []
    call = gcsfs.GCSFileSystem._call

    async def counted(self: Any, method: str, path: str, *arguments: Any, **more: Any) -> Any:
        # Listings of the embeddings alone: the workspace is asked for single files.
        if path.endswith("/o") and "embeddings" in str(more.get("prefix")):
            listings.append(path)
        return await call(self, method, path, *arguments, **more)

    places = {
        "LAION_EMBEDDINGS_URI": f"{new_bucket}/embeddings",
        "LAION_INDEX_URI": f"{new_bucket}/index",
    }
    with new_building(tmp_path, **places) as build:
        assert build.settle() == ["train", *SHARDS, "publish"]
        monkeypatch.setattr(gcsfs.GCSFileSystem, "_call", counted)
        assert build.tick_build() == []
        assert len(listings) == 1
        assert bucket.exists(f"{name}/index.build/shards/000003/shard.json")
        write_seeds(build.project.seeds / "mine")
        assert not failures(build.project.run("mine", nb_images_knn=10, nb_images_centroid=10))
        assert stale(build.project, "mine") == set()


# --- failures -------------------------------------------------------------------------------------


def damage(file: Path, at: int) -> bytes:
    """Overwrite some bytes; return the content before."""
    content = file.read_bytes()
    file.write_bytes(content[:at] + b"\xff" * 64 + content[at + 64 :])
    return content


@pytest.mark.faults
def test_a_shard_that_fails_holds_up_no_other_and_runs_again_once_its_file_is_mended(tmp_path):
    # Training reads whole files where they are compressed, so the damage comes after it.
    with new_building(tmp_path, "datacomp") as build:
        file = sorted((tmp_path / "embeddings").glob("*.npz"))[1]
        build.tick_build()
        (train,) = build.tick_build()
        assert build.run(train).success
        stat, content = file.stat(), damage(file, 50_000)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # damage that nobody announced
        assert build.settle() == ["000000", "000001 failed", "000002", "000003"]
        (told,) = failures(build.results["000001"]).values()
        assert file.name in told
        assert "failed: " in build.said
        assert "000001" in build.said
        assert not (tmp_path / "index").exists()
        file.write_bytes(content)
        assert build.settle() == ["train", "000001", "publish"]
        assert "nothing new" in build.said


@pytest.mark.faults
def test_a_shard_that_failed_and_was_materialized_by_hand_counts_as_done(build):
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the wire was cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "encode_shard", broken)
        assert build.settle() == ["train", *(f"{name} failed" for name in SHARDS)]
    by_hand = [
        dg.RunRequest(run_key="by hand", job_name="encode_shard_job", partition_key=name)
        for name in SHARDS
    ]
    assert all(build.run(each).success for each in by_hand)
    assert build.settle() == ["publish"]


def test_failed_and_running_shards_leave_room_for_no_more_than_a_number_at_once(tmp_path):
    sizes = (40,) * (SHARDS_AT_ONCE + 20)
    publish_all(tmp_path / "embeddings", "parquet", sizes)
    with new_building(tmp_path, LAION_SHARD_ROWS="40") as build:
        build.tick_build()
        assert build.run(*build.tick_build()).success
        launched = build.tick_build()
        assert [each.partition_key for each in launched] == [f"{n:06}" for n in range(SHARDS_AT_ONCE)]
        for number, request in enumerate(launched):  # the first ones fail, the others take long
            build.project.instance.create_run_for_job(
                build.project.defs.resolve_job_def(request.job_name),
                tags={"dagster/run_key": request.run_key},
                status=dg.DagsterRunStatus.FAILURE if number < 8 else dg.DagsterRunStatus.STARTED,
            )
        assert [each.partition_key for each in build.tick_build()] == [
            f"{SHARDS_AT_ONCE + n:06}" for n in range(8)
        ]
        assert "70 of 70 shards to encode" in build.said


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda file: file.unlink(), "img_emb_2.npy"),
        (lambda file: damage(file, 20_000), "img_emb/img_emb_2.npy changed"),
    ],
)
def test_a_planned_file_that_is_gone_or_changed_is_a_sentence_in_the_tick(build, change, fact):
    build.settle()
    change(build.project.root / "embeddings" / "img_emb" / "img_emb_2.npy")
    assert build.settle() == []
    assert fact in build.said
    assert build.said.endswith("(LAION_EMBEDDINGS_URI)")


@pytest.mark.faults
def test_both_files_of_a_part_gone_is_a_sentence_in_the_tick(build):
    build.settle()
    for name in ("img_emb/img_emb_2.npy", "metadata/metadata_2.parquet"):
        (build.project.root / "embeddings" / name).unlink()
    assert build.settle() == []
    assert "img_emb/img_emb_2.npy is gone" in build.said


def test_a_replaced_file_with_other_rows_is_refused_by_name(build):
    build.tick_build()
    assert build.run(*build.tick_build()).success
    publish(build.project.root / "embeddings", "clip-retrieval", 2, 100, 0)
    assert build.settle() == ["train failed"]
    (told,) = failures(build.results["train"]).values()
    assert "img_emb/img_emb_2.npy changed" in told
    assert "trained_index failed" in build.said


def test_an_index_that_no_build_wrote_is_not_replaced(build):
    build.project.index.mkdir()
    (build.project.index / "mine.txt").write_text("mine")
    assert build.settle() == ["train failed"]
    (told,) = failures(build.results["train"]).values()
    assert told.endswith("(LAION_INDEX_URI)")
    assert "trained_index failed" in build.said
    assert (build.project.index / "mine.txt").read_text() == "mine"


# What is set, whether a run says it or the tick, and what must be named.
WRONG: dict[str, tuple[dict[str, str], bool, tuple[str, ...]]] = {
    "no folder": ({"LAION_EMBEDDINGS_URI": "/none"}, False, ("/none", "(LAION_EMBEDDINGS_URI)")),
    "no such bucket": (
        {"LAION_EMBEDDINGS_URI": "gs:/none"}, False, ("gs:/none", "(LAION_EMBEDDINGS_URI)"),
    ),
    "another layout": (
        {"LAION_EMBEDDINGS_LAYOUT": "datacomp"}, False, ("no embeddings", "(LAION_EMBEDDINGS_URI)"),
    ),
    "a key of the index": ({"LAION_INDEX_KEY": "nonsense"}, True, ('"nonsense"', "(LAION_INDEX_KEY)")),
    "a key that needs more rows": (
        {"LAION_INDEX_KEY": "IVF4096,Flat"}, True, ("2,400", "(LAION_INDEX_KEY)"),
    ),
    "a key that does not divide": (
        {"LAION_INDEX_KEY": "IVF4,PQ7x8"}, True, ("PQ7", "(LAION_INDEX_KEY)"),
    ),
    "too few bytes": (
        {"LAION_INDEX_KEY": "", "LAION_BYTES_PER_ROW": "9"}, True, ("12 bytes", "(LAION_BYTES_PER_ROW)"),
    ),
    "a column": (
        {"LAION_EMBEDDINGS_COLUMNS": "url,nonsense"}, True,
        ("'nonsense'", "caption", "(LAION_EMBEDDINGS_COLUMNS)"),
    ),
    "a place to work": ({"LAION_BUILD_URI": "gs:/none"}, False, ("gs:/none", "(LAION_BUILD_URI)")),
}  # fmt: skip


def test_a_wrong_setting_is_one_sentence_that_names_it(tmp_path):
    with new_building(tmp_path) as build:
        right = build.project.more
        for name, (settings, in_a_run, facts) in WRONG.items():
            build = restarted(build, **settings)
            ran, told = build.settle(), build.said
            if in_a_run:
                assert ran == ["train failed"], name
                assert "trained_index failed: see the run's error" in told
                (told,) = failures(build.results["train"]).values()
            else:
                assert ran == [], name
            assert [fact for fact in facts if fact not in told] == [], told
            build = restarted(build, **(dict.fromkeys(settings, "") | right))
        assert build.settle() == ["train", *SHARDS, "publish"]


@pytest.mark.parametrize(
    ("layout", "facts"),
    [("datacomp", ("nonsense", "l14_img", "b32_img")), ("parquet", ("nonsense", "embedding"))],
)
def test_an_unknown_key_is_a_sentence_with_those_there_are(layout, facts, tmp_path):
    with new_building(tmp_path, layout, LAION_EMBEDDINGS_KEY="nonsense") as build:
        assert build.settle() == ["train failed"]
        (told,) = failures(build.results["train"]).values()
        assert [fact for fact in (*facts, "(LAION_EMBEDDINGS_KEY)") if fact not in told] == [], told


def test_several_layouts_in_a_folder_are_a_sentence_that_names_the_setting(tmp_path):
    publish_all(tmp_path / "embeddings", "parquet")
    with new_building(tmp_path) as build:
        publish_all(tmp_path / "embeddings", "clip-retrieval")
        assert build.settle() == []
        assert build.said.endswith("(LAION_EMBEDDINGS_LAYOUT)")


def test_a_layout_that_is_none_is_refused_at_the_start():
    with pytest.raises(InputError, match=r"LAION_EMBEDDINGS_LAYOUT is 'zip': .*'parquet'"):
        build_defs({"LAION_EMBEDDINGS_LAYOUT": "zip"})


def test_a_shard_needs_a_partition_that_is_one(build):
    build.settle()
    none = dg.RunRequest(run_key="1", job_name="encode_shard_job")
    (told,) = failures(build.run(none)).values()
    assert "launch the run for a partition" in told
    build.project.instance.add_dynamic_partitions("index_shards", ["mine", "000099"])
    for name in ("mine", "000099"):
        request = dg.RunRequest(run_key=name, job_name="encode_shard_job", partition_key=name)
        (told,) = failures(build.run(request)).values()
        assert name.lstrip("0") in told


# --- without embeddings ---------------------------------------------------------------------------


def test_without_embeddings_there_is_no_build():
    defs, built = build_defs({}), build_defs({"LAION_EMBEDDINGS_URI": "/e", "LAION_INDEX_URI": "/i"})
    for each in (defs, built):
        dg.Definitions.validate_loadable(each)
    names = {key.to_user_string() for key in defs.resolve_asset_graph().get_all_asset_keys()}
    with_build = {key.to_user_string() for key in built.resolve_asset_graph().get_all_asset_keys()}
    assert names - with_build == {"laion_index_source"}
    assert with_build - names == {"embedding_files", "trained_index", "index_shards", "laion_index"}
    assert {job.name for job in defs.get_repository_def().get_all_jobs()} & {
        "train_index_job", "encode_shard_job", "publish_index_job",
    } == set()  # fmt: skip
    sensors = [
        {sensor.name for sensor in each.get_repository_def().sensor_defs} for each in (defs, built)
    ]
    assert sensors == [
        {"seed_sets_sensor", "laion_index_sensor", "missed_retries_sensor"},
        {"seed_sets_sensor", "embedding_files_sensor", "missed_retries_sensor"},
    ]
    graph = built.resolve_asset_graph()
    parents = {
        key.to_user_string(): {each.to_user_string() for each in graph.get(key).parent_keys}
        for key in graph.materializable_asset_keys
    }
    assert parents["trained_index"] == {"embedding_files"}
    assert parents["index_shards"] == {"trained_index"}
    assert parents["laion_index"] == {"index_shards"}
    assert parents["staged_laion_index"] == {"laion_index"}


def test_a_builder_without_embeddings_says_what_to_set():
    with (
        pytest.raises(InputError, match="no embeddings are set") as refused,
        IndexBuilder(None, 0.5).open(print),
    ):
        pass
    assert refused.value.about == "embeddings_uri"


# --- a tick is cheap ------------------------------------------------------------------------------


def test_a_tick_without_news_reads_no_header(tmp_path, monkeypatch):
    with new_building(tmp_path) as build:
        build.settle()
        monkeypatch.setattr(InputFiles, "read", None)
        monkeypatch.setattr("laion_assets.build.builder.read_trained", None)
        assert build.tick_build() == []
        assert "nothing new" in build.said
        publish(tmp_path / "embeddings", "clip-retrieval", 4, 10, 2400)
        assert build.tick_build() == []
        assert [each.job_name for each in build.tick_build()] == ["train_index_job"]


# --- checks ---------------------------------------------------------------------------------------


def built(recall: dict[str, dict[str, float]], nprobe: int, unusable: int = 0) -> Built:
    return Built("f", KEY, 24, 1000, 1000 - unusable, unusable, 16, 1, recall, nprobe)


CURVE = {
    "1": {"1": 0.5, "100": 0.3, "1000": 0.2},
    "4": {"1": 0.9, "100": 0.7, "1000": 0.6},
    "16": {"1": 1.0, "100": 0.74, "1000": 0.64},
}


@pytest.mark.parametrize(
    ("index", "min_recall", "failed"),
    [
        (built(CURVE, 4), 0.7, set()),
        (built(CURVE, 4), 0.71, {"recall_is_sufficient"}),
        (built(CURVE, 7), 0.7, set()),  # between two that were measured: the lower one
        (built(CURVE, 1), 0.3, {"nprobe_is_sufficient"}),
        (built(CURVE, 4, 10), 0.5, set()),
        (built(CURVE, 4, 11), 0.5, {"rows_have_vectors"}),
        (built({}, 0), 1.0, set()),
    ],
)
def test_the_checks_of_a_built_index(index, min_recall, failed):
    results = list(checks.of_built_index(index, min_recall))
    assert {each.check_name for each in results if not each.passed} == failed
    assert {each.check_name for each in results} == {spec.name for spec in checks.BUILT}


def test_failed_checks_warn_and_the_index_is_published_all_the_same(tmp_path):
    files = publish_all(tmp_path / "embeddings", "clip-retrieval")
    vectors = vectors_of(600)
    vectors[:100] = np.nan
    np.save(files[0], vectors)
    with new_building(tmp_path, LAION_MIN_RECALL="1", LAION_INDEX_KEY="IVF16,Flat") as build:
        assert build.settle() == ["train", *SHARDS, "publish"]
        found = checks_of(build.results["publish"])
        assert not found["rows_have_vectors"]
        index = reported(build.results["publish"], "laion_index")
        assert (index["dagster/row_count"], index["rows without a usable vector"]) == (2300, 100)
        shard = reported(build.results["000000"], "index_shards")
        assert shard["rows without a usable vector"] == 100
