"""Everything in a bucket of a real server: the same tables, and whatever is wrong told in a sentence."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from conftest import Demo, Project, failures, new_project, reported

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
