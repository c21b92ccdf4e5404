"""URL, caption and other columns of index rows, taken by id from Arrow or Parquet files.

Arrow files are memory-mapped, and only the requested rows are read. The kernel is advised that reads are
random, and the pages of many rows are requested before the first is read: a cold read takes only these.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from laion_assets.index.arrow_file import ArrowFile
from laion_assets.index.batch_tables import BatchTables
from laion_assets.index.metadata_file import BatchLayout, MetadataFile
from laion_assets.index.parquet_file import ParquetFile
from laion_assets.io.arrays import Ids, Mask
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import slices
from laion_assets.io.ranges import Disk, Hold, WholeFiles, in_memory
from laion_assets.io.text import readable

URL_COLUMNS = ("url", "URL", "image_url", "image_path")
CAPTION_COLUMNS = ("caption", "TEXT", "text", "alt")
THUMBNAIL_COLUMN = "thumbnail"
SMALL = 16 << 30  # bytes of all files whose page tables, 32 MB, may stay
THREADS = 4  # more wait for the interpreter
ROWS_AT_ONCE = (256, 1 << 14)  # rows that a thread requests and takes
SAMPLED = 64  # rows that show whether all are in memory
TEXT_TYPES = (pa.large_string(), pa.null())
THUMBNAIL_TYPES = (pa.binary(), pa.null())
# Columns that people look at; every table carries those that the metadata has.
CARRIED_METADATA = (
    "NSFW", "nsfw", "punsafe", "pwatermark", "LICENSE", "LANGUAGE", "language",
    "WIDTH", "HEIGHT", "width", "height", "original_width", "original_height", "aesthetic", "md5",
)  # fmt: skip


class Metadata:
    """The metadata of an index: row i belongs to the image with id i.

    Args:
        paths: files of one format, in order of id.
        columns: the files' names of `url` and `caption` where they are not among the usual ones, and
            further columns to carry along, for example `{"url": "image_link", "score": "score"}`.
        disk: fetches the parts of the files that are about to be read, where they are not complete.
        tables: keeps where the batches of Arrow files and their buffers are, which is then read once.

    Attributes:
        columns: all columns that `take` can return: `url`, `caption`, and every column of any file.
            A column that a file lacks is null there. One whose types do not go together is a union.
        schema: the columns that are carried along, which `take` returns by default.

    Raises:
        InputError: a file that cannot be read, no URL column, or columns to carry along that do not
            exist or whose types do not go together.

    """

    def __init__(
        self,
        paths: Sequence[Path],
        columns: Mapping[str, str] | None = None,
        disk: Disk | None = None,
        tables: BatchTables | None = None,
    ) -> None:
        self._disk = disk or WholeFiles()
        small = SMALL // max(len(paths), 1)
        self._files: list[MetadataFile] = [_open(path, self._disk, tables, small) for path in paths]
        self._names = {
            file.path: _column_names(file.schema, columns or {}, file.path) for file in self._files
        }
        self.columns = _common_schema(self._files, self._names)
        self.schema = _carried(self.columns, columns or {}, paths[0].parent)
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
        return file.layout(self._present(file, self._wanted(None)))

    def row_bytes(self) -> int:
        """Return about how many bytes a row that is taken has, as stored in the first batch."""
        layout = self.layout()
        return (layout.always + sum(layout.buffers)) // max(layout.rows, 1)

    def covers(self, ids: Ids) -> Mask:
        """Return which ids have a metadata row, shape (n,)."""
        return (ids >= 0) & (ids < len(self))

    def take(self, ids: Ids, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of some ids, in their order. Bytes that are not UTF-8 are replaced by U+FFFD.

        Args:
            ids: (n,) in any order; repeats are allowed; all must be covered.
            columns: names from `columns`; those of `schema` but the thumbnails when None.

        Raises:
            IndexError: an id has no metadata row (see `covers`).

        """
        if not self.covers(ids).all():
            raise IndexError("an id without a metadata row")
        unique, back = np.unique(ids, return_inverse=True)
        schema = self._schema_of(columns)
        with self._disk.hold() as held:
            if not self._disk.whole:
                self._fetch(held, self._by_file(unique), schema)
            warm = self._in_memory(unique, schema)

            def take(rows: _Rows) -> pa.Table:
                if self._disk.whole and not warm:
                    self._fetch(held, [rows], schema)
                return self._take_from_file(rows, schema)

            # Threads wait for the disk together, but for a few rows in memory they wait for each other.
            each = map if warm and len(unique) <= ROWS_AT_ONCE[1] else _readers().map
            table = pa.concat_tables([schema.empty_table(), *each(take, self._parts(unique))])
        return table.take(pa.array(back))

    @contextmanager
    def reading_ahead(self, columns: Sequence[str]) -> Iterator[Callable[[Ids], None]]:
        """Return a function that reads rows in the background, so that `take` then finds them in memory.

        It does nothing if the files are not complete, because it would fetch rows that are never taken.
        Parquet is not read ahead, because its footer does not say where a row is.

        Args:
            columns: as for `take`.

        """
        if not self._disk.whole:
            yield lambda _: None
            return

        schema = self._schema_of(columns)

        def read(part: _Rows) -> None:
            with self._disk.hold() as held:
                self._fetch(held, [part], schema)

        with ThreadPoolExecutor(THREADS, "read-ahead") as readers:

            def read_ahead(ids: Ids) -> None:
                ids = np.sort(ids)
                if not self._in_memory(ids, schema):
                    readers.map(read, self._parts(ids))  # `take` meets and raises the same errors

            yield read_ahead

    def _wanted(self, columns: Sequence[str] | None) -> list[str]:
        if columns is None:
            return [name for name in self.schema.names if name != THUMBNAIL_COLUMN]
        return list(columns)

    def _present(self, file: MetadataFile, columns: Iterable[str]) -> list[str]:
        """Return the file's names of those columns that it has."""
        names = self._names[file.path]
        return [names[name] for name in columns if name in names]

    def _by_file(self, ids: Ids) -> list[_Rows]:
        """Return where ascending ids are, one entry for each file that has some."""
        batches = np.searchsorted(self._starts, ids, side="right") - 1
        rows = ids - self._starts[batches]
        edges = np.searchsorted(batches, self._first_batch)
        return [
            _Rows(file, batches[first:last] - first_batch, rows[first:last])
            for file, first_batch, (first, last) in zip(
                self._files, self._first_batch[:-1], pairwise(edges), strict=True
            )
            if last > first
        ]

    def _parts(self, ids: Ids) -> list[_Rows]:
        """Return where ascending ids are, as many at a time as a thread takes."""
        at_once = int(np.clip(-(-len(ids) // THREADS), *ROWS_AT_ONCE))
        return [
            _Rows(rows.file, rows.batches[part], rows.rows[part])
            for rows in self._by_file(ids)
            for part in slices(len(rows.rows), at_once)
        ]

    def _schema_of(self, columns: Sequence[str] | None) -> pa.Schema:
        return pa.schema([self.columns.field(name) for name in self._wanted(columns)])

    def _in_memory(self, ids: Ids, schema: pa.Schema) -> bool:
        """Return whether a sample of ascending ids is in the page cache."""
        sample = self._by_file(ids[:: len(ids) // SAMPLED + 1])
        return all(
            in_memory(rows.file.path, ranges)
            for rows in sample
            for ranges in rows.file.needs(rows.batches, rows.rows, self._present(rows.file, schema.names))
        )

    def _fetch(self, held: Hold, requests: Sequence[_Rows], schema: pa.Schema) -> None:
        """Fetch or request the bytes that rows need, in rounds: the next ranges of all files at once."""
        needs = [
            (
                rows.file.path,
                rows.file.needs(rows.batches, rows.rows, self._present(rows.file, schema.names)),
            )
            for rows in requests
        ]
        while needs:
            following = [(path, some, next(some, None)) for path, some in needs]
            held.need({path: ranges for path, _, ranges in following if ranges is not None})
            needs = [(path, some) for path, some, ranges in following if ranges is not None]

    def _take_from_file(self, rows: _Rows, schema: pa.Schema) -> pa.Table:
        names = self._names[rows.file.path]
        taken = rows.file.take(rows.batches, rows.rows, self._present(rows.file, schema.names))
        found = dict(zip((name for name in schema.names if name in names), taken, strict=True))
        columns = [
            _cast(found[field.name], field, rows.file.path)
            if field.name in found
            else pa.nulls(len(rows.rows), field.type)
            for field in schema
        ]
        return readable(pa.Table.from_arrays(columns, schema=schema))


def _cast(column: pa.Array | pa.ChunkedArray, field: pa.Field, path: Path) -> pa.Array | pa.ChunkedArray:
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"column {field.name!r} of {path} holds {column.type}, of which not all values fit the "
            f"{field.type} of all metadata files ({error}): write it with the type of the other files"
        ) from error


@dataclass(frozen=True)
class _Rows:
    """Rows of a file, see `MetadataFile.take`."""

    file: MetadataFile
    batches: Ids
    rows: Ids


@cache
def _readers() -> ThreadPoolExecutor:
    """Return threads that take rows; starting them takes longer than a small request."""
    return ThreadPoolExecutor(THREADS, "metadata")


os.register_at_fork(after_in_child=_readers.cache_clear)  # a forked process has none of the threads


def _open(path: Path, disk: Disk, tables: BatchTables | None, small: int) -> MetadataFile:
    return ArrowFile(path, disk, tables, small) if path.suffix == ".arrow" else ParquetFile(path)


def _column_names(schema: pa.Schema, given: Mapping[str, str], path: Path) -> dict[str, str]:
    """Map our names of all columns to the file's."""
    names = [name for name, repeats in Counter(schema.names).items() if repeats == 1]
    for ours in ("url", "caption"):
        if ours in given and given[ours] not in names:
            raise InputError(
                f"{path} has no column {given[ours]!r}, to which {ours!r} is mapped: choose one of "
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
    found = {name: name for name in names if name != "caption"} | {"url": url}
    return found if caption is None else found | {"caption": caption}


def _common_schema(files: Sequence[MetadataFile], names: Mapping[Path, Mapping[str, str]]) -> pa.Schema:
    """Unify the types of each column: they differ where one has wider values, or none at all."""
    common = {"url": pa.large_string(), "caption": pa.large_string()}
    first_of_schema = {file.schema: file for file in reversed(files)}
    for file in reversed(first_of_schema.values()):
        for ours, theirs in names[file.path].items():
            kind = plain_type(file.schema.field(theirs).type)
            if pa.types.is_string(kind):
                kind = pa.large_string()  # the captions of a request may be more than 2 GiB
            if ours in ("url", "caption") and kind not in TEXT_TYPES:
                raise InputError(
                    f"column {theirs!r} of {file.path} holds {kind}, not text: name the right one with "
                    f"{ours}=<column>",
                    "metadata_columns",
                )
            common[ours] = _unified(common.get(ours, kind), kind)
    return pa.schema(common)


def _unified(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return a type for the values of both; a union if there is none."""
    if pa.types.is_union(one):
        return one
    if pa.uint64() in (one, other) and any(map(pa.types.is_signed_integer, (one, other))):
        return pa.decimal128(20)  # Arrow would choose int64
    try:
        schemas = [pa.schema({"": kind}) for kind in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowTypeError:
        return pa.dense_union([pa.field(str(kind), kind) for kind in (one, other)])


def _carried(columns: pa.Schema, given: Mapping[str, str], folder: Path) -> pa.Schema:
    """Choose the columns that are carried along."""
    wanted = [name for name in given if name not in ("url", "caption")]
    for name in wanted:
        if name not in columns.names:
            raise InputError(
                f"no metadata file in {folder} has a column {name!r} to carry along: choose some of "
                f"{', '.join(columns.names)}",
                "metadata_columns",
            )
    names = ["url", "caption", *(name for name in (*CARRIED_METADATA, *wanted) if name in columns.names)]
    if THUMBNAIL_COLUMN in columns.names and columns.field(THUMBNAIL_COLUMN).type in THUMBNAIL_TYPES:
        names.append(THUMBNAIL_COLUMN)
    carried = pa.schema([columns.field(name) for name in dict.fromkeys(names)])
    for field in carried:
        if pa.types.is_union(field.type):
            one, other = (field.type.field(number).type for number in range(2))
            raise InputError(
                f"column {field.name!r} of the metadata in {folder} holds {one} in one file and "
                f"{other} in another: write it with one type"
            )
    return carried


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return text as string and binary as binary, whichever encoding a file uses."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind
