"""A step that needs the index, on a disk that has lost it."""

import shutil

import dagster as dg
from conftest import Demo, failures, new_project


def materializations(instance: dg.DagsterInstance) -> list[dg.EventLogRecord]:
    key = dg.AssetKey("staged_laion_index")
    return list(instance.fetch_materializations(key, limit=10).records)


def test_it_is_staged_again_and_that_is_on_record(demo: Demo, tmp_path):
    with new_project(tmp_path, demo.index, demo.seeds) as project:
        assert project.run("fruit").success
        (first,) = materializations(project.instance)
        shutil.rmtree(project.cache)
        project.cache.mkdir()
        assert project.run("fruit", "knn_urls").success
        again, _ = materializations(project.instance)
        assert again.asset_materialization.description == (
            "staged again by knn_urls: the disk had lost it"
        )
        assert again.asset_materialization.metadata["bytes fetched"].value > 0
        tags = [record.asset_materialization.tags["dagster/data_version"] for record in (again, first)]
        assert tags[0] == tags[1]


def test_one_lost_file_is_all_that_is_fetched(demo: Demo, tmp_path):
    with new_project(tmp_path, demo.index, demo.seeds) as project:
        assert project.run("fruit").success
        lost = next((project.cache / "metadata").iterdir())
        size = lost.stat().st_size
        lost.unlink()
        assert project.run("fruit", "centroid_urls").success
        again, _ = materializations(project.instance)
        assert again.asset_materialization.metadata["bytes fetched"].value == size


def test_or_the_step_fails_with_the_remedy_if_so_set(demo: Demo, tmp_path):
    with new_project(tmp_path, demo.index, demo.seeds, LAION_LOST_INDEX="fail") as project:
        assert project.run("fruit").success
        shutil.rmtree(project.cache)
        told = failures(project.run("fruit", "knn_urls"))
        assert told == {
            "knn_urls": f"nothing is staged in {project.cache}: materialize staged_laion_index first"
        }
        assert len(materializations(project.instance)) == 1
