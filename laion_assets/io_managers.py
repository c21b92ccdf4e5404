"""Arrow streams to Parquet files and back, at a local path or in a bucket.

A table is written while it is computed, a batch at a time, and appears under its name only when it is
whole. What must not live here: what the tables mean.
Dagster's concept: https://docs.dagster.io/guides/build/io-managers
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import dagster as dg
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from laion_assets.failures import as_failures
from laion_assets.retrieval.errors import InputError
from laion_assets.retrieval.tables import DESCRIPTIONS, Table

PREVIEW_ROWS = 10
PREVIEW_TEXT = 120  # characters; the event log holds every preview for ever
CANNOT_WRITE = {
    errno.ENOENT,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
}
PARTIAL = ".partial"
MAX_FOOTER_TEXT = 1 << 30  # a decoder may be larger than the 100 MB that Arrow allows by default


@dataclass(frozen=True)
class TableOutput:
    """A table to be written, and what to report once it was.

    Attributes:
        table: read to its end while it is written.
        report: metadata for the UI, made from the table as it was written.

    """

    table: Table
    report: Callable[[StoredTable], Mapping[str, Any]]


class StoredTable:
    """A Parquet file that was written here: opened once, read as often as needed."""

    def __init__(self, uri: str) -> None:
        self.where = uri
        fs, path = fsspec.url_to_fs(uri)
        try:
            self._file = pq.ParquetFile(fs.open(path, "rb"), thrift_string_size_limit=MAX_FOOTER_TEXT)
        except FileNotFoundError as error:
            asset = Path(uri).parent.name
            raise InputError(f"{uri} is not there: materialize {asset} again") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{uri} cannot be read ({error}): materialize it again") from error
        self.schema: pa.Schema = self._file.schema_arrow.remove_metadata()

    @property
    def footer(self) -> Mapping[str, str]:
        """Key-value metadata."""
        stored = self._file.metadata.metadata or {}
        return {key.decode(): value.decode() for key, value in stored.items()}

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def batches(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Read the rows in order."""
        names = None if columns is None else list(columns)
        yield from self._file.iter_batches(columns=names)

    def read(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Read all rows at once."""
        return self._file.read(columns=None if columns is None else list(columns))

    def top(self, rows: int, columns: Iterable[str]) -> pa.Table:
        """Read the first rows only."""
        first = next(self._file.iter_batches(batch_size=max(rows, 1), columns=list(columns)), None)
        return pa.table({}) if first is None else pa.Table.from_batches([first])


class ParquetIOManager(dg.IOManager):
    """Keeps each asset's table at `<base>/<asset>/<seed set>.parquet`.

    Args:
        base: folder or bucket URL of the tables.

    """

    def __init__(self, base: str) -> None:
        self._base = base.rstrip("/")

    def uri(self, asset: str, seed_set: str) -> str:
        """Location of one table."""
        return f"{self._base}/{asset}/{seed_set}.parquet"

    def handle_output(self, context: dg.OutputContext, obj: TableOutput) -> None:
        """Write a table and report what it holds."""
        uri = self.uri(context.asset_key.path[-1], context.partition_key)
        started = time.monotonic()
        with as_failures():
            rows, preview = write_table(obj.table, uri)
        stored = StoredTable(uri)
        context.add_output_metadata(
            {
                "dagster/partition_row_count": rows,
                "dagster/uri": uri,
                "dagster/column_schema": column_schema(stored.schema),
                "seconds": round(time.monotonic() - started, 2),
                **obj.report(stored),
                "first rows": preview_table(preview, stored.schema),
            }
        )

    def load_input(self, context: dg.InputContext) -> StoredTable:
        """Open a table that was written before.

        The record of a materialization is a claim about the storage: the file is looked at here, and
        one that is gone is an error that says which asset to materialize.
        """
        with as_failures():
            return StoredTable(self.uri(context.asset_key.path[-1], context.partition_key))


def write_table(table: Table, uri: str) -> tuple[int, list[dict[str, Any]]]:
    """Write a stream of batches; return the number of rows and the first few of them.

    Raises:
        InputError: the place cannot be written to.

    """
    rows = 0
    preview: list[dict[str, Any]] = []
    with (
        _new_file(uri) as sink,
        pq.ParquetWriter(sink, table.schema, compression="zstd") as writer,
    ):
        for batch in table.batches:
            writer.write_batch(batch)
            rows += len(batch)
            if len(preview) < PREVIEW_ROWS:
                preview += batch.slice(0, PREVIEW_ROWS - len(preview)).to_pylist()
        writer.add_key_value_metadata(dict(table.footer()))
    return rows, preview


@contextlib.contextmanager
def _new_file(uri: str) -> Iterator[BinaryIO]:
    """Open a file that takes its name only if the block ends well."""
    fs, path = fsspec.url_to_fs(uri)
    try:
        if "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol):
            with _new_local_file(Path(path)) as sink:
                yield sink
        else:
            with _new_object(fs, path) as sink:
                yield sink
    except OSError as error:
        if not isinstance(error, PermissionError) and error.errno not in CANNOT_WRITE:
            raise
        raise InputError(
            f"cannot write {uri} ({error.strerror or error}): set LAION_OUTPUT_URI to a folder with room "
            "that you can write to"
        ) from error


@contextlib.contextmanager
def _new_local_file(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with temporary.open("wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed have left of this table."""
    for left in path.parent.glob(f".{path.name}.*{PARTIAL}"):
        writer = int(left.name.removesuffix(PARTIAL).rpartition(".")[2])
        if not _is_alive(writer):
            left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is, and somebody else's
        return True
    return True


@contextlib.contextmanager
def _new_object(fs: Any, path: str) -> Iterator[BinaryIO]:
    """One upload, which makes an object only when the block ends well."""
    with fs.transaction, fs.open(path, "wb") as sink:
        yield sink


def column_schema(schema: pa.Schema) -> dg.TableSchema:
    """Describe a table's columns for the UI."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(field.name, str(field.type), description=DESCRIPTIONS.get(field.name))
            for field in schema
        ]
    )


def preview_table(rows: list[dict[str, Any]], schema: pa.Schema) -> dg.TableMetadataValue:
    """Show a few rows: numbers as they are, texts cut short, bytes and vectors left out."""
    shown = [
        field.name
        for field in schema
        if not (
            pa.types.is_binary(field.type)
            or pa.types.is_fixed_size_binary(field.type)
            or pa.types.is_fixed_size_list(field.type)
        )
    ]
    columns = [column for column in column_schema(schema).columns if column.name in shown]
    records = [dg.TableRecord({name: _shown(row[name]) for name in shown}) for row in rows]
    return dg.MetadataValue.table(records=records, schema=dg.TableSchema(columns=columns))


def _shown(value: Any) -> str | int | float | bool | None:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, str) and len(value) > PREVIEW_TEXT:
        return value[: PREVIEW_TEXT - 1] + "…"
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
