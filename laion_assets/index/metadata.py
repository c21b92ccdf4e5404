"""URL, caption and other columns of index rows, taken by id from Arrow or Parquet files.

Arrow files are memory-mapped and each record batch is visited once per request, in id order: nothing
is concatenated that was not asked for. What must not live here: knowledge of faiss or of Dagster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from laion_assets.index import arrow_layout
from laion_assets.io.arrays import Ids, Mask
from laion_assets.io.errors import InputError
from laion_assets.io.ranges import Disk, Hold, Ranges, WholeFiles, ranges_of, union

URL_COLUMNS = ("url", "URL", "image_url", "image_path")
CAPTION_COLUMNS = ("caption", "TEXT", "text", "alt")
THUMBNAIL_COLUMN = "thumbnail"
TEXT_TYPES = (pa.string(), pa.null())
PICTURE_TYPES = (pa.binary(), pa.null())
# Columns that later steps or people filter on; they travel along when the metadata has them.
TRAVELLING_COLUMNS = (
    "NSFW", "nsfw", "punsafe", "pwatermark", "LICENSE", "LANGUAGE", "language",
    "WIDTH", "HEIGHT", "width", "height", "original_width", "original_height", "aesthetic", "md5",
)  # fmt: skip


class Rows(Protocol):
    """One metadata file as a sequence of batches."""

    path: Path
    schema: pa.Schema
    batch_lengths: list[int]

    def needs(self, number: int, places: Ids, columns: Sequence[str]) -> Iterator[Ranges]:
        """Yield what has to be on the disk to take some rows of a batch.

        What is yielded first must be there before the next is asked for: it tells where that is.

        Args:
            number: of the batch.
            places: (n,) of the rows in it.
            columns: that will be taken.

        """

    def batch(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Return one batch, only the columns named."""


class ArrowRows:
    """An Arrow IPC file, memory-mapped."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        try:
            with disk.hold() as held:
                self._open(held)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"{path} is not a whole Arrow IPC file ({error}): stage the index again, and if it "
                "stays, copy the file to the source again"
            ) from error

    def _open(self, held: Hold) -> None:
        size = self.path.stat().st_size
        held.need({self.path: arrow_layout.ends(size)})
        mapped = pa.memory_map(str(self.path))
        self._all = mapped.read_buffer()
        footer = arrow_layout.footer(size, self._all[max(size - arrow_layout.TAIL, 0) :])
        held.need({self.path: footer})
        self._reader = pa.ipc.open_file(mapped)
        self.schema: pa.Schema = self._reader.schema
        self._blocks = arrow_layout.blocks(self._all[int(footer[0, 0]) :])
        # The reader keeps neither in memory: it looks them up whenever it reads.
        self._always = union(footer, self._blocks.dictionaries)
        held.need({self.path: union(self._always, ranges_of(*self._blocks.headers.T))})
        headers = (self._all[start:stop] for start, stop in self._blocks.headers)
        told = [arrow_layout.rows_and_compression(header) for header in headers]
        self.batch_lengths = [rows for rows, _ in told]
        self._compressed = [compressed for _, compressed in told]

    def needs(self, number: int, places: Ids, columns: Sequence[str]) -> Iterator[Ranges]:
        """Yield what describes the batch, then what describes the rows, then their values."""
        yield union(self._always, self._blocks.headers[number : number + 1])
        if self._compressed[number]:
            yield self._blocks.bodies[number : number + 1]
            return
        batch = self._reader.get_batch(number).select(list(columns))
        for places_of in (arrow_layout.places_of_rows, arrow_layout.places_of_values):
            spans = [ranges_of(*span) for column in batch.columns for span in places_of(column, places)]
            yield union(*spans) - self._all.address

    def batch(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Return one record batch without copying it."""
        batch = self._reader.get_batch(number).select(list(columns))
        return pa.Table.from_batches([batch])


class ParquetRows:
    """A Parquet file; a batch is a row group."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"{path} is not a whole Parquet file ({error}): stage the index again, and if it "
                "stays, copy the file to the source again"
            ) from error
        self.schema: pa.Schema = self._file.schema_arrow
        groups = self._file.metadata
        self.batch_lengths = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]

    def needs(self, number: int, places: Ids, columns: Sequence[str]) -> Iterator[Ranges]:  # noqa: ARG002
        """Yield nothing: such a file is only ever read where all of it is there."""
        return iter(())

    def batch(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Return one row group, unpacked."""
        return self._file.read_row_group(number, columns=list(columns)).select(list(columns))


