"""An Arrow IPC file of metadata, memory-mapped, of which single rows are read.

The positions of all buffers are read from the batches' headers once, and kept. numpy then gathers the
rows from the mapped file: it needs nothing else of a batch, and other threads run while it waits for the
disk. Arrow itself reads what has no single rows: compressed batches, and columns of other types than
numbers and text.

**Page tables.** The kernel keeps 4 KB of them for every 2 MB of a mapping in which something was read.
For rows all over files of LAION-5B's size these are gigabytes, which count towards a container's limit
until the mapping ends. So a large file is mapped anew for every few thousand values.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from laion_assets.index import arrow_layout
from laion_assets.index.arrow_layout import Column
from laion_assets.index.batch_tables import BatchTables
from laion_assets.index.metadata_file import BatchLayout, incomplete, rows_of
from laion_assets.io.arrays import Bytes, Ids, Mask
from laion_assets.io.descriptors import TOO_MANY_OPEN_FILES
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import slices
from laion_assets.io.ranges import Disk, Hold, Ranges, batched, members, ranges_of, total, union

NOT_OF_THE_FILE = {*TOO_MANY_OPEN_FILES, errno.ENOMEM}  # errors of the process that maps it
VALUES_AT_ONCE = 4096  # that are gathered from one mapping of a large file
GATHERED_AT_ONCE = 1 << 18  # bytes; numpy needs eight times as many to say where they are


class ArrowFile:
    """An Arrow IPC file, memory-mapped for random reads.

    Not with Arrow's own mapping: it asks the kernel for all of a record batch, of which a request needs a
    few rows.

    Args:
        path: the file.
        disk: fetches the parts of the file that are about to be read.
        tables: keeps the positions of the batches' buffers, which are then read once.
        small: a file of at most so many bytes is mapped only once.

    Raises:
        InputError: the file is damaged, or in Arrow's stream format.

    """

    def __init__(self, path: Path, disk: Disk, tables: BatchTables | None, small: int) -> None:
        self.path = path
        with self._naming_the_file(), disk.hold() as held:
            self._open(disk, held, tables, small)

    def _open(self, disk: Disk, held: Hold, tables: BatchTables | None, small: int) -> None:
        self._descriptor = os.open(self.path, os.O_RDONLY)
        close = weakref.finalize(self, os.close, self._descriptor)
        self._size = size = os.fstat(self._descriptor).st_size
        held.need({self.path: arrow_layout.ends(size)})
        mapped = self._map()
        self._check_format(mapped[: len(arrow_layout.MAGIC)])
        self._all = pa.py_buffer(mapped)
        self._mapped = mapped if size <= small else None
        footer = arrow_layout.footer(size, self._all[max(size - arrow_layout.TAIL, 0) :])
        held.need({self.path: footer})
        self._of_thread = threading.local()
        self.schema: pa.Schema = self._reader().schema
        self._blocks = arrow_layout.blocks(self._all[int(footer[0, 0]) :], size)
        # The reader keeps neither in memory and reads both again for every batch.
        self._always = union(footer, self._blocks.dictionaries)
        table = tables and tables.read(self.path, len(self._blocks.headers))
        if not table:
            table = arrow_layout.read_headers(self._blocks, partial(disk.read, self.path))
            if tables:
                tables.write(self.path, table)
        self._table = table
        self.batch_lengths = table.rows
        self._buffers = self._numbered_buffers()
        self._plain = {
            name: column
            for name, buffers in self._buffers.items()
            if (column := arrow_layout.column(self.schema.field(name).type, buffers))
        }
        self._check_sizes()
        if self._mapped:
            close()

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Convert errors of a damaged file."""
        try:
            yield
        except InputError:  # it could not be fetched, or is of the stream format
            raise
        except (pa.ArrowException, OSError, ValueError) as error:  # an empty file cannot be mapped
            if isinstance(error, OSError) and error.errno in NOT_OF_THE_FILE:
                raise
            raise incomplete(self.path, "Arrow IPC", error) from error

    def differs(self, disk: Disk, count: int) -> bool:
        """Read a few random headers again; whether one differs from what is known of it.

        Args:
            disk: reads them.
            count: number of headers.

        """
        batches = np.random.default_rng().permutation(len(self._blocks.headers))[:count]
        some = self._blocks.of(batches)
        with self._naming_the_file():
            found = arrow_layout.read_headers(some, partial(disk.read, self.path))
        return not self._table.agrees(batches, found)

    def _check_format(self, begin: bytes) -> None:
        """Refuse Arrow's stream format, which has no table of its batches.

        Args:
            begin: the first bytes of the file.

        Raises:
            InputError: the file is in that format.

        """
        if begin.startswith(arrow_layout.CONTINUATION.to_bytes(4, "little")):
            raise InputError(
                f"{self.path} is in Arrow's stream format, which Hugging Face's datasets writes and of "
                "which single rows cannot be read: write it at the source as Parquet, for example with "
                "`Dataset.to_parquet`, or with `pyarrow.ipc.new_file`",
                "metadata_uri",
            )

    def _numbered_buffers(self) -> dict[str, range]:
        """Return the numbers of each column's buffers; none if single buffers cannot be used."""
        numbers = arrow_layout.buffer_numbers(self.schema)
        count = sum(map(len, numbers.values())) if numbers else 0
        if not numbers or self._table.compressed.any() or count != self._table.starts.shape[1]:
            return {}
        return numbers

    def _check_sizes(self) -> None:
        """Check that buffers are as long as their batches' rows.

        Raises:
            ValueError: one is not.

        """
        rows, sizes = self._table.rows, self._table.sizes
        for name, column in self._plain.items():
            elements = rows + (column.texts is not None) * (rows > 0)
            valid = sizes[:, column.validity]
            short = (sizes[:, column.elements] * 8 < elements * column.bits) | (
                (valid > 0) & (valid * 8 < rows)
            )
            if short.any():
                raise ValueError(f"column {name!r} of batch {int(np.argmax(short))} is too short")

    def _reader(self) -> pa.ipc.RecordBatchFileReader:
        """Return the reader of this thread: Arrow's are not safe for two, and would be waited for."""
        if not hasattr(self._of_thread, "reader"):
            self._of_thread.reader = pa.ipc.open_file(pa.BufferReader(self._all))
        return self._of_thread.reader

    def _headers(self, batches: Ids) -> Ranges:
        """Return the ranges of batches' headers, and what the reader reads again for every batch."""
        return union(self._always, ranges_of(*self._blocks.headers[batches].T))

    # --- what is read -----------------------------------------------------------------------------

    def needs(self, batches: Ids, rows: Ids, columns: Sequence[str]) -> Iterator[Ranges]:
        """Yield where numbers and the positions of texts are, then where the texts are.

        Raises:
            InputError: a text is not within its batch.

        """
        plain = [self._plain[name] for name in columns if name in self._plain]
        spans = [span for column in plain for span in self._element_spans(column, batches, rows)]
        others = [name for name in columns if name not in self._plain]
        if others:
            spans += self._whole(np.unique(batches), others)
        yield union(*spans)
        with self._naming_the_file():
            texts = [self._texts(column, batches, rows) for column in plain if column.texts is not None]
        yield union(*(ranges_of(*places.T) for places in texts))

    def _whole(self, batches: Ids, columns: Sequence[str]) -> list[Ranges]:
        """Return what Arrow reads of batches for columns without single rows."""
        if not self._buffers:
            return [self._headers(batches), ranges_of(*self._blocks.bodies[batches].T)]
        numbers = np.concatenate([self._buffers[name] for name in columns]).astype(np.int64)
        starts = self._table.starts[batches][:, numbers].ravel()
        stops = starts + self._table.sizes[batches][:, numbers].ravel()
        return [self._headers(batches), ranges_of(starts, stops)]

    def _element_spans(self, column: Column, batches: Ids, rows: Ids) -> Iterator[Ranges]:
        first = self._table.starts[batches, column.elements]
        after = rows + (1 if column.texts is None else 2)
        yield ranges_of(first + rows * column.bits // 8, first + (after * column.bits + 7) // 8)
        some = self._table.sizes[batches, column.validity] > 0
        place = (self._table.starts[batches, column.validity] + rows // 8)[some]
        yield ranges_of(place, place + 1)

    def layout(self, columns: Sequence[str]) -> BatchLayout:
        """Return what reading rows of the first batch reads."""
        plain = [self._plain[name] for name in columns if name in self._plain]
        others = [name for name in columns if name not in self._plain]
        whole = self._whole(np.array([0]), others) if others else []
        always = max(sum(map(total, whole)) - total(self._always), 0)
        numbers = [
            number
            for column in plain
            for number in (column.validity, column.elements, column.texts)
            if number is not None
        ]
        sizes = self._table.sizes[0, numbers].tolist() if numbers else []
        return BatchLayout(int(self._table.rows[0]), always, tuple(filter(None, sizes)))

    # --- values -----------------------------------------------------------------------------------

    def take(self, batches: Ids, rows: Ids, columns: Sequence[str]) -> list[pa.Array | pa.ChunkedArray]:
        """Return the values of some rows, of each column."""
        with self._naming_the_file():
            others = [name for name in columns if name not in self._plain]
            found = dict(zip(others, self._taken_by_arrow(batches, rows, others), strict=True))
            return [
                self._gathered(self._plain[name], batches, rows) if name in self._plain else found[name]
                for name in columns
            ]

    def _taken_by_arrow(self, batches: Ids, rows: Ids, columns: Sequence[str]) -> list[pa.ChunkedArray]:
        if not columns:
            return []
        parts = []
        edges = np.flatnonzero(np.diff(batches, prepend=-1, append=-1))
        for first, last in pairwise(edges.tolist()):
            batch = pa.Table.from_batches([self._reader().get_batch(int(batches[first]))]).select(columns)
            for column in batch.columns:  # Arrow follows offsets wherever they point
                _as_bytes(column).validate(full=True)
            places = pa.array(rows[first:last])
            parts.append(pa.table([rows_of(column, places) for column in batch.columns], list(columns)))
        whole: list[pa.ChunkedArray] = pa.concat_tables(parts).columns
        return whole

    def _gathered(self, column: Column, batches: Ids, rows: Ids) -> pa.Array:
        valid = self._valid(column, batches, rows)
        validity = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
        if column.texts is not None:
            return self._gathered_texts(column, batches, rows, validity)
        starts = self._table.starts[batches, column.elements]
        if column.bits == 1:
            numbers = np.packbits(self._bits(starts, rows), bitorder="little")
        else:
            width = column.bits // 8
            numbers = self._gather(starts + rows * width, width)
        return pa.Array.from_buffers(column.kind, len(rows), [validity, pa.py_buffer(numbers)])

    def _gathered_texts(
        self, column: Column, batches: Ids, rows: Ids, validity: pa.Buffer | None
    ) -> pa.Array:
        places = self._texts(column, batches, rows)
        offsets = np.concatenate([[0], np.cumsum(places[:, 1] - places[:, 0])])
        parts = [self._bytes().take(members(some)) for some in batched(places, GATHERED_AT_ONCE)]
        values = np.concatenate([np.empty(0, np.uint8), *parts])
        text = pa.types.is_string(column.kind) or pa.types.is_large_string(column.kind)
        buffers = [validity, pa.py_buffer(offsets), pa.py_buffer(values)]
        kind = pa.large_string() if text else pa.large_binary()
        return pa.Array.from_buffers(kind, len(rows), buffers)

    def _texts(self, column: Column, batches: Ids, rows: Ids) -> Ids:
        """Return where the texts of rows are, (n, 2) starts and stops.

        Raises:
            ValueError: a text is not within its batch.

        """
        width = column.bits // 8
        starts = self._table.starts[batches, column.elements] + rows * width
        edges = self._gather(starts, 2 * width).view(f"<i{width}").astype(np.int64)
        sizes = self._table.sizes[batches, column.texts]
        if (edges[:, 0] < 0).any() or (edges[:, 0] > edges[:, 1]).any() or (edges[:, 1] > sizes).any():
            raise ValueError("the text of a row is not within its batch")
        return edges + self._table.starts[batches, column.texts][:, None]

    def _valid(self, column: Column, batches: Ids, rows: Ids) -> Mask:
        valid = np.ones(len(rows), np.bool_)
        some = self._table.sizes[batches, column.validity] > 0
        valid[some] = self._bits(self._table.starts[batches[some], column.validity], rows[some])
        return valid

    def _bits(self, starts: Ids, rows: Ids) -> Mask:
        bits: Mask = (self._gather(starts + rows // 8, 1)[:, 0] >> (rows % 8).astype(np.uint8) & 1) > 0
        return bits

    def _gather(self, starts: Ids, width: int) -> Bytes:
        """Return `width` bytes from each start, (n, width)."""
        parts = [
            self._bytes().take(starts[some, None] + np.arange(width))
            for some in slices(len(starts), VALUES_AT_ONCE)
        ]
        return np.concatenate([np.empty((0, width), np.uint8), *parts])

    def _bytes(self) -> Bytes:
        """Return the bytes of the file; those of a large file in a mapping of their own."""
        return np.frombuffer(self._mapped or self._map(), np.uint8)

    def _map(self) -> mmap.mmap:
        """Map the file for random reads.

        Raises:
            ValueError: it is empty, or was cut after it was opened.

        """
        mapped = mmap.mmap(self._descriptor, self._size, prot=mmap.PROT_READ)
        mapped.madvise(mmap.MADV_RANDOM)
        return mapped


def _as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text as bytes, which need not be UTF-8."""
    kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    return column.cast(kinds.get(column.type, column.type))
