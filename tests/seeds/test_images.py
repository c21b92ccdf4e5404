"""Images of every kind become vectors; bad ones are reported and do not affect others."""

import io
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.onnx_models import DIMENSION, EDGE, PREPROCESSOR, vision_model, write_model
from helpers.project import REPOSITORY
from PIL import Image

from laion_assets.io.errors import InputError
from laion_assets.seeds import decoding
from laion_assets.seeds.decoding import PixelBudget, open_image
from laion_assets.seeds.images import BadImage, EmbeddedImage, ImageFile, embed_images
from laion_assets.seeds.model import Model

DEMO = REPOSITORY / "laion_assets" / "demo"
PICTURES = sorted((DEMO / "pictures").rglob("*.webp"))
RED, WHITE, BLUE = (200, 30, 20), (255, 255, 255), (10, 20, 250)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(DEMO / "model", "cpu")


@pytest.fixture
def small(tmp_path: Path) -> Model:
    """A model that returns no usable vector for a black image."""
    return Model(write_model(tmp_path / "small"))


def file(name: str, data: bytes) -> ImageFile:
    return ImageFile(name, lambda: data)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Smooth random colours, as a photograph has them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixels_of(data: bytes) -> np.ndarray[Any, np.dtype[np.int16]]:
    with open_image(data, lambda width, height: (width, height), PixelBudget()) as image:
        assert image.mode == "RGB"
        return np.asarray(image).astype(np.int16)


def embedded(model: Model, *files: ImageFile) -> list[EmbeddedImage]:
    outcomes = list(embed_images(model, files))
    assert [outcome for outcome in outcomes if isinstance(outcome, BadImage)] == []
    return outcomes  # type: ignore[return-value]


def reason(model: Model, data: bytes) -> str:
    (outcome,) = embed_images(model, [file("picture.jpg", data)])
    assert isinstance(outcome, BadImage)
    assert str(outcome) == f"picture.jpg {outcome.reason}"
    return outcome.reason


# --- vectors --------------------------------------------------------------------------------------


def test_pictures_lie_where_their_originals_do(model):
    """The demo data includes the model's answers for the originals of the small images."""
    golden = np.load(Path(__file__).with_name("originals.npz"))
    paths = [DEMO / "pictures" / name for name in golden["names"]]
    assert sorted(paths) == PICTURES
    outcomes = embedded(model, *(ImageFile(path.name, path.read_bytes) for path in paths))
    vectors, originals = (
        np.stack([image.vector for image in outcomes]),
        golden["embeddings"].astype(np.float32),
    )
    own = np.einsum("ij,ij->i", vectors, originals)
    assert np.median(own) > 0.975
    assert own.min() > 0.79
    others = vectors @ originals.T
    np.fill_diagonal(others, -1)
    assert np.mean(own > others.max(axis=1)) > 0.95


def test_vectors_come_in_order_with_length_1_and_a_thumbnail(model):
    paths = PICTURES[:20]
    outcomes = embedded(model, *(ImageFile(path.name, path.read_bytes) for path in paths))
    assert [image.name for image in outcomes] == [path.name for path in paths]
    for path, image in zip(paths, outcomes, strict=True):
        assert image.vector.shape == (256,)
        assert image.vector.dtype == np.float32
        assert np.linalg.norm(image.vector) == pytest.approx(1, abs=1e-6)
        assert image.thumbnail is not None
        thumbnail, original = Image.open(io.BytesIO(image.thumbnail)), Image.open(path)
        assert thumbnail.format == "WEBP"
        assert max(thumbnail.size) == min(96, max(original.size))
        ratio = original.width / original.height
        assert thumbnail.width / thumbnail.height == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_vector_does_not_depend_on_the_batch(batch, model):
    files = [ImageFile(path.name, path.read_bytes) for path in PICTURES[:7]]
    usual = embedded(model, *files)
    for image, same in zip(usual, embed_images(model, files, batch=batch, threads=1), strict=True):
        assert isinstance(same, EmbeddedImage)
        assert float(image.vector @ same.vector) > 0.999999


def test_an_image_of_which_the_model_makes_nothing_is_a_problem_of_that_image(small):
    black, other = Image.new("RGB", (9, 9)), noise()
    files = [file(name, saved(image)) for name, image in [("a", other), ("b", black), ("c", other)]]
    first, second, third = embed_images(small, files)
    assert isinstance(second, BadImage)
    assert "without a direction" in second.reason
    assert isinstance(first, EmbeddedImage)
    assert isinstance(third, EmbeddedImage)
    np.testing.assert_array_equal(first.vector, third.vector)


