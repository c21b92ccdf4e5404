"""A quick look around images, with the demo's index and model."""

import errno
import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import indices
from helpers.onnx_models import clip_tokenizer, text_model
from helpers.project import Demo, contents
from helpers.seed_files import write
from PIL import Image

from laion_assets.cli import main
from laion_assets.defs.look import images_at, look
from laion_assets.defs.terminal import aligned, columns, count, cut, one_line
from laion_assets.demo import DEMO_MODEL
from laion_assets.io import remote_images
from laion_assets.io.errors import InputError
from laion_assets.search.safety import marked_unsafe


@pytest.fixture
def place(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty working directory, and the environment of the demo's index."""
    monkeypatch.chdir(tmp_path)
    return {
        "LAION_INDEX_URI": str(demo.index),
        "LAION_CACHE_DIR": str(tmp_path / "cache"),
        "LAION_SEEDS_URI": str(demo.images),
    }


def sheet(path: Path | None) -> Image.Image:
    assert path is not None
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.convert("RGB")


# --- what is found --------------------------------------------------------------------------------


def test_a_folder_shows_what_is_like_its_images_and_writes_only_a_sheet(place, demo, tmp_path):
    lines: list[str] = []
    found = look(str(demo.images / "fruit"), place, log=lines.append)
    rows = found.rows
    assert len(rows) == 48
    assert rows["rank"].to_pylist() == list(range(1, 49))
    assert len(set(rows["id"].to_pylist())) == 48
    assert rows["similarity"].to_numpy()[:4].min() > 0.5
    of_fruit = sum("/fruit/" in url for url in rows["url"].to_pylist()[:24])
    assert of_fruit > 12
    assert found.notes == ()
    seeds = len(list((demo.images / "fruit").iterdir()))
    assert f"around {seeds} images" in found.about
    assert found.sheet == Path("data/look/fruit.png")
    assert sheet(found.sheet).width > 1000
    assert any(line.startswith("staging ") for line in lines)
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")} == {"cache", "data"}
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == [
        tmp_path / "data" / "look" / "fruit.png"
    ]


def test_the_second_look_stages_nothing(place, demo, tmp_path):
    image = str(min((demo.images / "house").iterdir()))
    look(image, place)
    before, lines = contents(tmp_path / "cache"), []
    found = look(image, place, top=5, log=lines.append)
    assert lines == []
    assert contents(tmp_path / "cache") == before
    assert found.about.endswith("around 1 image")
    assert found.rows["similarity"].to_pylist() == sorted(found.rows["similarity"].to_pylist())[::-1]


def test_rows_are_those_nearest_to_each_image_in_turn(place, demo):
    one, other = sorted((demo.images / "flower").iterdir())[:2]
    folder = Path("two")
    for image in (one, other):
        write(folder, {image.name: image.read_bytes()})
    first = {look(str(image), place, top=1).rows["id"][0].as_py() for image in (one, other)}
    assert set(look("two", place, top=2).rows["id"].to_pylist()) == first


def test_the_settings_of_the_environment_hold(place, demo, tmp_path):
    image = str(min((demo.images / "fruit").iterdir()))
    blocked, unwanted = look(image, place, top=2).rows.select(["id", "caption"]).to_pylist()
    (tmp_path / "blocked.txt").write_text(f"{blocked['id']}\n")
    filters = {
        "LAION_BLOCK_LIST": "blocked.txt",
        "LAION_FILTERS": f'caption != "{unwanted["caption"]}"',
    }
    found = look(image, place | filters, top=10)
    assert "block list: 1 of 1 listed id in the index" in found.notes
    rows = found.rows
    assert blocked["id"] not in rows["id"].to_pylist()
    assert unwanted["caption"] not in rows["caption"].to_pylist()
    found = {
        threshold: len(look(image, place | {"LAION_DEDUP_THRESHOLD": threshold}, top=1000).rows)
        for threshold in ("1", "0.3")
    }
    assert found["1"] == 1000
    assert found["0.3"] < 1000
    with pytest.raises(InputError, match="'punsafe', which the metadata does not have"):
        look(image, place | {"LAION_FILTERS": "punsafe < 0.5"})


def test_a_prompt_is_looked_for_with_a_model_of_texts(place, demo, tmp_path):
    model = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    tokenizer = clip_tokenizer()
    tokenizer.save(str(model / "tokenizer.json"))
    text = text_model(tokenizer.get_vocab_size(), dimension=256)
    (model / "onnx" / "text_model.onnx").write_bytes(text)
    found = look("a red / green house?", place | {"LAION_MODEL": str(model)}, top=5)
    assert (len(found.rows), found.notes) == (5, ())
    assert found.about.endswith("around a prompt")
    image = min((demo.images / "fruit").iterdir()).read_bytes()
    write(Path("both"), {"a.webp": image, "prompts.txt": b"# colours\nred\ngreen\n"})
    both = look("both", place | {"LAION_MODEL": str(model)}, top=5)
    write(Path("texts"), {"prompts.txt": b"red\ngreen\n"})
    texts = look("texts", place | {"LAION_MODEL": str(model)}, top=5)
    assert texts.about.endswith("around 2 prompts, in order of rank around any prompt")
    fruits = look("fruits", place | {"LAION_MODEL": str(model)}, top=5)
    assert fruits.notes == ("'fruits' is taken for a prompt, not for 'fruit'",)
    order = ", in order of rank around any image or prompt"
    assert both.about.endswith(f"around 1 image and 2 prompts{order}")
    of_set = {"LAION_MODEL": str(model), "LAION_SEEDS_URI": str(tmp_path)}
    named = look("both", place | of_set, top=5)
    assert named.rows["id"] == both.rows["id"]
    assert found.sheet == Path("data/look/a-red-green-house.png")
    long = look("house " * 100, place | {"LAION_MODEL": str(model)}, top=5, output="long.png")
    assert "but the model reads only" in long.notes[0]
    assert sheet(long.sheet).width > 1000


def test_a_seed_set_is_named_as_in_materialize(place, demo):
    named = look("fruit", place)
    by_path = look(str(demo.images / "fruit"), place)
    assert named.rows["id"] == by_path.rows["id"]
    seeds = len(list((demo.images / "fruit").iterdir()))
    assert f"around seed set 'fruit' ({seeds} images), in order of rank around any image" in named.about
    assert named.sheet == Path("data/look/fruit.png")

    image = min((demo.images / "fruit").iterdir()).read_bytes()
    write(Path("fruit"), {"a.webp": image})
    assert look("fruit", place, top=1).about.startswith("the best of 3,0")  # the path comes first
    with pytest.raises(InputError, match=r"house\.jpg does not exist"):
        look("house.jpg", place)
    with pytest.raises(InputError, match=r"^'no-set' is no file, .* the demo's model .* images only"):
        look("no-set", place)
    with pytest.raises(InputError, match=r"'fruti' is taken for a prompt, not for 'fruit'.* images only"):
        look("fruti", place)


def test_a_seed_set_of_embeddings_needs_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = indices.random_rows(np.random.default_rng(3), 300)
    indices.write_index(tmp_path / "index", rows, "Flat")
    urls = [f"https://a/{i}.jpg" for i in range(300)]
    indices.write_metadata(tmp_path / "index", pa.table({"url": urls}))
    for name, vectors in (("mine", rows[[5, 17]]), ("narrow", rows[:2, :-1])):
        (tmp_path / "seeds" / name).mkdir(parents=True)
        np.save(tmp_path / "seeds" / name / "a.npy", vectors)
    (tmp_path / "seeds" / "texts").mkdir()
    (tmp_path / "seeds" / "texts" / "prompts.txt").write_text("a red house")
    environment = {"LAION_INDEX_URI": "index", "LAION_SEEDS_URI": "seeds"}
    found = look("mine", environment, top=10)
    assert set(found.rows["id"].to_pylist()[:2]) == {5, 17}
    assert "(2 vectors)" in found.about
    with pytest.raises(InputError, match="dimensions"):
        look("narrow", environment)
    for query in ("texts", "a red house"):
        with pytest.raises(InputError, match="no model is set"):
            look(query, environment)


def test_a_seed_set_may_hold_vectors_and_settings(place, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((100, 256), np.float32)
    (tmp_path / "seeds" / "mine").mkdir(parents=True)
    np.save(tmp_path / "seeds" / "mine" / "seeds.npy", vectors)
    (tmp_path / "seeds" / "mine" / "settings.yaml").write_text("filters: width > 1\n")
    mine = place | {"LAION_SEEDS_URI": str(tmp_path / "seeds")}
    with pytest.raises(InputError, match="width"):
        look("mine", mine, top=5)
    (tmp_path / "seeds" / "mine" / "settings.yaml").unlink()
    found = look("mine", mine, top=5)
    assert "around seed set 'mine' (24 vectors of 100, evenly spaced), in order" in found.about
    assert len(found.rows) == 5


def test_prompts_beside_images_are_named_where_no_model_reads_them(place, demo):
    image = min((demo.images / "fruit").iterdir()).read_bytes()
    write(Path("both"), {"a.webp": image, "prompts.txt": b"a red apple"})
    found = look("both", place, top=3)
    assert [note.partition(" is ")[0] for note in found.notes] == ["both/prompts.txt"]


def test_of_many_images_some_are_taken(place, demo):
    image = min((demo.images / "fruit").iterdir()).read_bytes()
    write(Path("many"), {f"{number:03}.webp": image for number in range(100)})
    found = look("many", place, top=3)
    assert "around 24 images of 100, evenly spaced" in found.about
    assert len(found.rows) == 3


# --- what cannot be used --------------------------------------------------------------------------


def test_a_bad_image_is_named_and_the_others_are_looked_for(place, demo):
    good = min((demo.images / "fruit").iterdir())
    write(Path("mine"), {"a.jpg": b"hello", "b.webp": good.read_bytes(), "c.png": b"", "notes.txt": b""})
    found = look("mine", place, top=3)
    assert "around 1 image" in found.about
    assert [note.partition(" is ")[0] for note in found.notes] == ["mine/a.jpg", "mine/c.png"]
    vector, heic = b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0\0\0\x18ftypheic"
    unread = {"a.SVG": vector, "b.heic": heic, "sub/c.webp": good.read_bytes(), ".d.svg": vector}
    write(Path("phone"), unread)
    found = look("phone", place, top=3)
    assert "around 1 image" in found.about
    assert [note.partition(" is ")[0] for note in found.notes] == ["phone/a.SVG", "phone/b.heic"]
    with pytest.raises(InputError, match=r"no image can be embedded: phone/a\.SVG is"):
        look("phone/a.SVG", place)
    write(Path("bad"), {"a.jpg": b"hello"})
    with pytest.raises(InputError, match=r"no image can be embedded: bad/a\.jpg is text"):
        look("bad", place)


def test_what_is_no_file_is_named_and_the_others_are_looked_for(place, demo, monkeypatch):
    good = min((demo.images / "fruit").iterdir()).read_bytes()
    write(Path("mine"), {"failing.webp": good})
    write(Path("more"), {"a.webp": good})
    for name, target in (("gone.png", "nothing"), ("loop.png", "loop.png"), ("linked", "../more")):
        Path("mine", name).symlink_to(target)
    os.mkfifo("mine/pipe.png")

    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "failing.webp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    found = look("mine", place, top=3)
    assert "around 1 image" in found.about
    unfollowed = "which cannot be followed"
    assert found.notes == (
        f"mine/gone.png is a link to nothing, {unfollowed} (No such file or directory)",
        f"mine/loop.png is a link to loop.png, {unfollowed} (Too many levels of symbolic links)",
        "mine/pipe.png is neither a file nor a folder",
        "mine/failing.webp cannot be read (Input/output error)",
    )
    for number in range(12):
        os.mkfifo(f"mine/{number}.png")
    assert look("mine", place, top=3).notes[10] == "5 more are left out"


def test_a_prompt_needs_a_model_of_texts(place, tmp_path):
    other = shutil.copytree(DEMO_MODEL, tmp_path.parent / f"{tmp_path.name}-model")
    with pytest.raises(InputError, match=f"^the model {other} has no text model"):
        look("a red house", place | {"LAION_MODEL": str(other)})
    with pytest.raises(InputError, match=r"embeds images only.* use a model that has one") as refused:
        look("a red house", place)
    with pytest.raises(
        InputError, match=r"^'castle' is no file, folder or seed set, so .* prompt; the demo's"
    ):
        look("castle", place)
    assert "remove" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []  # that is known before an index is staged


def test_without_an_index_or_a_model_that_is_said_at_once(place, demo, tmp_path):
    image = str(min((demo.images / "fruit").iterdir()))
    with pytest.raises(InputError, match=f"no folder {tmp_path}/none") as refused:
        look(image, place | {"LAION_INDEX_URI": str(tmp_path / "none")})
    assert refused.value.about == "index_uri"
    other = shutil.copytree(demo.index, tmp_path / "other")
    (other / "demo.json").unlink()
    with pytest.raises(InputError, match="no model") as refused:
        look(image, place | {"LAION_INDEX_URI": str(other)})
    assert refused.value.about == "model"
    (other / "model.json").write_text(json.dumps({"name": "another"}))
    with pytest.raises(InputError, match="made with another"):
        look(image, place | {"LAION_INDEX_URI": str(other), "LAION_MODEL": str(DEMO_MODEL)})
    assert not (tmp_path / "cache").exists()


def test_a_lost_index_is_not_staged_where_that_is_forbidden(place, demo, tmp_path):
    image = str(min((demo.images / "fruit").iterdir()))
    with pytest.raises(InputError, match="nothing is staged"):
        look(image, place | {"LAION_LOST_INDEX": "fail"})
    assert not (tmp_path / "cache").exists()


def test_the_copy_of_another_index_stays(place, demo, tmp_path):
    image = str(min((demo.images / "fruit").iterdir()))
    look(image, place)
    other, lines = shutil.copytree(demo.index, tmp_path / "other"), []
    with pytest.raises(InputError, match=r"of .*, which would be removed .*another cache directory"):
        look(image, place | {"LAION_INDEX_URI": str(other)})
    look(image, place)
    elsewhere = {"LAION_INDEX_URI": str(other), "LAION_CACHE_DIR": str(tmp_path / "elsewhere")}
    look(image, place | elsewhere, log=lines.append)
    assert lines[0].startswith(f"staging {other} ")


@pytest.mark.parametrize("top", [0, -3, 1001])
def test_the_number_of_rows_has_bounds(place, top):
    with pytest.raises(InputError, match=rf"--top is {top:,}: give 1 to 1,000"):
        look("x.jpg", place, top=top)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no query is given"),
        ("gone.jpg", "gone.jpg does not exist"),
        ("gone.heic", "gone.heic does not exist"),
        ("./gone", "./gone does not exist"),
        ("pictures/gone of mine", "does not exist"),
        ("holiday/2024", "does not exist"),
        ("~/gone", "does not exist"),
        ("gs://bucket/folder", "name a local file or folder"),
        ("picturse/", "did you mean pictures"),
        ("empty", "holds no images"),
        ("/dev/null", "neither a file nor a folder"),
        ("loop.png", r"loop\.png is a link to loop\.png, .* \(Too many levels of symbolic links\)"),
        ("a dangling link", "a dangling link is a link to nowhere, which cannot be followed"),
    ],
)
@pytest.mark.usefixtures("place")
def test_a_path_that_cannot_be_used_is_no_prompt(text, said):
    write(Path("pictures"), {"a.png": b""})
    write(Path("empty"), {"notes.txt": b"", ".hidden.png": b"", "_temporary/a.png": b""})
    for name, target in (("loop.png", "loop.png"), ("a dangling link", "nowhere")):
        Path(name).symlink_to(target)
    with pytest.raises(InputError, match=said) as refused:
        images_at(text)
    assert f"did you mean {text}" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["a cat", "cat", "a black/white photo", "x" * 5000, "~nobody-of-that-name?", "1/2 an orange"]
)
@pytest.mark.usefixtures("place")
def test_any_other_text_is_a_prompt(text):
    if text.startswith("~"):
        with pytest.raises(InputError, match="does not exist"):
            images_at(text)
    else:
        assert images_at(text) is None


