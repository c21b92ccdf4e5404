"""Seed sets of images and prompts: what counts as one, and how it is embedded."""

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.faults import Proxy, proxy_before
from helpers.onnx_models import text_model, write_model
from PIL import Image

from laion_assets.demo import DEMO_MODEL
from laion_assets.demo.build import _IMAGES
from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage
from laion_assets.seeds import (
    KnownImages,
    Model,
    Seeds,
    count_seeds,
    find_seed_set,
    list_folder,
    read_seeds,
)


def encoded(kind: str = "PNG", size: tuple[int, int] = (20, 10), colour: str = "red") -> bytes:
    made = io.BytesIO()
    Image.new("RGB", size, colour).save(made, kind)
    return made.getvalue()


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """A small model of images and texts."""
    folder = tmp_path_factory.mktemp("model")
    return Model(write_model(folder, text=text_model(600, length=77)), "cpu")


def read(root: Path, model: Model | None, **more: object) -> Seeds:
    return read_seeds(str(root), find_seed_set(str(root), "set"), model, **more)  # type: ignore[arg-type]


# --- what a set holds -----------------------------------------------------------------------------


def test_images_of_any_kind_case_and_depth_and_a_list_of_prompts_are_seeds(tmp_path):
    names = ["a.jpg", "b.JPEG", "c/d/e.PNG", "f.webp", "g.gif", "h.bmp", "i.tif", "j.TIFF", "k.avif"]
    write(tmp_path / "set", dict.fromkeys(names, b"") | {"prompts.txt": b"a cat", "notes.md": b""})
    found = find_seed_set(str(tmp_path), "set")
    assert sorted(file.name for file in found.images) == sorted(names)
    assert [file.name for file in found.prompts] == ["prompts.txt"]
    assert found.ignored == ("notes.md",)
    assert found.contents() == "9 images, 1 file of prompts, 1 ignored file"


def test_embeddings_win_over_images_beside_them(tmp_path):
    vectors = io.BytesIO()
    np.save(vectors, np.eye(3, dtype=np.float32))
    write(tmp_path / "set", {"a.npy": vectors.getvalue(), "photo.jpg": b"", "more/photo.png": b""})
    found = find_seed_set(str(tmp_path), "set")
    assert (found.images, found.not_embedded) == ((), ("more/photo.png", "photo.jpg"))
    assert "2 images not embedded" in found.contents()
    before = found.fingerprint
    write(tmp_path / "set", {"photo.jpg": b"other"})
    assert find_seed_set(str(tmp_path), "set").fingerprint == before
    assert len(read(tmp_path, None).embeddings) == 3


def test_the_fingerprint_follows_the_content_of_images_and_prompts(tmp_path):
    write(tmp_path / "set", {"a.png": encoded(), "prompts.txt": b"a cat"})
    seen = set()
    for files in ({}, {"a.png": encoded(colour="blue")}, {"prompts.txt": b"a dog"}, {"b.png": b""}):
        write(tmp_path / "set", files)
        seen.add(list_folder(str(tmp_path)).sets["set"].fingerprint)
    assert len(seen) == 4


# --- how it becomes vectors -----------------------------------------------------------------------


def test_images_and_prompts_become_rows_that_say_what_they_are(tmp_path, model):
    write(tmp_path / "set", {"b.png": encoded(), "a.jpg": encoded("JPEG", colour="blue")})
    write(tmp_path / "set", {"prompts.txt": "# two of them\na cat\n\nein Käfig 🐈\n".encode()})
    seeds = read(tmp_path, model)
    rows = seeds.to_table().select(["file", "row", "kind", "caption"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("a.jpg", 0, "image", None),
        ("b.png", 0, "image", None),
        ("prompts.txt", 1, "prompt", "a cat"),
        ("prompts.txt", 3, "prompt", "ein Käfig 🐈"),
    ]
    np.testing.assert_allclose(np.linalg.norm(seeds.embeddings, axis=1), 1, atol=1e-6)
    thumbnails = seeds.columns["thumbnail"].to_pylist()
    assert [Image.open(io.BytesIO(data)).size for data in thumbnails[:2]] == [(20, 10), (20, 10)]
    assert thumbnails[2:] == [None, None]
    assert count_seeds(str(tmp_path), find_seed_set(str(tmp_path), "set")) == 4


def test_the_demos_images_are_embedded_as_its_index_was(tmp_path):
    (tmp_path / "set").mkdir()
    source = pq.read_table(_IMAGES.parent / "openclipart.parquet", columns=["url", "embedding"])
    for path in sorted((_IMAGES / "bird").iterdir())[:8]:
        shutil.copy(path, tmp_path / "set")
    seeds = read(tmp_path, Model(DEMO_MODEL, "cpu"))
    stored = dict(zip(source["url"].to_pylist(), source["embedding"].to_pylist(), strict=True))
    by_name = {url.rpartition("/")[2].rpartition(".")[0]: vector for url, vector in stored.items()}
    theirs = np.array([by_name[Path(name).stem] for name in seeds.columns["file"].to_pylist()])
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    assert np.median((theirs * seeds.embeddings).sum(axis=1)) > 0.95  # of smaller copies of the images


def test_images_that_were_embedded_before_are_taken_from_there(tmp_path, model):
    write(tmp_path / "set", {f"{n}.png": encoded(size=(10 + n, 10)) for n in range(5)})
    first = read(tmp_path, model)
    write(tmp_path / "set", {"more/new.png": encoded(colour="green"), "copy.png": encoded(size=(12, 10))})
    again = read(tmp_path, model, known=KnownImages.of(first.to_table()))
    assert (first.reused, again.reused, len(again.embeddings)) == (0, 6, 7)
    by_name = dict(zip(again.columns["file"].to_pylist(), again.embeddings, strict=True))
    for name, vector in zip(first.columns["file"].to_pylist(), first.embeddings, strict=True):
        np.testing.assert_array_equal(by_name[name], vector)
    assert all(again.columns["thumbnail"].to_pylist())


def test_images_and_prompts_are_read_from_a_bucket(new_bucket, model):
    fs, root = open_storage(f"{new_bucket}/seeds")
    fs.pipe({f"{root}/set/a.png": encoded(), f"{root}/set/prompts.txt": b"a cat"})
    uri = f"{new_bucket}/seeds"
    seeds = read_seeds(uri, find_seed_set(uri, "set"), model)
    assert seeds.columns["kind"].to_pylist() == ["image", "prompt"]


@pytest.fixture
def failing(new_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Proxy]]:
    """A set of images and prompts in a bucket, and the proxy before it; gcsfs retries at once."""

    async def sleep(_: float) -> None:
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=sleep))
    uri = f"{new_bucket}/seeds"
    fs, root = open_storage(uri)
    fs.pipe({f"{root}/set/{n}.png": encoded(size=(10 + n, 9)) for n in range(20)})
    fs.pipe_file(f"{root}/set/prompts.txt", b"a cat")
    with proxy_before(os.environ["STORAGE_EMULATOR_HOST"]) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield uri, proxy


@pytest.mark.parametrize(
    ("failure", "remedy"),
    [(403, "grant it to the account"), (502, "check the network")],
)
@pytest.mark.parametrize("name", ["7.png", "prompts.txt"])
def test_a_bucket_that_refuses_or_fails_is_no_bad_image(failing, model, name, failure, remedy):
    uri, proxy = failing
    listed = find_seed_set(uri, "set")
    proxy.rule = lambda path: failure if re.search(f"(/|%2F){name}", path) else None
    with pytest.raises(InputError, match=remedy) as refused:
        read_seeds(uri, listed, model, max_bad_images=1.0)
    assert f"{uri}/set/{name}" in str(refused.value)
    assert "replace or remove" not in str(refused.value)
    assert refused.value.about == "seeds_uri"


def test_an_image_that_is_gone_or_changed_since_it_was_listed_is_a_bad_one(new_bucket, model):
    uri = f"{new_bucket}/seeds"
    fs, root = open_storage(uri)
    fs.pipe({f"{root}/set/{n}.png": encoded(size=(10 + n, 9)) for n in range(20)})
    listed = find_seed_set(uri, "set")
    fs.rm_file(f"{root}/set/7.png")
    fs.pipe_file(f"{root}/set/8.png", encoded(colour="blue"))
    bad = read_seeds(uri, listed, model, max_bad_images=0.1).bad_images
    assert [image.name for image in bad] == ["7.png", "8.png"]
    assert "it is gone" in bad[0].reason
    assert "changed while it was being read" in bad[1].reason


def test_prompts_that_cannot_be_read_are_named_before_anything_is_embedded(tmp_path):
    write(tmp_path / "set", {"prompts.txt": b"a cat"})
    listed = find_seed_set(str(tmp_path), "set")
    (tmp_path / "set" / "prompts.txt").write_bytes(b"a dog")
    with pytest.raises(InputError, match=r"^set/prompts\.txt changed while it was being read; run again"):
        count_seeds(str(tmp_path), listed)
    (tmp_path / "set" / "prompts.txt").unlink()
    with pytest.raises(InputError, match=r"^set/prompts\.txt cannot be read \(it is gone\)"):
        count_seeds(str(tmp_path), listed)


# --- what cannot be embedded ----------------------------------------------------------------------

BAD = {
    "empty.jpg": b"",
    "text.jpg": b"no image at all",
    "cut.png": encoded(size=(300, 300))[:200],
    "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "phone.heic": b"\0\0\0\x18ftypheic" + bytes(40),
}


def test_bad_images_are_named_with_the_reason_and_the_set_goes_on(tmp_path, model):
    write(tmp_path / "set", {f"{n}.png": encoded() for n in range(5)} | BAD)
    seeds = read(tmp_path, model, max_bad_images=0.5)
    assert len(seeds.embeddings) == 5
    reasons = {image.name: image.reason for image in seeds.bad_images}
    assert set(reasons) == set(BAD)
    assert len(set(reasons.values())) == len(BAD), "every kind has a reason of its own"


