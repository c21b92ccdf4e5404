"""Read footers, vector columns and metadata columns of Parquet files by ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from laion_assets.build.input_files import BadFileError, InputFiles, RangeFile
from laion_assets.io.storage import first_line
from laion_assets.io.text import list_shortly
from laion_assets.staging.transfer.files import SourceFile

VECTOR_BUFFER = 16 << 20  # bytes per request for a vector column
METADATA_BUFFER = 4 << 20  # bytes per request for a metadata column
FIRST_ROWS_BUFFER = 1 << 16  # bytes per request that only looks for the first vector
PIECE_NUMBERS = 4 << 20  # numbers of vectors decoded at a time
METADATA_ROWS = 1 << 15  # rows per batch


@dataclass(frozen=True)
class VectorColumn:
    """A column of vectors in a Parquet file.

    Attributes:
        name: name of the column.
        dimension: dimension of the vectors; None if the file has no vectors.
        groups: number of rows in each row group.

    """

    name: str
    dimension: int | None
    groups: tuple[int, ...]


def read_footer(files: InputFiles, file: SourceFile) -> tuple[pa.Schema, tuple[int, ...]]:
    """Read the schema of a file and the number of rows in each of its row groups.

    Raises:
        InputError: the file is not a complete Parquet file, or two columns have the same name.

    """
    with readable(file), _opened(files, file, METADATA_BUFFER) as parquet:
        schema = parquet.schema_arrow.remove_metadata()
        footer = parquet.metadata
        groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise BadFileError(f"{file.url} has two columns {twice[0]!r}: rename one")
    return schema, groups


def choose_column(schema: pa.Schema, url: str, key: str | None) -> str:
    """Return the name of the vector column.

    Args:
        schema: schema of the file.
        url: URL of the file, for messages.
        key: the column's name; None for the only column of vectors.

    Raises:
        InputError: the column is missing, or there are several columns of vectors.

    """
    columns = [field.name for field in schema if is_vectors(field.type)]
    name = key or (columns[0] if len(columns) == 1 else None)
    if name is None and columns:
        raise BadFileError(
            f"{url} has several columns of vectors ({list_shortly(columns, limit=20)}): name the one to "
            "use",
            "key",
        )
    if name is None or name not in schema.names:
        missing = f"no column {name!r}" if name else "no column of vectors, which are lists of floats"
        raise BadFileError(
            f"{url} has {missing} (found {list_shortly(schema.names, limit=20)}): name the column that "
            "holds the vectors, or the right folder",
            "key",
        )
    if name not in columns:
        raise BadFileError(
            f"{url} has {schema.field(name).type} in the column {name!r}: write lists of float16, "
            "float32 or float64, or name another column",
            "key",
        )
    return name


def is_vectors(kind: pa.DataType) -> bool:
    """Return whether a type is a list of floating-point numbers."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and pa.types.is_floating(kind.value_type))


def read_column(
    files: InputFiles, file: SourceFile, schema: pa.Schema, groups: tuple[int, ...], name: str
) -> VectorColumn:
    """Find the dimension of a vector column from its type or its first vector.

    Raises:
        InputError: the file cannot be read.

    """
    kind = schema.field(name).type
    if pa.types.is_fixed_size_list(kind):
        return VectorColumn(name, kind.list_size if sum(groups) else None, groups)
    dimension = None
    with readable(file), _opened(files, file, FIRST_ROWS_BUFFER) as parquet:
        for batch in parquet.iter_batches(64, columns=[name], use_threads=False):
            vectors = batch.column(0).drop_null()
            if len(vectors):
                dimension = vectors.value_lengths()[0].as_py()
                break
    return VectorColumn(name, dimension, groups)


def column_rows(
    files: InputFiles, file: SourceFile, column: VectorColumn, start: int, stop: int
) -> Iterator[NDArray[Any]]:
    """Yield the vectors of the rows from `start` to `stop` as stored, in pieces (n, d) of bounded size.

    A null vector is a row of NaN.

    Raises:
        InputError: the file cannot be read, has changed, or has a vector of another dimension.

    """
    ends = np.cumsum(column.groups, dtype=np.int64)
    firsts = ends - column.groups
    wanted = np.flatnonzero((ends > start) & (firsts < stop))
    if not len(wanted):
        return
    dimension = column.dimension or 0
    rows = max(PIECE_NUMBERS // max(dimension, 1), 1)
    at = int(firsts[wanted[0]])
    with readable(file), _opened(files, file, VECTOR_BUFFER) as parquet:
        batches = parquet.iter_batches(
            rows, row_groups=wanted.tolist(), columns=[column.name], use_threads=False
        )
        for batch in batches:
            first, last = max(start - at, 0), min(stop - at, len(batch))
            if first < last:
                part = batch.column(0).slice(first, last - first)
                yield _matrix(part, dimension, at + first, file.url)
            at += len(batch)
            if at >= stop:
                return


def metadata_batches(
    files: InputFiles, file: SourceFile, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Yield all rows of some columns, in order.

    Raises:
        InputError: the file cannot be read, or has changed.

    """
    with readable(file), _opened(files, file, METADATA_BUFFER) as parquet:
        for batch in parquet.iter_batches(METADATA_ROWS, columns=list(columns)):
            yield batch.select(list(columns))


@contextmanager
def readable(file: SourceFile) -> Iterator[None]:
    """Convert Arrow's errors in the block to an InputError with a remedy.

    Raises:
        InputError: the file is damaged, or Arrow cannot read it.

    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError):
            raise
        raise BadFileError(
            f"{file.url} is not a complete Parquet file ({first_line(error)}): write it again from its "
            "source"
        ) from error


def _opened(files: InputFiles, file: SourceFile, buffer: int) -> pq.ParquetFile:
    """Open a file whose columns are read in requests of `buffer` bytes instead of at once."""
    return pq.ParquetFile(RangeFile(files, file), buffer_size=buffer, pre_buffer=False)


def _matrix(column: pa.Array, dimension: int, first_row: int, url: str) -> NDArray[Any]:
    """Return lists as a matrix (n, d) of their own dtype; a null list is a row of NaN."""
    present = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = column.value_lengths().fill_null(dimension).to_numpy(zero_copy_only=False)
    odd = np.flatnonzero(lengths != dimension)
    if len(odd):
        raise BadFileError(
            f"row {first_row + odd[0]} of {url} has a vector of {lengths[odd[0]]} dimensions, the first "
            f"has {dimension}: give all rows vectors of one model, or null"
        )
    numbers = column.flatten()
    if numbers.null_count:
        numbers = numbers.cast(pa.float32()).fill_null(float("nan"))
    values = numbers.to_numpy(zero_copy_only=False)
    if present.all():
        matrix: NDArray[Any] = values.reshape(-1, dimension)
        return matrix
    matrix = np.full((len(column), dimension), np.nan, values.dtype)
    matrix[present] = values.reshape(-1, dimension)
    return matrix
