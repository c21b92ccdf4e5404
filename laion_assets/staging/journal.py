"""The journal beside a partial file: which chunks of it are on the disk, and their checksums.

One line for the file, then one for each chunk, written when the chunk is durable. What a line says is
believed only after the chunk was read back and compared, so a torn or stale line costs a chunk.
What must not live here: what the chunks hold.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from laion_assets.staging.plan import SourceFile

# A folder of its own, for an index of one form has a file where that of another has a folder.
INCOMING = ".incoming"
JOURNAL = ".journal"
LINE = re.compile(r"(\d+) ([0-9a-f]{8})\n")


def partial_of(cache: Path, name: str) -> Path:
    """Return where a file of the index is while it is not whole."""
    return cache / INCOMING / name


def journal_of(partial: Path) -> Path:
    """Return where its journal is."""
    return partial.with_name(f"{partial.name}{JOURNAL}")


class Journal:
    """Records chunks; many threads may.

    Args:
        partial: the partial file, which need not exist.
        file: what it becomes. The journal of anything else is thrown away, with the partial file.
        chunk: bytes of its chunks.

    Attributes:
        recorded: checksum by number of the chunks of earlier attempts.

    """

    def __init__(self, partial: Path, file: SourceFile, chunk: int) -> None:
        path = journal_of(partial)
        found = recorded_chunks(partial, file, chunk)
        self.recorded = found or {}
        if found is None:
            partial.unlink(missing_ok=True)  # first: a journal without its file says nothing
            path.write_text(_head(file, chunk))
        self._lines = path.open("ab", buffering=0)  # so that a line is one write, whichever thread's

    def record(self, number: int, checksum: int) -> None:
        """Note that a chunk is on the disk, durably."""
        self._lines.write(f"{number} {checksum:08x}\n".encode())

    def close(self) -> None:
        """Stop recording."""
        self._lines.close()


def recorded_chunks(partial: Path, file: SourceFile, chunk: int) -> dict[int, int] | None:
    """Return the checksums recorded for a partial file, by number; None where it is of no use.

    Only reads: it tells how much is left before anything is changed.
    """
    path = journal_of(partial)
    if not path.exists() or not partial.exists():
        return None
    head, *lines = path.read_text(errors="replace").splitlines(keepends=True) or [""]
    if head != _head(file, chunk):
        return None
    found = (LINE.fullmatch(line) for line in lines)
    return {int(match[1]): int(match[2], 16) for match in found if match}


def _head(file: SourceFile, chunk: int) -> str:
    head = {"source": file.url, "version": file.version, "size": file.size, "chunk": chunk}
    return json.dumps(head) + "\n"
