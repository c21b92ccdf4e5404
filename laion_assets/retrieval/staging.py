"""The index on local disk: copied from any fsspec URL or used in place, verified, and opened.

A manifest beside the data says what is there. It is marked incomplete before the first byte changes and
complete after the last one, and lists each file when it is whole, so that a copy that was killed goes on
where it stopped. Readers hold a shared lock from verification to close; the stager takes the exclusive
one, and only when bytes must change.
What must not live here: which files make an index (layout), what is read from them (index, metadata).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import google_crc32c

from laion_assets.retrieval.checksums import checksum_text
from laion_assets.retrieval.errors import InputError
from laion_assets.retrieval.index import Index
from laion_assets.retrieval.layout import METADATA_FOLDER, index_files, metadata_files
from laion_assets.retrieval.metadata import Metadata
from laion_assets.retrieval.progress import Progress
from laion_assets.retrieval.storage import open_storage

MANIFEST = "manifest.json"
LOCK = ".lock"
PARTIAL = ".partial"
CHUNK = 16 << 20
DISK_TAKES_NO_MORE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
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
            manifest = cls(stored["source"], files, stored["complete"])
            manifest._check_types()
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error!r}): delete it and {STAGE_AGAIN}") from error
        return manifest

    def _check_types(self) -> None:
        whole = (self.source, str), (self.complete, bool)
        sizes = ((file.size, int) for file in self.files)
        texts = (
            (text, str)
            for file in self.files
            for text in (file.name, file.path, file.version, file.checksum)
        )
        for value, kind in chain(whole, sizes, texts):
            if type(value) is not kind:
                raise TypeError(f"{value!r} is no {kind.__name__}")

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
    def changes(self) -> bool:
        """Whether the disk is not yet as the source."""
        return bool(self.fetch or self.remove)

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


def plan(
    source: Sequence[SourceFile],
    manifest: Manifest | None,
    sizes: Mapping[str, int],
    *,
    in_place: bool = False,
) -> Plan:
    """Compare source and disk; a pure function.

    Args:
        source: files of the index where it comes from.
        manifest: of the cache directory, if there is one.
        sizes: bytes on disk of each file the manifest names, by name; absent when missing.
        in_place: whether the files are used where they are; those of a copy are then not needed.

    """
    staged = {file.name: file for file in manifest.files} if manifest else {}
    paths = {file.name: _staged_path(file, in_place) for file in source}

    def is_here(file: SourceFile) -> bool:
        there = staged.get(file.name)
        return (
            there is not None
            and (there.path, there.version, there.size) == (paths[file.name], file.version, file.size)
            and sizes.get(file.name) == file.size
        )

    return Plan(
        fetch=tuple(file for file in source if not is_here(file)),
        keep=tuple(staged[file.name] for file in source if is_here(file)),
        remove=tuple(file for name, file in staged.items() if paths.get(name) != file.path),
    )


def list_source(index_uri: str, metadata_uri: str | None) -> tuple[Any, list[SourceFile]]:
    """List the files of an index where it comes from, and the file system they are on.

    Args:
        index_uri: folder of the index.
        metadata_uri: folder of the metadata when it is not `metadata` in the folder of the index.

    Raises:
        InputError: no such folder, or no index or metadata in it.

    """
    fs, root = open_storage(index_uri, "LAION_INDEX_URI")
    image_index = {
        path.removeprefix(root).lstrip("/"): (path, info)
        for path, info in fs.find(root, maxdepth=2, detail=True).items()
    }
    if not image_index and not fs.isdir(root):
        raise InputError(
            f"there is no folder {index_uri}: set LAION_INDEX_URI to the folder of the index, "
            "or run `laion-assets demo` to build the demo's"
        )
    index, lists = index_files(image_index, index_uri)
    files = [_source_file(name, *image_index[name]) for name in (index, lists) if name]

    folder = metadata_uri or f"{index_uri.rstrip('/')}/{METADATA_FOLDER}"
    metadata_fs, metadata_root = open_storage(folder, "LAION_METADATA_URI")
    if type(metadata_fs) is not type(fs):
        raise InputError(f"{index_uri} and {folder} must be on the same kind of storage")
    found = {
        path.rpartition("/")[2]: (path, info)
        for path, info in fs.find(metadata_root, maxdepth=1, detail=True).items()
    }
    if not found and not fs.isdir(metadata_root):
        raise InputError(f"there is no folder {folder}: set LAION_METADATA_URI to that of the metadata")
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
        InputError: no index there, a cache that cannot be written to or has not enough free space, or a
            file that changed while it was copied.

    """
    started = time.monotonic()
    fs, source = list_source(index_uri, metadata_uri)
    if in_place and not _is_local(fs):
        raise InputError(f"{index_uri} is not on a local disk: LAION_STAGING=in-place needs one")
    if _is_local(fs) and not in_place:
        _check_apart(source, cache)
    _make(cache)
    with _lock(cache, fcntl.LOCK_SH, log):
        manifest = Manifest.read(cache)
        if manifest and manifest.complete and not _plan_on_disk(source, cache, in_place).changes:
            return Staged(manifest, 0, 0, time.monotonic() - started)
    with _lock(cache, fcntl.LOCK_EX, log):
        todo = _plan_on_disk(source, cache, in_place)
        if not in_place:
            _check_space(cache, todo.bytes_to_fetch)
        try:
            manifest = _stage_files(fs, index_uri, todo, cache, in_place, log)
        except OSError as error:
            if error.errno not in DISK_TAKES_NO_MORE:
                raise
            raise _cannot_write(cache, error) from error
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
    sizes = {
        file.name: (cache / file.path).stat().st_size
        for file in (manifest.files if manifest else ())
        if (cache / file.path).exists()
    }
    return plan(source, manifest, sizes, in_place=in_place)


def _stage_files(
    fs: Any, uri: str, todo: Plan, cache: Path, in_place: bool, log: Callable[[str], None]
) -> Manifest:
    done = list(todo.keep)
    # What goes stays listed until it is gone, or a stager killed here would leave it for ever.
    Manifest(uri, (*todo.keep, *todo.remove), complete=False).write(cache)
    _remove(cache, todo, in_place, log)
    what = "checking" if in_place else "staging"
    with Progress(what, todo.bytes_to_fetch, "B", log) as progress:
        for file in todo.fetch:
            checksum = _read_through(fs, file, None if in_place else cache / file.name, progress)
            path = _staged_path(file, in_place)
            done.append(StagedFile(file.name, path, file.size, file.version, checksum))
            Manifest(uri, tuple(done), complete=False).write(cache)
    manifest = Manifest(uri, tuple(done), complete=True)
    manifest.write(cache)
    return manifest


def _staged_path(file: SourceFile, in_place: bool) -> str:
    return file.path if in_place else file.name


def _remove(cache: Path, todo: Plan, in_place: bool, log: Callable[[str], None]) -> None:
    """Remove copies that are not needed, but never a file of the source, which may be an earlier copy."""
    sources = {Path(file.path).resolve() for file in todo.fetch} if in_place else set()
    copies = [cache / gone.path for gone in todo.remove if not Path(gone.path).is_absolute()]
    if not in_place:
        copies += cache.rglob(f"*{PARTIAL}")  # of a stager that was killed
    for path in copies:
        if path.exists() and path.resolve() not in sources:
            log(f"removing {path}, which the index no longer needs")
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def _read_through(fs: Any, file: SourceFile, target: Path | None, progress: Progress) -> str:
    """Read a source file once, into `target` if given, and return its verified checksum."""
    checksum = google_crc32c.Checksum()
    size = 0
    partial = target.with_name(f"{target.name}{PARTIAL}") if target else Path(os.devnull)
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


def _check_apart(source: Sequence[SourceFile], cache: Path) -> None:
    if any(Path(file.path).resolve() == (cache / file.name).resolve() for file in source):
        raise InputError(
            f"the index is in {cache} already, and would be copied onto itself: set "
            "LAION_STAGING=in-place to use it where it is, or LAION_CACHE_DIR to another folder"
        )


def _make(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / LOCK).open("a").close()
    except OSError as error:
        raise _cannot_write(cache, error) from error


def _cannot_write(cache: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write to {cache} ({error.strerror}): set LAION_CACHE_DIR to a folder with room that you "
        "can write to"
    )


def _check_space(cache: Path, needed: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise InputError(
            f"{cache} has {free:,} bytes free, staging needs {needed:,}: free some space or set "
            "LAION_CACHE_DIR to a larger disk"
        )


def _is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


@contextmanager
def _lock(cache: Path, kind: int, log: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Hold the cache's lock; the system frees it when the process ends, however it ends."""
    with (cache / LOCK).open("a") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting until another process is done with {cache}")
            fcntl.flock(file, kind)
        yield
