"""Settings: their origins, the file of a seed set, and requests sized by a target."""

import json
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.project import Project, Ticks, failures, new_project, reported
from hypothesis import given
from hypothesis import strategies as st

from laion_assets.defs.settings import (
    COUNTS,
    FIELDS,
    TARGET,
    Defaults,
    ResolvedSettings,
    RetrievalConfig,
    allowed,
    changes,
    kind_of,
    variable_of,
)
from laion_assets.defs.settings import THIS_RUN as RUN
from laion_assets.io.errors import InputError
from laion_assets.io.tables import StoredTable
from laion_assets.search.sizing import EXPECT_ALIVE, images_wanted
from laion_assets.seeds import find_seed_set, read_settings

OWN = "cats/settings.yaml"


def resolved(
    run: dict[str, Any] | None = None,
    own: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    block_list: str | None = None,
) -> ResolvedSettings:
    variables = {variable_of(name): str(value) for name, value in (environment or {}).items()}
    defaults = Defaults.from_environment(variables)
    return RetrievalConfig(**(run or {})).resolve(defaults, own, "cats", block_list)


def own_settings(root: Path, content: str) -> dict[str, Any]:
    """The own settings of a seed set in a folder."""
    (root / "cats").mkdir(exist_ok=True)
    np.save(root / "cats" / "a.npy", np.eye(4, dtype=np.float32))
    (root / "cats" / "settings.yaml").write_text(content)
    return read_settings(str(root), find_seed_set(str(root), "cats"))


# --- one declaration ------------------------------------------------------------------------------


def test_a_setting_is_declared_once_and_the_launchpad_and_the_environment_follow():
    for name, field in FIELDS.items():
        shown = RetrievalConfig.model_fields[name]
        assert (field.description or "") in (shown.description or "")
        assert str(field.default or "") in (shown.description or "")
        assert shown.default is None, "what is left empty comes from elsewhere"
        some = {int: "7", float: "0.5", str: "width > 5"}[kind_of(name)]
        found = resolved(environment={name: some})
        assert getattr(found.values, name) == kind_of(name)(some)
        assert found.origins[name] == variable_of(name) == f"LAION_{name.upper()}"


@pytest.mark.parametrize("name", FIELDS)
def test_an_unset_setting_has_its_default_and_an_empty_variable_counts_as_unset(name):
    for found in (resolved(), resolved(environment={name: ""})):
        default = FIELDS[name].default
        assert getattr(found.values, name) == default
        assert found.origins.get(name) == (None if default is None else "default")


BOUNDS = {
    "nb_images_knn": (0, -1),
    "nb_images_centroid": (0, -1),
    "target_images": (0, -1),
    "expect_alive": (0, 1.5),
    "nprobe": (0, -1),
    "dedup_threshold": (0, -1, 1.5),
    "max_bad_images": (-0.1, 1.5),
}


@pytest.mark.parametrize(("name", "value"), [(n, value) for n in BOUNDS for value in BOUNDS[n]])
def test_a_value_out_of_bounds_is_refused_with_its_origin_and_what_is_allowed(name, value):
    assert set(BOUNDS) == set(FIELDS) - {"filters"}
    levels = {"run": RUN, "own": OWN, "environment": variable_of(name)}
    for level, origin in levels.items():
        with pytest.raises(InputError) as refused:
            resolved(**{level: {name: value}})
        told = str(refused.value)
        for fact in (f"{name} is ", str(value), f"(from {origin})", allowed(name)):
            assert fact in told


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dedup_threshold", "many"),
        ("dedup_threshold", "nan"),
        ("dedup_threshold", "inf"),
        ("nb_images_knn", "1.5"),
        ("nprobe", "many"),
    ],
)
def test_a_variable_that_is_not_a_number_is_refused_by_its_name(name, text):
    with pytest.raises(InputError) as refused:
        resolved(environment={name: text})
    for fact in (variable_of(name), repr(text), allowed(name)):
        assert fact in str(refused.value)


# --- which level a setting comes from -------------------------------------------------------------

NAMES = (TARGET, *COUNTS, "nprobe")
LEVEL = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 10**6))


@given(run=LEVEL, own=LEVEL, environment=LEVEL)
def test_the_nearest_level_decides_each_setting_and_whether_counts_or_a_target(run, own, environment):
    edited = run
    with suppress(InputError):  # what the Launchpad shows and nobody edited
        below = resolved(None, own, environment).values
        edited = {name: value for name, value in run.items() if value != getattr(below, name)}
    levels = {RUN: edited, OWN: own, "environment": environment}
    nearest = next((level for level in levels.values() if level.keys() & {TARGET, *COUNTS}), {})
    by_target = TARGET in nearest
    if by_target and nearest.keys() & {*COUNTS}:
        with pytest.raises(InputError, match=r"target_images is \d+ \(from .*\(from .*not both"):
            resolved(run, own, environment)
        return
    found = resolved(run, own, environment)
    unused = COUNTS if by_target else (TARGET,)
    for name in NAMES:
        given_by = [(value[name], origin) for origin, value in levels.items() if name in value]
        expected = (given_by or [(FIELDS[name].default, "default")])[0]
        if name in unused or expected[0] is None:
            assert (getattr(found.values, name), found.origins.get(name)) == (None, None)
            continue
        origin = expected[1].replace("environment", variable_of(name))
        assert (getattr(found.values, name), found.origins[name]) == (expected[0], origin)
    assert not found.computed


def test_a_target_and_a_count_from_the_same_place_are_refused_with_both_places():
    with pytest.raises(InputError) as refused:
        resolved(environment={"target_images": 5000, "nb_images_centroid": 9})
    for fact in (
        "target_images is 5000 (from LAION_TARGET_IMAGES)",
        "nb_images_centroid is 9 (from LAION_NB_IMAGES_CENTROID)",
        "not both",
    ):
        assert fact in str(refused.value)


def test_a_wrong_value_that_a_nearer_level_replaces_stops_nothing():
    wrong = {"nprobe": 0, "target_images": 600, "nb_images_knn": 9}
    found = resolved({"nprobe": 5, "nb_images_knn": 5}, environment=wrong)
    assert (found.values.nprobe, found.values.nb_images_knn, found.values.target_images) == (5, 5, None)


def test_filters_can_be_taken_off_for_one_run():
    found = resolved({"filters": ""}, environment={"filters": "width > 5"})
    assert (found.values.filters, found.origins["filters"]) == (None, RUN)


# --- the record -----------------------------------------------------------------------------------


@given(run=LEVEL, own=LEVEL, block_list=st.none() | st.text(max_size=9), nprobe=st.integers(1, 9))
def test_a_record_outlives_json_and_knows_what_was_asked_for(run, own, block_list, nprobe):
    try:
        asked = resolved(run, own, block_list=block_list)
    except InputError:
        return  # target and counts in one place
    used = asked.with_expect_alive(0.5, "measured").with_nprobe(nprobe)
    assert ResolvedSettings.from_json(json.loads(json.dumps(used.to_json()))) == used
    assert {name: used.asked()[name] for name in used.asked().keys() - {"nprobe"}} == {
        name: asked.asked()[name] for name in asked.asked().keys() - {"nprobe"}
    }
    assert used.asked()["nprobe"] in (None, asked.values.nprobe)
    assert (used.images is None) == (asked.values.target_images is None)
    if asked.values.target_images:
        assert used.values.expect_alive == (asked.values.expect_alive or 0.5)
    shown = {row["setting"]: row for row in used.rows()}
    assert set(shown) == used.origins.keys() | ({"block_list"} if block_list else set())
    assert shown["nprobe"]["value"] == str(nprobe)
    again = ResolvedSettings.from_rows(used.rows())
    assert again == replace(used, computed=frozenset(), block_list=block_list or None)


def test_a_record_of_another_release_is_a_value_error():
    stored = resolved().to_json()
    with pytest.raises(ValueError, match="nb_pictures"):
        ResolvedSettings.from_json({**stored, "values": {"nb_pictures": 5}})


def test_changes_between_two_requests_are_named_with_both_values():
    def changed(then: ResolvedSettings, now: ResolvedSettings) -> list[str]:
        return changes(then.asked(), now.asked())

    assert changed(resolved(), resolved()) == []
    assert changed(resolved(), resolved(own={"nb_images_knn": 60})) == ["nb_images_knn 50 -> 60"]
    assert changed(resolved(environment={"filters": "width > 5"}), resolved()) == [
        "filters width > 5 -> none"
    ]
    assert changed(resolved(), resolved(block_list="list.txt, 3 ids")) == [
        "block_list none -> list.txt, 3 ids"
    ]
    assert changed(resolved(), resolved(own={"target_images": 600})) == [
        "nb_images_knn 50 -> none",
        "nb_images_centroid 500 -> none",
        "target_images none -> 600",
    ]


# --- the settings.yaml of a seed set --------------------------------------------------------------


def test_a_seed_set_brings_its_settings_along(tmp_path):
    own = own_settings(tmp_path, "# for the client\nnb_images_knn: 200\ndedup_threshold: 1\nteam: a\n")
    assert own == {"nb_images_knn": 200, "dedup_threshold": 1, "team": "a"}
    found = resolved(own=own)
    assert (found.values.nb_images_knn, found.origins["nb_images_knn"]) == (200, OWN)
    assert type(found.values.dedup_threshold) is float
    assert own_settings(tmp_path, "") == own_settings(tmp_path, "# nothing yet\n") == {}


LAUGHS = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghi")]
# What a file holds, and what the error must name: setting, value, what is allowed, remedy.
REFUSED = {
    "nb_image_knn: 5": ("'nb_image_knn'", "not a setting", "did you mean nb_images_knn?"),
    "LAION_INDEX_URI: gs://x": ("'LAION_INDEX_URI'", "not a setting", *FIELDS),
    "nb_images_knn: many": ("nb_images_knn is 'many'", "a whole number of 1 or more"),
    "nb_images_knn: '5'": ("nb_images_knn is '5'", "a whole number"),
    "nb_images_knn: 1.5": ("nb_images_knn is 1.5", "a whole number"),
    "nb_images_knn: yes": ("nb_images_knn is True", "a whole number"),
    "nb_images_knn:": ("nb_images_knn is empty", "a whole number", "remove it"),
    "nb_images_knn: [1, 2]": ("nb_images_knn is a list", "a whole number"),
    "dedup_threshold: 2001-01-01": ("dedup_threshold is ", "2001", "a number above 0 up to 1"),
    f"dedup_threshold: 1{'0' * 400}": ("a number of 1,329 bits for dedup_threshold",),
    "dedup_threshold: .nan": ("dedup_threshold is nan", "a number above 0 up to 1"),
    "filters: 5": ("filters is 5", "give text"),
    "filters: width >> 5": ("filters", "'width >> 5'"),
    "nb_images_knn: 0": ("nb_images_knn is 0", "1 or more"),
    "target_images: 5\nnb_images_knn: 5": ("target_images is 5", "nb_images_knn is 5", "not both"),
    "team: a/b": ("team is 'a/b'", "60 letters, digits"),
    "team:": ("team is None", "60 letters, digits"),
    "\n".join(["a: &a [x]", *LAUGHS]): ("uses an alias",),
}


@pytest.mark.parametrize("content", REFUSED, ids=lambda text: text[:30])
def test_a_settings_file_that_cannot_be_used_is_named_with_the_remedy(tmp_path, content):
    with pytest.raises(InputError) as refused:
        resolved(own=own_settings(tmp_path, content))
    for fact in ("cats/settings.yaml", *REFUSED[content]):
        assert fact in str(refused.value)
    assert len(str(refused.value)) < 400


# --- in the graph ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(demo, tmp_path_factory):
    """A project in which flower was run with its own settings."""
    with new_project(tmp_path_factory.mktemp("settings"), demo.index, demo.seeds) as project:
        write_settings(project, "nb_images_knn: 5\nnb_images_centroid: 6\n")
        yield project


def write_settings(project: Project, text: str) -> None:
    (project.seeds / "flower" / "settings.yaml").write_text(text)


def test_what_a_run_says_comes_before_the_set_and_that_before_the_environment(made):
    other = made.with_environment(LAION_NB_IMAGES_KNN="7", LAION_NPROBE="3")
    result = other.run("flower", nb_images_centroid=9)
    assert failures(result) == {}
    seeds = reported(result, "seed_embeddings")["seeds"]
    expected = {
        "nb_images_knn": "5 (flower/settings.yaml)",
        "nb_images_centroid": f"9 ({RUN})",
        "dedup_threshold": "0.94 (default)",
        "nprobe": "3 (LAION_NPROBE)",
        "max_bad_images": "0.05 (default)",
    }
    for asset in ("knn_urls", "centroid_urls", "combined_urls"):
        assert reported(result, asset)["settings"] == expected
    assert reported(result, "knn_urls")["requested"] == 5 * seeds
    assert reported(result, "centroid_urls")["requested"] == 9
    assert reported(result, "combined_urls")["requested"] == 5 * seeds + 9


def test_the_footer_of_a_table_records_its_settings_once_with_their_origins(made):
    assert made.run("flower", target_images=100).success
    table = StoredTable(str(made.table("knn_urls", "flower")))
    settings = json.loads(table.footer["laion_assets"])["settings"]
    assert set(settings) == {"values", "origins", "computed", "block_list"}
    assert set(settings["values"]) == set(FIELDS)
    assert settings["computed"] == ["expect_alive", "nprobe"]
    assert settings["origins"][TARGET] == RUN
    assert settings["origins"]["dedup_threshold"] == "default"


def test_numbers_given_once_are_gone_with_the_next_run_and_those_of_the_set_are_not(made):
    result = made.run("flower", nb_images_knn=1)
    assert reported(result, "knn_urls")["settings"]["nb_images_knn"] == f"1 ({RUN})"
    ticks = Ticks(made)
    write_settings(made, "nb_images_knn: 4\n")
    assert "flower" not in ticks.tick()
    assert "flower" in ticks.tick()  # other settings are a change like any other
    result = made.run("flower")  # as the sensor does it
    assert reported(result, "knn_urls")["settings"]["nb_images_knn"] == "4 (flower/settings.yaml)"
    assert ticks.tick() == ticks.tick() == []


def test_all_steps_see_the_settings_that_were_there_when_the_seeds_were_read(made):
    write_settings(made, "nb_images_knn: 3\nnb_images_centroid: 8\n")
    assert made.run("flower", "seed_embeddings", "centroid_vector").success
    write_settings(made, "nb_images_knn: 2\nnb_images_centroid: 2\n")
    result = made.run("flower", "knn_urls", "centroid_urls", "combined_urls")
    told = reported(result, "combined_urls")["settings"]
    assert told["nb_images_knn"] == "3 (flower/settings.yaml)"
    assert told["nb_images_centroid"] == "8 (flower/settings.yaml)"
    assert made.run("flower", "seed_embeddings").success
    told = failures(made.run("flower", "combined_urls"))["combined_urls"]
    for fact in ("knn_urls of 'flower'", "settings.yaml", "materialize knn_urls again"):
        assert fact in told


def test_a_set_with_wrong_settings_fails_before_its_seeds_are_read(project):
    write_settings(project, "nb_images_knn: 0")
    (project.seeds / "flower" / "broken.npy").write_bytes(b"no array")
    told = failures(project.run("flower", "seed_embeddings"))["seed_embeddings"]
    for fact in ("nb_images_knn is 0", "flower/settings.yaml", "1 or more"):
        assert fact in told
    assert not project.output.exists()


# --- requests sized by a target -------------------------------------------------------------------


@given(target=st.integers(1, 10**9), alive=st.floats(1e-3, 1))
def test_the_fewest_images_are_wanted_of_which_the_target_works(target, alive):
    images = images_wanted(target, alive)
    assert images * alive >= target * (1 - 1e-9)
    assert (images - 1) * alive < target * (1 + 1e-9)


def test_a_target_is_reached_in_one_run(project):
    first = project.run("flower", target_images=600)
    assert failures(first) == {}
    told = reported(first, "combined_urls")
    wanted = images_wanted(600, EXPECT_ALIVE)
    assert told["kept"] == told["images for the target"] == wanted == 800
    assert len(StoredTable(str(project.table("combined_urls", "flower")))) == wanted
    assert told["settings"]["expect_alive"] == f"{EXPECT_ALIVE} (default)"
    assert told["settings"]["target_images"] == f"600 ({RUN})"
    seeds = reported(first, "seed_embeddings")["seeds"]
    assert reported(first, "knn_urls")["kept"] == -(-wanted // 2 // seeds) * seeds
    assert told["yield"] == round(told["kept"] / told["requested"], 6)

    other = project.run("flower", "centroid_urls", target_images=700)
    for fact in ("target_images 600 -> 700", "materialize knn_urls again"):
        assert fact in failures(other)["centroid_urls"]

    second = project.run("flower", target_images=300, expect_alive=1.0, dedup_threshold=0.8)
    assert reported(second, "combined_urls")["kept"] == 300


def test_a_target_beyond_the_index_takes_all_there_is_and_says_so(project):
    result = project.run("flower", target_images=10**9)
    assert failures(result) == {}
    told = reported(result, "centroid_urls")
    assert told["requested"] == reported(result, "staged_laion_index")["dagster/row_count"]
    assert reported(result, "combined_urls")["kept"] >= told["kept"]
    log = [entry.user_message for entry in project.instance.all_logs(result.run_id)]
    assert sum("target cannot be reached around" in message for message in log) == 2
    assert "all there is of the" in reported(result, "combined_urls")["about"]
