"""Read vectors from the content of one seed file; `READERS` has one function per file type.

A small file cannot take much memory: only the needed columns are read, in batches, and their declared
unpacked size is first compared with the size of the file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from laion_assets.io.arrays import Floats, unit_rows
from laion_assets.io.parallel import slices
from laion_assets.io.storage import first_line
from laion_assets.io.text import count, decoded
from laion_assets.seeds.seed_files import UnusableFileError

EMBEDDING_COLUMNS = ("embedding", "image_embedding", "img_emb", "vector")
CARRIED_COLUMNS = {"url": pa.string(), "caption": pa.string(), "thumbnail": pa.binary()}
ROWS_AT_ONCE = 1 << 12
NUMBERS_AT_ONCE = 1 << 20
MAX_UNPACKED = 4 << 30  # bytes of vectors in one file
MAX_CARRIED = 1 << 30  # bytes of each carried column
EXPANSION = 100  # most bytes that a byte of a Parquet file may unpack to
SMALL = 64 << 20  # bytes that any Parquet file may unpack to
PROBLEMS_KEPT = 20  # of one file; others are counted


@dataclass(frozen=True)
class VectorFile:
    """The content of a seed file.

    Attributes:
        vectors: (n, d) float32 unit rows.
        columns: n values of the columns that seed tables keep.
        notes: phrases about values that were left out or replaced.

    """

    vectors: Floats
    columns: Mapping[str, pa.Array] = field(default_factory=dict)
    notes: Sequence[str] = ()


def read_npy(data: bytes) -> VectorFile:
    """Read a .npy file: one vector or a matrix of vectors. Pickled objects are never loaded.

    Args:
        data: the file's content.

    Raises:
        UnusableFileError: the content is not a complete .npy file of usable vectors.

    """
    stream = io.BytesIO(data)
    try:
        vectors = np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # a broken header raises whatever Python's tokenizer raises
        if "Object arrays" in str(error):
            raise UnusableFileError(
                "holds pickled objects, which are never loaded: save a plain array of numbers"
            ) from error
        raise UnusableFileError(f"is not a complete .npy file ({first_line(error)})") from error
    if rest := len(data) - stream.tell():
        raise UnusableFileError(
            f"has {count(rest, 'byte')} after its array of shape {vectors.shape}: save each array as a "
            "file"
        )
    del data, stream
    return VectorFile(checked_unit_rows(vectors[None] if vectors.ndim == 1 else vectors))


def read_parquet(data: bytes) -> VectorFile:
    """Read a Parquet file: its column of embeddings, and the columns that seed tables keep.

    Args:
        data: the file's content.

    Raises:
        UnusableFileError: the content is not a complete Parquet file with a column of usable vectors, or
            unpacks to too much.

    """
    try:
        return _vectors_in(pa.BufferReader(data))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UnusableFileError(f"is not a complete Parquet file ({first_line(error)})") from error


READERS: Mapping[str, Callable[[bytes], VectorFile]] = {".npy": read_npy, ".parquet": read_parquet}


def _vectors_in(source: pa.NativeFile) -> VectorFile:
    schema = pq.read_schema(source)
    source.seek(0)
    column = next((name for name in EMBEDDING_COLUMNS if name in schema.names), None)
    if column is None:
        raise UnusableFileError(
            f"has no embedding column (looked for {', '.join(EMBEDDING_COLUMNS)}; found "
            f"{', '.join(schema.names)})"
        )
    _item_type(schema.field(column).type)
    carried = [name for name, kind in CARRIED_COLUMNS.items() if _fits(schema, name, kind)]
    notes = [
        f"column {name} left out: it holds {schema.field(name).type}, not {kind}"
        for name, kind in CARRIED_COLUMNS.items()
        if name in schema.names and name not in carried
    ]
    # As dictionaries, repeated texts take memory only once.
    file = pq.ParquetFile(source, read_dictionary=carried, pre_buffer=False)
    _check_unpacked(file.metadata, [column, *carried], source.size())
    rows = file.metadata.num_rows
    vectors, kept, first = None, {name: list[pa.Array]() for name in carried}, 0
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column, *carried], use_threads=False):
        matrix = matrix_of(batch[column], first)
        if vectors is None:
            vectors = np.empty((rows, matrix.shape[1]), matrix.dtype)
        if matrix.shape[1] != vectors.shape[1]:
            raise UnusableFileError(_other_length(first, matrix.shape[1], vectors.shape[1]))
        vectors[first : first + len(batch)] = matrix
        for name, parts in kept.items():
            parts.append(batch[name])
        first += len(batch)
    if vectors is None:
        raise UnusableFileError("is empty (it has no rows)")
    columns = {}
    for name, parts in kept.items():
        columns[name], note = _plain(name, parts)
        notes += note
    return VectorFile(checked_unit_rows(vectors), columns, notes)


def _fits(schema: pa.Schema, name: str, wanted: pa.DataType) -> bool:
    if name not in schema.names:
        return False
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return bool(is_text or (is_bytes and wanted == pa.binary()))


def _check_unpacked(footer: pq.FileMetaData, names: Sequence[str], size: int) -> None:
    """Check that the unpacked size of the columns is plausible for the size of the file."""
    unpacked = 0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        chunks = [group.column(place) for place in range(group.num_columns)]
        wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in names]
        unpacked += sum(max(4 * chunk.num_values, chunk.total_uncompressed_size) for chunk in wanted)
    if unpacked > min(max(EXPANSION * size, SMALL), MAX_UNPACKED):
        raise UnusableFileError(
            f"has {size:,} bytes and unpacks to {unpacked:,}: remove repeated rows, or split the file"
        )


def _plain(name: str, parts: Sequence[pa.Array]) -> tuple[pa.Array, list[str]]:
    """Return a column as plain text or bytes, and notes about what was left out or replaced."""
    wanted = CARRIED_COLUMNS[name]
    encoded = [part if pa.types.is_dictionary(part.type) else part.dictionary_encode() for part in parts]
    size = sum(pc.sum(pc.binary_length(e.dictionary).take(e.indices)).as_py() or 0 for e in encoded)
    if size > MAX_CARRIED:
        rows = sum(map(len, parts))
        return pa.nulls(rows, wanted), [f"column {name} left out: it has {size:,} bytes"]
    if wanted == pa.binary():
        return pa.concat_arrays([e.dictionary.cast(wanted).take(e.indices) for e in encoded]), []
    plain, replaced = [], 0
    for each in encoded:
        texts, odd = decoded(each.dictionary)
        plain.append(texts.cast(wanted).take(each.indices))
        replaced += pc.sum(odd.take(each.indices)).as_py() or 0
    note = f"{count(replaced, 'value')} of {name} not UTF-8, of which bytes were replaced"
    return pa.concat_arrays(plain), [note] if replaced else []


def matrix_of(column: pa.Array | pa.ChunkedArray, first: int = 0) -> Any:
    """Return a column of lists or tensors as a matrix (n, d) of its own dtype; null elements become NaN.

    Args:
        column: n lists, or n tensors of any shape.
        first: number of its first row, for errors.

    Raises:
        UnusableFileError: the column does not hold floating-point numbers, or lists are missing or differ
            in length.

    """
    _item_type(column.type)
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    missing = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
    if len(missing):
        raise _problems(missing, lambda row: f"row {first + row} has no embedding")
    lengths = values.value_lengths().to_numpy(zero_copy_only=False)
    odd = np.flatnonzero(lengths != lengths[:1])
    if len(odd):
        raise _problems(odd, lambda row: _other_length(first + row, lengths[row], lengths[0]))
    flat = values.flatten()
    if flat.null_count:
        flat = flat.fill_null(float("nan"))
    return flat.to_numpy(zero_copy_only=False).reshape(len(values), lengths[0] if len(values) else 0)


def _item_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the numbers in a column of lists or tensors."""
    stored = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if not (
        pa.types.is_list(stored) or pa.types.is_large_list(stored) or pa.types.is_fixed_size_list(stored)
    ):
        raise UnusableFileError(f"has embeddings of type {kind}, not lists of numbers")
    if not pa.types.is_floating(stored.value_type):
        raise UnusableFileError(f"has embeddings of {stored.value_type}, not of floating-point numbers")
    return stored.value_type


