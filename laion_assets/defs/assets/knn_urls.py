"""`knn_urls`: a search around each seed, in shards that may run at the same time.

The asset is a graph of three kinds of steps: `shards` settles the settings and cuts the seeds, `search`
searches one shard, `join` writes and reports the table. A small set is one shard, whose search writes the
table itself. After a failure, Dagster's re-execution searches only what failed.

Dagster's concept: https://docs.dagster.io/guides/build/assets/graph-backed-assets
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import dagster as dg

from laion_assets.defs import checks
from laion_assets.defs.assets.url_sets import SEARCH_VERSION, Searched, SearchStep
from laion_assets.defs.bounds import Bounds
from laion_assets.defs.failures import as_failures
from laion_assets.defs.io_manager import Tables, check_version
from laion_assets.defs.kubernetes.placement import Placement
from laion_assets.defs.partitions import seed_sets
from laion_assets.defs.provenance import Provenance
from laion_assets.defs.resources import LaionIndex, Pictures
from laion_assets.defs.settings import Defaults, RetrievalConfig
from laion_assets.defs.sources import retrieval_settings
from laion_assets.defs.terminal import count
from laion_assets.io.errors import InputError
from laion_assets.io.tables import StoredTable, Written
from laion_assets.search.combined import DECODER
from laion_assets.search.shards import Shard, from_json, joined, shards_for, to_json

NAME = "knn_urls"
REMEDY = f"materialize {NAME} again"
Value = dict[str, Any]  # passed between steps as JSON


def knn_urls_asset(placement: Placement) -> dg.AssetsDefinition:
    """Return the asset with the pods of its steps from a placement."""
    with_index, small = placement.with_index(NAME), placement.any_node(NAME)

    @dg.op(
        ins={"staged": dg.In(dg.Nothing), "settings": dg.In(dg.Nothing)},
        out=dg.DynamicOut(io_manager_key="handover"),
        tags=small.op_tags,
        retry_policy=small.retry_policy,
    )
    def shards(
        context: dg.AssetExecutionContext,
        vectors: StoredTable,
        laion_index: dg.ResourceParam[LaionIndex],
        retrieval_config: RetrievalConfig,
        defaults: dg.ResourceParam[Defaults],
        tables: dg.ResourceParam[Tables],
        pictures: dg.ResourceParam[Pictures],
        bounds: dg.ResourceParam[Bounds],
    ) -> Iterator[dg.DynamicOutput[Value]]:
        """Settle the settings, and cut the seeds in shards."""
        with as_failures():
            step = SearchStep(context, vectors, laion_index, tables, pictures, bounds, per_seed=True)
            origin = step.origin(retrieval_config, defaults)
            number = shards_for(len(vectors), step.k(origin.settings))
        if number > 1:
            context.log.info(f"{count(len(vectors), 'seed')} in {number:,} shards")
        for each in range(number):
            shard = asdict(Shard(each, number))
            value = {
                "version": SEARCH_VERSION,
                "shard": shard,
                "origin": origin.to_json(),
                "columns": _columns(laion_index),
            }
            yield dg.DynamicOutput(value, f"{each:04d}")

    @dg.op(
        out=dg.Out(io_manager_key="handover"),
        pool="retrieval",
        tags=with_index.op_tags,
        retry_policy=with_index.retry_policy,
    )
    def search(
        context: dg.AssetExecutionContext,
        shard: Value,
        vectors: StoredTable,
        laion_index: dg.ResourceParam[LaionIndex],
        tables: dg.ResourceParam[Tables],
        pictures: dg.ResourceParam[Pictures],
        bounds: dg.ResourceParam[Bounds],
    ) -> Value:
        """Search around the seeds of one shard."""
        with as_failures():
            part, origin = Shard(**shard["shard"]), Provenance.from_json(shard["origin"])
            check_version([shard], SEARCH_VERSION, REMEDY)
            _check_inputs([shard], origin, vectors, laion_index)
            step = SearchStep(context, vectors, laion_index, tables, pictures, bounds, per_seed=True)
            folder = tables.handed_over(NAME, context.partition_key, context.run.run_id)
            uri = f"{folder}/{part.number:04d}.parquet" if part.of > 1 else None
            return _to_json(step.write(origin, part, uri)) | shard | {"uri": uri}

    @dg.op(
        out=checks.outputs_with(NAME, checks.KNN_URLS),
        tags=small.op_tags,
        retry_policy=small.retry_policy,
    )
    def join(
        context: dg.AssetExecutionContext,
        found: list[Value],
        vectors: StoredTable,
        laion_index: dg.ResourceParam[LaionIndex],
        tables: dg.ResourceParam[Tables],
        pictures: dg.ResourceParam[Pictures],
        bounds: dg.ResourceParam[Bounds],
    ) -> Iterator[Any]:
        """Write the rows of all shards in their order, and report the table."""
        with as_failures():
            step = SearchStep(context, vectors, laion_index, tables, pictures, bounds, per_seed=True)
            parts = sorted(found, key=lambda part: part["shard"]["number"])
            _check_whole(parts)
            check_version(parts, SEARCH_VERSION, REMEDY)
            _check_inputs(parts, Provenance.from_json(parts[0]["provenance"]), vectors, laion_index)
            if parts[0]["uri"] is None:
                table = tables.written(context)
                searched = _from_json(parts[0], table.attachment(DECODER))
            else:
                searched = _join(step, parts)
            result = step.report(searched)
            tables.remove_handed_over(context)
        yield result

    @dg.graph_asset(
        name=NAME,
        ins={
            "vectors": dg.AssetIn("seed_embeddings"),
            "staged": dg.AssetIn("staged_laion_index", dagster_type=dg.Nothing),
            "settings": dg.AssetIn(retrieval_settings.key, dagster_type=dg.Nothing),
        },
        description="Images found around each seed: same context and style.\n\n"
        "Near-duplicates are removed within each seed's results; an image found for two seeds has two "
        "rows. Many seeds are searched in shards, which may run at the same time.",
        group_name="urls",
        kinds={"faiss", "parquet"},
        partitions_def=seed_sets,
        code_version=SEARCH_VERSION,
        check_specs=checks.KNN_URLS,
        tags=with_index.tags,
    )
    def knn_urls(vectors: Any, staged: Any, settings: Any) -> dict[str, Any]:
        cut = shards(vectors=vectors, staged=staged, settings=settings)
        found = cut.map(lambda shard: search(shard, vectors)).collect()
        outputs = join(found, vectors)
        return {name: getattr(outputs, name) for name in outputs._fields}

    return knn_urls


def _check_whole(parts: list[Value]) -> None:
    """Raise if these are not all shards of one search, in their order.

    There are none if the run ended before a shard was begun: Dagster's re-execution from the failure
    then runs only this step.
    """
    if not parts:
        raise InputError(f"the run ended before any shard was searched: {REMEDY}")
    shards, origin = [Shard(**part["shard"]) for part in parts], parts[0]["origin"]
    of = shards[0].of
    if shards != [Shard(number, of) for number in range(of)] or any(p["origin"] != origin for p in parts):
        raise InputError(f"the shards are not those of one search: {REMEDY}")


def _columns(laion_index: LaionIndex) -> list[list[str]]:
    """Return the columns that a table takes from the metadata, in their order."""
    return [list(column) for column in laion_index.metadata_columns.items()]


def _check_inputs(
    parts: list[Value], origin: Provenance, vectors: StoredTable, laion_index: LaionIndex
) -> None:
    """Raise if the seeds or settings are no longer those with which this search began."""
    unchanged = {
        f"seed_embeddings of {origin.seed_set!r}": (
            Provenance.of(vectors).seeds_version == origin.seeds_version
        ),
        "the block list": laion_index.block_list_description() == origin.settings.block_list,
        "LAION_METADATA_COLUMNS": all(part.get("columns") == _columns(laion_index) for part in parts),
    }
    for what, is_unchanged in unchanged.items():
        if not is_unchanged:
            raise InputError(f"{what} has changed since this search began: {REMEDY}")


def _to_json(searched: Searched) -> Value:
    return {
        "found": to_json(searched.found),
        "provenance": searched.provenance.to_json(),
        "table": asdict(searched.table),
        "figures": dict(searched.figures),
        "cut": searched.cut,
    }


def _from_json(part: Value, decoder: bytes) -> Searched:
    return Searched(
        from_json(part["found"], decoder),
        Provenance.from_json(part["provenance"]),
        Written(**part["table"]),
        part["figures"],
    )


def _join(step: SearchStep, parts: list[Value]) -> Searched:
    """Write the tables of all shards as one."""
    stored = [StoredTable(part["uri"], REMEDY, part["table"]["checksum"]) for part in parts]
    shards = [
        _from_json(part, table.attachment(DECODER)) for part, table in zip(parts, stored, strict=True)
    ]
    indices = {shard.provenance.index for shard in shards}
    if len(indices) > 1:
        raise InputError(f"the shards searched different indices: {REMEDY}")
    if len({part["cut"] for part in parts}) > 1:
        raise InputError(f"the shards cut the seeds differently: {REMEDY}")
    found = joined([shard.found for shard in shards], step.laion_index.block_list())
    with step.tables.new(step.context, stored[0].schema) as table:
        for part in stored:
            for batch in part.batches():
                table.write(batch)
        provenance = step.provenance(shards[0].provenance, found)
        table.attach(DECODER, found.decoder)
        table.footer = provenance.to_footer()
    seconds = round(sum(shard.table.seconds for shard in shards) + table.seconds, 2)
    return Searched(
        found,
        provenance,
        replace(table.written(), seconds=seconds),
        _summed([shard.figures for shard in shards]),
    )


def _summed(figures: list[Mapping[str, int | str]]) -> Mapping[str, int | str]:
    """Add up the numbers of shards; texts differ, and are left out."""
    numbers = {name for each in figures for name, value in each.items() if isinstance(value, int)}
    return {name: sum(int(each.get(name, 0)) for each in figures) for name in sorted(numbers)}
