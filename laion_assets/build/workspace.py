"""The folder in which a build keeps what it has done: on a disk or in a bucket."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from laion_assets.io.errors import InputError
from laion_assets.io.storage import is_local, new_file, open_storage, reaching
from laion_assets.io.text import json_object

WORK_URI = "build_uri"  # what errors are about, see `InputError`


class Workspace:
    """A folder whose files appear when they are complete, or not at all.

    Args:
        uri: a local path or any fsspec URL; the folder need not exist.

    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._fs, self._root = open_storage(self.uri, WORK_URI)

    def __truediv__(self, name: str) -> Workspace:
        """Return a folder inside."""
        return Workspace(f"{self.uri}/{name}")

    def where(self, name: str) -> str:
        """Return the location of a file."""
        return f"{self.uri}/{name}"

    @property
    def local(self) -> Path | None:
        """The folder, where it is on this machine."""
        return Path(self._root) if is_local(self._fs) else None

    @contextmanager
    def new(self, name: str) -> Iterator[BinaryIO]:
        """Write a file."""
        with new_file(self.where(name), WORK_URI) as sink:
            yield sink

    def exists(self, name: str) -> bool:
        """Return whether a file is there."""
        with reaching(self.uri, WORK_URI):
            return bool(self._fs.exists(f"{self._root}/{name}"))

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        with reaching(self.uri, WORK_URI):
            return int(self._fs.info(f"{self._root}/{name}")["size"])

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Read a file, or some bytes of it.

        Raises:
            InputError: it is missing or shorter.

        """
        with reaching(self.uri, WORK_URI):
            try:
                data: bytes = self._fs.cat_file(f"{self._root}/{name}", start=start, end=stop)
            except FileNotFoundError as error:
                raise self.damaged(name, "is missing") from error
        if stop is not None and len(data) != stop - (start or 0):
            raise self.damaged(name, "is truncated")
        return data

    def remove(self) -> None:
        """Remove the folder and all in it."""
        with reaching(self.uri, WORK_URI):
            if self._fs.exists(self._root):
                self._fs.rm(self._root, recursive=True)

    def damaged(self, name: str, problem: str) -> InputError:
        """Return the error for a file that is not what was written."""
        return InputError(
            f"{self.where(name)} {problem}: remove {self.uri}, and what was in it is made again", WORK_URI
        )

    def write_json(self, name: str, content: Any) -> None:
        """Write a small record."""
        with self.new(name) as sink:
            sink.write(json.dumps(content, indent=1).encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a small record; None where there is none.

        Raises:
            InputError: it is damaged.

        """
        if not self.exists(name):
            return None
        try:
            return json_object(self.read(name))
        except ValueError as error:
            raise self.damaged(name, f"is not JSON ({error})") from error

    def write_array(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Write an array as .npy."""
        with self.new(name) as sink:
            np.save(sink, array, allow_pickle=False)

    def read_array(self, name: str) -> np.ndarray[Any, Any]:
        """Read an array.

        Raises:
            InputError: it is missing or damaged.

        """
        try:
            array: np.ndarray[Any, Any] = np.load(io.BytesIO(self.read(name)), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise self.damaged(name, f"is no array ({error})") from error
        return array
