"""Full and sparse staging on the platform: the choice between them, and that their tables are equal."""

import shutil

import pytest
from helpers.project import Demo, failures, new_project, reported

from laion_assets.defs.places import Places
from laion_assets.io.errors import InputError
from laion_assets.io.tables import StoredTable

TABLES = ("knn_urls", "centroid_urls", "combined_urls")


def test_a_bucket_is_read_sparse_and_a_folder_copied_by_default():
    def staging(**environment: str) -> str:
        return Places.from_environment(environment).staging_mode

    assert staging() == staging(LAION_INDEX_URI="/data/index") == "full"
    assert (
        staging(LAION_INDEX_URI="gs://b/index") == staging(LAION_INDEX_URI="https://b/index") == "sparse"
    )
    assert staging(LAION_INDEX_URI="gs://b/index", LAION_STAGING="full") == "full"


def test_the_budget_is_read_from_the_environment():
    assert Places.from_environment({"LAION_SPARSE_BUDGET": "2GiB"}).sparse_budget == 2 << 30
    with pytest.raises(InputError, match=r"LAION_SPARSE_BUDGET is 'much'.*300GB"):
        Places.from_environment({"LAION_SPARSE_BUDGET": "much"})


def test_the_whole_graph_makes_the_same_tables(demo: Demo, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "sparse").mkdir()
    sparse_settings = {"LAION_STAGING": "sparse", "LAION_SPARSE_BUDGET": "1MB"}
    with (
        new_project(tmp_path / "full", demo.index, demo.seeds) as full,
        new_project(tmp_path / "sparse", demo.index, demo.seeds, **sparse_settings) as sparse,
    ):
        results = [
            project.run("flower", nb_images_knn=20, nb_images_centroid=200, nprobe=2)
            for project in (full, sparse)
        ]
        assert [failures(result) for result in results] == [{}, {}]
        for name in TABLES:
            tables = [StoredTable(str(project.table(name, "flower"))) for project in (full, sparse)]
            assert tables[0].read() == tables[1].read()
        report = reported(results[1], "centroid_urls")
        assert report["recall of nprobe"].startswith("not measured")
        assert report["bytes fetched"] >= 0
        staged = reported(results[1], "staged_laion_index")
        assert staged["bytes on the disk"] < staged["bytes"]
        shutil.rmtree(sparse.cache)
        assert failures(sparse.run("flower", "knn_urls", nb_images_knn=20)) == {}