def test_the_sheet_never_replaces_an_image(place, demo):
    image = min((demo.images / "fruit").iterdir())
    picture = io.BytesIO()
    with Image.open(image) as opened:
        opened.convert("RGB").save(picture, "PNG")
    write(Path("data/look"), {"mine.png": picture.getvalue()})
    for output in (None, "data/look/../look/mine.png"):
        with pytest.raises(InputError, match="cannot replace"):
            look("data/look/mine.png", place, output=output)
    with pytest.raises(InputError, match=r"\.png"):
        look(str(image), place, output=str(image))
    write(Path("seeds/mine"), {"a.png": picture.getvalue()})
    with pytest.raises(InputError, match="cannot replace"):
        look("mine", place | {"LAION_SEEDS_URI": "seeds"}, output="seeds/mine/a.png")
    assert contents(Path("data")) == {"look/mine.png": picture.getvalue()}
    with pytest.raises(InputError, match=r"--output is deep/er/mine\.PNG: there is no folder deep/er"):
        look("data/look/mine.png", place, top=3, output="deep/er/mine.PNG")
    Path("deep").mkdir()
    found = look("data/look/mine.png", place, top=3, output="deep/mine.PNG")
    assert sheet(found.sheet).height > 100


# --- pictures from their hosts --------------------------------------------------------------------


class Host(BaseHTTPRequestHandler):
    paths: list[str]

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_response(404 if self.path == "/1" else 200)
        self.end_headers()
        if self.path == "/2":
            self.wfile.write(b"no picture")
        elif self.path != "/1":
            Image.new("RGB", (200, 100), "red").save(self.wfile, "PNG")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[tuple[str, list[str]]]:
    Host.paths = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Host.paths
        server.shutdown()


@pytest.fixture
def bare(place, demo, tmp_path, host) -> dict[str, str]:
    """An index without thumbnails, with its images on a local server; every third row is unsafe."""
    index = shutil.copytree(demo.index, tmp_path / "bare")
    for path in sorted((index / "metadata").glob("*.arrow")):
        table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
        rows = np.arange(len(table))
        remote = pa.table(
            {
                "url": [f"{host[0]}/{row % 3}" for row in rows],
                "caption": table["caption"],
                "punsafe": pa.array(np.where(rows % 3 == 0, 0.9, 0.1)),
            }
        )
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, remote.schema) as writer:
            writer.write_table(remote)
    return place | {"LAION_INDEX_URI": str(index), "LAION_STAGING": "in-place"}


def test_hosts_are_asked_for_pictures_only_where_that_is_allowed(bare, demo, host, monkeypatch):
    image = str(min((demo.images / "fruit").iterdir()))
    found = look(image, bare)
    assert found.sheet is None
    assert "LAION_SHOW_REMOTE_PICTURES=true" in found.notes[0]
    allowed = bare | {"LAION_SHOW_REMOTE_PICTURES": "true"}
    found = look(image, allowed)
    assert "is at an address that is not public" in found.notes[0]  # as this test's server is
    assert (found.sheet, host[1]) == (None, [])
    monkeypatch.setattr(remote_images, "is_public", lambda _: True)
    with monkeypatch.context() as patch:
        patch.setattr("laion_assets.defs.look.FETCHED", 30)
        found = look(image, allowed)
    assert len(host[1]) <= 30
    assert set(host[1]) == {"/1", "/2"}  # those of /0 are unsafe
    assert "not fetched: 30 of 30 images" in found.notes[0]
    for reason in ("marked as unsafe", "status 404", "is text, not an image"):
        assert reason in found.notes[0]


def test_what_hosts_have_becomes_the_contact_sheet(bare, demo, host, monkeypatch):
    monkeypatch.setattr(remote_images, "is_public", lambda _: True)
    monkeypatch.setattr("laion_assets.search.safety.UNSAFE_FROM", 1)
    image = str(min((demo.images / "fruit").iterdir()))
    found = look(image, bare | {"LAION_SHOW_REMOTE_PICTURES": "true"}, top=60)
    assert len(host[1]) == 48
    pixels = np.asarray(sheet(found.sheet)).reshape(-1, 3).astype(int)
    red = (pixels[:, 0] > 230) & (pixels[:, 1:].max(axis=1) < 40)
    assert red.sum() > 5000


def test_rows_are_safe_only_where_all_columns_say_so():
    rows = {
        "punsafe": [0.1, 0.5, None, float("nan"), 0.2],
        "NSFW": ["UNLIKELY", "UNLIKELY", "UNLIKELY", "UNLIKELY", "UNSURE"],
    }
    assert marked_unsafe(pa.table(rows)).tolist() == [False, True, True, True, True]
    assert marked_unsafe(pa.table({"nsfw": [True, False, None]})).tolist() == [True, False, True]
    assert marked_unsafe(pa.table({"NSFW": [["?"]]})).tolist() == [True]
    assert marked_unsafe(pa.table({"url": ["a"]})).tolist() == [False]


# --- what is printed ------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_the_place_of_the_sheet(place, demo, capsys, monkeypatch):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["look", str(demo.images / "fruit"), "--top", "4"]) == 0
    printed = capsys.readouterr()
    about, _, head, *rows, _, sheet_line = printed.out.splitlines()
    assert about.startswith("the 4 best of 3,0")
    assert head.split() == ["rank", "similarity", "caption", "url"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4"]
    start = head.index("url")
    assert {row[start:][:8] for row in rows} == {"https://"}
    assert max(map(columns, rows)) <= 90
    assert sheet_line == "contact sheet: data/look/fruit.png"
    assert main(["look", "gone.jpg"]) == 1
    assert capsys.readouterr().err.startswith("error: gone.jpg does not exist")


def test_urls_are_whole_where_the_output_is_no_terminal(place, demo, capsys, monkeypatch):
    image = str(min((demo.images / "fruit").iterdir()))
    found = look(image, place, top=3)
    long = f"https://example.org/{'x' * 2000}"
    rows = found.rows.set_column(found.rows.column_names.index("url"), "url", pa.array([long] * 3))
    lines = replace(found, rows=rows).lines(is_terminal=False)
    assert all(line.endswith(f"  {long}") for line in lines[1:])
    for name, value in (place | {"COLUMNS": "40"}).items():
        monkeypatch.setenv(name, value)
    assert main(["look", image, "--top", "3"]) == 0
    printed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[3:6]]
    assert printed == found.rows["url"].to_pylist()


def test_an_encoding_without_a_letter_costs_that_letter(place, demo, monkeypatch):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    image = shutil.copy(min((demo.images / "fruit").iterdir()), "größe.webp")
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["look", str(image)]) == 0
    out.flush()
    assert b"contact sheet: data/look/gr??e.png" in out.buffer.getvalue()


def test_texts_off_the_web_cannot_act_on_a_terminal():
    evil = "a\x1b[31mred\x07\r\nnext\u202egnp.exe\u200b\x9b1m\ud800 end"
    line = one_line(evil)
    assert line.isprintable()
    assert line == "a [31mred next gnp.exe 1m end"
    assert len(one_line("e" + "\u0301" * 400)) == 3
    assert len(one_line("x" * 10_000)) == 500


def test_one_is_singular():
    assert [count(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]


def test_columns_are_aligned_whatever_their_letters():
    lines = aligned(
        [["1", "日本語の写真です", "x"], ["22", "e\u0301te\u0301", "x"]], (True, False, False), (4, 9, 4)
    )
    assert lines == [" 1  日本語の…  x", "22  e\u0301te\u0301        x"]
    assert {columns(line) for line in lines} == {columns(lines[0])}
    assert cut("12345", 5) == "12345"
    assert cut("123456", 5) == "1234…"
