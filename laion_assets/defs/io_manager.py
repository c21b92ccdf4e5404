"""Locate tables and open them as inputs of later assets. Assets write their own tables.

Dagster's concept: https://docs.dagster.io/guides/build/io-managers
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import dagster as dg
import pyarrow as pa

from laion_assets.defs.failures import as_failures
from laion_assets.defs.history import CHECKSUM, asset_of_step, materializations
from laion_assets.io.checksums import checksum_text, crc32c
from laion_assets.io.errors import InputError
from laion_assets.io.storage import new_file, on_this_machine, open_storage, reaching
from laion_assets.io.tables import (
    OUTPUT,
    SUFFIX,
    StoredTable,
    TableWriter,
    attachments_of,
    new_table,
    remove,
)
from laion_assets.io.text import json_object
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
        return self._unfinished(*_table_of(context))

    def handed_over(self, asset: str, seed_set: str, run: str) -> str:
        """Return the location of the folder for what the steps of an asset hand over in a run."""
        return f"{self._unfinished(asset, seed_set)}/{run}"

    def remove_handed_over(self, context: dg.AssetExecutionContext) -> None:
        """Remove what was handed over in this run and in runs that have ended: the table replaces it."""
        folder = self._unfinished(*_table_of(context))
        fs, path = open_storage(folder, OUTPUT)
        with reaching(folder, OUTPUT):
            found = fs.ls(path, detail=False) if fs.exists(path) else []
        runs = {name.rpartition("/")[2] for name in found if name != path}
        known = ((run, context.instance.get_run_by_id(run)) for run in runs)
        ended = {run for run, found in known if found is None or found.is_finished}
        ended |= runs & {context.run.run_id}
        for run in ended:
            remove(f"{folder}/{run}")
        if on_this_machine(folder):
            with suppress(OSError):  # another run is at work there
                fs.rmdir(path)

    def _unfinished(self, asset: str, seed_set: str) -> str:
        return self.uri(asset, seed_set).removesuffix(SUFFIX) + UNFINISHED

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


def _checksum(value: object) -> str:
    return checksum_text(crc32c(json.dumps(value).encode()))


def check_version(handed_over: Iterable[Mapping[str, Any]], version: str, remedy: str) -> None:
    """Raise if another version of an asset began this work: it may have divided the work differently."""
    if any(value.get("version") != version for value in handed_over):
        raise InputError(f"another version of laion_assets began this: {remedy}")


class HandoverIOManager(dg.IOManager):
    """Passes JSON values from one step of an asset to the next, as files among its unfinished work.

    A run that re-executes another from its failure reads the values of the first run.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Write the value of a step."""
        with as_failures(), new_file(self._uri(context, context.partition_key), OUTPUT) as sink:
            sink.write(json.dumps({"value": obj, "crc32c": _checksum(obj)}).encode())

    def load_input(self, context: dg.InputContext) -> Any:
        """Read the value of an earlier step."""
        upstream = context.upstream_output
        if upstream is None:
            raise TypeError(f"the input {context.name} comes from no step")
        uri = self._uri(upstream, context.partition_key)
        fs, path = open_storage(uri, OUTPUT)
        with as_failures(), reaching(uri, OUTPUT):
            try:
                stored = json_object(fs.cat_file(path))
                if stored.get("crc32c") != _checksum(stored.get("value")):
                    raise ValueError("it differs from what was written")
                return stored["value"]
            except (FileNotFoundError, ValueError) as error:
                asset = asset_of_step(upstream.step_key)
                raise InputError(f"{uri} is missing or damaged: materialize {asset} again") from error

    def _uri(self, context: dg.OutputContext, seed_set: str) -> str:
        asset, _, step = context.step_key.partition(".")
        name = "-".join(re.findall(r"\w+", f"{step} {context.mapping_key or ''}"))
        return f"{self._tables.handed_over(asset, seed_set, context.run_id)}/{name}.json"