def test_a_model_that_fails_ends_the_work_in_a_sentence(tmp_path):
    model = Model(write_model(tmp_path, vision=vision_model(shape=("n", 3, "h", "w"))))
    files = [file("a", saved(noise()))]
    assert next(embed_images(model, files)).vector.shape == (DIMENSION,)  # type: ignore[union-attr]
    other = Model(
        write_model(
            tmp_path,
            vision=vision_model(shape=("n", 3, "h", "w")),
            preprocessor=PREPROCESSOR | {"size": {"height": 9, "width": 9}},
        )
    )
    with pytest.raises(InputError, match=r"vision_model\.onnx fails on pixel_values 1 x 3 x 9 x 9"):
        next(embed_images(other, files))


# --- what is done to an image ---------------------------------------------------------------------

GREY = noise().convert("L")
HALF_CLEAR = np.dstack([np.asarray(noise()), np.full((30, 40), 128, np.uint8)])
ON_WHITE = np.rint(np.asarray(noise()) * (128 / 255) + 255 * (127 / 255))


def animated(kind: str) -> bytes:
    frames = [noise(seed=seed).quantize(256) for seed in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)


def palette_with_hole() -> Image.Image:
    """Left half red, right half a colour that is marked as transparent."""
    image = Image.new("P", (40, 30), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (20, 0, 40, 30))
    return image


def red_and_white() -> np.ndarray[Any, Any]:
    picture = np.full((30, 40, 3), WHITE)
    picture[:, :20] = RED
    return picture


SAME_AS: dict[str, tuple[bytes, Any, float]] = {
    "grey": (saved(GREY), np.dstack([np.asarray(GREY)] * 3), 0),
    "black and white": (
        saved(GREY.convert("1")),
        np.dstack([np.asarray(GREY.convert("1")) * 255] * 3),
        0,
    ),
    "16 bits": (
        saved(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)),
        np.dstack([np.asarray(GREY)] * 3),
        0,
    ),
    "16 bits in TIFF": (
        saved(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "TIFF"),
        np.dstack([np.asarray(GREY)] * 3),
        0,
    ),
    "floating point": (
        saved(Image.fromarray(np.asarray(GREY).astype(np.float32) / 255), "TIFF"),
        np.dstack([np.asarray(GREY)] * 3),
        1,
    ),
    "CMYK": (saved(noise().convert("CMYK"), "TIFF"), np.asarray(noise()), 2),
    "a palette": (saved(noise().quantize(256)), np.asarray(noise().quantize(256).convert("RGB")), 0),
    "a palette with a transparent colour": (
        saved(palette_with_hole(), transparency=1),
        red_and_white(),
        0,
    ),
    "a palette with an alpha for each colour": (
        saved(palette_with_hole(), transparency=bytes([255, 0])),
        red_and_white(),
        0,
    ),
    "a GIF with a transparent colour": (
        saved(palette_with_hole(), "GIF", transparency=1),
        red_and_white(),
        0,
    ),
    "RGB with a transparent colour": (
        saved(palette_with_hole().convert("RGB"), transparency=BLUE),
        red_and_white(),
        0,
    ),
    "half transparent": (saved(Image.fromarray(HALF_CLEAR)), ON_WHITE, 1),
    "half transparent WebP": (saved(Image.fromarray(HALF_CLEAR), "WEBP", lossless=True), ON_WHITE, 1),
    "half transparent grey": (
        saved(Image.merge("LA", [GREY, Image.new("L", GREY.size, 0)])),
        np.full((30, 40, 3), 255),
        0,
    ),
    "an animated GIF": (animated("GIF"), np.asarray(noise().quantize(256).convert("RGB")), 0),
    "an animated PNG": (animated("PNG"), np.asarray(noise().quantize(256).convert("RGB")), 0),
    "an animated WebP": (animated("WEBP"), np.asarray(noise().quantize(256).convert("RGB")), 60),
    "BMP": (saved(noise(), "BMP"), np.asarray(noise()), 0),
    "AVIF": (saved(noise(), "AVIF", quality=95), np.asarray(noise()), 30),
    "with a colour profile": (saved(noise(), icc_profile=b"a profile"), np.asarray(noise()), 0),
    "one pixel": (saved(Image.new("RGB", (1, 1), RED)), np.full((1, 1, 3), RED), 0),
}


@pytest.mark.parametrize("kind", SAME_AS)
@pytest.mark.parametrize("band", [decoding.BAND, 100])
def test_an_image_of_any_kind_becomes_rgb_on_white(kind, band, monkeypatch):
    monkeypatch.setattr(decoding, "BAND", band)
    data, expected, off_by = SAME_AS[kind]
    assert np.abs(pixels_of(data) - np.asarray(expected)).max() <= off_by


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_upright(kind, orientation):
    upright = Image.new("RGB", (4, 2), WHITE)
    upright.putpixel((0, 0), RED)
    upright.putpixel((3, 0), BLUE)
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    stored = upright.transpose(decoding.TURNS[undo]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(stored, kind, exif=exif, **options)
    np.testing.assert_array_equal(pixels_of(data), np.asarray(upright))


def test_damaged_metadata_does_not_matter():
    data = saved(noise(), "JPEG", quality=95)
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff garbage"
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert pixels_of(data).shape == (30, 40, 3)


@pytest.mark.parametrize("size", [(1, 1), (4000, 10), (10, 4000), (40_000, 1), (3, 3)])
def test_images_of_odd_shapes_are_embedded(size, model):
    (image,) = embedded(model, file("odd", saved(noise(*size))))
    assert np.isfinite(image.vector).all()


@pytest.mark.parametrize("size", [(4000, 10), (10, 4000), (700, 5)])
def test_of_a_long_image_only_the_kept_part_is_resized(size, tmp_path, monkeypatch):
    preprocessing = Model(
        write_model(
            tmp_path,
            preprocessor=PREPROCESSOR
            | {"size": {"shortest_edge": 8}, "do_center_crop": True, "crop_size": EDGE},
        )
    ).preprocessing
    image = noise(*size)
    whole = preprocessing(image)
    monkeypatch.setattr("laion_assets.seeds.preprocessing.LONGEST_RESIZED", 0)
    np.testing.assert_allclose(preprocessing(image), whole, atol=2 / 255)


def photograph(width: int, height: int) -> Image.Image:
    """Noise with equal power at each scale, as in photographs."""
    random = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequencies[0, 0] = 1
    channels = []
    for _ in range(3):
        spectrum = np.fft.rfft2(random.standard_normal((height, width))) / frequencies
        values = np.fft.irfft2(spectrum, (height, width))
        channels.append(np.clip(128 + 50 * values / values.std(), 0, 255).astype(np.uint8))
    return Image.fromarray(np.dstack(channels))


@pytest.mark.parametrize(("size", "turned"), [((1400, 3000), 1), ((2900, 2800), 6), ((3000, 1400), 6)])
def test_a_large_jpeg_is_decoded_at_less_and_gives_the_same_vector(size, turned, model):
    exif = Image.Exif()
    exif[0x0112] = turned
    jpeg = saved(photograph(*size), "JPEG", quality=85, exif=exif)
    as_stored = Image.open(io.BytesIO(jpeg))
    whole = saved(as_stored.transpose(decoding.TURNS[turned]) if turned > 1 else as_stored, "BMP")
    less, all_of_it = embedded(model, file("less.jpg", jpeg), file("all.bmp", whole))
    assert float(less.vector @ all_of_it.vector) > 0.9999


# --- what is no image -----------------------------------------------------------------------------

JPEG = saved(noise(300, 200), "JPEG", quality=90)


def with_size(width: int, height: int) -> bytes:
    """A PNG whose header names another size."""
    data = bytearray(saved(noise()))
    data[16:24] = struct.pack(">II", width, height)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


BAD = {
    "nothing": (b"", "is empty (0 bytes): use another file"),
    "a truncated JPEG": (JPEG[: len(JPEG) // 2], "is truncated: copy it again"),
    "a truncated PNG": (saved(noise(300, 200))[:3000], "is truncated"),
    "a truncated WebP": (saved(noise(300, 200), "WEBP")[:300], "damaged"),
    "a truncated AVIF": (saved(noise(300, 200), "AVIF")[:300], "damaged"),
    "a truncated GIF": (saved(noise(300, 200), "GIF")[:2000], "truncated"),
    "a truncated TIFF": (saved(noise(300, 200), "TIFF")[:2000], "is truncated"),
    "the start of a JPEG": (JPEG[:20], "is a truncated or damaged JPEG"),
    "text": ("Ein Bild, das keines ist: äöü\n".encode() * 50, "is text, not an image"),
    "a drawing": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "is SVG"),
    "a web page": (b"\n<!DOCTYPE html><title>404</title>", "is a web page"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "is HEIC, which is not supported"),
    "PDF": (b"%PDF-1.7\n", "is PDF"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "is not an image in a supported format"),
    "140 megapixels": (with_size(14_000, 10_000), "has 140 megapixels (14,000 x 10,000), at most 128"),
    "4 gigapixels": (with_size(1 << 16, 1 << 16), "has 4,295 megapixels, at most 128"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_is_named_with_the_reason(kind, small):
    data, told = BAD[kind]
    assert told in reason(small, data)


def test_bad_images_hold_up_no_other_and_keep_their_place(small):
    good = [file(f"good {n}", saved(noise(seed=n))) for n in range(40)]
    bad = [file(f"bad {n}", data) for n, (data, _) in enumerate(BAD.values())]
    files = [each for pair in zip(good, bad * 3, strict=False) for each in pair]
    outcomes = list(embed_images(small, files, batch=7))
    assert [outcome.name for outcome in outcomes] == [each.name for each in files]
    assert all(isinstance(outcome, BadImage) == outcome.name.startswith("bad") for outcome in outcomes)


def test_a_file_that_cannot_be_read_is_bad_and_a_network_that_fails_ends_the_work(small, tmp_path):
    def broken(error: Exception) -> bytes:
        raise error

    gone = ImageFile("gone", (tmp_path / "gone.jpg").read_bytes)
    (outcome,) = embed_images(small, [gone])
    assert outcome == BadImage("gone", "cannot be read (No such file or directory)")
    (outcome,) = embed_images(small, [ImageFile("folder", tmp_path.read_bytes)])
    assert outcome == BadImage("folder", "cannot be read (Is a directory)")
    with pytest.raises(ConnectionResetError):
        list(
            embed_images(
                small, [file("a", JPEG), ImageFile("b", partial(broken, ConnectionResetError()))]
            )
        )
    with pytest.raises(OSError, match="Forbidden"):  # as gcsfs refuses access
        list(embed_images(small, [ImageFile("b", partial(broken, OSError("Forbidden: x")))]))


# --- the stream -----------------------------------------------------------------------------------


def test_known_images_are_not_embedded_again(small, monkeypatch):
    files = [file(f"{n}", saved(noise(seed=n))) for n in range(5)]
    first = embedded(small, *files)
    known = {image.content: image.vector for image in first}
    monkeypatch.setattr(small, "embed_pixels", lambda _: pytest.fail("was embedded again"))
    again = list(embed_images(small, files, known=known))
    assert [image.content for image in again] == [image.content for image in first]  # type: ignore[union-attr]
    for image, same in zip(first, again, strict=True):
        assert isinstance(same, EmbeddedImage)
        np.testing.assert_array_equal(image.vector, same.vector)
        assert same.thumbnail is None


def test_of_many_images_only_the_new_ones_are_embedded(small):
    old = [file(f"old {n}", saved(noise(seed=n))) for n in range(20)]
    known = {image.content: image.vector for image in embedded(small, *old)}
    new = [file(f"new {n}", saved(noise(seed=100 + n))) for n in range(3)]
    asked: list[int] = []
    embed = small.embed_pixels
    small.embed_pixels = lambda pixels: (asked.append(len(pixels)), embed(pixels))[1]  # type: ignore[method-assign]
    mixed = [*old[:10], new[0], *old[10:], *new[1:]]
    outcomes = list(embed_images(small, mixed, known=known, batch=2))
    assert [outcome.name for outcome in outcomes] == [each.name for each in mixed]
    assert sum(asked) == 3


def test_files_are_read_only_a_little_ahead_and_progress_is_told(small):
    read: list[str] = []
    done: list[int] = []

    def files() -> Iterator[ImageFile]:
        for n in range(100):
            data = saved(noise(seed=n))
            yield ImageFile(f"{n}", lambda n=n, data=data: (read.append(f"{n}"), data)[1])  # type: ignore[misc]

    outcomes = embed_images(small, files(), batch=4, threads=2, progress=done.append)
    for number, _ in enumerate(outcomes, 1):
        assert len(read) <= number + 3 * 4 + 2
    assert sum(done) == 100


def test_a_stream_that_is_closed_leaves_no_threads(small):
    outcomes = embed_images(small, (file(f"{n}", JPEG) for n in range(1000)), batch=2)
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_pixels_in_work_are_bounded_and_one_image_always_may_be():
    budget, entered = PixelBudget(100), threading.Event()

    def enter(pixels: int, then: Callable[[], object]) -> threading.Thread:
        def work() -> None:
            with budget.hold(pixels):
                then()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    with budget.hold(1000):
        second = enter(1, entered.set)
        assert not entered.wait(0.1)
    second.join(5)
    assert entered.is_set()


MEMORY = """
import io, resource, sys
from pathlib import Path
from PIL import Image
from laion_assets.seeds.images import ImageFile, embed_images
from laion_assets.seeds.model import Model

model = Model(Path(sys.argv[1]))
data = Path(sys.argv[2]).read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
files = [ImageFile(str(n), lambda: data) for n in range(2)]
count = sum(image.vector.shape == (4,) for image in embed_images(model, files))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(("kind", "mebibytes"), [("JPEG", 400), ("PNG", 900)])
def test_fifty_megapixels_take_little_memory(kind, mebibytes, tmp_path, small):
    picture = Image.new("RGB" if kind == "JPEG" else "RGBA", (8660, 5774), RED)
    picture.save(tmp_path / "picture", kind, compress_level=1)
    command = [sys.executable, "-c", MEMORY, str(small.files.folder), str(tmp_path / "picture")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    count, kibibytes = map(int, done.stdout.split())
    assert count == 2
    assert kibibytes < mebibytes << 10
