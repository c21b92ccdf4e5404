"""The index on local disk: copied from any fsspec URL or used in place, verified, and opened.

A manifest beside the data says what is there. It is marked incomplete before the first byte changes and
complete after the last one, and lists each file when it is whole, so that a copy that was killed goes on
where it stopped. Readers hold a shared lock from verification to close; the stager takes the exclusive
one, and only when bytes must change.
What must not live here: which files make an index (layout), what is read from them (index, metadata).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import google_crc32c

from laion_assets.retrieval.checksums import checksum_text
from laion_assets.retrieval.errors import InputError
from laion_assets.retrieval.index import Index
from laion_assets.retrieval.layout import METADATA_FOLDER, index_files, metadata_files
from laion_assets.retrieval.metadata import Metadata
from laion_assets.retrieval.progress import Progress

MANIFEST = "manifest.json"
LOCK = ".lock"
CHUNK = 16 << 20
STAGE_AGAIN = "materialize staged_laion_index again"


@dataclass(frozen=True)
class SourceFile:
    """A file of the index where it comes from.

    Attributes:
        name: relative path in the staged index.
        path: for the file system of the source.
        size: bytes.
        version: changes when the file is overwritten.
        checksum: crc32c as the source reports it; None where it reports none.

    """

    name: str
    path: str
    size: int
    version: str
    checksum: str | None


@dataclass(frozen=True)
class StagedFile:
    """A file of the index as it is on the local disk.

    Attributes:
        name: relative path in the staged index.
        path: relative to the manifest; absolute where the source is used in place.
        size: bytes.
        version: of the source file it was made from.
        checksum: crc32c of its bytes.

    """

    name: str
    path: str
    size: int
    version: str
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What is staged, from where, and whether all of it is there."""

    source: str
    files: tuple[StagedFile, ...]
    complete: bool

    @property
    def fingerprint(self) -> str:
        """Changes with the name, size or content of any file, and only then."""
        lines = sorted(f"{file.name}\t{file.size}\t{file.checksum}" for file in self.files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @classmethod
    def read(cls, cache: Path) -> Manifest | None:
        """Read the manifest of a cache directory; None where there is none."""
        path = cache / MANIFEST
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text())
            files = tuple(StagedFile(**file) for file in stored["files"])
            return cls(stored["source"], files, stored["complete"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error}): delete it and {STAGE_AGAIN}") from error

    def write(self, cache: Path) -> None:
        """Replace the manifest, durably: all of it or none."""
        temporary = cache / f"{MANIFEST}.new"
        with temporary.open("w") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(cache / MANIFEST)


@dataclass(frozen=True)
class Plan:
    """What staging has to do."""

    fetch: tuple[SourceFile, ...]
    keep: tuple[StagedFile, ...]
    remove: tuple[StagedFile, ...]

    @property
    def bytes_to_fetch(self) -> int:
        """Bytes of the files to fetch."""
        return sum(file.size for file in self.fetch)


@dataclass(frozen=True)
class Staged:
    """What staging did."""

    manifest: Manifest
    fetched: int
    bytes_fetched: int
    seconds: float


@dataclass(frozen=True)
class OpenIndex:
    """A verified index and its metadata, open for reading."""

    index: Index
    metadata: Metadata
    manifest: Manifest


def plan(source: Sequence[SourceFile], manifest: Manifest | None, sizes: Mapping[str, int]) -> Plan:
    """Compare source and disk; a pure function.

    Args:
        source: files of the index where it comes from.
        manifest: of the cache directory, if there is one.
        sizes: bytes on disk of each file the manifest names, by name; absent when missing.

    """
    staged = {file.name: file for file in manifest.files} if manifest else {}

    def is_here(file: SourceFile) -> bool:
        there = staged.get(file.name)
        return (
            there is not None
            and (there.version, there.size) == (file.version, file.size)
            and sizes.get(file.name) == file.size
        )

    names = {file.name for file in source}
    return Plan(
        fetch=tuple(file for file in source if not is_here(file)),
        keep=tuple(staged[file.name] for file in source if is_here(file)),
        remove=tuple(file for name, file in staged.items() if name not in names),
    )


