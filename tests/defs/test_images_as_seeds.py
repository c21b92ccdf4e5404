"""The graph embeds a new folder of images, and reports the result for each."""

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest
from helpers.onnx_models import text_model, write_model
from helpers.project import Demo, Project, Ticks, failures, new_project, reported, stale
from PIL import Image

from laion_assets.defs.sources import last_version
from laion_assets.demo import DEMO_MODEL
from laion_assets.index import MODEL_RECORD
from laion_assets.seeds import list_folder

ASSETS = ("seed_embeddings", "centroid_vector", "knn_urls", "centroid_urls", "combined_urls")


@pytest.fixture
def images(demo: Demo, tmp_path: Path):
    """A project on the demo's index, with the demo's seed sets as images."""
    with new_project(tmp_path, demo.index, demo.images) as made:
        yield made


def mine(project: Project, images: int = 3) -> Path:
    """A seed set of the user's own images."""
    folder = project.seeds / "mine"
    for path in sorted((project.seeds / "fruit").iterdir())[:images]:
        folder.mkdir(exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").save(folder / f"{path.stem}.JPG", "JPEG", quality=95)
    return folder


def test_images_that_are_dropped_in_lead_to_a_table_with_ones_own_images_on_top(images):
    ticks = Ticks(images)
    mine(images)
    assert ticks.tick() == []
    assert "mine (3 images)" in ticks.said
    assert "mine" in ticks.tick()
    result = images.run("mine")
    assert failures(result) == {}
    seeds = reported(result, "seed_embeddings")
    assert (seeds["seeds"], seeds["dimension"], seeds["images embedded before"]) == (3, 256, 0)
    assert seeds["contact sheet"].startswith("![contact sheet]")
    assert "3 images" in seeds["about"]
    table = pq.read_table(images.table("seed_embeddings", "mine"))
    assert table["kind"].to_pylist() == ["image"] * 3
    assert all(table["thumbnail"].to_pylist())
    combined = reported(result, "combined_urls")
    assert combined["kept"] > 50
    assert Path(combined["picture"]).exists()
    footer = json.loads(pq.read_metadata(images.table("combined_urls", "mine")).metadata[b"laion_assets"])
    assert footer["model"]


def test_adding_images_embeds_only_those(images):
    folder = mine(images)
    assert images.run("mine", "seed_embeddings").success
    shutil.copy(sorted((images.seeds / "house").iterdir())[0], folder / "new.webp")
    told = reported(images.run("mine", "seed_embeddings"), "seed_embeddings")
    assert (told["seeds"], told["images embedded before"]) == (4, 3)
    other = images.with_environment(LAION_MODEL=str(copy_of_the_model(images)))
    told = reported(other.run("mine", "seed_embeddings"), "seed_embeddings")
    assert (told["seeds"], told["images embedded before"]) == (4, 0), "another model, other vectors"


def test_a_run_that_fails_keeps_what_it_embedded(images):
    folder = mine(images)
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).write_bytes(b"")
    result = images.run("mine", "seed_embeddings")
    assert "LAION_MAX_BAD_IMAGES" in failures(result)["seed_embeddings"]
    (folder / "a.png").unlink()
    (kept,) = (images.output / "seed_embeddings" / "mine.unfinished").iterdir()
    (kept.parent / "damaged.parquet").write_bytes(b"PAR1")
    told = reported(images.run("mine", "seed_embeddings", max_bad_images=1.0), "seed_embeddings")
    assert (told["seeds"], told["images embedded before"]) == (3, 3)
    assert list(kept.parent.iterdir()) == []


def footer(project: Project, asset: str, seed_set: str = "mine") -> dict[str, Any]:
    """The provenance in a table's footer."""
    metadata = pq.read_metadata(project.table(asset, seed_set)).metadata
    found: dict[str, Any] = json.loads(metadata[b"laion_assets"])
    return found


def data_version(project: Project, asset: str, seed_set: str) -> str | None:
    return last_version(project.instance, dg.AssetKey(asset), seed_set)


def test_another_model_makes_what_follows_stale_and_old_and_new_are_not_combined(images):
    mine(images)
    ticks = Ticks(images)
    assert failures(images.run("mine")) == {}
    assert [ticks.tick(), ticks.tick()][0] == []
    assert stale(images, "mine") == set()
    before = data_version(images, "seed_embeddings", "mine")
    other = ticks.project = images.with_environment(LAION_MODEL=str(copy_of_the_model(images)))
    assert failures(other.run("mine", "seed_embeddings")) == {}
    assert data_version(images, "seed_embeddings", "mine") != before
    assert stale(other, "mine") == {"centroid_vector", "knn_urls", "combined_urls"}
    assert [ticks.tick() for _ in range(3)] == [[]] * 3, "the files are the same: no run"
    assert "mine" not in ticks.said
    assert failures(other.run("mine", "knn_urls")) == {}
    sentence = failures(other.run("mine", "combined_urls"))["combined_urls"]
    models = {footer(other, asset)["model"] for asset in ("knn_urls", "centroid_urls")}
    assert len(models) == 2
    for fact in ("centroid_urls", "another model", *models):
        assert fact in sentence
    assert failures(other.run("mine", "centroid_vector", "centroid_urls", "combined_urls")) == {}
    assert stale(other, "mine") == set()
    made_with = {footer(other, asset)["model"] for asset in ASSETS}
    assert made_with == {footer(other, "seed_embeddings")["model"]}


def test_another_model_changes_nothing_for_a_set_of_embeddings(project):
    other = project.with_environment(LAION_MODEL=str(copy_of_the_model(project)))
    files = list_folder(str(project.seeds)).sets["fruit"].fingerprint
    for each in (project, other):
        assert failures(each.run("fruit", "seed_embeddings")) == {}
        assert data_version(each, "seed_embeddings", "fruit") == files
        assert footer(each, "seed_embeddings", "fruit")["model"] is None


def test_seeds_and_centroid_record_the_settings_that_were_used(images):
    folder = mine(images)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "settings.yaml").write_text("nb_images_knn: 7\n")
    cases: list[tuple[Project, dict[str, Any], str]] = [
        (images.with_environment(LAION_MAX_BAD_IMAGES="0.5"), {}, "LAION_MAX_BAD_IMAGES"),
        (images, {"max_bad_images": 0.5, "nb_images_knn": 9}, "Launchpad or command line"),
    ]
    for project, launchpad, origin in cases:
        assert failures(project.run("mine", "seed_embeddings", "centroid_vector", **launchpad)) == {}
        for asset in ("seed_embeddings", "centroid_vector"):
            recorded = footer(project, asset)
            assert recorded["settings"]["values"]["max_bad_images"] == 0.5
            assert recorded["settings"]["origins"]["max_bad_images"] == origin
            assert recorded["own"] == {"nb_images_knn": 7}
    assert recorded["settings"]["values"]["nb_images_knn"] == 9
    # Values of one run hold for that run alone; later ones take the set's own.
    assert failures(images.run("mine", "staged_laion_index", "knn_urls")) == {}
    settings = footer(images, "knn_urls")["settings"]
    assert settings["values"]["nb_images_knn"] == 7
    assert settings["origins"]["nb_images_knn"] == "mine/settings.yaml"


def copy_of_the_model(project: Project) -> Path:
    """The demo's model with another preprocessing, which makes it another model."""
    folder = shutil.copytree(DEMO_MODEL, project.root / "model", dirs_exist_ok=True)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"resample": 2}))
    return folder


def test_a_bad_image_beside_good_ones_is_reported_and_too_many_fail_the_run(images):
    folder = mine(images)
    for name in ("broken.jpg", "torn.jpg"):
        (folder / name).write_bytes(b"no image")
    result = images.run("mine", "seed_embeddings")
    sentence = failures(result)["seed_embeddings"]
    for fact in ("2 of 5 images", "'mine'", "broken.jpg", "torn.jpg", "LAION_MAX_BAD_IMAGES"):
        assert fact in sentence
    (folder / "settings.yaml").write_text("max_bad_images: 0.4\n")
    result = images.run("mine", "seed_embeddings")
    assert failures(result) == {}
    bad = reported(result, "seed_embeddings")["bad images"]
    assert [reason.split(" ")[0] for reason in bad] == ["broken.jpg", "torn.jpg"]


def test_an_index_of_ones_own_needs_a_model_and_says_so(demo, tmp_path):
    index = shutil.copytree(demo.index, tmp_path / "index")
    (index / "demo.json").unlink()
    with new_project(tmp_path, index, demo.images) as project:
        sentence = failures(project.run("fruit", "seed_embeddings"))["seed_embeddings"]
        assert "images" in sentence
        assert "LAION_MODEL" in sentence
        with_model = project.with_environment(LAION_MODEL=str(DEMO_MODEL))
        assert failures(with_model.run("fruit", "seed_embeddings")) == {}


def test_a_model_that_is_not_the_indexs_is_refused_before_anything_is_embedded(demo, tmp_path):
    index = shutil.copytree(demo.index, tmp_path / "index")
    small = write_model(tmp_path / "small", text=text_model(600, length=77))
    with new_project(tmp_path, index, demo.images, LAION_MODEL=str(small)) as project:
        sentence = failures(project.run("fruit", "seed_embeddings"))["seed_embeddings"]
        assert "4 dimensions" in sentence
        assert "256" in sentence
        record = {"name": "someone/else", "url": "hf://someone/else", "dimension": 256}
        (index / MODEL_RECORD).write_text(json.dumps(record))
        named = project.with_environment(LAION_MODEL=str(DEMO_MODEL))
        sentence = failures(named.run("fruit", "seed_embeddings"))["seed_embeddings"]
        assert "someone/else" in sentence
        assert "use hf://someone/else" in sentence
        (index / MODEL_RECORD).write_text('{"dimension": "many"}')
        sentence = failures(named.run("fruit", "seed_embeddings"))["seed_embeddings"]
        assert str(index / MODEL_RECORD) in sentence
        # An index that records nothing has its dimension once it is staged.
        (index / MODEL_RECORD).unlink()
        assert project.run("fruit", "staged_laion_index").success
        assert "4 dimensions" in failures(project.run("fruit", "seed_embeddings"))["seed_embeddings"]


def test_prompts_are_seeds_of_their_own_and_not_part_of_the_centroid(demo, tmp_path):
    index = shutil.copytree(demo.index, tmp_path / "index")
    (index / MODEL_RECORD).unlink()
    small = write_model(tmp_path / "small", text=text_model(600, length=77))
    with new_project(tmp_path, index, demo.images, LAION_MODEL=str(small)) as project:
        folder = mine(project)
        (folder / "prompts.txt").write_text("a pear\n" + "very " * 90 + "long\n")
        result = project.run("mine", "seed_embeddings", "centroid_vector")
        assert failures(result) == {}
        told = reported(result, "seed_embeddings")
        assert told["seeds"] == 5
        (cut,) = told["cut prompts"]
        assert "line 2" in cut
        assert "the mean of **3 seeds**" in reported(result, "centroid_vector")["about"]
        (check,) = [c for c in result.get_asset_check_evaluations() if "all_seeds" in c.check_name]
        assert not check.passed
        assert "left out: 2 prompts" in (check.description or "")
        for path in folder.glob("*.JPG"):
            path.unlink()
        result = project.run("mine", "seed_embeddings", "centroid_vector")
        assert "the mean of **2 seeds**" in reported(result, "centroid_vector")["about"]
