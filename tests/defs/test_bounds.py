"""A run that requests too much is refused with the number before it searches."""

from pathlib import Path

from helpers.project import Demo, Project, failures, new_project

SEEDS = 11  # of the demo's set of fruit
NUMBERS = {"nb_images_knn": 2, "nb_images_centroid": 5}
OF_A_RUN = 2 * SEEDS + 5


def refused(project: Project, *assets: str, **settings: int) -> str:
    """The one sentence with which a run fails; empty if it succeeds."""
    found = failures(project.run("fruit", *assets, **NUMBERS | settings))
    return "; ".join(sorted({*found.values()}))


def test_a_run_and_a_day_are_bounded_and_the_numbers_are_said(tmp_path: Path, demo: Demo) -> None:
    with new_project(tmp_path, demo.index, demo.seeds) as project:
        tight = project.with_environment(LAION_MAX_IMAGES=str(OF_A_RUN))
        assert refused(tight) == ""
        told = refused(tight, nb_images_centroid=6)
        assert f"requests {OF_A_RUN + 1} images, but LAION_MAX_IMAGES allows {OF_A_RUN}" in told
        assert not list(project.output.glob("*/.*"))  # nothing half written

        a_day = project.with_environment(LAION_MAX_IMAGES_PER_DAY=str(2 * OF_A_RUN))
        told = refused(a_day, nb_images_knn=3)
        assert f"{OF_A_RUN + SEEDS} images after {OF_A_RUN} in the last 24 hours" in told
        assert refused(a_day) == ""
        assert f"LAION_MAX_IMAGES_PER_DAY allows {2 * OF_A_RUN}" in refused(a_day)


def test_a_run_of_one_search_counts_only_what_it_requests(tmp_path: Path, demo: Demo) -> None:
    with new_project(tmp_path, demo.index, demo.seeds) as project:
        assert refused(project) == ""
        tight = project.with_environment(LAION_MAX_IMAGES="5")
        assert refused(tight, "centroid_urls") == ""
        assert f"requests {2 * SEEDS} images" in refused(tight, "knn_urls")
