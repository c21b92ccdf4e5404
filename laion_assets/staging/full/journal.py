"""The journal of a partial file lists its chunks that are on the disk, with their checksums.

The first line describes the file. Each further line holds the number of a chunk and the checksums of its
blocks, and is written once the chunk is durable. A line is only trusted after the chunk is read back and
compared, so a torn or outdated line costs one chunk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from laion_assets.staging.full.blocks import BLOCK
from laion_assets.staging.transfer.files import SourceFile

# A separate folder, because one form of an index has a file where another form has a folder.
INCOMING = ".incoming"
JOURNAL_SUFFIX = ".journal"
JOURNAL_LINE = re.compile(r"(\d+)((?: [0-9a-f]{8})*)\n")


def partial_path(cache: Path, name: str) -> Path:
    """Return the path of a file of the index while it is incomplete."""
    return cache / INCOMING / name


def journal_path(partial: Path) -> Path:
    """Return the path of the journal of a partial file."""
    return partial.with_name(f"{partial.name}{JOURNAL_SUFFIX}")


class Journal:
    """Records chunks; may be used by several threads.

    Args:
        partial: the partial file, which need not exist.
        file: the file to copy. A journal of another file is discarded with its partial file.
        chunk: size of a chunk in bytes.

    Attributes:
        recorded: checksums of the blocks of each chunk of earlier attempts, by its number.

    """

    def __init__(self, partial: Path, file: SourceFile, chunk: int) -> None:
        path = journal_path(partial)
        found = recorded_chunks(partial, file, chunk)
        self.recorded = found or {}
        if found is None:
            partial.unlink(missing_ok=True)  # before the journal, which is ignored without its file
            path.write_text(_header(file, chunk))
        self._lines = path.open("ab", buffering=0)  # unbuffered: each line is one write of one thread

    def record(self, number: int, checksums: Sequence[int]) -> None:
        """Record that a chunk is durable."""
        line = " ".join([str(number), *(f"{each:08x}" for each in checksums)])
        self._lines.write(f"{line}\n".encode())

    def close(self) -> None:
        """Close the journal."""
        self._lines.close()


def recorded_chunks(partial: Path, file: SourceFile, chunk: int) -> dict[int, list[int]] | None:
    """Return the checksums recorded for a partial file, see `Journal`; None if it cannot be resumed.

    This changes no file.
    """
    path = journal_path(partial)
    if not path.exists() or not partial.exists():
        return None
    header, *lines = path.read_text(errors="replace").splitlines(keepends=True) or [""]
    if header != _header(file, chunk):
        return None
    found = (JOURNAL_LINE.fullmatch(line) for line in lines)
    return {int(match[1]): [int(each, 16) for each in match[2].split()] for match in found if match}


def _header(file: SourceFile, chunk: int) -> str:
    header = {"source": file.url, "version": file.version, "size": file.size, "chunk": chunk}
    header |= {"block": BLOCK}
    return json.dumps(header) + "\n"
