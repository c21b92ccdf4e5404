"""Where in an Arrow IPC file things lie: its record batches, and the bytes of some rows of a column.

Written down in https://arrow.apache.org/docs/format/Columnar.html and the flatbuffer schemas beside it,
File.fbs and Message.fbs. What must not live here: the values.
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
TAIL = len(MAGIC) + 4  # the footer's length comes before the last magic
CONTINUATION = 0xFFFFFFFF  # begins a message since Arrow 0.15
BLOCK = np.dtype([("offset", "<i8"), ("header", "<i4"), ("_", "<i4"), ("body", "<i8")])
FOOTER_DICTIONARIES, FOOTER_BATCHES = 2, 3  # numbers of the fields in their tables
MESSAGE_HEADER = 2
BATCH_LENGTH, BATCH_COMPRESSION = 0, 3


@dataclass(frozen=True)
class Blocks:
    """Where the messages of a file are.

    Attributes:
        headers: (n, 2) starts and stops of the record batches' headers, in order of the rows.
        bodies: (n, 2) likewise of what follows them.
        dictionaries: the ranges of all dictionaries.

    """

    headers: Ids
    bodies: Ids
    dictionaries: Ranges


def ends(size: int) -> Ranges:
    """Return what has to be there before anything else of a file of so many bytes can be looked for."""
    starts, stops = np.array([0, max(size - TAIL, 0)]), np.array([min(len(MAGIC), size), size])
    return ranges_of(starts, stops)


def footer(size: int, tail: bytes) -> Ranges:
    """Return where the footer is, to the end of the file, which its last bytes tell."""
    length = int(np.frombuffer(tail, "<i4", 1)[0]) if len(tail) == TAIL else 0
    return ranges_of(np.array([max(size - TAIL - length, 0)]), np.array([size]))


def blocks(footer: bytes) -> Blocks:
    """Read the places of all messages from the footer, and whatever follows it."""
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
    """Read from a record batch's header how many rows it has, and whether its body is compressed."""
    start = 8 if _uint32(header, 0) == CONTINUATION else 4
    message = _table(header[start:], _uint32(header, start))
    place = message(MESSAGE_HEADER)
    batch = _table(header[start:], place + _uint32(header[start:], place))
    length = batch(BATCH_LENGTH)
    rows = int(np.frombuffer(header, "<i8", 1, start + length)[0]) if length else 0
    return rows, bool(batch(BATCH_COMPRESSION))


def _uint32(data: bytes, at: int) -> int:
    return int(np.frombuffer(data, "<u4", 1, at)[0])


def _table(data: bytes, at: int) -> Callable[[int], int]:
    """Return what tells the place of each field of a flatbuffer table; 0 for one that is not there."""
    names = at - int(np.frombuffer(data, "<i4", 1, at)[0])
    size = int(np.frombuffer(data, "<u2", 1, names)[0])

    def place(field: int) -> int:
        entry = 4 + 2 * field
        offset = int(np.frombuffer(data, "<u2", 1, names + entry)[0]) if entry < size else 0
        return at + offset if offset else 0

    return place


def _blocks(footer: bytes, place: int) -> NDArray[np.void]:
    if not place:
        return np.empty(0, BLOCK)
    vector = place + _uint32(footer, place)
    return np.frombuffer(footer, BLOCK, _uint32(footer, vector), vector + 4)


# --- rows of a column -----------------------------------------------------------------------------


def places_of_rows(column: pa.Array, rows: Ids) -> Iterator[tuple[Ids, Ids]]:
    """Yield starts and stops, as addresses, of what tells about rows: of numbers, that is all.

    Of text it is where the values lie, see `places_of_values`. Kinds made of other columns, and views,
    of which Arrow cannot take rows, are wanted whole.

    Args:
        column: of a memory-mapped batch; only where it lies is looked at.
        rows: (n,) of its rows.

    """
    kind, buffers = column.type, column.buffers()
    wide = _bits_of_an_element(kind)
    if wide is None:
        there = [buffer for buffer in buffers if buffer is not None]
        starts = np.array([buffer.address for buffer in there], np.int64)
        yield starts, starts + np.array([buffer.size for buffer in there], np.int64)
        return
    if buffers[0] is not None:  # which rows are null
        yield _bytes_of(buffers[0], rows, rows + 1, 1)
    if wide:
        yield _bytes_of(buffers[1], rows, rows + (2 if _offsets_of(kind) else 1), wide)


def places_of_values(column: pa.Array, rows: Ids) -> Iterator[tuple[Ids, Ids]]:
    """Yield starts and stops, as addresses, of text; what `places_of_rows` tells has to be there."""
    wide = _offsets_of(column.type)
    if wide is None:
        return
    _, where, values = column.buffers()
    if values is None:
        return
    offsets = np.frombuffer(where, wide)
    yield tuple(values.address + offsets[edge].astype(np.int64) for edge in (rows, rows + 1))


def _bytes_of(buffer: pa.Buffer, first: Ids, beyond: Ids, bits: int) -> tuple[Ids, Ids]:
    """The bytes that hold elements of so many bits."""
    return buffer.address + first * bits // 8, buffer.address + (beyond * bits + 7) // 8


def _offsets_of(kind: pa.DataType) -> type[np.signedinteger[Any]] | None:
    """What says where the values are, in columns of text."""
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return np.int32
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return np.int64
    return None


def _bits_of_an_element(kind: pa.DataType) -> int | None:
    """Bits of an element of the second buffer; None for kinds that are not of that form."""
    offsets = _offsets_of(kind)
    if offsets is not None:
        return np.dtype(offsets).itemsize * 8
    if pa.types.is_null(kind):
        return 0
    if pa.types.is_dictionary(kind):
        return int(kind.index_type.bit_width)
    if pa.types.is_primitive(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_decimal(kind):
        return int(kind.bit_width)
    return None
