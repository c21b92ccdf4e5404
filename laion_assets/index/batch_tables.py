"""Positions of the record batches of Arrow files and of their buffers, kept in small files.

The builder of an index publishes those of all its files; of other indices, whoever opens a file first
reads its headers and keeps what they say.

An Arrow file describes a batch in a header before that batch. LAION-5B's metadata has 89,264 of them, all
over two terabytes, and every step that opens the index or takes rows would read them again.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from laion_assets.index.arrow_layout import BatchTable
from laion_assets.io.arrays import Ids
from laion_assets.io.checksums import crc32c
from laion_assets.io.derived import keep
from laion_assets.io.errors import InputError

CHECKSUM = struct.Struct("<I")  # crc32c, before everything else
NUMBERS = pa.list_(pa.int64())
SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("rows", pa.int64()),
        ("compressed", pa.bool_()),
        ("starts", NUMBERS),
        ("sizes", NUMBERS),
    ]
)


class BatchTables:
    """Tables of the batches of some files.

    Args:
        folder: folder where they are kept; created when the first is written.
        contents: size and checksum of each file, see `content_of`.
        published: the file of the index that holds them, if it has one.

    """

    def __init__(self, folder: Path, contents: Mapping[Path, str], published: Path | None = None) -> None:
        self._folder = folder
        self._contents = contents
        self._published = _read_published(published) if published else SCHEMA.empty_table()

    def read(self, path: Path, batches: int) -> BatchTable | None:
        """Return the table of a file; None if none is kept, or a damaged one, or one of other content.

        Args:
            path: the file.
            batches: how many record batches its footer lists.

        """
        content = self._contents[path]
        published = self._published.filter(pc.field("file") == content)
        if len(published) == batches > 0:
            return _of_table(published)
        try:
            kept = self._kept(path).read_bytes()
        except FileNotFoundError:
            return None
        table = kept[CHECKSUM.size :]
        if kept != _with_checksum(table):
            return None
        try:
            found = _read(table).filter(pc.field("file") == content)
        except pa.ArrowException:  # another version of this package kept it
            return None
        return _of_table(found) if len(found) == batches > 0 else None

    def write(self, path: Path, table: BatchTable) -> None:
        """Keep the table of a file; a folder that is read-only or full does without it."""
        keep(self._kept(path), _with_checksum(table_as_parquet(self._contents[path], table)))

    def forget(self, path: Path) -> None:
        """Let the headers of a file be read again."""
        self._kept(path).unlink(missing_ok=True)

    def _kept(self, path: Path) -> Path:
        return self._folder / f"{path.name}.batches"


def _with_checksum(content: bytes) -> bytes:
    return CHECKSUM.pack(crc32c(content)) + content


def content_of(size: int, checksum: str) -> str:
    """Identify the content of a file by its size in bytes and its crc32c in base64."""
    return f"{size} {checksum}"


def table_as_parquet(content: str, table: BatchTable) -> bytes:
    """Return the table of a file as a Parquet file with a row for each batch.

    Args:
        content: identifies the content of the file, see `content_of`.
        table: its record batches.

    """
    file = [content] * len(table.rows)
    numbers = [_lists(table.starts), _lists(table.sizes)]
    return _parquet(pa.table([file, table.rows, table.compressed, *numbers], schema=SCHEMA))


def published_tables(tables: Iterable[bytes]) -> bytes:
    """Return the content of `PUBLISHED_TABLES`: the tables of all files in one.

    Args:
        tables: what `table_as_parquet` returned for each file.

    """
    return _parquet(pa.concat_tables([SCHEMA.empty_table(), *map(_read, tables)]))


def _parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    return file.getvalue()


def _read(content: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(content), schema=SCHEMA, page_checksum_verification=True)


def _lists(numbers: Ids) -> pa.Array:
    edges = np.arange(len(numbers) + 1, dtype=np.int32) * numbers.shape[1]
    return pa.ListArray.from_arrays(pa.array(edges), pa.array(numbers.ravel()))


def _of_table(table: pa.Table) -> BatchTable:
    starts, sizes = (_numbers(table[name]) for name in ("starts", "sizes"))
    return BatchTable(table["rows"].to_numpy(), table["compressed"].to_numpy(), starts, sizes)


def _numbers(lists: pa.ChunkedArray) -> Ids:
    """Return lists of one length as (n, length)."""
    whole = lists.combine_chunks()
    numbers: Ids = whole.flatten().to_numpy().reshape(len(whole), -1)
    return numbers


def _read_published(path: Path) -> pa.Table:
    try:
        return _read(path.read_bytes())
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} does not hold the positions of record batches ({error}): remove it from the index",
            "staged_index",
        ) from error
