"""A change of settings that Dagster does not see is a warning on the sets that were made before it."""

from pathlib import Path

import dagster as dg
import pytest
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.events import StepMaterializationData
from helpers.project import Demo, Project, failures, new_project, reported

from laion_assets.defs.assets.seed_embeddings import seed_folder
from laion_assets.defs.history import MADE_WITH, OWN_SETTINGS, materializations, measured_yield
from laion_assets.defs.resources import LaionIndex
from laion_assets.defs.sensors import GONE
from laion_assets.defs.settings import BLOCK_LIST, FOR_THIS_RUN, RetrievalConfig
from laion_assets.defs.settings_check import SETTINGS_AS_NOW, compare
from laion_assets.defs.sources import last_version, observation
from laion_assets.search.sizing import USUAL

SETS = ("flower", "fruit")


class Ticks:
    """What Dagster's daemon does with the sensor of the settings."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self._cursor: str | None = None
        self.said = ""

    def tick(self) -> None:
        """Evaluate it once."""
        repository = self.project.defs.get_repository_def()
        context = dg.build_sensor_context(
            self.project.instance,
            self._cursor,
            repository_def=repository,
            resources={"laion_index": repository.get_top_level_resources()["laion_index"]},
        )
        with context:
            seen = repository.get_sensor_def("settings_sensor")(context)
        self._cursor = seen.cursor
        self.said = seen.cursor.split("\n")[0]  # as the UI's list of ticks shows it
        assert seen.skip_reason.skip_message == self.said


def status(project: Project, seed_set: str) -> str:
    """What the UI shows of the check for one set: the newest evaluation."""
    key = dg.AssetCheckKey(dg.AssetKey("combined_urls"), SETTINGS_AS_NOW.name)
    (record,) = project.instance.event_log_storage.get_asset_check_execution_history(
        key, limit=1, partition_filter=PartitionKeyFilter(key=seed_set)
    )
    evaluation = record.event.dagster_event.event_specific_data
    assert evaluation.severity is dg.AssetCheckSeverity.WARN
    assert evaluation.passed == (record.status.value == "SUCCEEDED")
    latest = project.instance.event_log_storage.get_latest_storage_id_by_partition(
        key.asset_key, dg.DagsterEventType.ASSET_MATERIALIZATION
    )[seed_set]
    checked = evaluation.target_materialization_data  # without which the UI shows the check as missing
    assert checked
    assert checked.storage_id == latest
    return evaluation.description


AS_IT_SHOULD_BE = "made with the settings that a run would use now"


@pytest.fixture(scope="module")
def made(demo, tmp_path_factory):
    """A project in which two sets were made, one of them with settings of its own."""
    with new_project(tmp_path_factory.mktemp("made"), demo.index, demo.seeds) as project:
        (project.seeds / "flower" / "settings.yaml").write_text("nb_images_knn: 5\n")
        for name in SETS:
            assert failures(project.run(name)) == {}
        yield project


def test_a_change_in_the_environment_is_a_warning_until_it_is_taken_back_or_made_good(made, monkeypatch):
    ticks = Ticks(made)
    ticks.tick()
    assert ticks.said == "2 seed sets compared; made with other settings: none"
    ticks.tick()
    assert ticks.said == "nothing new; made with other settings: none"

    monkeypatch.setenv("LAION_NB_IMAGES_KNN", "60")
    for _ in range(2):
        ticks.tick()
        assert status(made, "fruit") == (
            "made with nb_images_knn 50, now nb_images_knn 60 (LAION_NB_IMAGES_KNN); materialize fruit "
            "again to have it so"
        )
        assert status(made, "flower") == AS_IT_SHOULD_BE  # what it says of itself comes first

    monkeypatch.delenv("LAION_NB_IMAGES_KNN")
    ticks.tick()
    assert status(made, "fruit") == AS_IT_SHOULD_BE

    monkeypatch.setenv("LAION_DEDUP_THRESHOLD", "0.9")
    ticks.tick()
    assert ticks.said == "2 seed sets compared; made with other settings: flower, fruit"
    assert failures(made.run("fruit")) == {}
    assert status(made, "fruit") == AS_IT_SHOULD_BE  # the step has said so
    ticks.tick()
    assert ticks.said == "1 seed set compared; made with other settings: flower"
    assert status(made, "fruit") == AS_IT_SHOULD_BE
    assert "now dedup_threshold 0.9 (LAION_DEDUP_THRESHOLD)" in status(made, "flower")


def with_list(made: Project, demo: Demo, listed: Path) -> Project:
    """The same project with a block list."""
    return Project(made.seeds.parent, demo.index, made.instance, LAION_BLOCK_LIST=str(listed))


def test_a_block_list_that_is_new_or_changed_or_unset_is_a_warning(made, demo, tmp_path, monkeypatch):
    listed = tmp_path / "list.txt"
    listed.write_text("3\n")
    assert failures(made.run("fruit")) == {}
    ticks = Ticks(made)
    ticks.tick()
    assert status(made, "fruit") == AS_IT_SHOULD_BE

    ticks.project = with_list(made, demo, listed)
    ticks.tick()
    assert status(made, "fruit").startswith(
        f"made with no block_list, now block_list {listed}, 1 ids, 0 URL"
    )
    assert status(made, "fruit").endswith("(LAION_BLOCK_LIST); materialize fruit again to have it so")
    assert failures(ticks.project.run("fruit")) == {}
    assert status(made, "fruit") == AS_IT_SHOULD_BE
    ticks.tick()
    with monkeypatch.context() as patched:
        patched.setattr(LaionIndex, "block_list", None)  # what is as it was is not read again
        ticks.tick()
    assert ticks.said == "nothing new; made with other settings: flower"

    listed.write_text("3\n4\n")
    ticks.tick()
    assert status(made, "fruit").startswith(f"made with block_list {listed}, 1 ids, 0 URLs, ")
    assert f"now block_list {listed}, 2 ids, 0 URLs, " in status(made, "fruit")
    listed.unlink()
    ticks.tick()
    assert status(made, "fruit") == (
        f"the next run cannot be made: the block list {listed} is not there: correct or "
        "unset LAION_BLOCK_LIST"
    )
    ticks.project = made
    ticks.tick()
    assert "now no block_list; materialize fruit again" in status(made, "fruit")
    assert failures(made.run("fruit", "combined_urls")) == {}  # of the tables that are there
    assert "now no block_list; materialize fruit again" in status(made, "fruit")


def test_a_yield_counts_for_the_block_list_it_was_measured_with(made, demo, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("3\n")
    project = with_list(made, demo, listed)
    first = project.run("fruit", target_images=50)
    assert "usual for LAION" in reported(first, "knn_urls")["settings"]["nb_images_knn"]
    second = project.run("fruit", target_images=50)
    assert f"by run {first.run_id[:8]}" in reported(second, "knn_urls")["settings"]["nb_images_knn"]
    asked = RetrievalConfig().resolve({}).recorded()
    assert second.run_id[:8] not in measured_yield(made.instance, "fruit", asked).basis
    assert measured_yield(made.instance, "fruit", {**asked, BLOCK_LIST: "another"}) == USUAL


def test_numbers_given_for_one_run_are_told_of_and_are_no_change(made):
    result = made.run("fruit", nb_images_knn=7)
    (check,) = [c for c in result.get_asset_check_evaluations() if c.check_name == SETTINGS_AS_NOW.name]
    assert check.passed
    assert check.description == (
        "made with nb_images_knn 7 for that run alone, the next takes nb_images_knn 50 (default); what "
        "is to stay belongs into fruit/settings.yaml"
    )
    assert reported(result, "knn_urls")["settings"]["nb_images_knn"] == f"7 ({FOR_THIS_RUN})"
    Ticks(made).tick()
    assert status(made, "fruit") == check.description


def test_what_follows_from_what_was_asked_for_is_no_change(made, monkeypatch):
    """The index has fewer lists than that, and the two counts are computed."""
    monkeypatch.setenv("LAION_NPROBE", "1000000")
    monkeypatch.setenv("LAION_TARGET_IMAGES", "600")
    result = made.run("fruit")
    assert status(made, "fruit") == AS_IT_SHOULD_BE
    for asset in ("knn_urls", "centroid_urls", "combined_urls"):
        told = reported(result, asset)
        assert told["settings"]["nprobe"] != "1000000 (LAION_NPROBE)"
        assert told[MADE_WITH]["nprobe"] == 1000000
        assert told[MADE_WITH]["target_images"] == 600
        assert told[MADE_WITH]["nb_images_knn"] is None


@pytest.mark.parametrize(
    ("environment", "given", "told"),
    [
        ({"LAION_NPROBE": "0"}, {"nprobe": 5}, "nprobe is 0 (from LAION_NPROBE): give 1 or more"),
        (
            {"LAION_TARGET_IMAGES": "600", "LAION_NB_IMAGES_KNN": "9"},
            {"nb_images_knn": 5},
            "target_images is 600 (from LAION_TARGET_IMAGES) and nb_images_knn is 9 (from "
            "LAION_NB_IMAGES_KNN): give the target or the two numbers, not both",
        ),
    ],
)
def test_settings_that_only_this_run_could_do_without_do_not_stop_it(
    made, monkeypatch, environment, given, told
):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert failures(made.run("fruit", **given)) == {}
    assert status(made, "fruit") == f"the next run cannot be made: {told}"


def test_of_a_set_that_was_removed_nothing_is_said_until_it_is_back(made, monkeypatch):
    """Nobody could follow the remedy: there is nothing to materialize it from."""
    before = status(made, "flower")
    seen = last_version(made.instance, seed_folder.key, "flower")
    made.instance.report_runless_asset_event(observation(seed_folder.key, GONE, "flower"))
    monkeypatch.setenv("LAION_DEDUP_THRESHOLD", "0.8")
    ticks = Ticks(made)
    ticks.tick()
    assert ticks.said == "1 seed set compared; made with other settings: fruit"
    assert status(made, "flower") == before
    made.instance.report_runless_asset_event(observation(seed_folder.key, seen, "flower"))
    ticks.tick()
    assert ticks.said == "1 seed set compared; made with other settings: flower, fruit"
    assert "materialize flower again" in status(made, "flower")
    made.instance.report_runless_asset_event(observation(seed_folder.key, GONE, "flower"))
    ticks.tick()
    assert ticks.said == "0 seed sets compared; made with other settings: fruit"
    made.instance.report_runless_asset_event(observation(seed_folder.key, seen, "flower"))


def test_wrong_settings_are_told_of_by_the_sensor(made, monkeypatch):
    ticks = Ticks(made)
    monkeypatch.setenv("LAION_NPROBE", "0")
    ticks.tick()
    assert ticks.said == "nprobe is 0 (from LAION_NPROBE): give 1 or more"
    monkeypatch.delenv("LAION_NPROBE")
    ticks.tick()
    assert "compared" in ticks.said


def test_a_set_whose_own_settings_are_none_any_more_silences_no_other(made, monkeypatch):
    """As after an upgrade that gave a setting another name."""
    last = next(materializations(made.instance, "combined_urls", "flower"))
    told = {MADE_WITH: last.figures[MADE_WITH], OWN_SETTINGS: {"nb_image_knn": 5}}
    event = dg.AssetMaterialization("combined_urls", partition="flower", metadata=told)
    kind = dg.DagsterEventType.ASSET_MATERIALIZATION.value
    data = StepMaterializationData(event)
    made.instance.report_dagster_event(
        dg.DagsterEvent(kind, made.job.name, event_specific_data=data), last.run
    )
    monkeypatch.setenv("LAION_NB_IMAGES_CENTROID", "90")
    ticks = Ticks(made)
    ticks.tick()
    assert ticks.said == "2 seed sets compared; made with other settings: flower, fruit"
    assert "now nb_images_centroid 90 (LAION_NB_IMAGES_CENTROID)" in status(made, "fruit")
    assert status(made, "flower").startswith(
        "the next run cannot be made: flower/settings.yaml sets 'nb_image_knn', which is no setting"
    )


def compared(made: RetrievalConfig, environment: dict[str, str], now: dict[str, str]) -> str:
    then = made.resolve(environment)
    return compare(then.recorded(), RetrievalConfig().resolve(now)).sentence("x")


def test_a_target_stands_for_the_numbers_that_were_computed_from_it():
    target = {"LAION_TARGET_IMAGES": "600"}
    assert compared(RetrievalConfig(), target, target).startswith("made with the settings")
    assert compared(RetrievalConfig(), {}, target).startswith(
        "made with nb_images_knn 50 and nb_images_centroid 500, now target_images 600 (LAION_TARGET_IM"
    )
    assert compared(RetrievalConfig(target_images=600), {}, {}).startswith(
        "made with target_images 600 for that run alone, the next takes nb_images_knn 50 (default) and"
    )


def test_filters_that_came_or_went_are_a_change():
    some = {"LAION_FILTERS": "width > 5"}
    assert "made with no filters, now filters width > 5" in compared(RetrievalConfig(), {}, some)
    assert "made with filters width > 5, now no filters" in compared(RetrievalConfig(), some, {})


def test_what_was_given_for_one_run_hides_no_other_change():
    given, now = RetrievalConfig(nb_images_knn=7), {"LAION_NB_IMAGES_CENTROID": "900"}
    assert compared(given, {}, now).startswith(
        "made with nb_images_centroid 500, now nb_images_centroid 900 (LAION_NB_IMAGES_CENTROID); "
        "materialize x again to have it so; made with nb_images_knn 7 for that run alone, the next takes "
        "nb_images_knn 50 (default)"
    )
    target = {"LAION_TARGET_IMAGES": "600"}
    assert compared(given, target, target).startswith(
        "made with nb_images_knn 7 for that run alone, the next takes target_images 600 (LAION_TARGET"
    )


def test_filters_that_one_run_did_without_are_no_change():
    some = {"LAION_FILTERS": "width > 5"}
    assert compared(RetrievalConfig(filters=""), some, some).startswith(
        "made with no filters for that run alone, the next takes filters width > 5 (LAION_FILTERS)"
    )
