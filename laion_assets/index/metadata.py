"""URL, caption and other columns of index rows, taken by id from Arrow or Parquet files.

Arrow files are memory-mapped, and only the requested rows are read. The kernel is told that reads are
random, and threads wait for them: a cold read takes only the pages that hold the rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
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
from laion_assets.io.ranges import Disk, Hold, WholeFiles
from laion_assets.io.text import readable

URL_COLUMNS = ("url", "URL", "image_url", "image_path")
CAPTION_COLUMNS = ("caption", "TEXT", "text", "alt")
THUMBNAIL_COLUMN = "thumbnail"
ROWS_AT_ONCE = (64, 512)  # rows that a thread takes; with fewer it waits longer for the interpreter
READS = 32  # threads that wait for the disk
TEXT_TYPES = (pa.string(), pa.null())
THUMBNAIL_TYPES = (pa.binary(), pa.null())
# Columns that people filter on; every table carries those that the metadata has.
CARRIED_METADATA = (
    "NSFW", "nsfw", "punsafe", "pwatermark", "LICENSE", "LANGUAGE", "language",
    "WIDTH", "HEIGHT", "width", "height", "original_width", "original_height", "aesthetic", "md5",
)  # fmt: skip


class Metadata:
    """The metadata of an index: row i belongs to the image with id i.

    Args:
        paths: files of one format, in order of id.
        columns: the file's names of `url` and `caption` where they are not among the usual ones, for
            example `{"url": "image_link"}`.
        disk: fetches the parts of the files that are about to be read, where they are not complete.
        tables: keeps where the batches of Arrow files and their buffers are, which is then read once.

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
        return file.layout(columns)

    def covers(self, ids: Ids) -> Mask:
        """Return which ids have a metadata row, shape (n,)."""
        return (ids >= 0) & (ids < len(self))

    def take(self, ids: Ids, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of some ids, in their order. Bytes that are not UTF-8 are replaced by U+FFFD.

        Args:
            ids: (n,) in any order; repeats are allowed; all must be covered.
            columns: names from `schema`; all but the thumbnails when None.

        Raises:
            IndexError: an id has no metadata row (see `covers`).

        """
        if not self.covers(ids).all():
            raise IndexError("an id without a metadata row")
        unique, back = np.unique(ids, return_inverse=True)
        schema = pa.schema([self.schema.field(name) for name in self._wanted(columns)])
        requests = self._by_file(unique)
        with self._disk.hold() as held:
            if not self._disk.whole:
                self._fetch(held, requests, schema)
            at_once = int(np.clip(len(unique) // READS, *ROWS_AT_ONCE))
            parts = [
                _Rows(rows.file, rows.batches[part], rows.rows[part])
                for rows in requests
                for part in slices(len(rows.rows), at_once)
            ]
            taken = _readers().map(partial(self._take_from_file, schema=schema), parts)
            table = pa.concat_tables([schema.empty_table(), *taken])
        return table.take(pa.array(back))

    def _wanted(self, columns: Sequence[str] | None) -> list[str]:
        if columns is None:
            return [name for name in self.schema.names if name != THUMBNAIL_COLUMN]
        return list(columns)

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

    def _fetch(self, held: Hold, requests: Sequence[_Rows], schema: pa.Schema) -> None:
        """Fetch the bytes that rows need, in rounds: the next ranges of all files at a time."""
        columns = [self._names[name] for name in schema.names if name in self._names]
        needs = [(rows.file.path, rows.file.needs(rows.batches, rows.rows, columns)) for rows in requests]
        while needs:
            following = [(path, some, next(some, None)) for path, some in needs]
            held.need({path: ranges for path, _, ranges in following if ranges is not None})
            needs = [(path, some) for path, some, ranges in following if ranges is not None]

    def _take_from_file(self, rows: _Rows, schema: pa.Schema) -> pa.Table:
        present = [field.name for field in schema if field.name in self._names]
        names = [self._names[name] for name in present]
        found = dict(zip(present, rows.file.take(rows.batches, rows.rows, names), strict=True))
        columns = [
            found[field.name].cast(field.type)
            if field.name in found
            else pa.nulls(len(rows.rows), field.type)
            for field in schema
        ]
        return readable(pa.Table.from_arrays(columns, schema=schema))


@dataclass(frozen=True)
class _Rows:
    """Rows of a file, see `MetadataFile.take`."""

    file: MetadataFile
    batches: Ids
    rows: Ids


@cache
def _readers() -> ThreadPoolExecutor:
    """Return threads that wait for the disk; starting them takes longer than a small request."""
    return ThreadPoolExecutor(READS, "metadata")


os.register_at_fork(after_in_child=_readers.cache_clear)  # a forked process has none of the threads


def _open(path: Path, disk: Disk, tables: BatchTables | None) -> MetadataFile:
    return ArrowFile(path, disk, tables) if path.suffix == ".arrow" else ParquetFile(path)


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


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return text as string and binary as binary, whichever encoding a file uses."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind
