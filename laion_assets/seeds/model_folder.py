"""Find and fingerprint the files of a CLIP model in the layout of transformers.js.

    onnx/vision_model.onnx      pixel_values -> image_embeds
    onnx/text_model.onnx        input_ids (and attention_mask) -> text_embeds
    preprocessor_config.json    how an image becomes pixel_values
    tokenizer.json              how a text becomes input_ids

Either ONNX file may come in several precisions (`vision_model_fp16.onnx`); the highest is used. Weights
of more than 2 GB are in a separate file (`vision_model.onnx_data`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

from laion_assets.io.checksums import fingerprint
from laion_assets.io.errors import InputError
from laion_assets.io.text import json_object, list_shortly

MODEL = "model"  # the setting that errors name
VISION, TEXT = "vision_model", "text_model"
PRECISIONS = ("", "_fp16", "_quantized", "_int8", "_uint8", "_q4f16", "_q4", "_bnb4")  # highest first
PREPROCESSOR, TOKENIZER, TOKENIZER_CONFIG = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
CONFIG = "config.json"
DEPTH = 2  # levels of folders that a model's files are in
OTHER_FILES_LISTED = 1000  # in subfolders other than onnx
CONFIGS = (PREPROCESSOR, TOKENIZER, TOKENIZER_CONFIG, CONFIG)
# Part of every fingerprint. Increment it if the same model now gives other vectors, for example after a
# change to image decoding.
EMBEDDING_VERSION = 1


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model that are used.

    Attributes:
        folder: the folder that holds them.
        vision: name of the image model.
        text: name of the text model; None if the model has none.
        names: sorted names of all files in use.

    """

    folder: Path
    vision: str
    text: str | None
    names: tuple[str, ...]

    def path(self, name: str) -> Path:
        """Return the path of a file."""
        return self.folder / name

    @property
    def fingerprint(self) -> str:
        """A hash of the contents of all files in use; 16 hexadecimal digits."""
        files = [("embedding version", EMBEDDING_VERSION, "")]
        for name in self.names:
            stat = self.path(name).stat()
            content = _content_hash(self.path(name), stat.st_size, stat.st_mtime_ns)
            files.append((name, stat.st_size, content))
        return fingerprint(files)


def find_model(folder: Path) -> ModelFiles:
    """Find the files of a model in a local folder.

    Raises:
        InputError: the folder does not exist, or lacks an image model or preprocessor_config.json.

    """
    if not folder.is_dir():
        raise InputError(
            f"the model {folder} is not a folder: name one that holds onnx/{VISION}.onnx", MODEL
        )
    return choose_files(folder, _files_in(folder), str(folder))


def _files_in(folder: Path) -> list[str]:
    """Return the files in a folder and its subfolders, a limited number in those other than onnx."""
    found = chain(folder.glob("*"), folder.glob("onnx/*"), islice(folder.glob("*/*"), OTHER_FILES_LISTED))
    return [path.relative_to(folder).as_posix() for path in found if os.path.isfile(path)]  # noqa: PTH113  # False without permission


def published_name(files: ModelFiles) -> str | None:
    """Return the name that a model's config.json records, or None."""
    if CONFIG not in files.names:
        return None
    try:
        name = json_object(files.path(CONFIG).read_bytes()).get("_name_or_path")
    except ValueError as error:
        raise InputError(
            f"{files.path(CONFIG)} is not a JSON object ({error}): copy it again from where the model "
            "was published",
            MODEL,
        ) from error
    return name if isinstance(name, str) and name else None


def choose_files(folder: Path, names: Iterable[str], where: str) -> ModelFiles:
    """Choose the files to use from all files of a folder.

    Args:
        folder: the folder that holds the files.
        names: paths of all its files, relative to it.
        where: the folder or URL that errors name.

    Raises:
        InputError: there is no image model or no preprocessor_config.json.

    """
    present = set(names)
    vision, text = (_fullest(part, present) for part in (VISION, TEXT))
    if vision is None:
        found = list_shortly(sorted(name for name in present if name.endswith(".onnx")))
        raise InputError(
            f"the model {where} has no onnx/{VISION}.onnx (ONNX files found: {found}): export the model "
            "in the layout of transformers.js",
            MODEL,
        )
    if PREPROCESSOR not in present:
        raise InputError(
            f"the model {where} has no {PREPROCESSOR}, which defines how images are resized: copy it "
            "from where the model was published",
            MODEL,
        )
    models = [name for name in (vision, text) if name]
    weights = [name for name in present if any(_is_data_of(model, name) for model in models)]
    configs = [name for name in CONFIGS if name in present]
    return ModelFiles(folder, vision, text, tuple(sorted([*models, *weights, *configs])))


def _fullest(part: str, present: set[str]) -> str | None:
    candidates = (f"onnx/{part}{precision}.onnx" for precision in PRECISIONS)
    return next((name for name in candidates if name in present), None)


def _is_data_of(model: str, name: str) -> bool:
    """Return whether this is the external weights file of an ONNX model."""
    return re.fullmatch(re.escape(model) + r"(_data(_\d+)?|\.data)", name) is not None


@lru_cache(maxsize=64)  # hashed again only when the file changes
def _content_hash(path: Path, size: int, written: int) -> str:  # noqa: ARG001
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