def test_a_pipe_or_a_device_is_named_and_never_opened(tmp_path, model):
    write(tmp_path / "set", {f"{n}.png": encoded() for n in range(3)})
    os.mkfifo(tmp_path / "set" / "pipe.jpg")
    (tmp_path / "set" / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "other").mkdir()
    os.mkfifo(tmp_path / "other" / "prompts.txt")
    bad = {image.name: image.reason for image in read(tmp_path, model, max_bad_images=0.5).bad_images}
    assert set(bad) == {"pipe.jpg", "device.jpg"}
    assert all("neither a file nor a link to one: remove it" in reason for reason in bad.values())
    listed = find_seed_set(str(tmp_path), "other")
    with pytest.raises(InputError, match="neither a file nor a link to one"):
        read_seeds(str(tmp_path), listed, model)


def test_names_are_escaped_where_a_terminal_or_utf8_would_stumble(tmp_path, model):
    write(tmp_path / "set", {"a.png": encoded(), "new\nline.jpg": b"", "\x1b[2J.jpg": b""})
    latin = os.fsencode(tmp_path / "set") + b"/caf\xe9.png"
    Path(os.fsdecode(latin)).write_bytes(encoded())
    seeds = read(tmp_path, model, max_bad_images=0.5)
    assert seeds.columns["file"].to_pylist() == ["a.png", "caf\\udce9.png"]
    assert [image.name for image in seeds.bad_images] == ["\\x1b[2J.jpg", "new\\nline.jpg"]


def test_an_image_that_cannot_be_resized_is_named_and_the_others_go_on(tmp_path, model):
    wide = io.BytesIO()
    Image.new("L", (100_000_000, 1)).save(wide, "PNG")
    write(tmp_path / "set", {"a.png": encoded(), "wide.png": wide.getvalue()})
    (bad,) = read(tmp_path, model).bad_images
    assert (bad.name, "crop it" in bad.reason) == ("wide.png", True)


def test_what_is_wrong_with_prompts_is_said_before_an_image_is_embedded(tmp_path, model):
    write(tmp_path / "set", {"a.png": encoded(), "prompts.txt": "a chair".encode("utf-16")})
    done: list[int] = []
    with pytest.raises(InputError, match=r"prompts\.txt"):
        read(tmp_path, model, progress=done.append)
    assert done == []


def test_too_many_bad_images_fail_the_set_and_ten_are_named(tmp_path, model):
    write(tmp_path / "set", {f"{n:02}.png": encoded() for n in range(20)})
    write(tmp_path / "set", {f"bad{n:02}.jpg": b"" for n in range(12)})
    with pytest.raises(
        InputError, match=r"12 of 32 images .*'set' are .* at most 2 \(5 %\) are"
    ) as refused:
        read(tmp_path, model)
    assert refused.value.about == "max_bad_images"
    assert "bad09.jpg" in str(refused.value)
    assert "bad10" not in str(refused.value)
    assert "and 2 more" in str(refused.value)


def test_a_small_set_can_do_without_one_image_but_not_without_two(tmp_path, model):
    write(tmp_path / "set", {f"{n}.png": encoded() for n in range(5)} | {"phone.heic": BAD["phone.heic"]})
    assert len(read(tmp_path, model).bad_images) == 1
    with pytest.raises(InputError, match=r"1 of 6 images .* is unusable, at most 0 \(0 %\)"):
        read(tmp_path, model, max_bad_images=0)
    write(tmp_path / "none" / "set", {"empty.jpg": b""})
    with pytest.raises(InputError, match=r"1 of 1 image .* is unusable, so none is left") as refused:
        read(tmp_path / "none", model)
    assert "max_bad_images" not in str(refused.value)
    write(tmp_path / "set", {"empty.jpg": b""})
    with pytest.raises(InputError, match=r"2 of 7 images .* are unusable, at most 1 \(5 %\) is"):
        read(tmp_path, model)


def test_a_set_of_bad_images_alone_fails_whatever_is_allowed(tmp_path, model):
    write(tmp_path / "set", BAD)
    with pytest.raises(InputError, match="5 of 5 images"):
        read(tmp_path, model, max_bad_images=1.0)


def test_without_a_model_it_is_said_how_many_images_there_are(tmp_path):
    write(tmp_path / "set", {f"{n}.png": encoded() for n in range(3)})
    with pytest.raises(InputError, match=r"'set' holds 3 images.* model") as refused:
        read(tmp_path, None)
    assert refused.value.about == "model"


def test_prompts_need_a_model_that_knows_texts(tmp_path):
    write(tmp_path / "set", {"prompts.txt": b"a cat"})
    with pytest.raises(InputError, match="embeds images only") as refused:
        read(tmp_path, Model(DEMO_MODEL, "cpu"))
    assert refused.value.about == "model"
    write(tmp_path / "set", {"prompts.txt": b"\n# nothing yet\n"})
    with pytest.raises(InputError, match=r"set/prompts\.txt has no prompt"):
        read(tmp_path, Model(DEMO_MODEL, "cpu"))
