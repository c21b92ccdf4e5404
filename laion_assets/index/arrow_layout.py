"""The byte layout of an Arrow IPC file: locates its record batches and the bytes of a column's rows.

The layout is specified in https://arrow.apache.org/docs/format/Columnar.html and in the flatbuffer
schemas File.fbs and Message.fbs. Values are not decoded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from laion_assets.io.arrays import Ids
from laion_assets.io.ranges import Ranges, ranges_of

MAGIC = b"ARROW1"
TAIL = len(MAGIC) + 4  # the footer's length precedes the last magic
CONTINUATION = 0xFFFFFFFF  # begins a message since Arrow 0.15
FOOTER_BLOCK = np.dtype([("offset", "<i8"), ("header", "<i4"), ("_", "<i4"), ("body", "<i8")])
FOOTER_DICTIONARIES, FOOTER_BATCHES = 2, 3  # field numbers in the flatbuffer tables
MESSAGE_HEADER = 2
BATCH_LENGTH, BATCH_COMPRESSION = 0, 3


@dataclass(frozen=True)
class Blocks:
    """The locations of a file's messages.

    Attributes:
        headers: (n, 2) starts and stops of the record batches' headers, in row order.
        bodies: (n, 2) starts and stops of their bodies.
        dictionaries: ranges of all dictionaries.

    """

    headers: Ids
    bodies: Ids
    dictionaries: Ranges


def ends(size: int) -> Ranges:
    """Return the ranges at both ends of a file of `size` bytes, from which all others are located."""
    starts, stops = np.array([0, max(size - TAIL, 0)]), np.array([min(len(MAGIC), size), size])
    return ranges_of(starts, stops)


def footer(size: int, tail: bytes) -> Ranges:
    """Return the range from the footer to the end of the file.

    Args:
        size: size of the file in bytes.
        tail: its last bytes, at the range returned by `ends`.

    """
    length = int(np.frombuffer(tail, "<i4", 1)[0]) if len(tail) == TAIL else 0
    return ranges_of(np.array([max(size - TAIL - length, 0)]), np.array([size]))


def blocks(footer: bytes) -> Blocks:
    """Read the ranges of all messages from the footer; bytes after it are ignored."""
    table = _table(footer, _uint32(footer, 0))
    batches, dictionaries = (
        _blocks(footer, table(field)) for field in (FOOTER_BATCHES, FOOTER_DICTIONARIES)
    )
    stops = dictionaries["offset"] + dictionaries["header"] + dictionaries["body"]
    bodies = batches["offset"] + batches["header"]
    return Blocks(
        np.stack([batches["offset"], bodies], axis=1),
        np.stack([bodies, bodies + batches["body"]], axis=1),
        ranges_of(dictionaries["offset"], stops),
    )


def rows_and_compression(header: bytes) -> tuple[int, bool]:
    """Read from a record batch's header its number of rows and whether its body is compressed."""
    start = 8 if _uint32(header, 0) == CONTINUATION else 4
    message = _table(header[start:], _uint32(header, start))
    position = message(MESSAGE_HEADER)
    batch = _table(header[start:], position + _uint32(header[start:], position))
    length = batch(BATCH_LENGTH)
    rows = int(np.frombuffer(header, "<i8", 1, start + length)[0]) if length else 0
    return rows, bool(batch(BATCH_COMPRESSION))


def _uint32(data: bytes, at: int) -> int:
    return int(np.frombuffer(data, "<u4", 1, at)[0])


def _table(data: bytes, at: int) -> Callable[[int], int]:
    """Return a function from a field of a flatbuffer table to its position, 0 if it is absent."""
    vtable = at - int(np.frombuffer(data, "<i4", 1, at)[0])
    size = int(np.frombuffer(data, "<u2", 1, vtable)[0])

    def position(field: int) -> int:
        entry = 4 + 2 * field
        offset = int(np.frombuffer(data, "<u2", 1, vtable + entry)[0]) if entry < size else 0
        return at + offset if offset else 0

    return position


def _blocks(footer: bytes, position: int) -> NDArray[np.void]:
    if not position:
        return np.empty(0, FOOTER_BLOCK)
    vector = position + _uint32(footer, position)
    return np.frombuffer(footer, FOOTER_BLOCK, _uint32(footer, vector), vector + 4)


# --- rows of a column -----------------------------------------------------------------------------


def row_spans(column: pa.Array, rows: Ids) -> Iterator[tuple[Ids, Ids]]:
    """Yield the addresses of some rows' validity bits, and of their numbers or text offsets.

    A column of numbers needs nothing else. The text of a text column is located by `value_spans`. Nested
    columns and views are returned whole, because Arrow cannot take single rows of them.

    Args:
        column: a column of a memory-mapped batch; only its addresses are used, its data is not read.
        rows: (n,) row numbers.

    Yields:
        (starts, stops), each (m,) addresses in memory.

    """
    kind, buffers = column.type, column.buffers()
    bits = _bits_of_an_element(kind)
    if bits is None:
        present = [buffer for buffer in buffers if buffer is not None]
        starts = np.array([buffer.address for buffer in present], np.int64)
        yield starts, starts + np.array([buffer.size for buffer in present], np.int64)
        return
    if buffers[0] is not None:  # validity: one bit per row
        yield _bytes_of(buffers[0], rows, rows + 1, 1)
    if bits:
        yield _bytes_of(buffers[1], rows, rows + (2 if _offset_type(kind) else 1), bits)


def value_spans(column: pa.Array, rows: Ids) -> Iterator[tuple[Ids, Ids]]:
    """Yield the addresses of the text of some rows; the bytes at their `row_spans` must be present."""
    offset_type = _offset_type(column.type)
    if offset_type is None:
        return
    _, offsets_buffer, values = column.buffers()
    if values is None:
        return
    offsets = np.frombuffer(offsets_buffer, offset_type)
    yield tuple(values.address + offsets[edge].astype(np.int64) for edge in (rows, rows + 1))


def _bytes_of(buffer: pa.Buffer, first: Ids, stop: Ids, bits: int) -> tuple[Ids, Ids]:
    """Return the addresses of elements `first` to `stop`, each `bits` bits wide."""
    return buffer.address + first * bits // 8, buffer.address + (stop * bits + 7) // 8


def _offset_type(kind: pa.DataType) -> type[np.signedinteger[Any]] | None:
    """Return the offset type of a text or binary column; None for other columns."""
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return np.int32
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return np.int64
    return None


def _bits_of_an_element(kind: pa.DataType) -> int | None:
    """Return the bits per element of the second buffer; None if it is not an array of elements."""
    offset_type = _offset_type(kind)
    if offset_type is not None:
        return np.dtype(offset_type).itemsize * 8
    if pa.types.is_null(kind):
        return 0
    if pa.types.is_dictionary(kind):
        return int(kind.index_type.bit_width)
    if pa.types.is_primitive(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_decimal(kind):
        return int(kind.bit_width)
    return None
