"""The files of an index where it comes from: listed with fsspec, read in ranges.

Google Cloud Storage is read by a client of its own (bucket), everything else through fsspec.
What must not live here: the local disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import aiohttp

from laion_assets.index.layout import METADATA_FOLDER, index_files, metadata_files
from laion_assets.io.errors import InputError
from laion_assets.io.storage import BUCKETS, is_local, open_storage, reaching
from laion_assets.staging.manifest import StagedFile
from laion_assets.staging.plan import SourceFile
from laion_assets.staging.transfer.bucket import BucketReader
from laion_assets.staging.transfer.errors import ChangedError, TransientError, not_allowed

INDEX_SETTING = "index_uri"
METADATA_SETTING = "metadata_uri"
PIECE = 8 << 20  # read at a time, where a client hands over only what it has read whole
# What changes when a file is overwritten, best first; file systems spell them in many ways.
VERSION_KEYS = ("generation", "etag", "mtime", "last_modified", "lastmodified", "created")


class RangeReader(Protocol):
    """Reads parts of files.

    Attributes:
        pins: whether every read is of the version that was listed, or else fails.

    """

    pins: bool

    def read(self, file: SourceFile, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop` in pieces of a few MiB.

        It may end early without an error only where the file does.

        Raises:
            TransientError: worth another try.
            ChangedError: the file is no longer as it was listed.
            InputError: no right to read it.

        """

    def check(self, file: SourceFile) -> None:
        """See that what was read since the file was listed is of the version that was listed.

        Raises:
            ChangedError: it may not be.

        """


class Source:
    """An index where it comes from.

    Args:
        index_uri: folder of the index, any fsspec URL.
        metadata_uri: folder of the metadata when it is not `metadata` in the folder of the index.

    """

    def __init__(self, index_uri: str, metadata_uri: str | None) -> None:
        self.index_uri = index_uri
        self._metadata_uri = metadata_uri or f"{index_uri.rstrip('/')}/{METADATA_FOLDER}"
        self._fs, self._root = open_storage(index_uri, INDEX_SETTING)
        metadata_fs, self._metadata_root = open_storage(self._metadata_uri, METADATA_SETTING)
        if type(metadata_fs) is not type(self._fs):
            raise InputError(f"{index_uri} and {self._metadata_uri} must be on the same kind of storage")
        self.is_local = is_local(self._fs)
        self.reader = _reader(self._fs, index_uri)

    def list(self) -> tuple[SourceFile, ...]:
        """List the files of the index, as they are now.

        Raises:
            InputError: no such folder, no index or metadata in it, or no right to list it.

        """
        found = self._find(self._root, self.index_uri, INDEX_SETTING)
        index, lists = index_files(found, self.index_uri)
        files = [self._file(name, *found[name]) for name in (index, lists) if name]
        below = f"{self._metadata_root}/"  # usually within that folder, and listed with it
        inside = {
            path.removeprefix(below): (path, info)
            for path, info in found.values()
            if path.startswith(below)
        }
        metadata = inside or self._find(self._metadata_root, self._metadata_uri, METADATA_SETTING)
        names = metadata_files((name for name in metadata if "/" not in name), self._metadata_uri)
        files += [self._file(f"{METADATA_FOLDER}/{name}", *metadata[name]) for name in names]
        return tuple(files)

    def _find(self, root: str, uri: str, setting: str) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """Return path and details of the files in a folder and its subfolders, by relative path."""
        with reaching(uri, setting):
            found = self._fs.find(root, maxdepth=2, detail=True)
            if not found and not self._fs.isdir(root):
                raise InputError(
                    f"there is no folder {uri}: set {setting} to the folder that it should be, or run "
                    "`laion-assets demo` to build the demo's"
                )
        return {path.removeprefix(root).lstrip("/"): (path, info) for path, info in found.items()}

    def _file(self, name: str, path: str, info: Mapping[str, Any]) -> SourceFile:
        url = self._fs.unstrip_protocol(path)
        return SourceFile(name, url, path, info["size"], _version(info), info.get("crc32c"))


class FsspecReader:
    """Reads ranges through fsspec; nothing holds on to a version of the file meanwhile."""

    pins = False

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def read(self, file: SourceFile, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, see `RangeReader`."""
        for at in range(start, stop, PIECE):
            try:
                piece = self._fs.cat_file(file.path, start=at, end=min(at + PIECE, stop))
            except FileNotFoundError as error:
                raise ChangedError(file, "it is gone") from error
            except PermissionError as error:
                raise not_allowed(file.url, error) from error
            except (OSError, aiohttp.ClientError) as error:  # a timeout is the former
                raise TransientError(str(error) or repr(error)) from error
            yield piece

    def check(self, file: SourceFile) -> None:
        """Compare the version with today's, see `RangeReader`."""
        try:
            version = _version(self._fs.info(file.path))
        except FileNotFoundError as error:
            raise ChangedError(file, "it is gone") from error
        if version != file.version:
            raise ChangedError(file, "it was overwritten")


def reader_of(staged: Sequence[StagedFile]) -> tuple[RangeReader, list[SourceFile]]:
    """Return what reads the source of some files, all on one kind of storage, and the files there."""
    files = []
    for file in staged:
        fs, path = open_storage(file.source, INDEX_SETTING)
        files.append(SourceFile(file.name, file.source, path, file.size, file.version, file.checksum))
    return _reader(fs, staged[0].source), files


def _reader(fs: Any, uri: str) -> RangeReader:
    return BucketReader(fs) if uri.startswith(BUCKETS) else FsspecReader(fs)


def _version(info: Mapping[str, Any]) -> str:
    spelled = {key.lower(): value for key, value in info.items()}
    return next((str(spelled[key]) for key in VERSION_KEYS if spelled.get(key)), "")
