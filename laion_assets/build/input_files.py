"""List the input files of a build and read ranges of them."""

from __future__ import annotations

import errno
import io
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from laion_assets.io.arrays import Bytes
from laion_assets.io.errors import InputError
from laion_assets.io.storage import BUCKETS, find_files, is_regular, open_storage, reaching
from laion_assets.staging.transfer.fetch import TransferStats, read_range
from laion_assets.staging.transfer.files import SourceFile
from laion_assets.staging.transfer.range_readers import ChangedError
from laion_assets.staging.transfer.source import range_reader, source_file

URI = "uri"  # what errors are about, see `InputError`
DEPTH = 3  # levels of folders in which files are found, including the named folder
PART = 2 << 20  # bytes per request; longer reads are split into parallel requests
READ_THREADS = 8  # parallel requests of one long read
STREAM_WINDOW = PART * READ_THREADS  # bytes of a stream in memory

_log = logging.getLogger(__name__)


class BadFileError(InputError):
    """The content of one file cannot be used."""


class InputFiles:
    """A folder, or a single file, on a local path or at a URL.

    Every read returns the listed version of a file or fails: reads of a bucket name the listed
    generation, and elsewhere `check` compares versions after reading.

    Args:
        uri: the folder or file.
        log: called with a line about each retry, from any thread; by default Python's logging.

    Attributes:
        uri: the folder or file.
        stats: statistics of the reads.

    Raises:
        InputError: the kind of storage is unknown, or credentials for it are missing.

    """

    def __init__(self, uri: str, log: Callable[[str], None] | None = None) -> None:
        self.uri = uri
        self.stats = TransferStats()
        self._log = log or _log.warning
        self._halt = threading.Event()
        self._fs, self._root = open_storage(uri, URI)
        self._reader = range_reader(self._fs, uri)
        self._listed: dict[str, tuple[str, Mapping[str, Any]]] = {}

    def names(self) -> list[str]:
        """List the relative paths of the files in the folder and its subfolders.

        Files and folders whose names start with "." or "_" are left out.

        Raises:
            InputError: the folder does not exist or cannot be listed.

        """
        with reaching(self.uri, URI):
            found = find_files(self._fs, self._root, DEPTH)
            if not found and not self._fs.isdir(self._root):
                raise InputError(
                    f"there is no folder {self.uri}: correct the address, or put embeddings there", URI
                )
        for path, info in found.items():
            name = path.removeprefix(self._root).lstrip("/") or path.rpartition("/")[2]
            if not name.endswith("/") and all(part[0] not in "._" for part in name.split("/") if part):
                self._listed[name] = (path, info)
        return sorted(self._listed)

    def file(self, name: str) -> SourceFile:
        """Return a listed file.

        Raises:
            InputError: the file is gone or not a regular file.

        """
        path, info = self._listed[name]
        if not self.uri.startswith(BUCKETS):
            # Some listings lack the details that `check` compares, or describe links, not their targets.
            try:
                with reaching(self.uri, URI):
                    info = self._fs.info(path)
            except FileNotFoundError as error:
                raise BadFileError(
                    f"{self._fs.unstrip_protocol(path)} is gone or a dangling link: run again once "
                    "all files are there"
                ) from error
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise BadFileError(
                    f"{self._fs.unstrip_protocol(path)} is a link to itself: remove it"
                ) from error
        if info["type"] != "file" or not is_regular(self._fs, path):
            raise BadFileError(f"{self._fs.unstrip_protocol(path)} is not a regular file: remove it")
        return source_file(self._fs, name, path, info)

    def read(self, file: SourceFile, start: int, stop: int) -> Bytes:
        """Read the bytes from `start` to `stop`; long ranges are read in parallel requests.

        Raises:
            InputError: access is denied, every retry failed, or the file was changed or removed.

        """
        content = np.empty(stop - start, np.uint8)

        def fill(at: int) -> None:
            end = min(at + PART, stop)
            pieces = read_range(self._reader, file, at, end, self._halt, self._log, self.stats)
            for data, offset in pieces:
                there = offset - start
                content[there : there + len(data)] = np.frombuffer(data, np.uint8)

        parts = range(start, stop, PART)
        with _unchanged():
            if len(parts) <= 1:
                for at in parts:
                    fill(at)
            else:
                with ThreadPoolExecutor(min(len(parts), READ_THREADS), "read") as pool:
                    list(pool.map(fill, parts))
        return content

    def stream(self, file: SourceFile, start: int, stop: int) -> Iterator[Bytes]:
        """Yield the bytes from `start` to `stop` in pieces, see `read`."""
        for at in range(start, stop, STREAM_WINDOW):
            yield self.read(file, at, min(at + STREAM_WINDOW, stop))

    def check(self, file: SourceFile) -> None:
        """Check that the file has not changed since it was listed.

        Raises:
            InputError: the file was changed or removed.

        """
        with reaching(self.uri, URI), _unchanged():
            self._reader.check(file)


class RangeFile(io.RawIOBase):
    """A Python file object that reads ranges of an input file.

    Args:
        files: reads the ranges.
        file: the file.
        tail: number of bytes at its end that are read first and kept in memory.

    """

    def __init__(self, files: InputFiles, file: SourceFile, tail: int = 0) -> None:
        super().__init__()
        self._files = files
        self._file = file
        self._at = 0
        self._tail_start = max(file.size - tail, 0)
        self._tail = files.read(file, self._tail_start, file.size).tobytes()

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position and return it."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        if origin + offset < 0:
            raise OSError("position before the start of the file")
        self._at = origin + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes, fewer only at the end of the file; the whole rest if negative."""
        rest = max(self._file.size - self._at, 0)
        start, stop = self._at, self._at + (rest if size < 0 else min(size, rest))
        self._at = stop
        if start >= self._tail_start:
            return self._tail[start - self._tail_start : stop - self._tail_start]
        return self._files.read(self._file, start, stop).tobytes()


@contextmanager
def _unchanged() -> Iterator[None]:
    try:
        yield
    except ChangedError as error:
        raise InputError(
            f"{error.file.url} changed while it was being read ({error}): run again once it is complete"
        ) from error
