"""The byte layout of an Arrow IPC file: locates its record batches and the buffers of their columns.

The layout is specified in https://arrow.apache.org/docs/format/Columnar.html and in the flatbuffer
schemas File.fbs and Message.fbs. Values are not decoded here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from laion_assets.io.arrays import Bytes, Ids, Mask
from laion_assets.io.ranges import Ranges, ranges_of

MAGIC = b"ARROW1"
TAIL = len(MAGIC) + 4  # the footer's length precedes the last magic
CONTINUATION = 0xFFFFFFFF  # begins a message since Arrow 0.15
FOOTER_BLOCK = np.dtype([("offset", "<i8"), ("header", "<i4"), ("_", "<i4"), ("body", "<i8")])
FOOTER_DICTIONARIES, FOOTER_BATCHES = 2, 3  # field numbers in the flatbuffer tables
MESSAGE_KIND, MESSAGE_HEADER = 1, 2
RECORD_BATCH = 3  # kind of a message
BATCH_LENGTH, BATCH_BUFFERS, BATCH_COMPRESSION = 0, 2, 3


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

    def of(self, batches: Ids) -> Blocks:
        """Return those of some record batches."""
        return Blocks(self.headers[batches], self.bodies[batches], self.dictionaries)


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


def blocks(footer: bytes, size: int) -> Blocks:
    """Read the ranges of all messages from the footer; bytes after it are ignored.

    Args:
        footer: of the file.
        size: size of the file in bytes.

    Raises:
        ValueError: a message is not within the file.

    """
    table = _table(footer, _uint32(footer, 0))
    batches, dictionaries = (
        _blocks(footer, table(field), size) for field in (FOOTER_BATCHES, FOOTER_DICTIONARIES)
    )
    stops = dictionaries["offset"] + dictionaries["header"] + dictionaries["body"]
    bodies = batches["offset"] + batches["header"]
    return Blocks(
        np.stack([batches["offset"], bodies], axis=1),
        np.stack([bodies, bodies + batches["body"]], axis=1),
        ranges_of(dictionaries["offset"], stops),
    )


@dataclass(frozen=True)
class BatchTable:
    """The record batches of a file.

    Attributes:
        rows: (n,) int64 rows of each batch.
        compressed: (n,) whether its body is compressed.
        starts: (n, b) int64 positions in the file of the batches' buffers, in the order of the schema;
            b is 0 if their number differs.
        sizes: (n, b) int64 bytes of each buffer.

    """

    rows: Ids
    compressed: Mask
    starts: Ids
    sizes: Ids

    def agrees(self, batches: Ids, found: BatchTable) -> bool:
        """Return whether some batches are as another table has them, and their buffers if known."""
        known = self.rows[batches], self.compressed[batches], self.starts[batches], self.sizes[batches]
        width = self.starts.shape[1]
        others = found.rows, found.compressed, found.starts[:, :width], found.sizes[:, :width]
        return all(map(np.array_equal, known, others))


def read_headers(blocks: Blocks, read: Callable[[Ids], Sequence[bytes]]) -> BatchTable:
    """Read the record batches' headers.

    Args:
        blocks: where the batches are.
        read: returns the bytes of the file between (n, 2) starts and stops.

    Raises:
        ValueError: a header is damaged.

    """
    lengths = blocks.headers[:, 1] - blocks.headers[:, 0]
    rows, compressed = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.bool_)
    headers, of_length = read(blocks.headers), {}
    for length in np.unique(lengths).tolist():
        some = np.flatnonzero(lengths == length)
        texts = b"".join(headers[number] for number in some.tolist())
        messages = _Flatbuffers(np.frombuffer(texts, np.uint8).reshape(len(some), length))
        rows[some], compressed[some], of_length[length] = _batches(messages)
    counts = {buffers.shape[1] for buffers in of_length.values()}
    buffers = np.zeros((len(lengths), counts.pop() if len(counts) == 1 else 0, 2), np.int64)
    if buffers.size:
        for length, found in of_length.items():
            buffers[lengths == length] = found
    starts, sizes = buffers[..., 0], buffers[..., 1]
    bodies = blocks.bodies[:, 1:] - blocks.bodies[:, :1]
    if (rows < 0).any() or (starts < 0).any() or (sizes < 0).any() or (starts > bodies - sizes).any():
        raise ValueError("a record batch's header is damaged")
    return BatchTable(rows, compressed, starts + blocks.bodies[:, :1], sizes)


def read_table(size: int, read: Callable[[int, int], bytes]) -> BatchTable:
    """Read the record batches of a file of which ranges can be read.

    Args:
        size: bytes of the file.
        read: returns the bytes of the file from a start to a stop.

    Raises:
        ValueError: the file is damaged.

    """
    ((start, stop),) = footer(size, read(max(size - TAIL, 0), size)).tolist()
    found = blocks(read(start, stop), size)
    return read_headers(found, lambda spans: [read(*edges) for edges in spans.tolist()])


def _batches(messages: _Flatbuffers) -> tuple[Ids, Mask, Ids]:
    """Return rows, compression, and (n, b, 2) offsets and sizes of buffers; b is 0 if it differs."""
    message = messages.follow(np.where(messages.read("<u4", 0) == CONTINUATION, 8, 4))
    kind = messages.field(message, MESSAGE_KIND)
    if not (kind > 0).all() or (messages.read("<u1", kind) != RECORD_BATCH).any():
        raise ValueError("a record batch's header is damaged")
    batch = messages.follow(messages.field(message, MESSAGE_HEADER))
    length, compression = messages.field(batch, BATCH_LENGTH), messages.field(batch, BATCH_COMPRESSION)
    rows = np.where(length > 0, messages.read("<i8", length), 0)
    vector = messages.follow(messages.field(batch, BATCH_BUFFERS))
    counts = np.unique(messages.read("<u4", vector))
    count = int(counts[0]) if len(counts) == 1 else 0
    buffers = messages.read_many("<i8", vector + 4, 2 * count).reshape(len(rows), count, 2)
    return rows, compression > 0, buffers


class _Flatbuffers:
    """Flatbuffers of one length, read side by side: positions are arrays with one for each.

    Args:
        content: (n, bytes of each) uint8.

    """

    def __init__(self, content: Bytes) -> None:
        self._content = content

    def read(self, kind: str, at: Ids | int) -> Ids:
        """Read a number of each at its position.

        Raises:
            ValueError: a position is outside.

        """
        return self.read_many(kind, np.broadcast_to(at, len(self._content)), 1)[:, 0]

    def read_many(self, kind: str, at: Ids, count: int) -> Ids:
        """Read `count` numbers of each, (n, count)."""
        dtype = np.dtype(kind)
        width = count * dtype.itemsize
        if len(at) and (at.min() < 0 or at.max() + width > self._content.shape[1]):
            raise ValueError("a record batch's header is damaged")
        found = np.take_along_axis(self._content, at[:, None] + np.arange(width), axis=1)
        return np.ascontiguousarray(found).view(dtype).reshape(len(at), count).astype(np.int64)

    def follow(self, at: Ids) -> Ids:
        """Return the positions to which the offsets at some positions point."""
        return at + self.read("<u4", at)

    def field(self, table: Ids, number: int) -> Ids:
        """Return the position of a field of tables, 0 where it is absent."""
        vtable = table - self.read("<i4", table)
        entry = 4 + 2 * number
        present = entry < self.read("<u2", vtable)
        offset = self.read("<u2", np.where(present, vtable + entry, vtable)) * present
        return np.where(offset > 0, table + offset, 0)


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


def _blocks(footer: bytes, position: int, size: int) -> NDArray[np.void]:
    if not position:
        return np.empty(0, FOOTER_BLOCK)
    vector = position + _uint32(footer, position)
    found = np.frombuffer(footer, FOOTER_BLOCK, _uint32(footer, vector), vector + 4)
    parts = np.array([found[name] for name in ("offset", "header", "body")], np.int64)
    if ((parts < 0) | (parts > size)).any() or (parts.sum(axis=0) > size).any():
        raise ValueError("its footer names messages outside of the file")
    if parts[1:].sum(dtype=np.float64) > size:
        raise ValueError("its footer names messages that overlap")
    return found


# --- columns --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column whose single rows can be located.

    Attributes:
        validity: number of the buffer with a bit per row, which is empty if no row is null.
        elements: number of the buffer with numbers, or with the offsets of texts.
        bits: bits of an element.
        texts: number of the buffer with texts; None for a column of numbers.
        kind: type of the column.

    """

    validity: int
    elements: int
    bits: int
    texts: int | None
    kind: pa.DataType


