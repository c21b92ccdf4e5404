"""URL, caption and other columns of index rows, taken by id from Arrow or Parquet files.

Arrow files are memory-mapped. Each record batch is visited once per request, and only the requested rows
are copied. The kernel is told that reads are random, and threads wait for them: a cold read takes only
the pages that hold the rows.
"""

from __future__ import annotations

import mmap
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from laion_assets.index import arrow_layout
from laion_assets.index.batch_tables import BatchTable, BatchTables
from laion_assets.io.arrays import Ids, Mask
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import slices
from laion_assets.io.ranges import NO_RANGES, Disk, Hold, Ranges, WholeFiles, ranges_of, total, union

URL_COLUMNS = ("url", "URL", "image_url", "image_path")
CAPTION_COLUMNS = ("caption", "TEXT", "text", "alt")
THUMBNAIL_COLUMN = "thumbnail"
BATCHES_AT_ONCE = 4  # record batches, at most, from which a thread takes rows
READS = 8  # threads that wait for the disk; of more, most wait for the interpreter
TEXT_TYPES = (pa.string(), pa.null())
THUMBNAIL_TYPES = (pa.binary(), pa.null())
# Columns that people filter on; every table carries those that the metadata has.
CARRIED_METADATA = (
    "NSFW", "nsfw", "punsafe", "pwatermark", "LICENSE", "LANGUAGE", "language",
    "WIDTH", "HEIGHT", "width", "height", "original_width", "original_height", "aesthetic", "md5",
)  # fmt: skip


class MetadataFile(Protocol):
    """One metadata file as a sequence of batches."""

    path: Path
    schema: pa.Schema
    batch_lengths: Ids

    def describing(self, numbers: Ids) -> Ranges:
        """Return the byte ranges that describe some batches, by number: needed before anything else."""

    def needs(self, number: int, rows: Ids, columns: Sequence[str]) -> Iterator[Ranges]:
        """Yield the byte ranges that reading some rows of a batch needs.

        What describes the batch, and each yielded range, must be on the disk before the next is
        requested, because it holds the location of the next.

        Args:
            number: the batch.
            rows: (n,) rows of the batch.
            columns: the columns to read.

        """

    def batch(self, number: int, columns: Sequence[str]) -> pa.RecordBatch | pa.Table:
        """Return one batch with at least the named columns."""

    def layout(self, columns: Sequence[str]) -> BatchLayout:
        """Return what reading rows of the first batch reads; what describes it must be on the disk."""


@dataclass(frozen=True)
class BatchLayout:
    """What reading some rows of a batch reads.

    Attributes:
        rows: rows of the batch.
        always: bytes that are read for any row: its header, or all of a compressed batch.
        buffers: sizes in bytes of the buffers of which only the pages of the rows are read.

    """

    rows: int
    always: int
    buffers: tuple[int, ...] = ()


class ArrowFile:
    """An Arrow IPC file, memory-mapped for random reads.

    Not with Arrow's own mapping: it asks the kernel for all of a record batch, of which a request needs a
    few rows.
    """

    def __init__(self, path: Path, disk: Disk, tables: BatchTables | None) -> None:
        self.path = path
        try:
            with disk.hold() as held:
                self._open(held, tables)
        except (pa.ArrowInvalid, OSError, ValueError) as error:  # an empty file cannot be mapped
            raise _incomplete(path, "Arrow IPC", error) from error

    def _open(self, held: Hold, tables: BatchTables | None) -> None:
        size = self.path.stat().st_size
        held.need({self.path: arrow_layout.ends(size)})
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        mapped.madvise(mmap.MADV_RANDOM)
        self._all = pa.py_buffer(mapped)
        footer = arrow_layout.footer(size, self._all[max(size - arrow_layout.TAIL, 0) :])
        held.need({self.path: footer})
        self._of_thread = threading.local()
        self.schema: pa.Schema = self._reader().schema
        self._blocks = arrow_layout.blocks(self._all[int(footer[0, 0]) :])
        # The reader keeps neither in memory and reads both again for every batch.
        self._always = union(footer, self._blocks.dictionaries)
        kept = tables and tables.read(self.path, len(self._blocks.headers))
        if not kept:
            kept = self._read_headers(held)
            if tables:
                tables.write(self.path, kept)
        self.batch_lengths = kept.rows
        self._compressed = kept.compressed

    def _reader(self) -> pa.ipc.RecordBatchFileReader:
        """Return the reader of this thread: Arrow's are not safe for two, and would be waited for."""
        if not hasattr(self._of_thread, "reader"):
            self._of_thread.reader = pa.ipc.open_file(pa.BufferReader(self._all))
        return self._of_thread.reader

    def _read_headers(self, held: Hold) -> BatchTable:
        held.need({self.path: self.describing(np.arange(len(self._blocks.headers)))})
        headers = (self._all[start:stop] for start, stop in self._blocks.headers)
        rows, compressed = (
            np.array([arrow_layout.rows_and_compression(header) for header in headers], np.int64)
            .reshape(-1, 2)
            .T
        )
        return BatchTable(rows, compressed.astype(np.bool_))

    def describing(self, numbers: Ids) -> Ranges:
        """Return the ranges of the batches' headers, and what the reader reads again for every batch."""
        return union(self._always, ranges_of(*self._blocks.headers[numbers].T))

    def needs(self, number: int, rows: Ids, columns: Sequence[str]) -> Iterator[Ranges]:
        """Yield what describes the rows, then their values."""
        if self._compressed[number]:
            yield self._blocks.bodies[number : number + 1]
            return
        batch = self._reader().get_batch(number).select(list(columns))
        for spans_of in (arrow_layout.row_spans, arrow_layout.value_spans):
            spans = [ranges_of(*span) for column in batch.columns for span in spans_of(column, rows)]
            yield union(*spans) - self._all.address

    def batch(self, number: int, columns: Sequence[str]) -> pa.RecordBatch:  # noqa: ARG002
        """Return one record batch; nothing of it is read or copied before its columns are."""
        return self._reader().get_batch(number)

    def layout(self, columns: Sequence[str]) -> BatchLayout:
        """Return what reading rows of the first batch reads."""
        rows = int(self.batch_lengths[0])
        if self._compressed[0]:
            return BatchLayout(rows, total(self._blocks.bodies[:1]))
        batch = self._reader().get_batch(0).select(list(columns))
        buffers = (buffer for column in batch.columns for buffer in column.buffers())
        header = total(self._blocks.headers[:1])
        return BatchLayout(rows, header, tuple(each.size for each in buffers if each is not None))


class ParquetFile:
    """A Parquet file; its batches are its row groups."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
            self._one_at_a_time = threading.Lock()
        except (pa.ArrowInvalid, OSError) as error:
            raise _incomplete(path, "Parquet", error) from error
        self.schema: pa.Schema = self._file.schema_arrow
        groups = self._file.metadata
        self.batch_lengths = np.array(
            [groups.row_group(i).num_rows for i in range(groups.num_row_groups)], np.int64
        )

    def describing(self, numbers: Ids) -> Ranges:  # noqa: ARG002
        """Return nothing: the footer, which is in memory, describes all row groups."""
        return NO_RANGES

    def needs(self, number: int, rows: Ids, columns: Sequence[str]) -> Iterator[Ranges]:  # noqa: ARG002
        """Yield nothing: Parquet files are only read where they are complete."""
        return iter(())

    def batch(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Return one row group, unpacked."""
        with self._one_at_a_time:
            return self._file.read_row_group(number, columns=list(columns))

    def layout(self, columns: Sequence[str]) -> BatchLayout:
        """Return what reading rows of the first row group reads: all of its columns."""
        group = self._file.metadata.row_group(0)
        chunks = (group.column(number) for number in range(group.num_columns))
        read = sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
        return BatchLayout(group.num_rows, read)


