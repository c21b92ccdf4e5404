"""Locate tables and open them as inputs of later assets. Assets write their own tables.

Dagster's concept: https://docs.dagster.io/guides/build/io-managers
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import dagster as dg
import pyarrow as pa

from laion_assets.defs.failures import as_failures
from laion_assets.defs.history import CHECKSUM, materializations
from laion_assets.io.storage import open_storage, reaching
from laion_assets.io.tables import OUTPUT, SUFFIX, StoredTable, TableWriter, attachments_of, new_table
from laion_assets.search.combined import DECODER

PICTURE = ".png"  # the contact sheet beside a table
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Tables:
    """The tables, which are Parquet files at `<base>/<asset>/<seed set>.parquet`.

    Attributes:
        base: a local path or a URL.

    """

    base: str

    def uri(self, asset: str, seed_set: str) -> str:
        """Return the location of one table."""
        return f"{self.base.rstrip('/')}/{asset}/{seed_set}{SUFFIX}"

    def open(self, asset: str, seed_set: str, checksum: str | None = None) -> StoredTable:
        """Open a table.

        Args:
            asset: name of the asset.
            seed_set: the partition.
            checksum: crc32c of the table when it was written; None if it is unknown.

        Raises:
            InputError: the table is missing or damaged; the message names the asset to materialize.

        """
        return StoredTable(self.uri(asset, seed_set), f"materialize {asset} again", checksum)

    def find(self, asset: str, seed_set: str) -> StoredTable | None:
        """Open a table; None if there is none."""
        fs, path = open_storage(self.uri(asset, seed_set), OUTPUT)
        with reaching(self.base, OUTPUT):
            return self.open(asset, seed_set) if fs.exists(path) else None

    def files(self, asset: str, seed_set: str) -> list[str]:
        """Return the locations of all that was written: table, decoders, picture, unfinished work."""
        table = self.uri(asset, seed_set)
        fs, path = open_storage(table, OUTPUT)
        endings = (SUFFIX, PICTURE, UNFINISHED)
        with reaching(table, OUTPUT):
            there = [end for end in endings if fs.exists(path.removesuffix(SUFFIX) + end)]
        return [*(table.removesuffix(SUFFIX) + end for end in there), *attachments_of(table, DECODER)]

    @contextmanager
    def new(self, context: dg.AssetExecutionContext, schema: pa.Schema) -> Iterator[TableWriter]:
        """Write the table of a step's asset and seed set, see `new_table`."""
        with new_table(self.uri(*_table_of(context)), schema) as table:
            yield table

    def unfinished(self, context: dg.AssetExecutionContext) -> str:
        """Return the location of a folder beside a step's table, for unfinished work."""
        return self.uri(*_table_of(context)).removesuffix(SUFFIX) + UNFINISHED

    def written(self, context: dg.AssetExecutionContext) -> StoredTable:
        """Open the table written by this step."""
        return self.open(*_table_of(context))


def _table_of(context: dg.AssetExecutionContext) -> tuple[str, str]:
    return context.asset_key.path[-1], context.partition_key


class ParquetIOManager(dg.IOManager):
    """Opens the table of an upstream asset as the input of a later one.

    If the file is missing, or is not the one that the last materialization recorded, the error names the
    asset to materialize.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Raise an error for a value: assets write their own tables, and checks have none.

        Raises:
            TypeError: a step returned a value.

        """
        if obj is None:
            return
        raise TypeError(
            f"{context.asset_key.to_user_string()} returned {type(obj).__name__}: assets must write "
            "their table and return no value"
        )

    def load_input(self, context: dg.InputContext) -> StoredTable:
        """Open a table written by an earlier step."""
        asset, seed_set = context.asset_key.path[-1], context.partition_key
        with as_failures():
            last = next(materializations(context.instance, asset, seed_set), None)
            return self._tables.open(asset, seed_set, last.figures.get(CHECKSUM) if last else None)
