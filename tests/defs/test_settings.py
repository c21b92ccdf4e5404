"""Settings: from whom they come, what a seed set's own file may say, and images asked for by a target."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.project import Project, Ticks, failures, new_project, reported
from hypothesis import given, settings
from hypothesis import strategies as st

from laion_assets.defs.settings import DEFAULTS, RetrievalConfig, Settings
from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage
from laion_assets.search.sizing import USUAL, counts_for
from laion_assets.seeds import find_seed_set, list_seed_sets, read_settings

RUN, OWN = "Launchpad or command line", "cats/settings.yaml"
COUNTS = ("nb_images_knn", "nb_images_centroid")


def resolved(
    run: dict[str, Any] | None = None,
    own: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
) -> Settings:
    variables = {f"LAION_{name.upper()}": str(value) for name, value in (environment or {}).items()}
    return RetrievalConfig(**(run or {})).resolve(variables, own, "cats")


def own_settings(root: Path, content: str | bytes, file: str = "settings.yaml") -> dict[str, Any]:
    """What a seed set in a folder brings along."""
    (root / "cats").mkdir(exist_ok=True)
    np.save(root / "cats" / "a.npy", np.eye(4, dtype=np.float32))
    (root / "cats" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_settings(str(root), find_seed_set(str(root), "cats"))


# --- which level a setting comes from -------------------------------------------------------------

NAMES = ("target_images", *COUNTS, "nprobe")
LEVEL = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 10**6))


@settings(deadline=None)
@given(run=LEVEL, own=LEVEL, environment=LEVEL)
def test_the_nearest_level_decides_each_setting_and_whether_counts_or_a_target(run, own, environment):
    levels = {RUN: run, OWN: own, "environment": environment}
    nearest = next((level for level in levels.values() if level.keys() & {"target_images", *COUNTS}), {})
    by_target = "target_images" in nearest
    if by_target and nearest.keys() & {*COUNTS}:
        with pytest.raises(InputError, match=r"target_images is \d+ \(from .*\(from .*not both"):
            resolved(run, own, environment)
        return
    found = resolved(run, own, environment)
    unused = COUNTS if by_target else ("target_images",)
    for name in NAMES:
        given_by = [(value[name], origin) for origin, value in levels.items() if name in value]
        expected = (given_by or [(DEFAULTS[name], "default")])[0]
        if name in unused or expected[0] is None:
            assert (getattr(found, name), found.origins.get(name)) == (None, None)
            continue
        origin = expected[1].replace("environment", f"LAION_{name.upper()}")
        assert (getattr(found, name), found.origins[name]) == (expected[0], origin)


def test_a_target_and_a_count_from_the_same_place_are_refused_with_both_places():
    with pytest.raises(InputError) as refused:
        resolved(environment={"target_images": 5000, "nb_images_centroid": 9})
    assert str(refused.value) == (
        "target_images is 5000 (from LAION_TARGET_IMAGES) and nb_images_centroid is 9 (from "
        "LAION_NB_IMAGES_CENTROID): give the target or the two numbers, not both"
    )


# --- the settings.yaml of a seed set --------------------------------------------------------------


def test_a_seed_set_brings_its_settings_along(tmp_path):
    own = own_settings(tmp_path, "# for the client\nnb_images_knn: 200\ndedup_threshold: 1\n")
    assert own == {"nb_images_knn": 200, "dedup_threshold": 1}
    settings = resolved(own=own)
    assert (settings.nb_images_knn, settings.origins["nb_images_knn"]) == (200, OWN)
    assert type(settings.dedup_threshold) is float
    assert own_settings(tmp_path, "") == own_settings(tmp_path, "# nothing yet\n") == {}


LAUGHS = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghi")]
REFUSED = {
    "nb_image_knn: 5": "sets 'nb_image_knn', which is no setting: did you mean nb_images_knn\\?",
    "LAION_INDEX_URI: gs://x": "sets 'LAION_INDEX_URI', which is no setting: there are nb_images_knn, ",
    "nb_images_knn: many": "sets nb_images_knn to 'many', which is not a whole number: correct or remove",
    "nb_images_knn: 1.5": "sets nb_images_knn to 1.5, which is not a whole number",
    "nb_images_knn: yes": "sets nb_images_knn to True, which is not a whole number",
    "nb_images_knn:": "sets nb_images_knn to nothing, which is not a whole number",
    "nb_images_knn: [1, 2]": "sets nb_images_knn to a list, which is not a whole number",
    "dedup_threshold: 2001-01-01": "sets dedup_threshold to .*, which is not a number",
    f"dedup_threshold: 1{'0' * 400}": "sets dedup_threshold to 10*, which is not a number",
    "filters: 5": r"sets filters to 5, which is not a text \(quote it\): correct or remove it",
    "filters: width >> 5": r"filters \(from cats/.*\) cannot be read from 'width >> 5' on: write",
    "dedup_threshold: .nan": "sets dedup_threshold to nan, which is not a number",
    "nb_images_knn: 0": r"nb_images_knn is 0 \(from cats/settings.yaml\): give 1 or more",
    "target_images: 5\nnb_images_knn: 5": "target_images is 5 .* and nb_images_knn is 5 .* not both",
    "nprobe: 1\nnprobe: 2": "has nprobe twice: remove one of them",
    "just words": "is not a list of settings: write one per line",
    "1: 2": "is not a list of settings",
    "[": "is not YAML .*: write one setting per line",
    "[" * 9000: "is not YAML",
    "nprobe: 2001-99-99": "is not YAML .*month",
    "nprobe: !!python/object/apply:os.abort []": "is not YAML .*could not determine",
    "# " + "x" * (16 << 10): "has 16,386 bytes, settings take 16,384 at most: shorten it",
    "\n".join(["a: &a [x]", *LAUGHS]): "sets 'a', which is no setting",
}


@pytest.mark.parametrize("content", REFUSED, ids=lambda text: text[:30])
def test_a_settings_file_that_cannot_be_used_is_named_with_the_remedy(tmp_path, content):
    with pytest.raises(InputError, match=REFUSED[content]) as refused:
        resolved(own=own_settings(tmp_path, content))
    assert "cats/settings.yaml" in str(refused.value)
    assert len(str(refused.value)) < 400


def test_bytes_that_are_no_text_are_no_settings(tmp_path):
    with pytest.raises(InputError, match=r"cats/settings\.yaml is not YAML"):
        own_settings(tmp_path, b"\xff\xfe\xff")


@pytest.mark.parametrize("name", ["settings.yml", "setting.yaml"])
def test_a_settings_file_of_another_name_is_not_overlooked(tmp_path, name):
    with pytest.raises(InputError, match=f"cats/{name} is not read: .*; rename or remove it"):
        own_settings(tmp_path, "nprobe: 5", name)


def test_settings_are_part_of_the_fingerprint_and_no_seeds(tmp_path):
    def fingerprint() -> str:
        return list_seed_sets(str(tmp_path))["cats"].fingerprint

    own_settings(tmp_path, "nprobe: 5")
    with_settings = fingerprint()
    own_settings(tmp_path, "nprobe: 6")
    assert fingerprint() != with_settings
    (tmp_path / "cats" / "settings.yaml").unlink()
    without = fingerprint()
    (tmp_path / "cats" / "deeper").mkdir()
    (tmp_path / "cats" / "deeper" / "notes.yaml").write_text("not: ours")
    assert fingerprint() == without != with_settings
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "settings.yaml").write_text("nprobe: 5")
    assert set(list_seed_sets(str(tmp_path))) == {"cats"}
    with pytest.raises(InputError, match="seed set 'empty' is empty"):
        find_seed_set(str(tmp_path), "empty")


def test_settings_are_read_from_a_bucket_once_they_are_at_rest(new_bucket):
    fs, root = open_storage(new_bucket, "")
    array = b"".join([np.lib.format.magic(1, 0)])
    fs.pipe(f"{root}/seeds/cats/a.npy", array)
    fs.pipe(f"{root}/seeds/cats/settings.yaml", b"nprobe: 5")
    seed_set = find_seed_set(f"{new_bucket}/seeds", "cats")
    assert read_settings(f"{new_bucket}/seeds", seed_set) == {"nprobe": 5}
    fs.pipe(f"{root}/seeds/cats/settings.yaml", b"nprobe: 6")
    with pytest.raises(InputError, match=r"cats/settings\.yaml changed while it was read; run again"):
        read_settings(f"{new_bucket}/seeds", seed_set)


# --- in the graph ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(demo, tmp_path_factory):
    """A project in which flower was run with settings of its own."""
    with new_project(tmp_path_factory.mktemp("settings"), demo.index, demo.seeds) as project:
        write_settings(project, "nb_images_knn: 5\nnb_images_centroid: 6\n")
        yield project


def write_settings(project: Project, text: str) -> None:
    (project.seeds / "flower" / "settings.yaml").write_text(text)


def test_what_a_run_says_comes_before_the_set_and_that_before_the_environment(made, monkeypatch):
    monkeypatch.setenv("LAION_NB_IMAGES_KNN", "7")
    monkeypatch.setenv("LAION_NPROBE", "3")
    result = made.run("flower", nb_images_centroid=9)
    assert failures(result) == {}
    seeds = reported(result, "seed_embeddings")
    assert seeds["settings of its own"] == {"nb_images_knn": 5, "nb_images_centroid": 6}
    told = reported(result, "combined_urls")["settings"]
    assert told == {
        "nb_images_knn": "5 (flower/settings.yaml)",
        "nb_images_centroid": f"9 ({RUN})",
        "dedup_threshold": "0.94 (default)",
        "nprobe": "3 (LAION_NPROBE)",
    }
    assert reported(result, "knn_urls")["requested"] == 5 * seeds["seeds"]
    assert reported(result, "centroid_urls")["requested"] == 9
    assert reported(result, "combined_urls")["requested"] == 5 * seeds["seeds"] + 9


def test_numbers_given_once_are_gone_with_the_next_run_and_those_of_the_set_are_not(made):
    result = made.run("flower", nb_images_knn=1)
    assert "1 (Launchpad" in reported(result, "knn_urls")["settings"]["nb_images_knn"]
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
    assert "knn_urls of 'flower' was made from other seeds or another settings.yaml" in told


def test_a_set_with_wrong_settings_fails_at_once_in_a_sentence(project):
    write_settings(project, "nb_images_knn: 0")
    assert failures(project.run("flower", "seed_embeddings")) == {
        "seed_embeddings": "nb_images_knn is 0 (from flower/settings.yaml): give 1 or more"
    }
    assert not project.output.exists()


# --- as many images as are wanted -----------------------------------------------------------------


@settings(deadline=None)
@given(
    target=st.integers(1, 10**9),
    seeds=st.integers(1, 10**5),
    share=st.floats(1e-4, 1),
    rows=st.integers(1, 6 * 10**9),
)
def test_the_fewest_images_are_asked_for_that_give_half_the_target_each(target, seeds, share, rows):
    half, nearly = target / 2, 1 + 1e-9
    free = counts_for(target, seeds, share)
    for count, queries in ((free.nb_images_knn, seeds), (free.nb_images_centroid, 1)):
        assert count * queries * share * nearly >= half
        assert (count - 1) * queries * share < half * nearly
    bounded = counts_for(target, seeds, share, rows)
    assert bounded.nb_images_knn == min(free.nb_images_knn, rows)
    assert bounded.nb_images_centroid == min(free.nb_images_centroid, rows)


def test_the_sum_of_the_readme():
    counts = counts_for(500_000, 1000, 0.3)
    assert (counts.nb_images_knn, counts.nb_images_centroid) == (834, 833_334)


def test_a_target_is_met_better_once_the_yield_was_measured(project):
    first = project.run("flower", target_images=600)
    assert failures(first) == {}
    seeds = reported(first, "seed_embeddings")["seeds"]
    told = reported(first, "combined_urls")
    expected = counts_for(600, seeds, USUAL.share)
    assert told["requested"] == expected.nb_images_knn * seeds + expected.nb_images_centroid
    assert told["yield"] == round(told["kept"] / told["requested"], 6)
    assert told["target images"] == 600
    assert told["target reached"] == round(told["kept"] / 600, 4)
    assert "usual for LAION" in told["settings"]["nb_images_knn"]

    second = project.run("flower", target_images=600)
    again = reported(second, "combined_urls")
    expected = counts_for(600, seeds, told["yield"])
    assert reported(second, "knn_urls")["requested"] == expected.nb_images_knn * seeds
    assert reported(second, "centroid_urls")["requested"] == expected.nb_images_centroid
    assert f"measured by run {first.run_id[:8]}" in again["settings"]["nb_images_centroid"]
    assert again["settings"]["target_images"] == f"600 ({RUN})"
    assert abs(again["target reached"] - 1) < abs(told["target reached"] - 1)

    # Another threshold has another yield: what was measured with the first one does not count.
    third = project.run("flower", target_images=600, dedup_threshold=0.8)
    assert "usual for LAION" in reported(third, "combined_urls")["settings"]["nb_images_knn"]


def test_no_more_is_asked_for_than_the_index_has(project):
    result = project.run(
        "flower", "staged_laion_index", "seed_embeddings", "knn_urls", target_images=10**9
    )
    told = reported(result, "knn_urls")
    rows = reported(result, "staged_laion_index")["dagster/row_count"]
    assert told["requested"] == rows * reported(result, "seed_embeddings")["seeds"]
    assert f"no more than the {rows:,} rows of the index" in told["settings"]["nb_images_knn"]
