"""The settings of a request are a source of the graph: a change makes tables stale."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest
from helpers.project import Demo, Project, Ticks, failures, new_project, reported, stale

from laion_assets.defs import sensors
from laion_assets.defs.history import FINGERPRINT, YIELD, measured_yield, staged_indices
from laion_assets.defs.provenance import PROVENANCE_KEY
from laion_assets.defs.resources import LaionIndex
from laion_assets.defs.settings import BLOCK_LIST, Defaults, RetrievalConfig
from laion_assets.defs.sources import CHANGED, FIRST, last_version, retrieval_settings
from laion_assets.search.sizing import USUAL

SETS = ("flower", "fruit")
URL_SETS = {"knn_urls", "centroid_urls"}


@pytest.fixture(scope="module")
def demo_made(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ticks]:
    """A project in which two sets were made, one of them with a settings.yaml, and its sensor."""
    with new_project(tmp_path_factory.mktemp("made"), demo.index, demo.seeds) as project:
        for folder in project.seeds.iterdir():
            if folder.name not in SETS:
                shutil.rmtree(folder)
        (project.seeds / "flower" / "settings.yaml").write_text("nb_images_knn: 5\n")
        for name in SETS:
            assert failures(project.run(name)) == {}
        yield Ticks(project)


@pytest.fixture
def made(demo_made: Ticks) -> Iterator[Ticks]:
    """The same project, with nothing stale."""
    before = demo_made.project
    demo_made.tick()
    for name in SETS:
        if found := stale(before, name):
            assert "seed_embeddings" not in found
            searched(before, name)
        assert stale(before, name) == set()
    yield demo_made
    demo_made.project = before


def searched(project: Project, seed_set: str, **given: Any) -> dg.ExecuteInProcessResult:
    """Materialize the URL tables of a set again, from the existing seeds and index."""
    result = project.run(seed_set, *URL_SETS, "combined_urls", **given)
    assert failures(result) == {}
    return result


def restarted(ticks: Ticks, **environment: str) -> None:
    """Start the code location with other variables, and let the sensor tick once."""
    ticks.project = ticks.project.with_environment(**environment)
    assert ticks.tick() == []


def observed(ticks: Ticks, seed_set: str) -> Mapping[str, Any]:
    """The metadata of the last observation of a set's settings."""
    wanted = dg.AssetRecordsFilter(retrieval_settings.key, [seed_set])
    (record,) = ticks.project.instance.fetch_observations(wanted, limit=1).records
    assert record.asset_observation
    return {name: value.value for name, value in record.asset_observation.metadata.items()}


def changed(ticks: Ticks, seed_set: str) -> str:
    return str(observed(ticks, seed_set)[CHANGED])


def test_a_run_observes_the_settings_it_uses_and_leaves_everything_fresh(made: Ticks) -> None:
    assert last_version(made.project.instance, retrieval_settings.key, "fruit")
    made.reported.clear()
    assert made.tick() == []
    assert made.said == "nothing new; 2 seed sets"
    assert made.reported == []  # the run has reported them
    for name in SETS:
        assert stale(made.project, name) == set()


def test_a_set_that_was_not_run_yet_has_its_settings_observed_without_news(project: Project) -> None:
    ticks = Ticks(project)
    ticks.tick()
    ticks.tick()
    ticks.tick()
    assert ("retrieval_settings", "fruit") in ticks.reported
    assert changed(ticks, "fruit") == FIRST
    assert "settings changed" not in ticks.said
    assert observed(ticks, "fruit")["settings"]["nb_images_knn"] == 50


def test_a_changed_variable_makes_stale_exactly_what_would_now_be_made_with_other_settings(
    made: Ticks,
) -> None:
    restarted(made, LAION_NB_IMAGES_KNN="60")
    assert made.said == "settings changed: fruit; 2 seed sets"
    assert changed(made, "fruit") == "nb_images_knn 50 -> 60"
    assert stale(made.project, "fruit") == URL_SETS
    assert stale(made.project, "flower") == set()  # its settings.yaml comes first

    reports = len(made.reported)
    made.tick()
    assert made.said == "nothing new; 2 seed sets"
    assert len(made.reported) == reports  # once for each change, not at every tick


def test_a_change_that_is_taken_back_leaves_everything_fresh(made: Ticks) -> None:
    restarted(made, LAION_NB_IMAGES_KNN="60")
    assert stale(made.project, "fruit") == URL_SETS
    restarted(made, LAION_NB_IMAGES_KNN="")
    assert changed(made, "fruit") == "nb_images_knn 60 -> 50"
    assert stale(made.project, "fruit") == set()


def test_a_run_with_the_new_settings_makes_the_set_fresh(made: Ticks) -> None:
    restarted(made, LAION_DEDUP_THRESHOLD="0.9")
    assert made.said == "settings changed: flower, fruit; 2 seed sets"
    assert failures(made.project.run("fruit", "knn_urls")) == {}
    assert stale(made.project, "fruit") == {"centroid_urls", "combined_urls"}
    searched(made.project, "fruit")
    assert stale(made.project, "fruit") == set()
    assert stale(made.project, "flower") == URL_SETS
    made.tick()
    assert made.said == "nothing new; 2 seed sets"


def test_a_run_that_comes_before_the_sensor_observes_the_change_itself(made: Ticks) -> None:
    made.project = made.project.with_environment(LAION_NB_IMAGES_CENTROID="400")
    assert failures(made.project.run("fruit", "centroid_urls")) == {}
    assert changed(made, "fruit") == "nb_images_centroid 500 -> 400"
    assert stale(made.project, "fruit") == {"knn_urls", "combined_urls"}
    made.tick()
    assert made.said == "settings changed: flower; 2 seed sets"


def test_a_settings_file_is_a_change_of_settings_like_any_other(made: Ticks) -> None:
    settings = made.project.seeds / "flower" / "settings.yaml"
    before = settings.read_text()
    settings.write_text("nb_images_knn: 6\nfilters: width > 5\n")
    try:
        made.tick()
        assert "settings changed: flower" in made.said
        for change in ("nb_images_knn 5 -> 6", "filters none -> width > 5"):
            assert change in changed(made, "flower")
        assert stale(made.project, "flower") >= URL_SETS
        assert stale(made.project, "fruit") == set()
    finally:
        settings.write_text(before)
    made.tick()
    assert stale(made.project, "flower") == set()


def test_a_block_list_that_is_new_or_changed_or_unset_makes_what_was_made_before_it_stale(
    made: Ticks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("3\n")
    without = made.project
    restarted(made, LAION_BLOCK_LIST=str(listed))
    assert changed(made, "fruit").startswith(f"block_list none -> {listed}, 1 id, 0 URLs")
    assert stale(made.project, "fruit") == stale(made.project, "flower") == URL_SETS
    searched(made.project, "fruit")
    assert stale(made.project, "fruit") == set()
    with monkeypatch.context() as patched:
        patched.setattr("laion_assets.defs.resources.read_block_list", None)  # unchanged: not read again
        assert made.tick() == []
    assert made.said == "nothing new; 2 seed sets"

    listed.write_text("3\n4\n")
    made.tick()
    told = changed(made, "fruit")
    assert told.startswith(f"block_list {listed}, 1 id, 0 URLs")
    assert f" -> {listed}, 2 ids, 0 URLs" in told
    assert stale(made.project, "fruit") == URL_SETS

    made.project = without
    made.tick()
    assert changed(made, "fruit").endswith(" -> none")
    assert stale(made.project, "fruit") == URL_SETS
    assert stale(made.project, "flower") == set()  # made without one
    assert failures(made.project.run("fruit", "combined_urls")) == {}  # of the tables that are there
    assert stale(made.project, "fruit") == URL_SETS


def test_what_is_given_for_one_run_in_the_launchpad_changes_no_settings(made: Ticks) -> None:
    result = searched(made.project, "fruit", nb_images_knn=7, nprobe=3)
    assert reported(result, "knn_urls")["settings"]["nb_images_knn"].startswith("7 ")
    assert stale(made.project, "fruit") == set()
    made.tick()
    assert made.said == "nothing new; 2 seed sets"


def test_what_is_computed_for_a_request_is_no_change(made: Ticks) -> None:
    """The index has fewer lists than that, and no share of URLs that work was given."""
    made.project = made.project.with_environment(LAION_NPROBE="1000000", LAION_TARGET_IMAGES="600")
    searched(made.project, "fruit")
    for asset in (*URL_SETS, "combined_urls"):
        footer = pq.read_metadata(made.project.table(asset, "fruit")).metadata[PROVENANCE_KEY.encode()]
        settings = json.loads(footer)["settings"]
        assert settings["values"]["nprobe"] < 1_000_000
        assert set(settings["computed"]) == {"expect_alive", "nprobe"}
    assert stale(made.project, "fruit") == set()
    made.tick()
    assert made.said == "settings changed: flower; 2 seed sets"
    assert "target_images" not in changed(made, "flower")  # it gives a count of its own


@pytest.mark.parametrize(
    ("environment", "given", "facts"),
    [
        ({"LAION_NPROBE": "0"}, {"nprobe": 5}, ("nprobe is '0'", "LAION_NPROBE", "1 or more")),
        (
            {"LAION_TARGET_IMAGES": "600", "LAION_NB_IMAGES_KNN": "9"},
            {"nb_images_knn": 5},
            ("target_images is 600", "nb_images_knn is 9", "not both"),
        ),
    ],
    ids=["nprobe", "target and count"],
)
def test_unusable_settings_are_a_version_that_says_why_and_stop_no_run_that_does_without_them(
    made: Ticks, environment: dict[str, str], given: dict[str, int], facts: tuple[str, ...]
) -> None:
    restarted(made, **environment)
    assert "settings changed: " in made.said
    for fact in ("cannot be used: ", *facts):
        assert fact in changed(made, "fruit")
    assert stale(made.project, "fruit") == URL_SETS
    searched(made.project, "fruit", **given)
    assert stale(made.project, "fruit") == set()
    made.tick()
    assert "fruit" not in made.said


def test_after_unusable_settings_the_change_is_named_against_the_last_usable_ones(made: Ticks) -> None:
    restarted(made, LAION_NPROBE="0")
    restarted(made, LAION_NPROBE="0", LAION_DEDUP_THRESHOLD="0.9")
    restarted(made, LAION_NPROBE="7", LAION_DEDUP_THRESHOLD="")
    assert changed(made, "fruit") == "nprobe none -> 7"
    restarted(made, LAION_NPROBE="0")
    restarted(made, LAION_NPROBE="7")
    assert changed(made, "fruit") == "as before"


def test_an_unreadable_block_list_is_a_version_too(made: Ticks, tmp_path: Path) -> None:
    restarted(made, LAION_BLOCK_LIST=str(tmp_path / "nowhere.txt"))
    assert made.said == "settings changed: flower, fruit; 2 seed sets"
    for fact in ("cannot be used: ", "nowhere.txt", "LAION_BLOCK_LIST"):
        assert fact in changed(made, "fruit")
    assert stale(made.project, "fruit") == URL_SETS


def test_a_set_whose_settings_cannot_be_used_holds_up_no_other(made: Ticks) -> None:
    settings = made.project.seeds / "flower" / "settings.yaml"
    before = settings.read_text()
    settings.write_text("nb_image_knn: 5\n")
    try:
        restarted(made, LAION_NB_IMAGES_CENTROID="90")
        assert "settings changed: flower, fruit" in made.said
        assert "did you mean nb_images_knn?" in changed(made, "flower")
        assert changed(made, "fruit") == "nb_images_centroid 500 -> 90"
    finally:
        settings.write_text(before)


def test_a_set_that_was_removed_is_left_alone_until_it_is_back(made: Ticks) -> None:
    folder = made.project.seeds / "flower"
    away = folder.rename(made.project.root / "away")
    assert made.tick() == []
    made.reported.clear()
    restarted(made, LAION_DEDUP_THRESHOLD="0.8")
    kept = "removed: flower (its tables are kept until you forget it)"
    assert made.said == f"{kept}; settings changed: fruit; 1 seed set"
    assert ("retrieval_settings", "flower") not in made.reported
    away.rename(folder)
    made.tick()
    assert "settings changed: flower" in made.said
    assert changed(made, "flower") == "dedup_threshold 0.94 -> 0.8"


def test_many_sets_are_observed_some_at_a_tick_until_all_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_most, more = 5, 3
    monkeypatch.setattr(sensors, "SETTINGS_PER_TICK", at_most)
    with new_project(tmp_path, tmp_path / "no index is needed") as project:
        names = [f"set {number:03}" for number in range(at_most + more)]
        for name in names:
            (project.seeds / name).mkdir()
            (project.seeds / name / "a.npy").write_bytes(b"not read by the sensor")
        project.instance.add_dynamic_partitions("seed_sets", names)
        ticks = Ticks(project)
        counts = []
        for _ in range(3):
            ticks.reported.clear()
            ticks.tick()
            counts.append(sum(source == "retrieval_settings" for source, _ in ticks.reported))
        assert counts == [at_most, more, 0]


def reported_index(project: Project) -> list[str]:
    return [figures[FINGERPRINT] for figures in staged_indices(project.instance)]


def test_a_yield_counts_only_for_the_block_list_it_was_measured_with(made: Ticks, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("3\n")
    project = made.project.with_environment(LAION_BLOCK_LIST=str(listed))
    run = searched(project, "fruit", target_images=50)
    told = [entry.user_message for entry in project.instance.all_logs(run.run_id)]
    assert any(message.startswith("searching until ") for message in told)
    asked, index = RetrievalConfig().resolve(Defaults({})).asked(), reported_index(project)
    assert run.run_id[:8] not in measured_yield(project.instance, "fruit", asked, index).basis
    assert measured_yield(project.instance, "fruit", {**asked, BLOCK_LIST: "another"}, index) == USUAL
    with_list = {**asked, BLOCK_LIST: LaionIndex.block_list_description(index_of(project))}
    found = measured_yield(project.instance, "fruit", with_list, index)
    assert found.share == reported(run, "combined_urls")[YIELD]
    assert measured_yield(project.instance, "fruit", with_list, ["another index"]) == USUAL


def test_a_request_beyond_the_index_is_told_so_and_says_nothing_of_smaller_ones(made: Ticks) -> None:
    project = made.project
    settings, index = RetrievalConfig().resolve(Defaults({})).asked(), reported_index(project)
    before = measured_yield(project.instance, "fruit", settings, index)
    beyond = searched(project, "fruit", nb_images_knn=10**6, nb_images_centroid=10**6)
    assert reported(beyond, "combined_urls")[YIELD] < 0.01
    assert measured_yield(project.instance, "fruit", settings, index) == before
    told = [entry.user_message for entry in project.instance.all_logs(beyond.run_id)]
    assert sum("the index has only" in message for message in told) == 2
    assert not [message for message in told if "set a higher nprobe" in message]


def index_of(project: Project) -> LaionIndex:
    with dg.build_resources({"it": (project.defs.resources or {})["laion_index"]}) as given:
        found: LaionIndex = given.it
        return found
