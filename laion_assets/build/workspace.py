"""The folder, on a disk or in a bucket, in which a build keeps its intermediate results."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from laion_assets.io.checksums import checksum_text, crc32c
from laion_assets.io.errors import InputError
from laion_assets.io.locks import locked
from laion_assets.io.storage import Sink, is_local, new_file, open_storage, reaching
from laion_assets.io.text import json_object

WORK_URI = "build_uri"  # the setting that errors name, see `InputError`
LOCK = ".lock"

Record = TypeVar("Record")


class Workspace:
    """A folder in which files appear only once they are complete.

    Args:
        uri: a local path or a URL; the folder need not exist.

    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._fs, self._root = open_storage(self.uri, WORK_URI)

    def __truediv__(self, name: str) -> Workspace:
        """Return a subfolder."""
        return Workspace(f"{self.uri}/{name}")

    def where(self, name: str) -> str:
        """Return the location of a file."""
        return f"{self.uri}/{name}"

    @property
    def local(self) -> Path | None:
        """The local path of the folder; None if it is remote."""
        return Path(self._root) if is_local(self._fs) else None

    def locked(self, log: Callable[[str], None]) -> AbstractContextManager[None]:
        """Wait for another build on this machine, then keep others out. Buckets have no locks.

        Args:
            log: called with a line if this has to wait.

        """
        if self.local is None:
            return nullcontext()
        return locked(self.local / LOCK, lambda: log(f"waiting for another build in {self.uri}"))

    def check_space(self, needed: int, what: str) -> None:
        """Check that there is enough free space; skipped for a bucket.

        Args:
            needed: bytes needed.
            what: what needs them, for the message.

        Raises:
            InputError: there is too little space.

        """
        if self.local is None:
            return
        free = shutil.disk_usage(existing(self.local)).free
        if needed > free:
            raise InputError(
                f"{self.uri} has {free:,} bytes free, {what} needs {needed:,}: free some space or use a "
                "larger disk",
                WORK_URI,
            )

    @contextmanager
    def new(self, name: str) -> Iterator[Sink]:
        """Write a file.

        Raises:
            InputError: there is too little space, or the folder is not writable.

        """
        with new_file(self.where(name), WORK_URI) as sink:
            yield sink

    def exists(self, name: str) -> bool:
        """Return whether a file exists."""
        with reaching(self.uri, WORK_URI):
            return bool(self._fs.exists(f"{self._root}/{name}"))

    def size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            InputError: the file is missing.

        """
        return int(self._info(name)["size"])

    def stored_checksum(self, name: str) -> str | None:
        """Return the crc32c of a file that its storage keeps; None if it keeps none."""
        return self._info(name).get("crc32c")

    def _info(self, name: str) -> dict[str, Any]:
        with reaching(self.uri, WORK_URI):
            try:
                info: dict[str, Any] = self._fs.info(f"{self._root}/{name}")
            except FileNotFoundError as error:
                raise self.damaged(name, "is missing") from error
        return info

    def read(
        self, name: str, start: int | None = None, stop: int | None = None, *, checksum: str | None = None
    ) -> bytes:
        """Read a file or a range of it.

        Args:
            name: name of the file.
            start: first byte; by default the start of the file.
            stop: byte after the last one; by default the end of the file.
            checksum: expected crc32c, formatted by `checksum_text`; None skips the check.

        Raises:
            InputError: the file is missing, shorter, or differs from the checksum.

        """
        with reaching(self.uri, WORK_URI):
            try:
                data: bytes = self._fs.cat_file(f"{self._root}/{name}", start=start, end=stop)
            except FileNotFoundError as error:
                raise self.damaged(name, "is missing") from error
        if stop is not None and len(data) != stop - (start or 0):
            raise self.damaged(name, "is truncated")
        if checksum is not None and checksum_text(crc32c(data)) != checksum:
            raise self.damaged(name, "differs from what was written")
        return data

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading in parts."""
        with reaching(self.uri, WORK_URI):
            file: BinaryIO = self._fs.open(f"{self._root}/{name}", "rb")
        return file

    def discard(self, name: str) -> None:
        """Remove a file if it exists."""
        with reaching(self.uri, WORK_URI):
            if self._fs.exists(f"{self._root}/{name}"):
                self._fs.rm_file(f"{self._root}/{name}")

    def remove(self) -> None:
        """Remove the folder with all its contents."""
        with reaching(self.uri, WORK_URI):
            if self._fs.exists(self._root):
                self._fs.rm(self._root, recursive=True)

    def damaged(self, name: str, problem: str) -> InputError:
        """Return the error for a damaged file."""
        return InputError(
            f"{self.where(name)} {problem}: remove {self.uri}; its contents are then rebuilt", WORK_URI
        )

    def write_json(self, name: str, content: Any) -> None:
        """Write a small record."""
        with self.new(name) as sink:
            sink.write(json.dumps(content, indent=1).encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a small record; None if there is none.

        Raises:
            InputError: the record is damaged.

        """
        if not self.exists(name):
            return None
        content = self.read(name)
        try:
            return json_object(content)
        except ValueError as error:
            raise self.damaged(name, f"is not JSON ({error})") from error

    def read_record(self, name: str, kind: Callable[..., Record]) -> Record | None:
        """Read a small record as a dataclass; None if there is none.

        Args:
            name: name of the file.
            kind: dataclass that is called with the fields by name.

        Raises:
            InputError: the record is damaged or has other fields.

        """
        stored = self.read_json(name)
        try:
            return None if stored is None else kind(**stored)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise self.damaged(name, f"has other fields than expected ({error})") from error

    def write_array(self, name: str, array: np.ndarray[Any, Any]) -> str:
        """Write an array as .npy and return its crc32c."""
        with self.new(name) as sink:
            np.save(sink, array, allow_pickle=False)
            return sink.checksum

    def read_array(self, name: str, checksum: str) -> np.ndarray[Any, Any]:
        """Read an array.

        Raises:
            InputError: the array is missing or damaged.

        """
        content = io.BytesIO(self.read(name, checksum=checksum))
        array: np.ndarray[Any, Any] = np.load(content, allow_pickle=False)
        return array


def existing(path: Path) -> Path:
    """Return the folder or its nearest existing parent."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
