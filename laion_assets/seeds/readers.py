"""Read vectors from the content of one seed file; `READERS` has one function per file type."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from laion_assets.io.storage import first_line
from laion_assets.seeds.seed_files import UnusableFileError

EMBEDDING_COLUMNS = ("embedding", "image_embedding", "img_emb", "vector")
CARRIED_COLUMNS = {"url": pa.string(), "caption": pa.string(), "thumbnail": pa.binary()}

Columns: TypeAlias = Mapping[str, pa.ChunkedArray]


def read_npy(data: bytes) -> tuple[Any, Columns]:
    """Read a .npy file: one vector or a matrix of vectors. Pickled objects are never loaded.

    Args:
        data: the file's content.

    Returns:
        The array as stored, with a single vector as a matrix of one row; no columns.

    Raises:
        UnusableFileError: the content is not a complete .npy file of a plain array.

    """
    try:
        vectors = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a broken header raises whatever Python's tokenizer raises
        if "Object arrays" in str(error):
            raise UnusableFileError(
                "holds pickled objects, which are never loaded: save a plain array of numbers"
            ) from error
        raise UnusableFileError(f"is not a complete .npy file ({first_line(error)})") from error
    return (vectors[None] if vectors.ndim == 1 else vectors), {}


def read_parquet(data: bytes) -> tuple[Any, Columns]:
    """Read a Parquet file: its column of embeddings, and the columns that seed tables keep.

    Args:
        data: the file's content.

    Returns:
        (n, d) vectors as stored; the columns `url`, `caption` and `thumbnail` that the file has.

    Raises:
        UnusableFileError: the content is not a complete Parquet file with a column of embeddings.

    """
    try:
        table = pq.read_table(io.BytesIO(data))
        names = table.column_names
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UnusableFileError(f"is not a complete Parquet file ({first_line(error)})") from error
    column = next((name for name in EMBEDDING_COLUMNS if name in names), None)
    if column is None:
        raise UnusableFileError(
            f"has no embedding column (looked for {', '.join(EMBEDDING_COLUMNS)}; found "
            f"{', '.join(names)})"
        )
    carried = {
        name: _cast(table[name], name, kind) for name, kind in CARRIED_COLUMNS.items() if name in names
    }
    return matrix_of(table[column]), carried


READERS: Mapping[str, Callable[[bytes], tuple[Any, Columns]]] = {
    ".npy": read_npy,
    ".parquet": read_parquet,
}


def matrix_of(column: pa.ChunkedArray) -> Any:
    """Return a column of lists as a matrix (n, d) of its own dtype; null elements become NaN.

    Raises:
        UnusableFileError: the column does not hold lists of floating-point numbers, or lists are missing
            or differ in length.

    """
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise UnusableFileError(f"has embeddings of type {kind}, not lists of numbers")
    if not pa.types.is_floating(kind.value_type):
        raise UnusableFileError(f"has embeddings of {kind.value_type}, not of floating-point numbers")
    values = column.combine_chunks()
    missing = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
    if len(missing):
        raise UnusableFileError(*(f"row {row} has no embedding" for row in missing))
    lengths = values.value_lengths().to_numpy(zero_copy_only=False)
    odd = np.flatnonzero(lengths != lengths[:1])
    if len(odd):
        raise UnusableFileError(
            *(f"row {row} has {lengths[row]} dimensions, row 0 has {lengths[0]}" for row in odd)
        )
    flat = values.flatten()
    if flat.null_count:
        flat = flat.fill_null(float("nan"))
    return flat.to_numpy(zero_copy_only=False).reshape(len(values), lengths[0] if len(values) else 0)


def _cast(column: pa.ChunkedArray, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    try:
        return column.cast(kind)
    except pa.ArrowException as error:
        raise UnusableFileError(f"has a column {name!r} of type {column.type}, not {kind}") from error
