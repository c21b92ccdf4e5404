"""A model's folder is found, staged from anywhere and opened; problems are reported in one sentence."""

import json
import shutil
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from helpers.gcs import describe
from helpers.onnx_models import (
    EDGE,
    PREPROCESSOR,
    clip_tokenizer,
    text_model,
    vision_model,
    write_model,
)
from helpers.project import REPOSITORY

from laion_assets.io.errors import InputError
from laion_assets.io.onnx_models import FLOAT, FLOAT16, value
from laion_assets.io.storage import open_storage
from laion_assets.seeds.model import Model
from laion_assets.seeds.model_folder import find_model
from laion_assets.seeds.model_staging import stage_model

DEMO_MODEL = REPOSITORY / "laion_assets" / "demo" / "model"
WORDS = clip_tokenizer().get_vocab_size()


def refusal(folder: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as refused:
        _ = Model(folder, **options).text
    return refused.value


# --- what is opened -------------------------------------------------------------------------------


def test_the_model_of_the_demo_is_opened_as_it_was_published():
    model = Model(DEMO_MODEL, "cpu")
    assert model.dimension == 256
    assert model.device == "cpu"
    assert model.preprocessing.size == (224, 224)
    answer = model.embed_pixels(np.zeros((2, 3, 224, 224), np.float32))
    assert answer.shape == (2, 256)
    assert answer.dtype == np.float32


def test_a_model_that_does_not_say_how_long_its_vectors_are_is_asked(tmp_path):
    assert Model(write_model(tmp_path, vision=vision_model(width="d"))).dimension == 4


def test_a_model_of_half_precision_gets_and_gives_what_others_do(tmp_path):
    whole = Model(write_model(tmp_path / "whole"))
    half = Model(write_model(tmp_path / "half", vision=vision_model(kind=FLOAT16)))
    pixels = np.random.default_rng(0).random((3, 3, EDGE, EDGE), np.float32)
    answer = half.embed_pixels(pixels)
    assert answer.dtype == np.float32
    np.testing.assert_allclose(answer, whole.embed_pixels(pixels), atol=0.2)


def test_a_model_with_a_fixed_batch_takes_any_number_of_images(tmp_path):
    fixed = Model(write_model(tmp_path / "fixed", vision=vision_model(shape=(2, 3, EDGE, EDGE))))
    any_number = Model(write_model(tmp_path / "any"))
    pixels = np.random.default_rng(0).random((5, 3, EDGE, EDGE), np.float32)
    np.testing.assert_array_equal(fixed.embed_pixels(pixels), any_number.embed_pixels(pixels))


def test_the_fullest_precision_is_chosen_and_weights_beside_it_belong_to_it(tmp_path):
    write_model(tmp_path, text=text_model(WORDS))
    onnx = tmp_path / "onnx"
    for name in ("vision_model_quantized.onnx", "vision_model_fp16.onnx", "vision_model_fp16.onnx_data"):
        (onnx / name).write_bytes(b"")
    found = find_model(tmp_path)
    assert found.vision == "onnx/vision_model.onnx"
    (onnx / "vision_model.onnx").unlink()
    found = find_model(tmp_path)
    assert found.vision == "onnx/vision_model_fp16.onnx"
    assert found.names == (
        "onnx/text_model.onnx",
        "onnx/vision_model_fp16.onnx",
        "onnx/vision_model_fp16.onnx_data",
        "preprocessor_config.json",
        "tokenizer.json",
    )
    (onnx / "vision_model_fp16.onnx").unlink()
    assert find_model(tmp_path).vision == "onnx/vision_model_quantized.onnx"


def test_the_fingerprint_is_of_what_is_used(tmp_path):
    first = write_model(tmp_path / "first")
    fingerprint = Model(first).fingerprint
    (first / "README.md").write_text("read me")
    (first / "onnx" / "vision_model_quantized.onnx").write_bytes(b"unused")
    assert Model(first).fingerprint == fingerprint
    assert Model(shutil.copytree(first, tmp_path / "second")).fingerprint == fingerprint
    write_model(first, preprocessor=PREPROCESSOR | {"resample": 2})
    assert Model(first).fingerprint != fingerprint


# --- what is wrong with it ------------------------------------------------------------------------


def without(name: str, folder: Path) -> None:
    (folder / name).unlink()


def with_content(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)


BROKEN = {
    "no image model": (partial(without, "onnx/vision_model.onnx"), "no onnx/vision_model.onnx"),
    "no preprocessing": (partial(without, "preprocessor_config.json"), "no preprocessor_config.json"),
    "a damaged image model": (
        partial(with_content, "onnx/vision_model.onnx", vision_model()[:500]),
        "vision_model.onnx cannot be opened as an ONNX model",
    ),
    "a damaged text model": (
        partial(with_content, "onnx/text_model.onnx", b"text"),
        "text_model.onnx cannot be opened as an ONNX model",
    ),
    "no text model": (partial(without, "onnx/text_model.onnx"), "no onnx/text_model.onnx"),
    "a pointer in its place": (
        partial(with_content, "onnx/vision_model.onnx", b"version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "another input": (
        partial(with_content, "onnx/vision_model.onnx", vision_model(takes="image")),
        "has the inputs image (tensor(float)), but pixel_values is needed",
    ),
    "one more input": (
        partial(
            with_content,
            "onnx/vision_model.onnx",
            vision_model(extra=[value("input_ids", FLOAT, ("batch",))]),
        ),
        "pixel_values (tensor(float)), input_ids (tensor(float)), but pixel_values is needed",
    ),
    "another output": (
        partial(with_content, "onnx/vision_model.onnx", vision_model(gives="pooler_output")),
        "has the outputs pooler_output (tensor(float)), but image_embeds is needed",
    ),
    "images of another size": (
        partial(
            with_content,
            "preprocessor_config.json",
            json.dumps(PREPROCESSOR | {"size": {"height": 8, "width": 9}}).encode(),
        ),
        "takes images of 3 x 8 x 8 and preprocessor_config.json makes 3 x 8 x 9",
    ),
    "texts of another dimension": (
        partial(with_content, "onnx/text_model.onnx", text_model(WORDS, dimension=5)),
        "gives texts 5 dimensions and images 4",
    ),
    "preprocessing that is no JSON": (
        partial(with_content, "preprocessor_config.json", b"{"),
        "preprocessor_config.json is not a JSON object",
    ),
}


@pytest.mark.parametrize("breaks", BROKEN)
def test_what_is_missing_or_damaged_is_named(breaks, tmp_path):
    folder = write_model(tmp_path, text=text_model(WORDS))
    change, told = BROKEN[breaks]
    change(folder)
    error = refusal(folder)
    assert told in str(error)
    assert error.about == "model"


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_that_holds_many_other_files_is_an_error_of_bounded_length(remote, tmp_path):
    for number in range(30):
        folder = tmp_path / "work" / f"model-{number}" / "onnx"
        folder.mkdir(parents=True)
        for name in (folder / "vision_model.onnx", tmp_path / "work" / f"{number:02}.onnx"):
            name.write_bytes(b"")
    if remote:
        put("memory://work", tmp_path / "work")
        with pytest.raises(InputError) as refused:
            stage_model("memory://work", tmp_path / "cache", print)
        told = str(refused.value)
    else:
        told = str(refusal(tmp_path / "work"))
    assert "00.onnx, 01.onnx, 02.onnx, 03.onnx, 04.onnx and 25 more)" in told
    assert len(told) < 300


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert f"{tmp_path / 'none'} is not a folder" in str(refusal(tmp_path / "none"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"image_processor_type": "ConvNextImageProcessor"},
            "ConvNextImageProcessor, which is not supported",
        ),
        ({"image_processor_type": None}, "image processor none"),
        ({"size": {"shortest_edge": 8}}, "results in images of different sizes"),
        ({"size": {"longest_edge": 8}}, "has size {'longest_edge': 8}"),
        ({"size": {"height": 8, "width": 1 << 20}}, "up to 4,096"),
        ({"do_center_crop": True, "crop_size": "big"}, "has crop_size 'big'"),
        ({"resample": 17}, "has resample 17"),
        ({"image_mean": [0, 0]}, "has image_mean [0, 0]"),
        ({"image_std": [1, 0, 1]}, "has image_std [1, 0, 1]"),
        ({"image_std": -0.5}, "has image_std -0.5"),
        ({"image_std": [1e-30] * 3}, "has image_std [1e-30, 1e-30, 1e-30]"),
        ({"image_mean": float("nan")}, "has image_mean nan"),
        ({"image_mean": ["0.5"] * 3}, "has image_mean ['0.5', '0.5', '0.5']"),
        ({"rescale_factor": 0}, "has rescale_factor 0"),
        ({"rescale_factor": -1}, "has rescale_factor -1"),
        ({"rescale_factor": 255}, "has rescale_factor 255: it must be a number from 1e-06 to 1"),
        ({"rescale_factor": True}, "has rescale_factor True"),
        ({"resample": True}, "has resample True"),
        ({"do_resize": "false"}, "has do_resize 'false': it must be true or false"),
        ({"do_center_crop": 0}, "has do_center_crop 0"),
        ({"do_normalize": []}, "has do_normalize []"),
        ({"do_pad": "no"}, "has do_pad 'no'"),
        ({"rescale_factor": "1/255"}, "has rescale_factor '1/255'"),
        ({"do_pad": True}, "requires do_pad"),
    ],
    ids=str,
)
def test_preprocessing_that_cannot_be_done_is_refused(change, told, tmp_path):
    error = refusal(write_model(tmp_path, preprocessor=PREPROCESSOR | change))
    assert told in str(error)
    assert "preprocessor_config.json" in str(error)


def test_a_gpu_is_used_where_there_is_one_and_missed_where_it_is_asked_for(tmp_path, monkeypatch):
    folder = write_model(tmp_path)
    here = ["AzureExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: here)
    assert Model(folder, "auto").device == "cpu"
    error = refusal(folder, device="cuda")
    assert "cannot use a GPU (it has AzureExecutionProvider, CPUExecutionProvider)" in str(error)
    assert error.about == "embed_device"
    assert "'tpu' is not a device: use one of auto, cpu, cuda" in str(refusal(folder, device="tpu"))


# --- staging --------------------------------------------------------------------------------------


class Source:
    """A remote model, and the log lines of its staging."""

    def __init__(self, uri: str, cache: Path) -> None:
        self.uri, self.cache = uri, cache
        self.lines: list[str] = []

    def stage(self) -> Path:
        return stage_model(self.uri, self.cache, self.lines.append)


def put(uri: str, folder: Path) -> None:
    fs, root = open_storage(uri)
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.fixture(params=["memory", "bucket"])
def remote(tmp_path: Path, request: pytest.FixtureRequest) -> Source:
    folder = write_model(tmp_path / "published", text=text_model(WORDS))
    (folder / "onnx" / "vision_model_quantized.onnx").write_bytes(b"unused")
    in_memory = request.param == "memory"
    root = f"memory://{tmp_path.name}" if in_memory else request.getfixturevalue("new_bucket")
    put(f"{root}/model", folder)
    return Source(f"{root}/model", tmp_path / "cache")


def test_a_local_folder_is_used_in_place(tmp_path):
    assert stage_model(str(DEMO_MODEL), tmp_path, print) == DEMO_MODEL
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_used_is_copied_and_nothing_twice(remote, monkeypatch):
    folder = remote.stage()
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names - {"staged.json", ".lock"} == set(find_model(folder).names)
    assert Model(folder).dimension == 4
    fs = type(open_storage(remote.uri)[0])
    monkeypatch.setattr(fs, "cat_ranges", lambda *_, **__: pytest.fail("was read again"))
    assert remote.stage() == folder


def test_a_copy_that_was_damaged_is_mended(remote):
    folder = remote.stage()
    fingerprint = find_model(folder).fingerprint
    model = folder / "onnx" / "vision_model.onnx"
    model.write_bytes(bytes(len(model.read_bytes())))
    assert find_model(remote.stage()).fingerprint == fingerprint


def test_what_has_changed_at_the_source_is_copied_again(remote, tmp_path):
    before = find_model(remote.stage()).fingerprint
    options = {"text": text_model(WORDS), "preprocessor": PREPROCESSOR | {"resample": 2}}
    changed = find_model(write_model(tmp_path / "changed", **options))
    put(remote.uri, changed.folder)
    after = find_model(remote.stage())
    assert after.fingerprint == changed.fingerprint != before


def test_a_source_that_is_gone_leaves_the_copy_in_use(remote):
    folder = remote.stage()
    fs, root = open_storage(remote.uri)
    fs.rm(root, recursive=True)
    assert remote.stage() == folder
    assert "using its staged copy" in remote.lines[-1]


def test_a_bucket_that_sends_other_bytes_than_it_stores_is_found_out(gcs_root, new_bucket, tmp_path):
    put(f"{new_bucket}/model", write_model(tmp_path / "published"))
    stored = gcs_root / new_bucket.removeprefix("gs://") / "model" / "onnx" / "vision_model.onnx"
    describe(stored, Crc32c="AAAAAA==")
    with pytest.raises(InputError, match=r"vision_model\.onnx.*checksum"):
        stage_model(f"{new_bucket}/model", tmp_path / "cache", print)
    assert not list((tmp_path / "cache").rglob("*.onnx"))


def test_a_source_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"memory://nothing has no onnx/vision_model\.onnx"):
        stage_model("memory://nothing", tmp_path, print)