def list_source(index_uri: str, metadata_uri: str | None) -> tuple[Any, list[SourceFile]]:
    """List the files of an index where it comes from, and the file system they are on.

    Args:
        index_uri: folder of the index.
        metadata_uri: folder of the metadata when it is not `metadata` in the folder of the index.

    Raises:
        InputError: no such folder, or no index or metadata in it.

    """
    fs, root = fsspec.url_to_fs(index_uri)
    if not fs.isdir(root):
        raise InputError(
            f"there is no folder {index_uri}: set LAION_INDEX_URI to the folder of the index, "
            "or run `laion-assets demo` to build the demo's"
        )
    image_index = {
        path.removeprefix(root).lstrip("/"): (path, info)
        for path, info in fs.find(root, maxdepth=2, detail=True).items()
    }
    index, lists = index_files(image_index, index_uri)
    files = [_source_file(name, *image_index[name]) for name in (index, lists) if name]

    folder = metadata_uri or f"{index_uri.rstrip('/')}/{METADATA_FOLDER}"
    metadata_fs, metadata_root = fsspec.url_to_fs(folder)
    if type(metadata_fs) is not type(fs):
        raise InputError(f"{index_uri} and {folder} must be on the same kind of storage")
    if not fs.isdir(metadata_root):
        raise InputError(f"there is no folder {folder}: set LAION_METADATA_URI to that of the metadata")
    found = {
        path.rpartition("/")[2]: (path, info)
        for path, info in fs.find(metadata_root, maxdepth=1, detail=True).items()
    }
    names = metadata_files(found, folder)
    files += [_source_file(f"{METADATA_FOLDER}/{name}", *found[name]) for name in names]
    return fs, files


def stage(
    index_uri: str,
    metadata_uri: str | None,
    cache: Path,
    *,
    in_place: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> Staged:
    """Make the index available on the local disk; does nothing when it is already there.

    Args:
        index_uri: folder of the index, any fsspec URL.
        metadata_uri: folder of the metadata, if elsewhere.
        cache: local directory for the copy, or only for the manifest when `in_place`.
        in_place: use the files where they are, which must be a local disk.
        log: takes lines about the progress.

    Raises:
        InputError: no index there, not enough free space, or a file that changed while it was copied.

    """
    started = time.monotonic()
    fs, source = list_source(index_uri, metadata_uri)
    if in_place and "file" not in _protocols(fs):
        raise InputError(f"{index_uri} is not on a local disk: LAION_STAGING=in-place needs one")
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache, fcntl.LOCK_SH):
        manifest = Manifest.read(cache)
        if manifest and manifest.complete and _agrees(manifest, source, cache, in_place):
            return Staged(manifest, 0, 0, time.monotonic() - started)
    with _lock(cache, fcntl.LOCK_EX):
        todo = _plan_on_disk(source, cache, in_place)
        if not in_place:
            _check_space(cache, todo.bytes_to_fetch)
        _stage_files(fs, index_uri, todo, cache, in_place, log)
    manifest = Manifest.read(cache)
    assert manifest  # noqa: S101  # written under the lock above
    return Staged(manifest, len(todo.fetch), todo.bytes_to_fetch, time.monotonic() - started)


@contextmanager
def open_staged(cache: Path, columns: Mapping[str, str] | None = None) -> Iterator[OpenIndex]:
    """Verify the staged index, open it, and keep stagers out until the end of the block.

    Args:
        cache: the directory it was staged to.
        columns: names of metadata columns, see `Metadata`.

    Raises:
        InputError: nothing staged, or files that are not as the manifest says.

    """
    if not (cache / LOCK).exists():
        raise InputError(f"nothing is staged in {cache}: materialize staged_laion_index first")
    with _lock(cache, fcntl.LOCK_SH):
        manifest = verified_manifest(cache)
        paths = {file.name: cache / file.path for file in manifest.files}
        index, lists = index_files(paths, str(cache))
        metadata = [paths[name] for name in sorted(paths) if name.startswith(f"{METADATA_FOLDER}/")]
        yield OpenIndex(
            Index(paths[index], paths[lists] if lists else None),
            Metadata(metadata, columns),
            manifest,
        )


def verified_manifest(cache: Path) -> Manifest:
    """Return the manifest after comparing it with the disk: cheap, sizes only.

    Raises:
        InputError: names the file that is missing or has another size, and the remedy.

    """
    manifest = Manifest.read(cache)
    if manifest is None:
        raise InputError(f"nothing is staged in {cache}: materialize staged_laion_index first")
    if not manifest.complete:
        raise InputError(f"staging into {cache} did not finish: {STAGE_AGAIN}")
    for file in manifest.files:
        path = cache / file.path
        size = path.stat().st_size if path.exists() else None
        if size != file.size:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise InputError(f"{path} {found}, the manifest says {file.size:,}: {STAGE_AGAIN}")
    return manifest


def _source_file(name: str, path: str, info: Mapping[str, Any]) -> SourceFile:
    version = str(info.get("generation") or info.get("etag") or info.get("mtime") or "")
    return SourceFile(name, path, info["size"], version, info.get("crc32c"))


def _plan_on_disk(source: Sequence[SourceFile], cache: Path, in_place: bool) -> Plan:
    manifest = Manifest.read(cache)
    # A manifest of the other mode describes other files: start from nothing.
    if manifest and any(Path(file.path).is_absolute() != in_place for file in manifest.files):
        manifest = None
    sizes = {
        file.name: (cache / file.path).stat().st_size
        for file in (manifest.files if manifest else ())
        if (cache / file.path).exists()
    }
    return plan(source, manifest, sizes)


def _agrees(manifest: Manifest, source: Sequence[SourceFile], cache: Path, in_place: bool) -> bool:
    todo = _plan_on_disk(source, cache, in_place)
    return not todo.fetch and not todo.remove and len(todo.keep) == len(manifest.files)


def _stage_files(
    fs: Any, uri: str, todo: Plan, cache: Path, in_place: bool, log: Callable[[str], None]
) -> None:
    done = list(todo.keep)
    Manifest(uri, tuple(done), complete=False).write(cache)
    for gone in todo.remove:
        if not Path(gone.path).is_absolute():
            (cache / gone.path).unlink(missing_ok=True)
    what = "checking" if in_place else "staging"
    with Progress(what, todo.bytes_to_fetch, "B", log) as progress:
        for file in todo.fetch:
            checksum = _read_through(fs, file, None if in_place else cache / file.name, progress)
            path = file.path if in_place else file.name
            done.append(StagedFile(file.name, path, file.size, file.version, checksum))
            Manifest(uri, tuple(done), complete=False).write(cache)
    Manifest(uri, tuple(done), complete=True).write(cache)


def _read_through(fs: Any, file: SourceFile, target: Path | None, progress: Progress) -> str:
    """Read a source file once, into `target` if given, and return its verified checksum."""
    checksum = google_crc32c.Checksum()
    size = 0
    partial = target.with_name(f"{target.name}.partial") if target else Path(os.devnull)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with fs.open(file.path, "rb") as reader, partial.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            checksum.update(chunk)
            size += len(chunk)
            if target:
                writer.write(chunk)
            progress.advance(len(chunk))
        if target:
            writer.flush()
            os.fsync(writer.fileno())
    found = checksum_text(checksum)
    if size != file.size or (file.checksum and found != file.checksum):
        partial.unlink() if target else None
        raise InputError(
            f"{file.path} changed while it was read (listed with {file.size:,} bytes, crc32c "
            f"{file.checksum}; got {size:,} bytes, {found}): {STAGE_AGAIN}"
        )
    if target:
        partial.replace(target)
    return found


def _check_space(cache: Path, needed: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise InputError(
            f"{cache} has {free:,} bytes free, staging needs {needed:,}: free some space or set "
            "LAION_CACHE_DIR to a larger disk"
        )


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextmanager
def _lock(cache: Path, kind: int) -> Iterator[None]:
    """Hold the cache's lock; the system frees it when the process ends, however it ends."""
    with (cache / LOCK).open("a") as file:
        fcntl.flock(file, kind)
        yield
