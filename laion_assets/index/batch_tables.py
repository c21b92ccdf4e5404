"""Row counts of the record batches of Arrow files, kept in small files.

An Arrow file states the rows of a batch in a header before that batch. LAION-5B's metadata has 89,264 of
them, all over two terabytes, and every step that opens the index would read them again.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laion_assets.io.arrays import Ids, Mask
from laion_assets.io.checksums import crc32c

CHECKSUM = struct.Struct("<I")  # crc32c, before everything else
CANNOT_BE_KEPT = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class BatchTable:
    """The record batches of a file.

    Attributes:
        rows: (n,) rows of each batch.
        compressed: (n,) whether its body is compressed.

    """

    rows: Ids
    compressed: Mask


class BatchTables:
    """Keeps the tables of some files in a folder.

    Args:
        folder: where they are kept; made when the first one is.
        contents: for each file, a text that changes with its content.

    """

    def __init__(self, folder: Path, contents: Mapping[Path, str]) -> None:
        self._folder = folder
        self._contents = contents

    def read(self, path: Path, batches: int) -> BatchTable | None:
        """Return the table of a file; None if none is kept, or one of another content, or a damaged one.

        Args:
            path: the file.
            batches: how many record batches its footer lists.

        """
        try:
            kept = self._kept(path).read_bytes()
        except FileNotFoundError:
            return None
        head = self._head(path, batches)
        body = kept[CHECKSUM.size + len(head) :]
        if kept != _with_checksum(head + body) or len(body) != 9 * batches:
            return None
        rows, compressed = (
            np.frombuffer(body, "<i8", batches),
            np.frombuffer(body, np.bool_, batches, 8 * batches),
        )
        return BatchTable(rows, compressed)

    def write(self, path: Path, table: BatchTable) -> None:
        """Keep the table of a file; a folder that is read-only or full does without it."""
        kept = self._kept(path)
        head = self._head(path, len(table.rows))
        body = table.rows.astype("<i8").tobytes() + table.compressed.astype(np.bool_).tobytes()
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            new = kept.with_name(f"{kept.name}.{os.getpid()}")
            new.write_bytes(_with_checksum(head + body))
            new.replace(kept)
        except OSError as error:
            if error.errno not in CANNOT_BE_KEPT:
                raise

    def _head(self, path: Path, batches: int) -> bytes:
        return f"{self._contents[path]} {batches}\n".encode()

    def _kept(self, path: Path) -> Path:
        return self._folder / f"{path.name}.batches"


def _with_checksum(content: bytes) -> bytes:
    return CHECKSUM.pack(crc32c(content)) + content