def test_a_source_that_cannot_be_reached_is_not_taken_for_an_empty_one(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(
        InputError, match=rf"127\.0\.0\.1:{port}/ cannot be .*check the network"
    ) as refused:
        stage_model(f"http://127.0.0.1:{port}/", tmp_path, print)
    assert "onnx" not in str(refused.value)
    assert refused.value.about == "model"


def test_no_byte_is_copied_to_a_disk_without_room(remote, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="1,000 free: make room") as refused:
        remote.stage()
    assert refused.value.about == "cache_dir"
    assert not list(remote.cache.rglob("*.onnx"))


def test_a_model_comes_from_a_bucket_and_is_compared_with_its_checksums(new_bucket: str, tmp_path):
    published = write_model(tmp_path / "published")
    put(f"{new_bucket}/clip", published)
    folder = stage_model(f"{new_bucket}/clip", tmp_path / "cache", print)
    assert find_model(folder).fingerprint == find_model(published).fingerprint
    record = json.loads((folder / "staged.json").read_text())
    for file in record["files"].values():
        assert file["version"] == file["checksum"]  # the bucket's own


def test_a_model_comes_from_a_web_server(tmp_path):
    published = write_model(tmp_path / "published" / "clip")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    serve = partial(Quiet, directory=str(published.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folder = stage_model(f"http://127.0.0.1:{server.server_port}/clip", tmp_path / "cache", print)
        server.shutdown()
    assert find_model(folder).fingerprint == find_model(published).fingerprint
