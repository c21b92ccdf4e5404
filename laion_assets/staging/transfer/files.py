"""Files at the source, as described by a listing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from laion_assets.io.checksums import fingerprint

# Details that change when a file is overwritten, best first; file systems use different names.
VERSION_KEYS = (
    "generation",
    "etag",
    "mtime",
    "last_modified",
    "last-modified",
    "lastmodified",
    "created",
)


@dataclass(frozen=True)
class SourceFile:
    """A file of the index at its source.

    Attributes:
        name: relative path in the staged index.
        url: URL with the protocol; identifies the file across sources.
        path: path in the file system of the source.
        size: size in bytes.
        version: a text that changes when the file is overwritten; empty if the source reports none.
        checksum: crc32c in base64 reported by the source; None if it keeps none.

    """

    name: str
    url: str
    path: str
    size: int
    version: str
    checksum: str | None


def version_of(files: Iterable[SourceFile]) -> str:
    """Return the version of a source, which changes with the name, size or content of any of its files.

    If a listing has no checksums, file versions are used in their place.
    """
    return fingerprint((file.name, file.size, file.checksum or file.version) for file in files)


def file_version(info: Mapping[str, Any]) -> str:
    """Return the detail of fsspec that changes when a file is overwritten; empty if there is none."""
    spelled = {key.lower(): value for key, value in info.items()}
    return next((str(spelled[key]) for key in VERSION_KEYS if spelled.get(key)), "")
