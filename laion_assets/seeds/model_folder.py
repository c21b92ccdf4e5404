"""The folder of a CLIP model in the layout of transformers.js: found, staged, fingerprinted.

    onnx/vision_model.onnx      pixel_values -> image_embeds
    onnx/text_model.onnx        input_ids (and attention_mask) -> text_embeds
    preprocessor_config.json    what is done to an image first
    tokenizer.json              how a text becomes input_ids

Both ONNX files may come in several precisions (`vision_model_fp16.onnx`); the fullest is used. Weights of
more than 2 GB lie in a file beside (`vision_model.onnx_data`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from laion_assets.io.checksums import checksum_text, crc32c, fingerprint
from laion_assets.io.errors import InputError
from laion_assets.io.progress import Progress
from laion_assets.io.storage import (
    Listed,
    first_line,
    list_files,
    new_file,
    on_this_machine,
    open_storage,
    reaching,
)

MODEL = "model"  # the parameter that names the folder
VISION, TEXT = "vision_model", "text_model"
PRECISIONS = ("", "_fp16", "_quantized", "_int8", "_uint8", "_q4f16", "_q4", "_bnb4")  # fullest first
PREPROCESSOR, TOKENIZER, TOKENIZER_CONFIG = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
CONFIG = "config.json"
CONFIGS = (PREPROCESSOR, TOKENIZER, TOKENIZER_CONFIG, CONFIG)
RECORD = "staged.json"
LOCK = ".lock"
READ_AT_ONCE = 8 << 20  # bytes of one request
REQUESTS_AT_ONCE = 8
SPARE = 64 << 20  # bytes that stay free on the disk
# Part of every fingerprint: raise it when the same model should give other vectors, such as after a
# change of how images are decoded.
EMBEDDING_VERSION = 1


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model that are used.

    Attributes:
        folder: that they lie in.
        vision: name of the image model in it.
        text: name of the text model; None where there is none.
        names: of all files that play a part, sorted.

    """

    folder: Path
    vision: str
    text: str | None
    names: tuple[str, ...]

    def path(self, name: str) -> Path:
        """Where a file is."""
        return self.folder / name

    @property
    def fingerprint(self) -> str:
        """Changes with the content of any file that plays a part; 16 hexadecimal digits."""
        files = [("embedding version", EMBEDDING_VERSION, "")]
        for name in self.names:
            stat = self.path(name).stat()
            content = _content_hash(self.path(name), stat.st_size, stat.st_mtime_ns)
            files.append((name, stat.st_size, content))
        return fingerprint(files)


def find_model(folder: Path) -> ModelFiles:
    """Find the files of a model in a local folder.

    Raises:
        InputError: no such folder, no image model in it, or no preprocessor_config.json.

    """
    if not folder.is_dir():
        raise InputError(
            f"the model {folder} is not a folder: name one that holds onnx/{VISION}.onnx", MODEL
        )
    here = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return _chosen(folder, here, str(folder))


def published_name(files: ModelFiles) -> str | None:
    """Return the name that a model's config.json records; None without one."""
    if CONFIG not in files.names:
        return None
    try:
        name = json.loads(files.path(CONFIG).read_bytes()).get("_name_or_path")
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{files.path(CONFIG)} is not a JSON object ({error}): copy it again from where the model "
            "was published",
            MODEL,
        ) from error
    return name if isinstance(name, str) and name else None


def stage_model(uri: str, cache_dir: Path, log: Callable[[str], None]) -> Path:
    """Return a local folder with the files of a model.

    A folder on the local disk is used in place. Of any other only the files that are used are copied to a
    folder below `cache_dir`, each verified by its size, and by its checksum where the source keeps one. A
    copy whose source has not changed is verified by its checksums and kept. It is also kept where the
    source cannot be reached.

    Args:
        uri: a local path or any fsspec URL.
        cache_dir: holds the copies of all models.
        log: takes lines of text.

    Raises:
        InputError: no model there, no access to it, no room, or a file that is not what the source says.

    """
    if on_this_machine(uri):
        return Path(uri.removeprefix("file://").removeprefix("local://")).expanduser()
    folder = cache_dir / hashlib.sha256(uri.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, log):
        staged = _staged(folder, uri)
        try:
            source = _Source(uri)
        except Exception as error:
            if not staged or not _is_whole(folder, staged):
                raise
            log(f"{uri} cannot be reached ({first_line(error)}): its staged copy is used")
            return folder
        source.copy_to(folder, staged, log)
    return folder


@dataclass(frozen=True, slots=True)
class _StagedFile:
    """A file of a staged copy.

    Attributes:
        size: bytes.
        version: what tells this version of the source file from others.
        checksum: crc32c of the bytes, base64.

    """

    size: int
    version: str
    checksum: str


@dataclass(frozen=True, slots=True)
class _SourceFile:
    """A file of a model that is somewhere else.

    Attributes:
        path: for the file system it lies on.
        size: bytes.
        version: see `_StagedFile`.
        checksum: crc32c of the content, base64, where the source tells it.

    """

    path: str
    size: int
    version: str
    checksum: str | None


