"""Build an index from published embeddings: train once, encode shard by shard, merge.

Dagster's concept: https://docs.dagster.io/guides/build/assets
"""

from collections.abc import Mapping

import dagster as dg

from laion_assets.build import without_vector
from laion_assets.defs import checks
from laion_assets.defs.drawing.charts import recall_curves
from laion_assets.defs.drawing.markup import embedded, table
from laion_assets.defs.failures import as_failures
from laion_assets.defs.history import ROW_COUNT
from laion_assets.defs.kubernetes.placement import Placement
from laion_assets.defs.partitions import index_shards as shard_partitions
from laion_assets.defs.report import Materialized
from laion_assets.defs.resources import IndexBuilder
from laion_assets.defs.sources import Version, embedding_files, observe
from laion_assets.defs.terminal import count
from laion_assets.io.errors import InputError

GROUP = "build"
POOL = "building"


def trained_index_asset(placement: Placement) -> dg.AssetsDefinition:
    """Return the asset with the pod from a placement."""
    pod = placement.building("trained_index")

    @dg.asset(
        deps=[embedding_files],
        group_name=GROUP,
        kinds={"faiss"},
        pool=POOL,
        code_version="1",
        tags=pod.tags,
        op_tags=pod.op_tags,
        retry_policy=pod.retry_policy,
    )
    def trained_index(
        context: dg.AssetExecutionContext, index_builder: dg.ResourceParam[IndexBuilder]
    ) -> Materialized:
        """The empty index, with a rotation, lists and codebooks trained on a sample of the embeddings.

        It also assigns an id to every row. The index is trained once. Embeddings added later get ids and
        are encoded with it too, so existing shards need not be encoded again.
        """
        with as_failures():
            with index_builder.open(context.log.info) as build:
                observe(context, Version(embedding_files.key, build.listing().version))
                trained, plan = build.train(), build.stored_plan()
            record = trained.record
            context.log.info(
                f"{record.index_key} trained on {count(record.sample, 'row')}; "
                f"{count(plan.rows, 'row')} planned in {count(len(plan.shards), 'shard')}"
            )
            return dg.MaterializeResult(
                data_version=dg.DataVersion(record.checksum),
                metadata={
                    "index key": record.index_key,
                    "dimension": record.dimension,
                    "rows planned": plan.rows,
                    "shards planned": len(plan.shards),
                    "rows sampled": record.sample,
                    "queries held out": len(trained.queries),
                    "inverted lists": trained.lists,
                    "seconds": record.seconds,
                    "dagster/uri": build.workspace.uri,
                },
            )

    return trained_index


def index_shards_asset(placement: Placement) -> dg.AssetsDefinition:
    """Return the asset with the pod from a placement."""
    pod = placement.building("index_shards")

    @dg.asset(
        deps=[
            "trained_index"
        ],  # a dependency on the embeddings would make every shard stale for each new file
        group_name=GROUP,
        kinds={"faiss", "arrow"},
        partitions_def=shard_partitions,
        pool=POOL,
        code_version="1",
        tags=pod.tags,
        op_tags=pod.op_tags,
        retry_policy=pod.retry_policy,
    )
    def index_shards(
        context: dg.AssetExecutionContext, index_builder: dg.ResourceParam[IndexBuilder]
    ) -> Materialized:
        """A shard: a few million rows, encoded and sorted by inverted list, with their metadata.

        Shards can be encoded in any order and in parallel by several pods. A killed shard restarts from
        its beginning; other shards are not affected.
        """
        with as_failures():
            if not context.has_partition_key:
                raise InputError("no shard was chosen: launch the run for a partition, which is a shard")
            with index_builder.open(context.log.info) as build:
                record = build.encode(_number_of(context.partition_key))
            speed = round(record.rows / max(record.encoding_seconds, 1e-3))
            context.log.info(
                f"{context.partition_key}: {count(record.rows, 'row')}{without_vector(record.unusable)} "
                f"in {record.seconds:,.1f} s, of which "
                f"{record.encoding_seconds:,.1f} s encoding, {speed:,} vectors per second"
            )
            return dg.MaterializeResult(
                data_version=dg.DataVersion(record.made_from),
                metadata={
                    ROW_COUNT: record.stored,
                    "rows without a usable vector": record.unusable,
                    "first id": record.first_id,
                    "bytes": record.bytes,
                    "seconds": record.seconds,
                    "vectors per second": speed,
                    "dagster/uri": f"{build.workspace.uri}/shards/{context.partition_key}",
                },
            )

    return index_shards


def _number_of(partition: str) -> int:
    if not partition.isdecimal():
        raise InputError(f"{partition!r} is not a shard: names of shards are numbers, such as 000000")
    return int(partition)


def laion_index_asset(placement: Placement) -> dg.AssetsDefinition:
    """Return the asset with the pod from a placement."""
    pod = placement.building("laion_index")

    @dg.asset(
        deps=["index_shards"],
        group_name=GROUP,
        kinds={"faiss", "arrow"},
        pool=POOL,
        code_version="1",
        check_specs=checks.BUILT,
        tags=pod.tags,
        op_tags=pod.op_tags,
        retry_policy=pod.retry_policy,
    )
    def laion_index(
        context: dg.AssetExecutionContext, index_builder: dg.ResourceParam[IndexBuilder]
    ) -> Materialized:
        """The index at LAION_INDEX_URI: all shards merged by inverted list, with the measured recall.

        Readers see the old index until the new one is complete.
        """
        with as_failures():
            with index_builder.open(context.log.info) as build:
                built = build.finish()
            results = list(checks.of_built_index(built, index_builder.min_recall))
            context.log.info(f"{built.summary} can be found; {results[0].description}")
            chart = recall_curves(built.recall)
            searched = checks.nprobe_of_a_search(built)
            return dg.MaterializeResult(
                data_version=dg.DataVersion(built.fingerprint),
                metadata={
                    "about": dg.MetadataValue.md(
                        f"**{count(built.stored, 'row')}** of {built.rows:,} in {built.index_key}\n\n"
                        f"{results[0].description}"
                    ),
                    "recall": table(_by_nprobe(built.recall, searched)),
                    "recall chart": dg.MetadataValue.md(
                        embedded("recall", chart.encode(), "image/svg+xml")
                    ),
                    "recall@100": built.recall.get(str(searched), {}).get("100", 1.0),
                    ROW_COUNT: built.stored,
                    "rows without a usable vector": built.unusable,
                    "index key": built.index_key,
                    "dimension": built.dimension,
                    "inverted lists": built.lists,
                    "bytes of lists": built.bytes,
                    "dagster/uri": build.request.index_uri,
                },
                check_results=checks.logged(context, results),
            )

    return laion_index


def _by_nprobe(shares: Mapping[str, Mapping[str, float]], searched: int) -> list[dict[str, str]]:
    """Return a row for each nprobe, with the recall for each number of results."""
    return [
        {"lists probed": f"{int(nprobe):,}{' (of a search)' if int(nprobe) == searched else ''}"}
        | {f"recall@{int(count):,}": f"{share:.1%}" for count, share in shares[nprobe].items()}
        for nprobe in sorted(shares, key=int)
    ]
