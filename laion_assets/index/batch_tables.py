"""Row counts of the record batches of Arrow files, kept in small files.

The builder of an index publishes those of all its files; of other indices, whoever opens a file first
reads its headers and keeps what they say.

An Arrow file states the rows of a batch in a header before that batch. LAION-5B's metadata has 89,264 of
them, all over two terabytes, and every step that opens the index would read them again.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laion_assets.io.arrays import Ids, Mask
from laion_assets.io.checksums import crc32c
from laion_assets.io.derived import keep
from laion_assets.io.errors import InputError
from laion_assets.io.text import json_object

CHECKSUM = struct.Struct("<I")  # crc32c, before everything else


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
    """Row counts of the batches of some files.

    Args:
        folder: folder where they are kept; created when the first is written.
        contents: size and checksum of each file, see `content_of`.
        published: the file of the index that holds them, if it has one.

    """

    def __init__(self, folder: Path, contents: Mapping[Path, str], published: Path | None = None) -> None:
        self._folder = folder
        self._contents = contents
        self._published = _read_published(published) if published else {}

    def read(self, path: Path, batches: int) -> BatchTable | None:
        """Return the table of a file; None if only one of other content or a damaged one is kept.

        Args:
            path: the file.
            batches: how many record batches its footer lists.

        """
        rows = self._published.get(self._contents[path])
        if rows is not None and len(rows) == batches:
            return BatchTable(rows, np.zeros(batches, np.bool_))
        try:
            kept = self._kept(path).read_bytes()
        except FileNotFoundError:
            return None
        head = self._head(path, batches)
        body = kept[CHECKSUM.size + len(head) :]
        if kept != _with_checksum(head + body) or len(body) != 9 * batches:
            return None
        counts = np.frombuffer(body, "<i8", batches)
        return BatchTable(counts, np.frombuffer(body, np.bool_, batches, 8 * batches))

    def write(self, path: Path, table: BatchTable) -> None:
        """Keep the table of a file; a folder that is read-only or full does without it."""
        head = self._head(path, len(table.rows))
        body = table.rows.astype("<i8").tobytes() + table.compressed.astype(np.bool_).tobytes()
        keep(self._kept(path), _with_checksum(head + body))

    def _head(self, path: Path, batches: int) -> bytes:
        return f"{self._contents[path]} {batches}\n".encode()

    def _kept(self, path: Path) -> Path:
        return self._folder / f"{path.name}.batches"


def _with_checksum(content: bytes) -> bytes:
    return CHECKSUM.pack(crc32c(content)) + content


def content_of(size: int, checksum: str) -> str:
    """Identify the content of a file by its size in bytes and its crc32c in base64."""
    return f"{size} {checksum}"


def published_table(files: Iterable[tuple[int, str, Sequence[int]]]) -> bytes:
    """Return the content of `PUBLISHED_TABLES`.

    Args:
        files: size, crc32c in base64, and rows of each uncompressed record batch, of each Arrow file.

    """
    return json.dumps({content_of(size, checksum): list(rows) for size, checksum, rows in files}).encode()


def _read_published(path: Path) -> dict[str, Ids]:
    try:
        tables = json_object(path.read_bytes())
        return {content: np.array(rows, np.int64) for content, rows in tables.items()}
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"{path} does not hold the row counts of record batches ({error}): remove it from the index",
            "staged_index",
        ) from error
