"""Files at the source, as a listing describes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from laion_assets.io.checksums import fingerprint

# Details that change when a file is overwritten, best first; file systems spell them differently.
VERSION_KEYS = ("generation", "etag", "mtime", "last_modified", "lastmodified", "created")


@dataclass(frozen=True)
class SourceFile:
    """A file of the index at its source.

    Attributes:
        name: relative path in the staged index.
        url: with the protocol; identifies the file across sources.
        path: path in the file system of the source.
        size: bytes.
        version: changes when the file is overwritten; empty where the source reports nothing that does.
        checksum: crc32c in base64 as the source reports it; None if it keeps none.

    """

    name: str
    url: str
    path: str
    size: int
    version: str
    checksum: str | None


def version_of(files: Iterable[SourceFile]) -> str:
    """Return the version of a source: it changes with the name, size or content of any of its files.

    Where a listing has no checksums, file versions stand for the contents.
    """
    return fingerprint((file.name, file.size, file.checksum or file.version) for file in files)


def file_version(info: Mapping[str, Any]) -> str:
    """Return the detail of fsspec that changes when a file is overwritten; empty if there is none."""
    spelled = {key.lower(): value for key, value in info.items()}
    return next((str(spelled[key]) for key in VERSION_KEYS if spelled.get(key)), "")