class Metadata:
    """The metadata of an index: row i belongs to the image with id i.

    Args:
        paths: files of one format, in order of id.
        columns: the file's names of `url` and `caption` where they are not among the usual ones, for
            example `{"url": "image_link"}`.
        disk: fetches the parts of the files that are about to be read, where they are not complete.
        tables: keeps the row counts of the batches of Arrow files, which are then read once.

    Attributes:
        schema: the columns that `take` returns: `url`, `caption`, and those carried along.

    Raises:
        InputError: a file that cannot be read, no URL column, files with different columns, or columns
            whose types cannot be unified.

    """

    def __init__(
        self,
        paths: Sequence[Path],
        columns: Mapping[str, str] | None = None,
        disk: Disk | None = None,
        tables: BatchTables | None = None,
    ) -> None:
        self._disk = disk or WholeFiles()
        self._files: list[MetadataFile] = [_open(path, self._disk, tables) for path in paths]
        self._names = _column_names(self._files[0].schema, columns or {}, paths[0])
        for file in self._files:
            missing = [name for name in self._names.values() if name not in file.schema.names]
            if missing:
                raise InputError(
                    f"{file.path} has no column {missing[0]!r}, which {paths[0].name} has (found "
                    f"{', '.join(file.schema.names)}): all metadata files must have the same columns"
                )
        self.schema = _common_schema(self._files, self._names)
        lengths = [file.batch_lengths for file in self._files]
        self._starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        self._first_batch = np.concatenate([[0], np.cumsum([len(some) for some in lengths])])

    def __len__(self) -> int:
        """Rows; the highest id with metadata is one less."""
        return int(self._starts[-1])

    @property
    def batches(self) -> int:
        """Record batches or row groups of all files."""
        return len(self._starts) - 1

    def layout(self) -> BatchLayout:
        """Return what `take` reads of a batch, by the first batch."""
        file = next((file for file in self._files if len(file.batch_lengths)), None)
        if file is None:
            return BatchLayout(0, 0)
        columns = [self._names[name] for name in self._wanted(None) if name in self._names]
        with self._disk.hold() as held:
            held.need({file.path: file.describing(np.array([0]))})
            return file.layout(columns)

    def covers(self, ids: Ids) -> Mask:
        """Return which ids have a metadata row, shape (n,)."""
        return (ids >= 0) & (ids < len(self))

    def take(self, ids: Ids, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of some ids, in their order.

        Args:
            ids: (n,) in any order; repeats are allowed; all must be covered.
            columns: names from `schema`; all but the thumbnails when None.

        Raises:
            IndexError: an id has no metadata row (see `covers`).

        """
        if not self.covers(ids).all():
            raise IndexError("an id without a metadata row")
        wanted = self._wanted(columns)
        unique, back = np.unique(ids, return_inverse=True)
        batch_of = np.searchsorted(self._starts, unique, side="right") - 1
        edges = np.flatnonzero(np.diff(batch_of, prepend=-1, append=-1))
        rows_by_batch = {
            int(batch_of[first]): unique[first:last] - self._starts[batch_of[first]]
            for first, last in pairwise(edges)
        }
        with self._disk.hold() as held:
            self._fetch(held, rows_by_batch, wanted)
            schema = pa.schema([self.schema.field(name) for name in wanted])
            take = partial(self._take_from_batches, schema=schema)
            some = list(rows_by_batch.items())
            at_once = min(max(len(some) // READS, 1), BATCHES_AT_ONCE)
            parts = _readers().map(take, [some[part] for part in slices(len(some), at_once)])
            table = pa.concat_tables([schema.empty_table(), *parts])
        return table.take(pa.array(back))

    def _wanted(self, columns: Sequence[str] | None) -> list[str]:
        if columns is None:
            return [name for name in self.schema.names if name != THUMBNAIL_COLUMN]
        return list(columns)

    def _fetch(self, held: Hold, rows_by_batch: Mapping[int, Ids], wanted: list[str]) -> None:
        """Fetch the bytes that the rows need, in rounds: one range of every batch at a time.

        Of whole files only what describes the batches is read ahead; threads wait for the rows.
        """
        numbers = defaultdict(list)
        for number in rows_by_batch:
            file, number_in_file = self._batch(number)
            numbers[file].append(number_in_file)
        held.need({file.path: file.describing(np.array(some)) for file, some in numbers.items()})
        if self._disk.whole:
            return
        columns = [self._names[name] for name in wanted if name in self._names]
        remaining = []
        for number, rows in rows_by_batch.items():
            file, number_in_file = self._batch(number)
            remaining.append((file.path, file.needs(number_in_file, rows, columns)))
        while remaining:
            needed = defaultdict(list)
            following = [(path, needs, next(needs, None)) for path, needs in remaining]
            for path, _, ranges in following:
                if ranges is not None:
                    needed[path].append(ranges)
            held.need({path: union(*ranges) for path, ranges in needed.items()})
            remaining = [(path, needs) for path, needs, ranges in following if ranges is not None]

    def _batch(self, number: int) -> tuple[MetadataFile, int]:
        """Return the file of a batch, and its number there."""
        file = int(np.searchsorted(self._first_batch, number, side="right")) - 1
        return self._files[file], number - int(self._first_batch[file])

    def _take_from_batches(self, batches: Sequence[tuple[int, Ids]], schema: pa.Schema) -> pa.Table:
        return pa.concat_tables([self._take_from_batch(*batch, schema) for batch in batches])

    def _take_from_batch(self, number: int, rows: Ids, schema: pa.Schema) -> pa.Table:
        file, number_in_file = self._batch(number)
        batch = file.batch(number_in_file, [self._names[n] for n in schema.names if n in self._names])
        places = pa.array(rows)
        columns = [
            _taken(batch.column(self._names[field.name]), places, field.type)
            if field.name in self._names
            else pa.nulls(len(rows), field.type)
            for field in schema
        ]
        return pa.Table.from_arrays(columns, schema=schema)


@cache
def _readers() -> ThreadPoolExecutor:
    """Return threads that wait for the disk; starting them takes longer than a small request."""
    return ThreadPoolExecutor(READS, "metadata")


def _open(path: Path, disk: Disk, tables: BatchTables | None) -> MetadataFile:
    return ArrowFile(path, disk, tables) if path.suffix == ".arrow" else ParquetFile(path)


def _incomplete(path: Path, kind: str, error: Exception) -> InputError:
    return InputError(
        f"{path} is not a complete {kind} file ({error}): stage the index again, and if that does not "
        "help, replace the file at the source",
        "staged_index",
    )


def _column_names(schema: pa.Schema, given: Mapping[str, str], path: Path) -> dict[str, str]:
    """Map our column names to the file's."""
    names = schema.names
    for ours, theirs in given.items():
        if theirs not in names:
            raise InputError(
                f"{path} has no column {theirs!r}, to which {ours!r} is mapped: choose one of "
                f"{', '.join(names)}",
                "metadata_columns",
            )
    url = given.get("url") or next((name for name in URL_COLUMNS if name in names), None)
    if url is None:
        raise InputError(
            f"{path} has no URL column (looked for {', '.join(URL_COLUMNS)}; found "
            f"{', '.join(names)}): name it with url=<column>",
            "metadata_columns",
        )
    caption = given.get("caption") or next((n for n in CAPTION_COLUMNS if n in names), None)
    found = {"url": url}
    if caption is not None:
        found["caption"] = caption
    found |= {name: name for name in CARRIED_METADATA if name in names}
    if THUMBNAIL_COLUMN in names and plain_type(schema.field(THUMBNAIL_COLUMN).type) in THUMBNAIL_TYPES:
        found[THUMBNAIL_COLUMN] = THUMBNAIL_COLUMN
    return found


def _common_schema(files: Sequence[MetadataFile], names: Mapping[str, str]) -> pa.Schema:
    """Unify the types of all files: they differ where one has wider values, or none at all."""
    common = pa.schema({"url": pa.string(), "caption": pa.string()})
    for file in files:
        types = {ours: plain_type(file.schema.field(theirs).type) for ours, theirs in names.items()}
        for ours in ("url", "caption"):
            if types.get(ours, pa.string()) not in TEXT_TYPES:
                raise InputError(
                    f"column {names[ours]!r} of {file.path} holds {types[ours]}, not text: name the "
                    f"right one with {ours}=<column>",
                    "metadata_columns",
                )
        try:
            common = pa.unify_schemas([common, pa.schema(types)], promote_options="permissive")
        except pa.ArrowTypeError as error:
            raise InputError(
                f"{file.path} has column types that do not fit those of {files[0].path.name} ({error}): "
                "all metadata files must have the same columns"
            ) from error
    return common


def _taken(
    column: pa.Array | pa.ChunkedArray, rows: pa.Array, kind: pa.DataType
) -> pa.Array | pa.ChunkedArray:
    """Take rows of a column as a type. Of views of text and binary Arrow cannot take rows."""
    if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
        column = column.cast(plain_type(column.type))
    taken = column.take(rows)
    return taken if taken.type == kind else taken.cast(kind)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return text as string and binary as binary, whichever encoding a file uses."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind
