"""The source of an index: lists its files with fsspec and provides a reader for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laion_assets.index.layout import (
    METADATA_FOLDER,
    PUBLISHED_TABLES,
    PUBLISHING,
    index_files,
    metadata_files,
)
from laion_assets.io.errors import InputError
from laion_assets.io.public_urls import public
from laion_assets.io.storage import BUCKETS, find_files, is_local, open_storage, reaching
from laion_assets.staging.transfer.files import SourceFile, file_version
from laion_assets.staging.transfer.gcs import GcsReader
from laion_assets.staging.transfer.range_readers import FsspecReader, RangeReader

INDEX_URI = "index_uri"
METADATA_URI = "metadata_uri"


class Source:
    """The source of an index.

    Args:
        index_uri: folder of the index, a local path or a URL.
        metadata_uri: folder of the metadata; by default `metadata` in the index folder.

    Attributes:
        index_uri: folder of the index.
        is_local: whether it is on the local disk.
        reader: reads ranges of its files.

    """

    def __init__(self, index_uri: str, metadata_uri: str | None) -> None:
        self.index_uri = index_uri = public(index_uri)
        self._metadata_uri = public(metadata_uri or f"{index_uri.rstrip('/')}/{METADATA_FOLDER}")
        self._fs, self._root = open_storage(index_uri, INDEX_URI)
        metadata_fs, self._metadata_root = open_storage(self._metadata_uri, METADATA_URI)
        if type(metadata_fs) is not type(self._fs):
            raise InputError(
                f"{index_uri} and {self._metadata_uri} are on different kinds of storage: put the "
                "metadata on the storage of the index",
                METADATA_URI,
            )
        self.is_local = is_local(self._fs)
        self.reader = range_reader(self._fs, index_uri)

    def list(self) -> tuple[SourceFile, ...]:
        """List the current files of the index.

        Raises:
            InputError: the folder does not exist, cannot be listed, or holds no index or metadata.

        """
        found = self._find(self._root, self.index_uri, INDEX_URI)
        if PUBLISHING in found:
            raise InputError(
                f"{self.index_uri} is being replaced by a newer index: try again once its build has "
                "ended, or restart the build if it was killed",
                INDEX_URI,
            )
        index, lists = index_files(found, self.index_uri)
        used = [name for name in (index, lists, PUBLISHED_TABLES) if name and name in found]
        files = [source_file(self._fs, name, *found[name]) for name in used]
        below = f"{self._metadata_root}/"  # usually inside the index folder, and listed with it
        inside = {
            path.removeprefix(below): (path, info)
            for path, info in found.values()
            if path.startswith(below)
        }
        hdf5 = next((name for name in found if name.endswith((".hdf5", ".h5"))), None)
        if hdf5 and not inside:
            raise InputError(
                f"{self.index_uri} holds its metadata as HDF5 ({hdf5}), which is not read: convert it to "
                f"Parquet in the order of the ids, in {METADATA_FOLDER}/",
                METADATA_URI,
            )
        metadata = inside or self._find(self._metadata_root, self._metadata_uri, METADATA_URI)
        names = metadata_files((name for name in metadata if "/" not in name), self._metadata_uri)
        files += [source_file(self._fs, f"{METADATA_FOLDER}/{name}", *metadata[name]) for name in names]
        return tuple(files)

    def _find(self, root: str, uri: str, about: str) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """Return path and details of the files in a folder and its subfolders, by relative path."""
        with reaching(uri, about):
            found = find_files(self._fs, root, depth=2)
            if not found and not self._fs.isdir(root):
                raise InputError(f"there is no folder {uri}: create it, or correct the address", about)
        return {path.removeprefix(root).lstrip("/"): (path, info) for path, info in found.items()}


def source_file(fs: Any, name: str, path: str, info: Mapping[str, Any]) -> SourceFile:
    """Return a file from the listing of its file system.

    Args:
        fs: the file system.
        name: path of the file relative to the listed folder.
        path: path of the file in the file system.
        info: the listing's details of the file.

    """
    url = fs.unstrip_protocol(path)
    return SourceFile(name, url, path, info["size"], file_version(info), info.get("crc32c"))


def open_files(urls: Sequence[str]) -> tuple[RangeReader, list[str]]:
    """Return a reader for files on one kind of storage, and the path of each file there."""
    opened = [open_storage(url, INDEX_URI) for url in urls]
    return range_reader(opened[0][0], urls[0]), [path for _, path in opened]


def range_reader(fs: Any, uri: str) -> RangeReader:
    """Return the reader for the files of a location.

    Args:
        fs: its file system.
        uri: URI of a folder or file in it.

    """
    return GcsReader(fs) if uri.startswith(BUCKETS) else FsspecReader(fs)