def _other_length(row: int, length: int, expected: int) -> str:
    return f"row {row} has {length} dimensions, row 0 has {expected}"


def _problems(rows: Any, describe: Callable[[int], str]) -> UnusableFileError:
    """Return an error about several rows; only the first are described."""
    shown = [describe(int(row)) for row in rows[:PROBLEMS_KEPT]]
    return UnusableFileError(*shown, more=len(rows) - len(shown))


def checked_unit_rows(raw: Any) -> Floats:
    """Check the vectors of one file and scale them to unit length.

    Args:
        raw: (n, d) of any floating-point dtype.

    Returns:
        (n, d) float32.

    Raises:
        UnusableFileError: the shape or dtype is wrong, or a row is zero or not finite.

    """
    if raw.dtype.kind != "f":
        raise UnusableFileError(f"has dtype {raw.dtype}, not floating-point numbers")
    if raw.ndim != 2:
        raise UnusableFileError(f"has shape {raw.shape}: one vector (d,) or a matrix (n, d) is needed")
    if raw.size == 0:
        raise UnusableFileError(f"is empty (shape {raw.shape})")
    if 4 * raw.size > MAX_UNPACKED:
        raise UnusableFileError(
            f"has shape {raw.shape}, more than {MAX_UNPACKED:,} bytes: split the file"
        )
    vectors = np.empty(raw.shape, np.float32)
    unusable = []
    rows = max(1, NUMBERS_AT_ONCE // raw.shape[1])
    for some in slices(len(raw), rows):
        vectors[some], usable = unit_rows(raw[some])
        unusable.append(some.start + np.flatnonzero(~usable))
    wrong = np.concatenate(unusable)
    if len(wrong):
        raise _problems(wrong, lambda row: _problem(row, raw[row]))
    return vectors


def _problem(number: int, row: Any) -> str:
    with np.errstate(over="ignore"):
        is_zero = not np.square(row.astype(np.float64)).any()  # in float64, as in `unit_rows`
    return f"row {number} is all zeros" if is_zero else f"row {number} holds NaN or infinite values"
