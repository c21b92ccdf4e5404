"""One file of the metadata, as `Metadata` reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.io.arrays import Ids
from laion_assets.io.errors import InputError
from laion_assets.io.ranges import Ranges


class MetadataFile(Protocol):
    """One metadata file as a sequence of batches."""

    path: Path
    schema: pa.Schema
    batch_lengths: Ids

    def needs(self, batches: Ids, rows: Ids, columns: Sequence[str]) -> Iterator[Ranges]:
        """Yield the byte ranges that reading some rows needs.

        Each yielded range must be on the disk before the next is requested, because it holds the location
        of the next.

        Args:
            batches: (n,) ascending numbers of the rows' batches.
            rows: (n,) rows within their batches, ascending in each batch.
            columns: the columns to read.

        """

    def take(self, batches: Ids, rows: Ids, columns: Sequence[str]) -> list[pa.Array | pa.ChunkedArray]:
        """Return the values of some rows, whose bytes are on the disk, of each column.

        Args:
            batches: (n,) ascending numbers of the rows' batches.
            rows: (n,) rows within their batches.
            columns: the columns to read.

        Raises:
            InputError: the file is damaged.

        """

    def layout(self, columns: Sequence[str]) -> BatchLayout:
        """Return what reading rows of the first batch reads."""


@dataclass(frozen=True)
class BatchLayout:
    """What reading some rows of a batch reads.

    Attributes:
        rows: rows of the batch.
        always: bytes that are read for any row.
        buffers: sizes in bytes of the buffers of which only the pages of the rows are read.

    """

    rows: int
    always: int
    buffers: tuple[int, ...] = ()


def incomplete(path: Path, kind: str, error: Exception) -> InputError:
    """Return the error for a file that is not of its kind, or damaged."""
    return InputError(
        f"{path} is not a complete {kind} file ({error}): stage the index again, and if that does not "
        "help, replace the file at the source",
        "staged_index",
    )


def rows_of(column: pa.ChunkedArray, rows: pa.Array) -> pa.ChunkedArray:
    """Take rows of a column, also where Arrow cannot: of views, run ends, and more than 2 GiB of text."""
    kind = column.type
    if pa.types.is_run_end_encoded(kind):
        return rows_of(pa.chunked_array(map(pc.run_end_decode, column.chunks), kind.value_type), rows)
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.large_string())
    elif pa.types.is_binary(kind) or pa.types.is_binary_view(kind):
        column = column.cast(pa.large_binary())
    return column.take(rows)
