"""A Parquet file of metadata. Its batches are its row groups. It is only read where it is complete."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from laion_assets.index.metadata_file import BatchLayout, incomplete, rows_of
from laion_assets.io.arrays import Ids
from laion_assets.io.ranges import Ranges

# What pyarrow raises for damaged files.
DAMAGE = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError)


class ParquetFile:
    """A Parquet file.

    Args:
        path: the file.

    Raises:
        InputError: the file is damaged.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            self._one_at_a_time = threading.Lock()
            self.schema: pa.Schema = self._file.schema_arrow
            groups = self._file.metadata
            self.batch_lengths = np.array(
                [groups.row_group(i).num_rows for i in range(groups.num_row_groups)], np.int64
            )
        except DAMAGE as error:
            raise incomplete(path, "Parquet", error) from error

    def needs(self, batches: Ids, rows: Ids, columns: Sequence[str]) -> Iterator[Ranges]:  # noqa: ARG002
        """Yield nothing: the file is complete."""
        return iter(())

    def take(self, batches: Ids, rows: Ids, columns: Sequence[str]) -> list[pa.ChunkedArray]:
        """Return the values of some rows, of each column; their row groups are unpacked whole."""
        try:
            parts = [
                self._taken(number, pa.array(rows[batches == number]), list(columns))
                for number in np.unique(batches).tolist()
            ]
        except DAMAGE as error:
            raise incomplete(self.path, "Parquet", error) from error
        whole: list[pa.ChunkedArray] = pa.concat_tables(parts).columns
        return whole

    def _taken(self, number: int, rows: pa.Array, columns: list[str]) -> pa.Table:
        with self._one_at_a_time:
            group = self._file.read_row_group(number, columns=columns).select(columns)
        if len(group) != self.batch_lengths[number]:
            raise ValueError(f"row group {number} has {len(group):,} rows")
        return pa.table([rows_of(column, rows) for column in group.columns], columns)

    def layout(self, columns: Sequence[str]) -> BatchLayout:
        """Return what reading rows of the first row group reads: all of its columns."""
        group = self._file.metadata.row_group(0)
        chunks = (group.column(number) for number in range(group.num_columns))
        read = sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
        return BatchLayout(group.num_rows, read)
