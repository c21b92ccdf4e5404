"""Our vectors equal those of transformers' and clip-retrieval's pipelines, with the same weights.

Theirs run in an environment of their own; ours in the one that the product has.
"""

import html
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from laion_assets.seeds.decoding import PixelBudget, open_image
from laion_assets.seeds.images import EmbeddedImage, ImageFile, embed_images
from laion_assets.seeds.model import Model
from laion_assets.seeds.prompts import Prompt, PromptTokens, embed_prompts

PACKAGE = Path(__file__).parents[2] / "laion_assets"
PYTHON = Path(__file__).parent / ".venv" / "bin" / "python"
PICTURES = PACKAGE / "demo" / "pictures"
CAPTIONS = 1000
SAME = 0.9999
PROMPTS = [
    "a photo of a cat",
    "",
    "Ein Häuschen mit Gärtchen, é è ñ ç",
    "a 😀 smiling 🐈‍⬛ cat 👩‍👩‍👧",
    "the quick brown fox doesn't jump; it's 12,345.67 % lazy!?" * 2,
    "日本の家 и дом",
    " ".join(f"word{number}" for number in range(100)),
    "UPPER lower   many\tspaces <|endoftext|> and marks",
]
Odd = Callable[[Image.Image], tuple[Image.Image, dict[str, Any]]]


def turned(image: Image.Image) -> tuple[Image.Image, dict[str, Any]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image.convert("RGB"), {"exif": exif, "quality": 95}


def frames(image: Image.Image) -> tuple[Image.Image, dict[str, Any]]:
    more = [image.rotate(angle).quantize(64) for angle in (90, 180)]
    return image.quantize(64), {"save_all": True, "append_images": more}


def with_clear_colour(image: Image.Image) -> tuple[Image.Image, dict[str, Any]]:
    return image.quantize(64), {"transparency": bytes(range(0, 256, 4))}


def with_alpha(image: Image.Image) -> tuple[Image.Image, dict[str, Any]]:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image, {}


ODD: dict[str, Odd] = {
    "grey.png": lambda image: (image.convert("L"), {}),
    "grey.jpg": lambda image: (image.convert("L"), {}),
    "cmyk.jpg": lambda image: (image.convert("CMYK"), {"quality": 90}),
    "black and white.png": lambda image: (image.convert("1"), {}),
    "palette.png": with_clear_colour,
    "alpha.png": with_alpha,
    "grey with alpha.png": lambda image: (with_alpha(image)[0].convert("LA"), {}),
    "turned.jpg": turned,
    "one pixel.png": lambda image: (image.resize((1, 1)), {}),
    "long.png": lambda image: (image.resize((4000, 10)), {}),
    "tall.png": lambda image: (image.resize((10, 4000)), {}),
    "very long.png": lambda image: (image.resize((9000, 20)), {}),
    "animated.gif": frames,
    "animated.webp": frames,
    "large.jpg": lambda image: (image.resize((3000, 2500), Image.Resampling.BICUBIC), {"quality": 90}),
    "large.png": lambda image: (image.resize((2500, 3000), Image.Resampling.BICUBIC), {}),
    "odd.bmp": lambda image: (image.resize((223, 227)), {}),
    "some.avif": lambda image: (image, {"quality": 80}),
    "some.tiff": lambda image: (image, {}),
}
NOT_TO_THE_BIT = {"very long.png", "long.png", "tall.png", "large.jpg"}


@dataclass(frozen=True)
class Reference:
    """What transformers made of the images and prompts."""

    folder: Path
    names: list[str]
    answers: dict[str, np.ndarray[Any, Any]]

    def files(self, names: list[str]) -> list[ImageFile]:
        return [ImageFile(name, (self.folder / "images" / name).read_bytes) for name in names]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    shutil.copytree(PICTURES, folder / "images" / "pictures")
    (folder / "images" / "odd").mkdir()
    pictures = sorted(PICTURES.rglob("*.webp"))
    for number, (name, make) in enumerate(ODD.items()):
        picture = Image.open(pictures[7 * (number % 14)]).convert("RGB")
        image, options = make(picture)
        image.save(folder / "images" / "odd" / name, **options)
    found = sorted((folder / "images").rglob("*.*"))
    names = [path.relative_to(folder / "images").as_posix() for path in found]
    assert len(names) == 100 + len(ODD)
    table = pq.read_table(PACKAGE / "demo" / "openclipart.parquet", columns=["caption"])
    # OpenAI's own code undoes HTML's escapes, which a text of prompts has not.
    captions = [html.unescape(caption) for caption in table["caption"].to_pylist()[:CAPTIONS]]
    for file, content in {"images": names, "prompts": PROMPTS, "captions": captions}.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    subprocess.run([PYTHON, Path(__file__).with_name("reference.py"), folder], check=True)
    with np.load(folder / "answers.npz") as answers:
        return Reference(folder, names, dict(answers))


def unit(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    exact = vectors.astype(np.float64)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True)


def embedded(model: Model, files: list[ImageFile]) -> np.ndarray[Any, Any]:
    outcomes = list(embed_images(model, files))
    assert all(isinstance(outcome, EmbeddedImage) for outcome in outcomes)
    return np.stack([outcome.vector for outcome in outcomes])  # type: ignore[union-attr]


def cosines(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.einsum("ij,ij->i", ours.astype(np.float64), unit(theirs))


def test_the_models_tell_images_and_texts_apart(reference):
    """Otherwise equal vectors would prove nothing."""
    for name in ("small_images", "large_images", "small_prompts", "large_prompts"):
        alike = unit(reference.answers[name]) @ unit(reference.answers[name]).T
        assert np.median(alike) < 0.95, name


@pytest.mark.parametrize("number", range(100 + len(ODD)))
def test_an_image_is_prepared_as_transformers_does(number, reference):
    name = reference.names[number]
    preprocessing = Model(reference.folder / "small").preprocessing
    data = (reference.folder / "images" / name).read_bytes()
    with open_image(data, lambda width, height: (width, height), PixelBudget()) as image:
        pixels = preprocessing(image)
    off = np.abs(pixels - reference.answers["pixels"][number])
    if Path(name).name in NOT_TO_THE_BIT:
        assert off.max() < 0.1
    else:
        assert off.max() < 1e-6


def test_vectors_of_images_are_those_of_transformers(reference):
    ours = embedded(Model(reference.folder / "small"), reference.files(reference.names))
    same = cosines(ours, reference.answers["small_images"])
    assert {n: c for n, c in zip(reference.names, same, strict=True) if not c > SAME} == {}


def test_vectors_of_images_are_those_of_clip_retrieval(reference):
    names = [f"pictures/{name}" for name in json.loads((reference.folder / "peer.json").read_text())]
    assert len(names) == 100
    ours = embedded(Model(reference.folder / "small"), reference.files(names))
    assert cosines(ours, reference.answers["peer_images"]).min() > SAME


@pytest.mark.parametrize("name", ["small", "masked"])
def test_vectors_of_prompts_are_those_of_transformers(name, reference):
    prompts = [Prompt(line, text) for line, text in enumerate(PROMPTS, 1)]
    ours = embed_prompts(Model(reference.folder / name), prompts)
    assert cosines(ours.vectors, reference.answers["small_prompts"]).min() > SAME
    assert [cut.line for cut in ours.cut] == [7]


def test_a_model_of_the_size_of_vit_l_14_gives_the_same(reference):
    model = Model(reference.folder / "large")
    assert model.dimension == 768
    images = reference.answers["large_images"]
    ours = embedded(model, reference.files(reference.names[: len(images)]))
    assert cosines(ours, images).min() > SAME
    theirs = reference.answers["large_prompts"]
    prompts = [Prompt(line, text) for line, text in enumerate(PROMPTS[: len(theirs)], 1)]
    assert cosines(embed_prompts(model, prompts).vectors, theirs).min() > SAME


def test_tokens_of_captions_are_those_of_clip(reference):
    captions = json.loads((reference.folder / "captions.json").read_text())
    assert len(captions) == CAPTIONS
    ids, mask, _ = PromptTokens(Model(reference.folder / "small")).of(captions)
    np.testing.assert_array_equal(ids, reference.answers["caption_tokens"])
    # OpenAI's own code fills up with zeros.
    np.testing.assert_array_equal(ids * mask, reference.answers["original_tokens"])
    ids, _, _ = PromptTokens(Model(reference.folder / "small")).of(PROMPTS)
    np.testing.assert_array_equal(ids, reference.answers["prompt_tokens"])