def buffer_numbers(schema: pa.Schema) -> dict[str, range] | None:
    """Return the numbers of each column's buffers; None if they differ from batch to batch."""
    numbers, first = {}, 0
    for field in schema:
        count = _buffers(field.type)
        if count is None:
            return None
        numbers[field.name] = range(first, first + count)
        first += count
    return numbers


def column(kind: pa.DataType, buffers: Sequence[int]) -> Column | None:
    """Return where the rows of a column are; None if single rows cannot be located.

    Args:
        kind: type of the column.
        buffers: numbers of its buffers.

    """
    offset_type = _offset_type(kind)
    if offset_type is not None:
        validity, elements, texts = buffers
        return Column(validity, elements, np.dtype(offset_type).itemsize * 8, texts, kind)
    if pa.types.is_primitive(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_decimal(kind):
        validity, elements = buffers
        return Column(validity, elements, int(kind.bit_width), None, kind)
    return None


def _buffers(kind: pa.DataType) -> int | None:
    """Return the number of buffers of a column; None if batches may have different numbers of them."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _buffers(kind.storage_type)
    if types.is_null(kind):
        return 0
    if types.is_dictionary(kind) or types.is_primitive(kind) or types.is_decimal(kind):
        return 2
    if types.is_fixed_size_binary(kind):
        return 2
    if _offset_type(kind) is not None:
        return 3
    own = 1 if types.is_struct(kind) or types.is_fixed_size_list(kind) else 2
    if types.is_nested(kind) and not (types.is_union(kind) or types.is_run_end_encoded(kind)):
        if types.is_list_view(kind) or types.is_large_list_view(kind):
            own = 3
        children = [_buffers(kind.field(number).type) for number in range(kind.num_fields)]
        return None if None in children else own + sum(filter(None, children))
    return None


def _offset_type(kind: pa.DataType) -> type[np.signedinteger[Any]] | None:
    """Return the offset type of a text or binary column; None for other columns."""
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return np.int32
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return np.int64
    return None