class _Source:
    """A model that is somewhere else, as it was when it was listed."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._fs, root = open_storage(uri, MODEL)
        try:
            with reaching(uri, MODEL):
                listed = {file.name: file for file in list_files(self._fs, root)}
                chosen = _chosen(Path(), listed, uri).names
                self._files = {name: self._source_file(listed[name]) for name in chosen}
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the model {uri} cannot be listed ({first_line(error)}): correct the address, or check "
                "the network",
                MODEL,
            ) from error

    def _source_file(self, listed: Listed) -> _SourceFile:
        """Ask for what not every listing tells: the size, and an ETag or another mark of the version."""
        info = self._fs.info(listed.path)
        if info["size"] is None:
            raise InputError(
                f"{listed.name} of the model {self._uri} comes without its size: download the model, and "
                "name the local folder",
                MODEL,
            )
        version = listed.checksum or hashlib.sha256(str(sorted(info.items())).encode()).hexdigest()
        return _SourceFile(listed.path, info["size"], version, listed.checksum)

    def copy_to(
        self, folder: Path, staged: Mapping[str, _StagedFile], log: Callable[[str], None]
    ) -> None:
        """Copy what has changed; each file is recorded once it is whole, and old ones are removed."""
        kept = {name: file for name, file in staged.items() if self._is_current(folder, name, file)}
        missing = {name: file for name, file in self._files.items() if name not in kept}
        total = sum(file.size for file in missing.values())
        free = shutil.disk_usage(folder).free
        if total + SPARE > free:
            raise InputError(
                f"the model {self._uri} takes {total:,} bytes and {folder} has {free:,} free: make room",
                "cache_dir",
            )
        _record(folder, self._uri, kept)
        with Progress(f"staging the model {self._uri}", total, "B", log) as progress:
            for name in missing:
                kept[name] = self._copied(name, folder / name, progress.advance)
                _record(folder, self._uri, kept)
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            name = path.relative_to(folder).as_posix()
            if name not in kept and name not in (RECORD, LOCK):
                path.unlink()

    def _is_current(self, folder: Path, name: str, file: _StagedFile) -> bool:
        return (
            name in self._files
            and (file.size, file.version) == (self._files[name].size, self._files[name].version)
            and _is_whole(folder, {name: file})
        )

    def _copied(self, name: str, target: Path, advance: Callable[[int], None]) -> _StagedFile:
        file, checksum, size = self._files[name], 0, 0
        with new_file(str(target), "cache_dir") as sink:
            for piece in self._pieces(name):
                sink.write(piece)
                checksum, size = crc32c(piece, checksum), size + len(piece)
                advance(len(piece))
            found = checksum_text(checksum)
            if size != file.size or file.checksum not in (None, found):
                raise InputError(
                    f"{name} of the model {self._uri} came with {size:,} bytes and checksum {found} "
                    f"instead of {file.size:,} and {file.checksum or 'any'}: try again",
                    MODEL,
                )
        return _StagedFile(size, file.version, found)

    def _pieces(self, name: str) -> Iterator[bytes]:
        """Read a file in order, several requests at a time."""
        path, size = self._files[name].path, self._files[name].size
        at_once = READ_AT_ONCE * REQUESTS_AT_ONCE
        for first in range(0, size, at_once):
            starts = list(range(first, min(first + at_once, size), READ_AT_ONCE))
            stops = [min(start + READ_AT_ONCE, size) for start in starts]
            try:
                with reaching(self._uri, MODEL):
                    yield from self._fs.cat_ranges([path] * len(starts), starts, stops, on_error="raise")
            except InputError:
                raise
            except Exception as error:
                raise InputError(
                    f"{name} of the model {self._uri} cannot be read ({first_line(error)}): try again",
                    MODEL,
                ) from error


def _chosen(folder: Path, names: Iterable[str], where: str) -> ModelFiles:
    """Choose of all files of a folder those that are used."""
    there = set(names)
    vision, text = (_fullest(part, there) for part in (VISION, TEXT))
    if vision is None:
        found = ", ".join(sorted(name for name in there if name.endswith(".onnx"))) or "none"
        raise InputError(
            f"the model {where} has no onnx/{VISION}.onnx (ONNX files found: {found}): export the model "
            "in the layout of transformers.js",
            MODEL,
        )
    if PREPROCESSOR not in there:
        raise InputError(
            f"the model {where} has no {PREPROCESSOR}, which says how images are resized: copy it from "
            "where the model was published",
            MODEL,
        )
    models = [name for name in (vision, text) if name]
    weights = [name for name in there if any(_is_data_of(model, name) for model in models)]
    configs = [name for name in CONFIGS if name in there]
    return ModelFiles(folder, vision, text, tuple(sorted([*models, *weights, *configs])))


def _fullest(part: str, there: set[str]) -> str | None:
    candidates = (f"onnx/{part}{precision}.onnx" for precision in PRECISIONS)
    return next((name for name in candidates if name in there), None)


def _is_data_of(model: str, name: str) -> bool:
    """Tell the weights that an ONNX file keeps beside itself, as optimum and torch name them."""
    return re.fullmatch(re.escape(model) + r"(_data(_\d+)?|\.data)", name) is not None


@lru_cache(maxsize=64)  # hashed again only when the file changes
def _content_hash(path: Path, size: int, written: int) -> str:  # noqa: ARG001
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(folder: Path, files: Mapping[str, _StagedFile]) -> bool:
    return all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == file.size
        and _checksum(folder / name) == file.checksum
        for name, file in files.items()
    )


def _checksum(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(READ_AT_ONCE):
            checksum = crc32c(piece, checksum)
    return checksum_text(checksum)


def _staged(folder: Path, uri: str) -> dict[str, _StagedFile]:
    """Return what the record of a copy says; nothing where there is none, or a damaged one."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        files = {name: _StagedFile(**file) for name, file in record["files"].items()}
        return files if record["source"] == uri else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _record(folder: Path, uri: str, files: Mapping[str, _StagedFile]) -> None:
    record = {"source": uri, "files": {name: asdict(file) for name, file in files.items()}}
    with new_file(str(folder / RECORD), "cache_dir") as sink:
        sink.write(json.dumps(record, indent=1).encode())


@contextmanager
def _alone(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes that stage the same model out."""
    with (folder / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that stages the same model to {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
