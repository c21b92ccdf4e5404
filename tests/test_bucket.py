"""Everything in a bucket of a real server: the same tables, and whatever is wrong told in a sentence."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from conftest import Demo, Project, Ticks, failures, new_project, reported
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest
from gcs import describe

from laion_assets.io_managers import StoredTable
from laion_assets.retrieval.storage import open_storage
from laion_assets.retrieval.tables import Provenance

TABLES = ("seed_embeddings", "centroid_vector", "knn_urls", "centroid_urls", "combined_urls")


@pytest.fixture(scope="module")
def bucket(gcs: str, demo: Demo) -> str:  # noqa: ARG001
    """A bucket with the demo's index and seeds."""
    fs, _ = open_storage("gs://laion", "")
    fs.mkdir("laion")
    fs.put(f"{demo.index}/", "laion/index/", recursive=True)
    fs.put(f"{demo.seeds}/", "laion/seeds/", recursive=True)
    return "gs://laion"


@pytest.fixture(scope="module")
def on_bucket(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project all of whose places are in the bucket."""
    places = {
        "LAION_INDEX_URI": f"{bucket}/index",
        "LAION_METADATA_URI": f"{bucket}/index/metadata",
        "LAION_SEEDS_URI": f"{bucket}/seeds",
        "LAION_OUTPUT_URI": f"{bucket}/output",
    }
    with new_project(tmp_path_factory.mktemp("on_bucket"), Path("unused"), **places) as project:
        yield project


def test_the_whole_graph_in_a_bucket_makes_the_tables_that_it_makes_on_a_disk(
    on_bucket: Project, project: Project, bucket: str
) -> None:
    result, local = on_bucket.run("flower"), project.run("flower")
    assert failures(result) == failures(local) == {}
    for name in TABLES:
        stored = StoredTable(f"{bucket}/output/{name}/flower.parquet")
        expected = StoredTable(str(project.table(name, "flower")))
        assert stored.read() == expected.read()
        made, as_made = (Provenance.from_footer(table.footer, "") for table in (stored, expected))
        assert replace(made, run="", written="") == replace(as_made, run="", written="")
        assert made.run == result.run_id
        assert reported(result, name)["dagster/uri"] == stored.where
    picture = reported(result, "combined_urls")["picture"]
    assert picture == f"{bucket}/output/combined_urls/flower.png"
    with fsspec.open(picture) as png:
        assert png.read() == Path(reported(local, "combined_urls")["picture"]).read_bytes()
    assert not on_bucket.output.exists()


# --- what Dagster's UI shows as stale -------------------------------------------------------------


def stale(project: Project, seed_set: str) -> set[str]:
    """The assets that the UI would show as stale for a seed set; none may be missing."""
    graph = project.defs.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(
        project.instance, graph, LoadingContextForTest(project.instance)
    )
    found = {
        key.to_user_string(): resolver.get_status(
            key, seed_set if graph.get(key).partitions_def else None
        )
        for key in graph.materializable_asset_keys
    }
    assert StaleStatus.MISSING not in found.values()
    return {name for name, status in found.items() if status is StaleStatus.STALE}


def test_the_ui_knows_what_is_stale(on_bucket: Project, bucket: str) -> None:
    fs, root = open_storage(f"{bucket}/seeds/fruit", "")
    ticks = Ticks(on_bucket)
    assert ticks.tick() == []
    assert "fruit" in ticks.tick()
    assert failures(on_bucket.run("fruit")) == {}
    assert stale(on_bucket, "fruit") == set()
    ticks.tick()
    assert "is as it was" in ticks.look_at_index()
    assert ("seed_folder", "fruit") not in ticks.reported  # the run said it already
    assert stale(on_bucket, "fruit") == set()

    fs.pipe_file(f"{root}/more #1 ä 50%?.npy", npy(seeds_of(1)))
    reported_before = len(ticks.reported)
    assert [ticks.tick() for _ in range(3)] == [[], ["fruit"], []]
    assert ticks.reported[reported_before:] == [("seed_folder", "fruit")]
    assert stale(on_bucket, "fruit") == {"seed_embeddings"}
    assert [ticks.tick() for _ in range(2)] == [[], []]
    assert len(ticks.reported) == reported_before + 1  # once for each content, not at every tick
    assert failures(on_bucket.run("fruit")) == {}
    assert stale(on_bucket, "fruit") == set()

    fs.pipe_file(f"{root}/more #1 ä 50%?.npy", npy(seeds_of(2)))
    assert failures(on_bucket.run("fruit", "seed_embeddings", "centroid_vector")) == {}
    assert stale(on_bucket, "fruit") == {"knn_urls", "centroid_urls", "combined_urls"}
    assert failures(on_bucket.run("fruit")) == {}
    assert stale(on_bucket, "fruit") == set()
    assert [ticks.tick() for _ in range(3)] == [[]] * 3  # by hand before the sensor saw it
    assert stale(on_bucket, "fruit") == set()

    captions = f"{bucket}/index/metadata/1_multi.arrow"
    index, path = open_storage(captions, "")
    table = pa.ipc.open_file(index.cat_file(path)).read_all()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.take(pa.array(range(len(table))[::-1])))
    index.pipe_file(path, index.cat_file(path))  # the same bytes once more
    assert "is as it was" in ticks.look_at_index()
    index.pipe_file(path, sink.getvalue().to_pybytes())
    assert "has changed" in ticks.look_at_index()
    assert "is as it was" in ticks.look_at_index()
    assert stale(on_bucket, "fruit") == {"staged_laion_index"}
    assert failures(on_bucket.run("fruit")) == {}
    assert stale(on_bucket, "fruit") == set()


# --- seeds in a bucket ----------------------------------------------------------------------------


def npy(vectors: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    return buffer.getvalue()


def seeds_of(number: int, dimension: int = 256) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((2, dimension)).astype(np.float32)


@pytest.fixture
def ticks(new_bucket: str, tmp_path: Path) -> Iterator[Ticks]:
    """A sensor over seeds in a bucket of its own."""
    places = {"LAION_SEEDS_URI": f"{new_bucket}/seeds/", "LAION_OUTPUT_URI": f"{new_bucket}/output"}
    with new_project(tmp_path, tmp_path / "no index is needed", **places) as project:
        yield Ticks(project)


def test_an_upload_is_waited_for_and_the_same_bytes_again_are_nothing_new(
    ticks: Ticks, new_bucket: str, gcs_root: Path
) -> None:
    fs, root = open_storage(f"{new_bucket}/seeds", "")
    assert ticks.tick() == []
    assert f"{new_bucket}/seeds/ is not a folder: set LAION_SEEDS_URI" in ticks.said
    for number in range(3):
        fs.pipe_file(f"{root}/cats/{number}.npy", npy(seeds_of(number)))
        assert ticks.tick() == []
    assert ticks.tick_and_work() == ["cats"]
    fs.pipe_file(f"{root}/cats/0.npy", npy(seeds_of(0)))
    assert [ticks.tick() for _ in range(3)] == [[]] * 3
    fs.pipe_file(f"{root}/cats/0.npy", npy(seeds_of(9)))
    assert [ticks.tick_and_work() for _ in range(3)] == [[], ["cats"], []]

    describe(gcs_root / f"{root}/cats/0.npy", Md5Hash="", Generation=5)  # as of a composite object
    info = fs.info(f"{root}/cats/0.npy")
    assert "crc32c" in info
    assert not info.get("md5Hash")
    assert [ticks.tick() for _ in range(3)] == [[]] * 3
    assert len(ticks.cursor or "") < 20


def test_names_of_every_kind_are_read_as_they_are(ticks: Ticks, new_bucket: str) -> None:
    names = ["a b.npy", "#1.npy", "x#2023.npy", "50%.npy", "a%20b.npy", "q?generation=3.npy", "[1]*.npy"]
    names += ["ü/é/深い.npy", "deep/er/and/deeper.npy"]
    fs, root = open_storage(f"{new_bucket}/seeds/Größe 1", "")
    for number, name in enumerate(names):
        fs.pipe_file(f"{root}/{name}", npy(seeds_of(number)))
    for marker in ("", "deep/", "folder.npy/"):
        fs.pipe_file(f"{root}/{marker}", b"")
    assert [ticks.tick_and_work() for _ in range(2)] == [[], ["Größe 1"]]
    stored = StoredTable(f"{new_bucket}/output/seed_embeddings/Größe 1.parquet")
    assert set(stored.read(["file"])["file"].to_pylist()) == set(names)
