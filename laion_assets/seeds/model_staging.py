"""Local copies of remote models: only the files in use, each verified by its checksum."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laion_assets.io.checksums import checksum_text, crc32c, file_crc32c
from laion_assets.io.errors import InputError
from laion_assets.io.locks import lock_exclusively
from laion_assets.io.progress import Progress
from laion_assets.io.public_urls import public
from laion_assets.io.storage import (
    Listed,
    first_line,
    list_files,
    new_file,
    on_this_machine,
    open_storage,
    reaching,
)
from laion_assets.seeds.model_folder import DEPTH, MODEL, choose_files

RECORD = "staged.json"
LOCK = ".lock"
READ_AT_ONCE = 8 << 20  # bytes of one request
REQUESTS_AT_ONCE = 8
SPARE = 64 << 20  # bytes left free on the disk


def stage_model(uri: str, cache_dir: Path, log: Callable[[str], None]) -> Path:
    """Return a local folder with the files of a model.

    A local folder is used in place. From a remote folder, only the files in use are copied to a folder
    below `cache_dir`. Each is verified by its size, and by its checksum if the source stores one. An
    existing copy is verified by its checksums and kept if the source is unchanged or cannot be reached.

    Args:
        uri: a local path or a URL.
        cache_dir: folder for the copies of all models.
        log: called with each log line.

    Raises:
        InputError: the model does not exist or cannot be accessed, the disk is full, or a copied file has
            the wrong size or checksum.

    """
    if on_this_machine(uri):
        return Path(uri.removeprefix("file://").removeprefix("local://")).expanduser()
    uri = public(uri)
    folder = cache_dir / hashlib.sha256(uri.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, log):
        staged = _staged(folder, uri)
        try:
            source = _Source(uri)
        except Exception as error:
            if not staged or not _is_whole(folder, staged):
                raise
            log(f"{uri} cannot be reached ({first_line(error)}): using its staged copy")
            return folder
        source.copy_to(folder, staged, log)
    return folder


@dataclass(frozen=True, slots=True)
class _StagedFile:
    """A file of a staged copy.

    Attributes:
        size: bytes.
        version: version of the source file.
        checksum: crc32c of the bytes, base64.

    """

    size: int
    version: str
    checksum: str


@dataclass(frozen=True, slots=True)
class _SourceFile:
    """A file of a remote model.

    Attributes:
        path: path in its file system.
        size: bytes.
        version: version of the file, compared with `_StagedFile.version`.
        checksum: crc32c of the content, base64; None if the source stores none.

    """

    path: str
    size: int
    version: str
    checksum: str | None


class _Source:
    """The listing of a remote model."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._fs, root = open_storage(uri, MODEL)
        try:
            with reaching(uri, MODEL):
                listed = {file.name: file for file in list_files(self._fs, root, DEPTH)}
                if not listed:  # a recursive listing ignores errors
                    with suppress(FileNotFoundError):
                        self._fs.ls(root)
                chosen = choose_files(Path(), listed, uri).names
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
        """Look up size and version, which some listings omit."""
        info = self._fs.info(listed.path)
        if info["size"] is None:
            raise InputError(
                f"the size of {listed.name} of the model {self._uri} is not reported: download the model "
                "and name the local folder",
                MODEL,
            )
        version = listed.checksum or hashlib.sha256(str(sorted(info.items())).encode()).hexdigest()
        return _SourceFile(listed.path, info["size"], version, listed.checksum)

    def copy_to(
        self, folder: Path, staged: Mapping[str, _StagedFile], log: Callable[[str], None]
    ) -> None:
        """Copy changed files, record each one once it is complete, and remove old ones."""
        kept = {name: file for name, file in staged.items() if self._is_current(folder, name, file)}
        missing = {name: file for name, file in self._files.items() if name not in kept}
        total = sum(file.size for file in missing.values())
        free = shutil.disk_usage(folder).free
        if total + SPARE > free:
            raise InputError(
                f"the model {self._uri} needs {total:,} bytes and {folder} has {free:,} free: make room",
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
                    f"{name} of the model {self._uri} was read with {size:,} bytes and checksum {found} "
                    f"instead of {file.size:,} and {file.checksum or 'any'}: try again",
                    MODEL,
                )
        return _StagedFile(size, file.version, found)

    def _pieces(self, name: str) -> Iterator[bytes]:
        """Read a file in order, with several requests at a time."""
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


def _is_whole(folder: Path, files: Mapping[str, _StagedFile]) -> bool:
    return all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == file.size
        and file_crc32c(folder / name) == file.checksum
        for name, file in files.items()
    )


def _staged(folder: Path, uri: str) -> dict[str, _StagedFile]:
    """Return the files in the record of a copy; empty if the record is missing or damaged."""
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
    """Keep out other processes that stage the same model."""
    with (folder / LOCK).open("ab") as file:
        lock_exclusively(
            file, lambda: log(f"waiting for another process that stages the same model to {folder}")
        )
        yield
