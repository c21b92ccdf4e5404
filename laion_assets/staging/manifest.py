"""The manifest of a cache directory: its files, their source, and whether the files are complete."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from laion_assets.io.checksums import checksum_text, crc32c, fingerprint
from laion_assets.io.errors import InputError
from laion_assets.staging.transfer.disk import allocated_bytes, sync_folder

MANIFEST = "manifest.json"
CHECKSUM = "crc32c"  # of the other fields
VERSION = "version "  # in place of a checksum, before the version of a file that was not read whole


class NotStagedError(InputError):
    """The disk does not hold a complete staged index. The remedy is to stage it again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "staged_index")


@dataclass(frozen=True)
class StagedFile:
    """A file of the index on the local disk.

    Attributes:
        name: relative path in the staged index.
        path: path relative to the manifest; absolute if the source is used in place.
        source: URL of the source file.
        size: size in bytes.
        version: version of the source file.
        checksum: crc32c of its bytes in base64. It is a text with the version for a sparse file, or one
            used in place, whose source keeps no checksum.
        sparse: whether only parts of it are on the disk.

    """

    name: str
    path: str
    source: str
    size: int
    version: str
    checksum: str
    sparse: bool = False

    @property
    def has_checksum(self) -> bool:
        """Whether the checksum is one of bytes, and not a version."""
        return not self.checksum.startswith(VERSION)

    @property
    def is_copied(self) -> bool:
        """Whether it was copied whole, and so all of its bytes can be compared with checksums."""
        return self.has_checksum and not self.sparse


@dataclass(frozen=True)
class Manifest:
    """The contents of a cache directory.

    Attributes:
        source: URL of the index.
        files: files of the index on the disk.
        complete: whether the files are complete; False from before the first byte changes until after
            the last.

    """

    source: str
    files: tuple[StagedFile, ...]
    complete: bool

    @property
    def fingerprint(self) -> str:
        """A hash that changes only with the name, size or content of a file."""
        return fingerprint((file.name, file.size, file.checksum) for file in self.files)

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(file.size for file in self.files)

    def bytes_on_disk(self, cache: Path) -> int:
        """Return the bytes of all files that are on the disk; sparse files are only partly there."""
        sparse = (allocated_bytes(cache / file.path) for file in self.files if file.sparse)
        return sum(sparse) + sum(file.size for file in self.files if not file.sparse)

    @classmethod
    def read(cls, cache: Path) -> Manifest | None:
        """Read the manifest of a cache directory; None if there is none.

        Raises:
            NotStagedError: the manifest is damaged.

        """
        path = cache / MANIFEST
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text())
            if stored.pop(CHECKSUM) != _checksum_of(stored):
                raise ValueError("its checksum is wrong")
            files = tuple(StagedFile(**file) for file in stored["files"])
            manifest = cls(stored["source"], files, stored["complete"])
            manifest._check_types()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NotStagedError(
                f"{path} is damaged ({type(error).__name__}: {error}): stage the index again"
            ) from error
        return manifest

    def _check_types(self) -> None:
        own = (self.source, str), (self.complete, bool)
        sizes = ((file.size, int) for file in self.files)
        flags = ((file.sparse, bool) for file in self.files)
        texts = (
            (text, str)
            for file in self.files
            for text in (file.name, file.path, file.source, file.version, file.checksum)
        )
        for value, kind in chain(own, sizes, flags, texts):
            if type(value) is not kind:
                raise TypeError(f"{value!r} is not of type {kind.__name__}")

    def write(self, cache: Path) -> None:
        """Replace the manifest atomically and durably."""
        temporary = cache / f"{MANIFEST}.new"
        with temporary.open("w") as file:
            content = asdict(self)
            json.dump(content | {CHECKSUM: _checksum_of(content)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(cache / MANIFEST)
        sync_folder(cache)


def _checksum_of(fields: Mapping[str, Any]) -> str:
    return checksum_text(crc32c(json.dumps(fields, sort_keys=True).encode()))
