"""The Launchpad shows the current settings of a seed set, and what is left unchanged stays theirs."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from helpers.project import Demo, Project, new_project, reported

from laion_assets.definitions import JOB


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, demo: Demo) -> Iterator[Project]:
    root = tmp_path_factory.mktemp("project")
    with new_project(root, demo.index, demo.seeds, LAION_NPROBE="4") as made:
        (made.seeds / "fruit" / "settings.yaml").write_text("nb_images_knn: 7\n")
        (made.seeds / "house" / "settings.yaml").write_text("target_images: 40\n")
        (made.seeds / "flower" / "settings.yaml").write_text("nb_images_knn: many\n")
        yield made


def shown(project: Project, seed_set: str) -> dict[str, Any]:
    """What the Launchpad fills in for a seed set, as the code server answers."""
    partitions = project.defs.get_repository_def().get_job(JOB).partitioned_config
    assert partitions
    config = partitions.get_run_config_for_partition_key(seed_set)
    return config["resources"]["retrieval_config"]["config"]


def test_the_settings_of_a_seed_set_are_filled_in(project: Project) -> None:
    others = {"dedup_threshold": 0.94, "max_bad_images": 0.05, "nprobe": 4}
    assert shown(project, "fruit") == {"nb_images_knn": 7, "nb_images_centroid": 500, **others}
    assert shown(project, "house") == {"target_images": 40, **others}


def test_a_set_that_cannot_run_is_not_filled_in_and_its_run_says_why(project: Project) -> None:
    assert shown(project, "flower") == shown(project, "no such set") == {}


def test_only_what_is_edited_is_of_the_run(project: Project) -> None:
    edited = shown(project, "fruit") | {"nb_images_centroid": 60}
    result = project.run("fruit", **edited)
    assert result.success
    settings = reported(result, "combined_urls")["settings"]
    assert settings == {
        "nb_images_knn": "7 (fruit/settings.yaml)",
        "nb_images_centroid": "60 (Launchpad or command line)",
        "dedup_threshold": "0.94 (default)",
        "max_bad_images": "0.05 (default)",
        "nprobe": "4 (LAION_NPROBE)",
    }


@pytest.mark.parametrize(
    ("index", "status"),
    [
        ("gs://bucket/index", dg.DefaultSensorStatus.STOPPED),
        ("/an/index", dg.DefaultSensorStatus.RUNNING),
    ],
)
def test_with_an_index_in_a_bucket_nothing_runs_unasked(
    project: Project, index: str, status: Any
) -> None:
    defs = project.with_environment(LAION_INDEX_URI=index).defs
    assert defs.get_repository_def().get_sensor_def("seed_sets_sensor").default_status is status