class Metadata:
    """The metadata of an index: row i is the image with id i.

    Args:
        paths: files of one format, in id order.
        columns: where to find `url` and `caption` when not under one of the usual names,
            for example `{"url": "image_link"}`.
        disk: is told which parts of the files are about to be read.

    Attributes:
        schema: columns as `take` returns them: `url`, `caption` and those that travel along.

    Raises:
        InputError: a file that cannot be read, no URL column, files with different columns, or columns
            whose types cannot be brought together.

    """

    def __init__(
        self, paths: Sequence[Path], columns: Mapping[str, str] | None = None, disk: Disk | None = None
    ) -> None:
        self._disk = disk or WholeFiles()
        self._files: list[Rows] = [_open(path, self._disk) for path in paths]
        self._names = _column_names(self._files[0].schema, columns or {}, paths[0])
        for path, rows in zip(paths, self._files, strict=True):
            missing = [name for name in self._names.values() if name not in rows.schema.names]
            if missing:
                raise InputError(
                    f"{path} has no column {missing[0]!r}, which {paths[0].name} has: the metadata "
                    f"files must have the same columns (found {', '.join(rows.schema.names)})"
                )
        self.schema = _common_schema(paths, self._files, self._names)
        lengths = [length for rows in self._files for length in rows.batch_lengths]
        self._batches = [
            (rows, number) for rows in self._files for number in range(len(rows.batch_lengths))
        ]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        """Rows, which is one more than the highest id that has metadata."""
        return int(self._starts[-1])

    def covers(self, ids: Ids) -> Mask:
        """Tell which ids have a metadata row."""
        return (ids >= 0) & (ids < len(self))

    def take(self, ids: Ids, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of the ids given, in their order.

        Args:
            ids: shape (n,), any order, repeats allowed, all covered.
            columns: names out of `schema`; all but the thumbnails when None.

        Raises:
            IndexError: an id has no metadata row (ask `covers` first).

        """
        if not self.covers(ids).all():
            raise IndexError("an id without a metadata row")
        wanted = self._wanted(columns)
        unique, back = np.unique(ids, return_inverse=True)
        batch_of = np.searchsorted(self._starts, unique, side="right") - 1
        edges = np.flatnonzero(np.diff(batch_of, prepend=-1, append=-1))
        of_batches = {
            int(batch_of[first]): unique[first:last] - self._starts[batch_of[first]]
            for first, last in pairwise(edges)
        }
        with self._disk.hold() as held:
            self._need(held, of_batches, wanted)
            parts = [self._take_from_batch(*batch, wanted) for batch in of_batches.items()]
        schema = pa.schema([self.schema.field(name) for name in wanted])
        table = pa.concat_tables(parts) if parts else schema.empty_table()
        return table.take(pa.array(back))

    def _wanted(self, columns: Sequence[str] | None) -> list[str]:
        if columns is None:
            return [name for name in self.schema.names if name != THUMBNAIL_COLUMN]
        return list(columns)

    def _need(self, held: Hold, of_batches: Mapping[int, Ids], wanted: list[str]) -> None:
        """See that what will be taken is on the disk, a round for all batches at a time."""
        if self._disk.whole:
            return
        columns = [self._names[name] for name in wanted if name in self._names]
        asking = []
        for number, places in of_batches.items():
            rows, number_in_file = self._batches[number]
            asking.append((rows.path, rows.needs(number_in_file, places, columns)))
        while asking:
            needed = defaultdict(list)
            asked = [(path, needs, next(needs, None)) for path, needs in asking]
            for path, _, ranges in asked:
                if ranges is not None:
                    needed[path].append(ranges)
            held.need({path: union(*some) for path, some in needed.items()})
            asking = [(path, needs) for path, needs, ranges in asked if ranges is not None]

    def _take_from_batch(self, number: int, places: Ids, wanted: list[str]) -> pa.Table:
        rows, number_in_file = self._batches[number]
        there = [name for name in wanted if name in self._names]
        batch = rows.batch(number_in_file, [self._names[name] for name in there]).rename_columns(there)
        columns = [
            _without_views(batch.column(field.name)).take(pa.array(places)).cast(field.type)
            if field.name in there
            else pa.nulls(len(places), field.type)
            for field in (self.schema.field(name) for name in wanted)
        ]
        return pa.table(columns, names=wanted)


def _open(path: Path, disk: Disk) -> Rows:
    return ArrowRows(path, disk) if path.suffix == ".arrow" else ParquetRows(path)


def _column_names(schema: pa.Schema, given: Mapping[str, str], path: Path) -> dict[str, str]:
    """Map our column names to the file's."""
    names = schema.names
    for ours, theirs in given.items():
        if theirs not in names:
            raise InputError(
                f"{path} has no column {theirs!r}, named for {ours!r} by LAION_METADATA_COLUMNS: "
                f"it has {', '.join(names)}"
            )
    url = given.get("url") or next((name for name in URL_COLUMNS if name in names), None)
    if url is None:
        raise InputError(
            f"{path} has no URL column (looked for {', '.join(URL_COLUMNS)}; found "
            f"{', '.join(names)}): name it with LAION_METADATA_COLUMNS=url=<column>"
        )
    caption = given.get("caption") or next((n for n in CAPTION_COLUMNS if n in names), None)
    found = {"url": url}
    if caption is not None:
        found["caption"] = caption
    found |= {name: name for name in TRAVELLING_COLUMNS if name in names}
    if THUMBNAIL_COLUMN in names and _plain(schema.field(THUMBNAIL_COLUMN).type) in PICTURE_TYPES:
        found[THUMBNAIL_COLUMN] = THUMBNAIL_COLUMN
    return found


def _common_schema(paths: Sequence[Path], files: Sequence[Rows], names: Mapping[str, str]) -> pa.Schema:
    """Bring the types of all files together: where one has no values, or wider ones, they differ."""
    common = pa.schema({"url": pa.string(), "caption": pa.string()})
    for path, rows in zip(paths, files, strict=True):
        types = {ours: _plain(rows.schema.field(theirs).type) for ours, theirs in names.items()}
        for ours in ("url", "caption"):
            if types.get(ours, pa.string()) not in TEXT_TYPES:
                raise InputError(
                    f"column {names[ours]!r} of {path} holds {types[ours]}, not text: name the right one "
                    f"with LAION_METADATA_COLUMNS={ours}=<column>"
                )
        try:
            common = pa.unify_schemas([common, pa.schema(types)], promote_options="permissive")
        except pa.ArrowTypeError as error:
            raise InputError(
                f"{path} has other types of columns than {paths[0].name} ({error}): the metadata files "
                "must have the same columns"
            ) from error
    return common


def _without_views(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text or binary views as what Arrow can take rows of."""
    if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
        return column.cast(_plain(column.type))
    return column


def _plain(kind: pa.DataType) -> pa.DataType:
    """Text as plain strings however it is stored, and binary likewise: batches may differ in that."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind
