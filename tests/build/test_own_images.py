"""A folder of images becomes an index without any other input."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from laion_assets.build import Build, Request, embed_folder
from laion_assets.demo import DEMO_MODEL
from laion_assets.io.errors import InputError
from laion_assets.search import search
from laion_assets.seeds import Model

PICTURES = DEMO_MODEL.with_name("pictures")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(DEMO_MODEL, "cpu")


def built(root: Path, model: Model):
    found = embed_folder(str(root / "mine"), str(root / "embeddings"), model, print)
    return found, Build(Request(str(root / "embeddings"), str(root / "index"))).run()


def vectors(root: Path) -> dict[str, np.ndarray]:
    rows = pq.read_table(root / "embeddings")
    return dict(zip(rows["url"].to_pylist(), np.array(rows["embedding"].to_pylist()), strict=True))


def test_each_image_is_the_best_row_for_itself_and_images_that_are_added_get_the_next_ids(
    tmp_path, model
):
    mine = tmp_path / "mine"
    shutil.copytree(PICTURES / "bird", mine / "nested folder")
    (mine / "broken.jpg").write_bytes(b"")
    (mine / "notes.txt").write_text("no image")
    found, index = built(tmp_path, model)
    count = len(list((PICTURES / "bird").iterdir()))
    assert (found.images, found.new, [str(bad) for bad in found.bad]) == (
        count, count, [f"{mine / 'broken.jpg'} is empty (0 bytes): use another file"],
    )  # fmt: skip
    assert index.stored == count
    first = vectors(tmp_path)
    shutil.copytree(PICTURES / "car", mine / "car")
    found, index = built(tmp_path, model)
    cars = len(list((PICTURES / "car").iterdir()))
    assert (found.images, found.new, index.stored) == (count + cars, cars, count + cars)
    after = vectors(tmp_path)
    assert list(after)[:count] == list(first)
    queries = np.array(list(after.values()), np.float32)
    hits = search(str(tmp_path / "index"), queries, 1)
    assert hits["id"].to_pylist() == list(range(count + cars))
    assert hits["url"].to_pylist() == list(after)
    assert (mine / "nested folder").as_uri() in hits["url"][0].as_py()


def test_without_images_or_with_another_model_it_says_what_to_do(tmp_path, model):
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="there is no folder"):
        embed_folder(str(tmp_path / "missing"), str(tmp_path / "embeddings"), model, print)
    (tmp_path / "list.txt").touch()
    with pytest.raises(InputError, match=r"list\.txt is a file: name the folder"):
        embed_folder(str(tmp_path / "list.txt"), str(tmp_path / "embeddings"), model, print)
    with pytest.raises(InputError, match="holds no image"):
        embed_folder(str(tmp_path / "mine"), str(tmp_path / "embeddings"), model, print)
    (tmp_path / "mine" / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"no image in .* can be embedded \(1 image\): .*a\.png"):
        embed_folder(str(tmp_path / "mine"), str(tmp_path / "embeddings"), model, print)
    shutil.copy(sorted((PICTURES / "car").iterdir())[0], tmp_path / "mine")
    embed_folder(str(tmp_path / "mine"), str(tmp_path / "embeddings"), model, print)
    copy = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    config = copy / "preprocessor_config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(InputError, match="embeddings of another model"):
        embed_folder(str(tmp_path / "mine"), str(tmp_path / "embeddings"), Model(copy, "cpu"), print)
