"""Seed files, and reads that refuse a file changed since it was listed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c

from laion_assets.io.checksums import checksum_text
from laion_assets.io.storage import first_line, is_local, is_regular

SEED_FILES_AT_ONCE = 64
SEED_BYTES_AT_ONCE = 64 << 20
MAX_BYTES = 4 << 30  # of one file
NOT_REGULAR = "neither a file nor a link to one: remove it"


@dataclass(frozen=True, slots=True)
class SeedFile:
    """One file of a seed set.

    Attributes:
        name: relative to the folder of the set.
        path: within its file system.
        size: bytes.
        checksum: crc32c of the content, base64, as a bucket reports it.

    """

    name: str
    path: str
    size: int
    checksum: str


class UnusableFileError(Exception):
    """One file cannot be used. Each problem is a phrase that follows the file's name.

    Attributes:
        problems: phrases such as "row 3 is all zeros".
        more: number of further problems.

    """

    def __init__(self, *problems: str, more: int = 0) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems
        self.more = more


def read_files(fs: Any, files: Sequence[SeedFile]) -> Iterator[tuple[SeedFile, bytes | OSError]]:
    """Read files and yield each with its content, or with its error if it is unreadable.

    Remote files are read concurrently.

    Args:
        fs: their file system.
        files: the files, in the order to yield them.

    """
    unreadable = OSError if is_local(fs) else FileNotFoundError
    for batch in _batches(files):
        refused = {file.path: refusal for file in batch if (refusal := _refusal(fs, file))}
        wanted = [file.path for file in batch if file.path not in refused]
        contents = dict(zip(wanted, fs.cat_ranges(wanted, None, None), strict=True)) | refused
        for file in batch:
            content = contents.pop(file.path)
            if isinstance(content, Exception) and not isinstance(content, unreadable):
                raise content
            yield file, content


def _refusal(fs: Any, file: SeedFile) -> OSError | None:
    if file.size > MAX_BYTES:
        return OSError(f"{file.size:,} bytes, at most {MAX_BYTES:,} are read: split the file")
    return None if is_regular(fs, file.path) else OSError(NOT_REGULAR)


def verified(content: bytes | OSError, file: SeedFile) -> bytes:
    """Return the content of a file if it is the one that was listed.

    Raises:
        UnusableFileError: the file could not be read, or has changed since it was listed.

    """
    if isinstance(content, FileNotFoundError):
        raise UnusableFileError("cannot be read (it is gone)") from content
    if isinstance(content, OSError):
        raise UnusableFileError(f"cannot be read ({first_line(content)})") from content
    if checksum_text(google_crc32c.Checksum(content)) != file.checksum:
        raise UnusableFileError("changed while it was being read; run again once it is complete")
    return content


def _batches(files: Sequence[SeedFile]) -> Iterator[list[SeedFile]]:
    batch: list[SeedFile] = []
    for file in files:
        batch.append(file)
        if (
            len(batch) == SEED_FILES_AT_ONCE
            or sum(seed_file.size for seed_file in batch) >= SEED_BYTES_AT_ONCE
        ):
            yield batch
            batch = []
    if batch:
        yield batch
