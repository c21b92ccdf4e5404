"""Arrow streams to Parquet files and back, at a local path or in a bucket.

A table is written while it is computed, a batch at a time, and appears under its name only when it is
whole. What must not live here: what the tables mean.
Dagster's concept: https://docs.dagster.io/guides/build/io-managers
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq

from laion_assets.defs.failures import as_failures
from laion_assets.io.errors import InputError
from laion_assets.io.storage import new_file, open_storage, reaching
from laion_assets.io.tables import DESCRIPTIONS, Table

PREVIEW_ROWS = 10
PREVIEW_TEXT = 120  # characters; the event log holds every preview for ever
OUTPUT = "output_uri"
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
    """A Parquet file that was written here: opened once, read as often as needed.

    In a bucket, each column of a group of rows is one request and nothing else is held.

    Attributes:
        where: location, for error messages.
        size: bytes.
        schema: its columns.

    """

    def __init__(self, uri: str) -> None:
        self.where = uri
        with self._telling():
            fs, path = open_storage(uri, OUTPUT)
            source = fs.open(path, "rb", cache_type="none")
            self.size = int(source.size)
            # By default all of the file would be read ahead, whatever its size.
            self._file = pq.ParquetFile(
                source, thrift_string_size_limit=MAX_FOOTER_TEXT, pre_buffer=False
            )
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
        batches = self._file.iter_batches(columns=names)
        while True:
            with self._telling():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def read(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Read all rows at once."""
        with self._telling():
            return self._file.read(columns=None if columns is None else list(columns))

    def top(self, rows: int, columns: Sequence[str]) -> pa.Table:
        """Read the first rows only."""
        with self._telling():
            first = next(self._file.iter_batches(batch_size=max(rows, 1), columns=list(columns)), None)
        empty = pa.schema([self.schema.field(name) for name in columns]).empty_table()
        return empty if first is None else pa.Table.from_batches([first])

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn what goes wrong while reading into a sentence with the remedy."""
        try:
            with reaching(self.where, OUTPUT):
                try:
                    yield
                except FileNotFoundError as error:
                    asset = Path(self.where).parent.name
                    raise InputError(f"{self.where} is not there: materialize {asset} again") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{self.where} cannot be read ({error}): materialize it again") from error


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
            seconds = round(time.monotonic() - started, 2)
            stored = StoredTable(uri)
            context.add_output_metadata(
                {
                    **obj.report(stored),  # first, as the UI shows it in this order
                    "seconds": seconds,
                    "bytes": stored.size,
                    "dagster/partition_row_count": rows,
                    "dagster/uri": uri,
                    "dagster/column_schema": column_schema(stored.schema),
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


def tables_in(base: str) -> dg.IOManagerDefinition:
    """Return the keeper of the tables under a folder or bucket URL, as a resource that the UI shows."""
    return dg.IOManagerDefinition.hardcoded_io_manager(
        ParquetIOManager(base), description=f"Parquet tables at `{base}/<asset>/<seed set>.parquet`"
    )


def write_table(table: Table, uri: str) -> tuple[int, list[dict[str, Any]]]:
    """Write a stream of batches; return the number of rows and the first few of them.

    Raises:
        InputError: the place cannot be written to.

    """
    rows = 0
    preview: list[dict[str, Any]] = []
    with (
        new_file(uri, OUTPUT) as sink,
        pq.ParquetWriter(sink, table.schema, compression="zstd") as writer,
    ):
        for batch in table.batches:
            writer.write_batch(batch)
            rows += len(batch)
            if len(preview) < PREVIEW_ROWS:
                preview += batch.slice(0, PREVIEW_ROWS - len(preview)).to_pylist()
        writer.add_key_value_metadata(dict(table.footer()))
    return rows, preview


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
