"""The URL sets: found around each seed, found around the centroid, and both as one.

What must not live here: how images are found, compared or united (retrieval).
Dagster's concept: https://docs.dagster.io/guides/build/assets
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import dagster as dg
import pyarrow as pa

from laion_assets.defs import checks
from laion_assets.defs import report as reports
from laion_assets.defs.assets.staged_laion_index import open_index
from laion_assets.defs.failures import as_failures
from laion_assets.defs.history import yield_for
from laion_assets.defs.io_manager import StoredTable, TableOutput
from laion_assets.defs.kubernetes.placement import (
    RETRY_POLICY,
    RUNS_ON_ANY_NODE,
    RUNS_WITH_INDEX,
    on_any_node,
    with_index,
)
from laion_assets.defs.partitions import seed_sets
from laion_assets.defs.resources import LaionIndex, Pictures
from laion_assets.defs.settings import BLOCK_LIST, BLOCK_LIST_SETTING, RetrievalConfig, Settings
from laion_assets.defs.settings_check import SETTINGS_AS_NOW, block_list_now, settings_as_now
from laion_assets.index.faiss_index import FURTHER
from laion_assets.io.progress import Progress
from laion_assets.io.tables import Provenance, Table
from laion_assets.search.combine import check_same_origin, combine
from laion_assets.search.filters import BlockList, Filters, conditions_in
from laion_assets.search.retrieve import PICTURES, Funnel, Request, Retrieval, retrieve
from laion_assets.seeds.seed_sets import embeddings_of
from laion_assets.staging import OpenIndex

LOW_RECALL = 0.9

Outputs = Iterator[dg.MaterializeResult[TableOutput] | dg.AssetCheckResult]


@dg.asset(
    deps=["staged_laion_index"],
    group_name="urls",
    kinds={"faiss", "parquet"},
    partitions_def=seed_sets,
    tags=RUNS_WITH_INDEX,
    op_tags=with_index("knn_urls"),
    retry_policy=RETRY_POLICY,
    pool="retrieval",
    code_version="2",
    check_specs=checks.KNN_URLS,
)
def knn_urls(
    context: dg.AssetExecutionContext,
    seed_embeddings: StoredTable,
    laion_index: dg.ResourceParam[LaionIndex],
    retrieval_config: RetrievalConfig,
    pictures: dg.ResourceParam[Pictures],
) -> Outputs:
    """Images found around each seed: same context and style.

    Near-duplicates are removed within each seed's results; an image found for two seeds has two rows.
    """
    yield from _retrieved(
        context, seed_embeddings, laion_index, retrieval_config, pictures, per_seed=True
    )


@dg.asset(
    deps=["staged_laion_index"],
    group_name="urls",
    kinds={"faiss", "parquet"},
    partitions_def=seed_sets,
    tags=RUNS_WITH_INDEX,
    op_tags=with_index("centroid_urls"),
    retry_policy=RETRY_POLICY,
    pool="retrieval",
    code_version="2",
    check_specs=checks.CENTROID_URLS,
)
def centroid_urls(
    context: dg.AssetExecutionContext,
    centroid_vector: StoredTable,
    laion_index: dg.ResourceParam[LaionIndex],
    retrieval_config: RetrievalConfig,
    pictures: dg.ResourceParam[Pictures],
) -> Outputs:
    """Images found around the centroid: same style, varied content; near-duplicates removed."""
    yield from _retrieved(
        context, centroid_vector, laion_index, retrieval_config, pictures, per_seed=False
    )


def _retrieved(
    context: dg.AssetExecutionContext,
    vectors: StoredTable,
    laion_index: LaionIndex,
    retrieval_config: RetrievalConfig,
    pictures: Pictures,
    *,
    per_seed: bool,
) -> Outputs:
    """Yield the images around the vectors of a table; the index stays open while they are written."""
    with as_failures():
        origin = Provenance.from_footer(vectors.footer, vectors.where)
        asked = retrieval_config.resolve(os.environ, origin.own_settings, origin.seed_set)
        block_list = laion_index.block_list()
        recorded = asked.recorded(block_list)
        expected = yield_for(context, origin.seed_set, recorded)
        queries = embeddings_of(vectors.read(["embedding"]))
        seeds = len(queries) if per_seed else vectors.read(["seeds"])["seeds"][0].as_py()
        conditions = conditions_in(asked.filters or "", asked.origins.get("filters", ""))
        filters = Filters(conditions, block_list)
    with as_failures(), ExitStack() as until_read:
        opened = until_read.enter_context(open_index(context, laion_index))
        settings = asked.sized(seeds, expected, opened.index.rows)
        k = settings.values()["nb_images_knn" if per_seed else "nb_images_centroid"]
        if asked.target_images:
            context.log.info(
                f"to keep {asked.target_images:,} images, from {seeds:,} seeds, at {expected}"
            )
        progress = Progress("queries", len(queries), "", context.log.info)
        found = retrieve(
            opened.index,
            opened.metadata,
            queries,
            Request(k, settings.dedup_threshold, settings.nprobe, filters),
            per_seed=per_seed,
            progress=progress.advance,
        )
        used = _used(settings, found.nprobe, block_list)
        provenance = Provenance.now(
            origin.seed_set,
            origin.seeds,
            opened.manifest.fingerprint,
            used,
            context.run.run_id,
            origin.own_settings,
            recorded,
        )
        context.log.info(
            f"looking for {k:,} images around {'each of ' if per_seed else ''}{len(queries):,} "
            f"vector{'s' if per_seed else ''} among {opened.index.rows:,} rows, "
            f"nprobe {found.nprobe}"
        )

        written: list[tuple[StoredTable, Mapping[str, Any]]] = []

        def made() -> Provenance:
            return replace(provenance, found=found.funnel.sentence(), counts=asdict(found.funnel))

        def footer() -> dict[str, str]:
            return made().to_footer() | dict(found.table.footer())

        def report(stored: StoredTable) -> Mapping[str, Any]:
            progress.close()
            context.log.info(_sentence(found.funnel))
            if found.funnel.received < found.funnel.requested:
                context.log.warning(_shortfall(found))
            if found.recall < LOW_RECALL:
                context.log.warning(
                    f"probing {FURTHER} times the lists would replace {1 - found.recall:.0%} of the "
                    f"images found: set nprobe above {found.nprobe}"
                )
            title = reports.AROUND_SEEDS if per_seed else reports.AROUND_CENTROID
            told = reports.of_search(stored, found, made(), title, remote_pictures=pictures.remote)
            told |= _fetched(opened)
            written.append((stored, told))
            return told

        batches = _closing(until_read, found.table.batches)
        table = Table(found.table.schema, batches, footer)
        yield dg.MaterializeResult(value=TableOutput(table, report))
    ((stored, told),) = written
    with as_failures():
        results = [
            *checks.of_search(stored, settings.dedup_threshold),
            checks.yield_as_before(context, told),
        ]
    yield from checks.telling(context, results)


@dg.asset(
    group_name="urls",
    kinds={"parquet"},
    partitions_def=seed_sets,
    tags=RUNS_ON_ANY_NODE,
    op_tags=on_any_node("combined_urls"),
    retry_policy=RETRY_POLICY,
    code_version="1",
    check_specs=[*checks.COMBINED, SETTINGS_AS_NOW],
)
def combined_urls(
    context: dg.AssetExecutionContext,
    knn_urls: StoredTable,
    centroid_urls: StoredTable,
    seed_embeddings: StoredTable,
    laion_index: dg.ResourceParam[LaionIndex],
    pictures: dg.ResourceParam[Pictures],
) -> Outputs:
    """Both URL sets as one table, a row per image, ready for img2dataset.

    Rows with the same id, the same URL, or near-duplicate pictures are one image; the row with the
    lowest rank stays. In order of rank, then id.
    """
    with as_failures():
        origin = check_same_origin(knn_urls, centroid_urls, seed_embeddings)
        combined = combine(knn_urls, centroid_urls, origin.settings["dedup_threshold"], PICTURES)
    funnel = combined.funnel
    context.log.info(
        f"{funnel.knn:,} + {funnel.centroid:,} rows: {funnel.repeated_ids:,} repeated ids, "
        f"{funnel.repeated_urls:,} repeated URLs, {funnel.near_duplicates:,} near-duplicates, "
        f"{funnel.kept:,} kept"
    )
    provenance = Provenance.now(
        origin.seed_set,
        origin.seeds,
        origin.index,
        origin.settings,
        context.run.run_id,
        origin.own_settings,
        origin.asked,
    )

    written: list[tuple[StoredTable, Mapping[str, Any]]] = []

    def report(stored: StoredTable) -> Mapping[str, Any]:
        told = reports.of_combined(
            stored,
            funnel,
            provenance,
            {reports.AROUND_SEEDS: knn_urls, reports.AROUND_CENTROID: centroid_urls},
            seed_embeddings,
            remote_pictures=pictures.remote,
        )
        context.log.info(f"{len(stored):,} rows, {stored.size:,} bytes in {stored.where}")
        written.append((stored, told))
        return told

    table = Table(combined.table.schema, combined.table.batches, provenance.to_footer)
    yield dg.MaterializeResult(value=TableOutput(table, report))
    ((stored, told),) = written
    with as_failures():
        threshold = origin.settings["dedup_threshold"]
        results = [
            *checks.of_combined(stored, knn_urls, centroid_urls, threshold),
            checks.yield_as_before(context, told),
            settings_as_now(origin, block_list_now(laion_index)),
        ]
    yield from checks.telling(context, results)


def _closing(stack: ExitStack, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Close the index where reading it fails.

    Dagster does not come back to the asset then, and another step of this process may have to stage the
    index again.
    """
    try:
        yield from batches
    except BaseException:
        stack.close()
        raise


def _fetched(opened: OpenIndex) -> dict[str, int]:
    """What this request had to read from the source, where the index is staged sparse."""
    if not any(file.sparse for file in opened.manifest.files):
        return {}
    return {"bytes fetched": opened.fetched.fetched, "reads of the bucket": opened.fetched.reads}


def _shortfall(found: Retrieval) -> str:
    missing = found.funnel.requested - found.funnel.received
    remedy = "ask for fewer images" if found.nprobe is None else "set a higher nprobe, or ask for fewer"
    return f"the index returned {missing:,} fewer than requested (nprobe {found.nprobe}): {remedy}"


def _used(settings: Settings, nprobe: int | None, block_list: BlockList | None) -> dict[str, Any]:
    """Settings as they were used, with where each came from."""
    used = settings.values() | {"nprobe": nprobe}
    origins = dict(settings.origins)
    if settings.nprobe is None:
        origins["nprobe"] = "chosen from the number of images"
    if block_list is not None:
        used[BLOCK_LIST], origins[BLOCK_LIST] = str(block_list), BLOCK_LIST_SETTING
    return used | {"origins": origins}


def _sentence(funnel: Funnel) -> str:
    lost = [f"{funnel.near_duplicates:,} near-duplicates", f"{funnel.without_url:,} without a URL"]
    lost += [f"{funnel.blocked:,} blocked"] if funnel.blocked else []
    lost += [f"{funnel.filtered:,} filtered out"] if funnel.filtered else []
    return f"{funnel.sentence()} ({', '.join(lost)}; yield {funnel.yielded:.0%})"
