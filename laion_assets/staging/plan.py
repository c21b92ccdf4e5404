"""What staging has to do, from what is listed alone.

What must not live here: reading or writing anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from laion_assets.index.layout import read_in_parts
from laion_assets.staging.manifest import Manifest, StagedFile


@dataclass(frozen=True)
class Transfer:
    """How files are read.

    Attributes:
        chunk: bytes that are read, recorded and, if need be, read again as one.
        threads: chunks that are read at a time, of one file or of many.

    """

    chunk: int = 32 << 20
    threads: int = 16


@dataclass(frozen=True)
class SourceFile:
    """A file of the index where it comes from.

    Attributes:
        name: relative path in the staged index.
        url: with the protocol, for people and to tell sources apart.
        path: for the file system of the source.
        size: bytes.
        version: changes when the file is overwritten; empty where the source tells nothing of the kind.
        checksum: crc32c as the source reports it, in base64; None where it reports none.

    """

    name: str
    url: str
    path: str
    size: int
    version: str
    checksum: str | None


def version_of(files: Iterable[SourceFile]) -> str:
    """Return what changes with the name, size or content of any file at the source.

    Where a listing tells no checksums, the time of writing stands for the content.
    """
    lines = sorted(f"{file.name}\t{file.size}\t{file.checksum or file.version}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Chunk:
    """A part of a file: bytes `start` up to, not including, `stop`."""

    number: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """What staging has to do.

    Attributes:
        fetch: files that the disk does not hold as the source has them.
        lay_out: files of which parts will come when they are needed, and nothing is there yet.
        keep: files that it does, recorded as of the source of today.
        remove: files that the index no longer needs, or not as they are.

    """

    fetch: tuple[SourceFile, ...]
    lay_out: tuple[SourceFile, ...]
    keep: tuple[StagedFile, ...]
    remove: tuple[StagedFile, ...]

    @property
    def changes(self) -> bool:
        """Whether the disk is not yet as the source."""
        return bool(self.fetch or self.lay_out or self.remove)


def plan(
    source: Sequence[SourceFile],
    manifest: Manifest | None,
    sizes: Mapping[str, int],
    *,
    in_place: bool = False,
    sparse: bool = False,
) -> Plan:
    """Compare source and disk; a pure function.

    A staged file is current when its size is right, on the disk too, and the source reports the checksum
    that it has; where the source reports none, when its URL and version are those of the source.

    Args:
        source: files of the index where it comes from.
        manifest: of the cache directory, if there is one.
        sizes: bytes on disk of each file the manifest names, by name; absent when missing.
        in_place: whether the files are used where they are; those of a copy are then not needed.
        sparse: whether parts of files suffice, where parts can be read. A whole file does as well.

    """
    staged = {file.name: file for file in manifest.files} if manifest else {}

    def is_current(file: SourceFile) -> bool:
        there = staged.get(file.name)
        return (
            there is not None
            and there.path == staged_path(file, in_place)
            and sparse >= there.sparse
            and sizes.get(file.name) == there.size == file.size
            and _same_content(there, file)
        )

    current = {file.name for file in source if is_current(file)}
    missing = [file for file in source if file.name not in current]
    return Plan(
        fetch=tuple(file for file in missing if not (sparse and read_in_parts(file.name))),
        lay_out=tuple(file for file in missing if sparse and read_in_parts(file.name)),
        keep=tuple(
            replace(staged[file.name], source=file.url, version=file.version)
            for file in source
            if file.name in current
        ),
        remove=tuple(file for name, file in staged.items() if name not in current),
    )


def _same_content(there: StagedFile, file: SourceFile) -> bool:
    if file.checksum is not None:
        return there.checksum == file.checksum
    return (there.source, there.version) == (file.url, file.version)


def staged_path(file: SourceFile, in_place: bool) -> str:
    """Return where a file is staged to, as `StagedFile.path` has it."""
    return file.path if in_place else file.name


def chunks_of(size: int, chunk: int) -> list[Chunk]:
    """Cut a file into chunks, the last one shorter; an empty file is one empty chunk."""
    starts = range(0, max(size, 1), chunk)
    return [Chunk(number, start, min(start + chunk, size)) for number, start in enumerate(starts)]
