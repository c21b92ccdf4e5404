"""The URL sets: found around each seed, found around the centroid, and both as one.

What must not live here: how images are found, compared or united (retrieval).
Dagster's concept: https://docs.dagster.io/guides/build/assets
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import dagster as dg
import pyarrow as pa

from laion_assets.assets.index import open_index
from laion_assets.checks import ONE_ROW_PER_IMAGE, one_row_per_image
from laion_assets.failures import as_failures
from laion_assets.io_managers import StoredTable, TableOutput
from laion_assets.kubernetes import RETRY_POLICY, on_any_node, with_index
from laion_assets.partitions import seed_sets
from laion_assets.past_runs import MADE_WITH, OWN_SETTINGS, YIELD, yield_for
from laion_assets.presentation import as_markdown, draw, links, save_png, strip
from laion_assets.resources import LaionIndex
from laion_assets.retrieval.combine import CombinedFunnel, check_same_origin, combine
from laion_assets.retrieval.filters import BLOCK_LIST_SETTING, BlockList, Filters, conditions_in
from laion_assets.retrieval.index import FURTHER
from laion_assets.retrieval.progress import Progress
from laion_assets.retrieval.retrieve import PICTURES, Funnel, Request, Retrieval, retrieve
from laion_assets.retrieval.seeds import embeddings_of
from laion_assets.retrieval.staging import OpenIndex
from laion_assets.retrieval.tables import Provenance, Table
from laion_assets.settings import CHOSEN, RetrievalConfig, Settings
from laion_assets.settings_check import SETTINGS_AS_NOW, settings_as_now

LOW_RECALL = 0.9

Outputs = Iterator[dg.MaterializeResult[TableOutput]]


@dg.asset(
    deps=["staged_laion_index"],
    group_name="urls",
    kinds={"faiss", "parquet"},
    partitions_def=seed_sets,
    op_tags=with_index("knn_urls"),
    retry_policy=RETRY_POLICY,
    pool="retrieval",
    code_version="1",
)
def knn_urls(
    context: dg.AssetExecutionContext,
    seed_embeddings: StoredTable,
    laion_index: dg.ResourceParam[LaionIndex],
    retrieval_config: RetrievalConfig,
) -> Outputs:
    """Images found around each seed: same context and style.

    Near-duplicates are removed within each seed's results; an image found for two seeds has two rows.
    """
    yield from _retrieved(context, seed_embeddings, laion_index, retrieval_config, per_seed=True)


@dg.asset(
    deps=["staged_laion_index"],
    group_name="urls",
    kinds={"faiss", "parquet"},
    partitions_def=seed_sets,
    op_tags=with_index("centroid_urls"),
    retry_policy=RETRY_POLICY,
    pool="retrieval",
    code_version="1",
)
def centroid_urls(
    context: dg.AssetExecutionContext,
    centroid_vector: StoredTable,
    laion_index: dg.ResourceParam[LaionIndex],
    retrieval_config: RetrievalConfig,
) -> Outputs:
    """Images found around the centroid: same style, varied content; near-duplicates removed."""
    yield from _retrieved(context, centroid_vector, laion_index, retrieval_config, per_seed=False)


def _retrieved(
    context: dg.AssetExecutionContext,
    vectors: StoredTable,
    laion_index: LaionIndex,
    retrieval_config: RetrievalConfig,
    *,
    per_seed: bool,
) -> Outputs:
    """Yield the images around the vectors of a table; the index stays open while they are written."""
    with as_failures():
        origin = Provenance.from_footer(vectors.footer, vectors.where)
        asked = retrieval_config.resolve(os.environ, origin.own_settings, origin.seed_set)
        expected = yield_for(context, origin.seed_set, asked)
        queries = embeddings_of(vectors.read(["embedding"]))
        seeds = len(queries) if per_seed else vectors.read(["seeds"])["seeds"][0].as_py()
        conditions = conditions_in(asked.filters or "", asked.origins.get("filters", ""))
        filters = Filters(conditions, laion_index.block_list())
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
        used = _used(settings, found.nprobe, filters.block_list)
        provenance = Provenance.now(
            origin.seed_set,
            origin.seeds,
            opened.manifest.fingerprint,
            used,
            context.run.run_id,
            origin.own_settings,
        )
        context.log.info(
            f"looking for {k:,} images around {'each of ' if per_seed else ''}{len(queries):,} "
            f"vector{'s' if per_seed else ''} among {opened.index.rows:,} rows, "
            f"nprobe {found.nprobe}"
        )

        def footer() -> dict[str, str]:
            counted = replace(provenance, found=found.funnel.sentence())
            return counted.to_footer() | dict(found.table.footer())

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
            title = "around each seed" if per_seed else "around the centroid"
            sheet = draw([strip(stored, title, found.funnel.sentence())])
            return {
                **_labelled(found.funnel),
                "yield": round(found.funnel.yielded, 4),
                "recall of nprobe": _recall(found),
                **_fetched(opened),
                "settings": _with_origins(used),
                "index fingerprint": opened.manifest.fingerprint,
                "seeds fingerprint": origin.seeds,
                "contact sheet": as_markdown(sheet) if sheet else links(stored),
            }

        batches = _closing(until_read, found.table.batches)
        table = Table(found.table.schema, batches, footer)
        yield dg.MaterializeResult(value=TableOutput(table, report))


@dg.asset(
    group_name="urls",
    kinds={"parquet"},
    partitions_def=seed_sets,
    op_tags=on_any_node("combined_urls"),
    retry_policy=RETRY_POLICY,
    code_version="1",
    check_specs=[ONE_ROW_PER_IMAGE, SETTINGS_AS_NOW],
)
def combined_urls(
    context: dg.AssetExecutionContext,
    knn_urls: StoredTable,
    centroid_urls: StoredTable,
    seed_embeddings: StoredTable,
) -> Iterator[dg.MaterializeResult[TableOutput] | dg.AssetCheckResult]:
    """Both URL sets as one table, a row per image, ready for img2dataset.

    Rows with the same id, the same URL, or near-duplicate pictures are one image; the row with the
    lowest rank stays. In order of rank, then id.
    """
    with as_failures():
        origin = check_same_origin(knn_urls, centroid_urls, seed_embeddings)
        as_now = settings_as_now(origin)
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
    )

    written: list[StoredTable] = []

    def report(stored: StoredTable) -> Mapping[str, Any]:
        written.append(stored)
        sheet = draw(
            [
                strip(seed_embeddings, origin.seed_set, f"{len(seed_embeddings):,} seeds"),
                strip(knn_urls, "around each seed", _found(knn_urls)),
                strip(centroid_urls, "around the centroid", _found(centroid_urls)),
                strip(stored, "combined", f"{funnel.kept:,} images"),
            ]
        )
        figures = {
            **_labelled(funnel),
            **_against_what_was_wanted(funnel.kept, origin.settings, len(seed_embeddings)),
            "index fingerprint": origin.index,
            "seeds fingerprint": origin.seeds,
            "settings": _with_origins(origin.settings),
            MADE_WITH: {**origin.settings, OWN_SETTINGS: origin.own_settings},
        }
        if sheet is None:
            return figures | {"contact sheet": links(stored)}
        picture = save_png(sheet, stored.where.removesuffix(".parquet") + ".png")
        return figures | {
            "picture": dg.MetadataValue.path(picture),
            "contact sheet": as_markdown(sheet),
        }

    table = Table(combined.table.schema, combined.table.batches, provenance.to_footer)
    yield dg.MaterializeResult(value=TableOutput(table, report))
    yield one_row_per_image(written[0])
    yield as_now


def _against_what_was_wanted(kept: int, settings: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """Compare what was kept with what both strategies asked for, and with the target if there is one."""
    requested = settings["nb_images_knn"] * seeds + settings["nb_images_centroid"]
    figures = {"requested": requested, YIELD: round(kept / requested, 6)}
    target = settings.get("target_images")
    wanted = {"target images": target, "target reached": round(kept / target, 4)} if target else {}
    return figures | wanted


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


def _recall(found: Retrieval) -> float | str:
    if math.isnan(found.recall):
        return "not measured: sparse staging reads no lists but those that are probed"
    return round(found.recall, 4)


def _fetched(opened: OpenIndex) -> dict[str, int]:
    """What this request had to read from the source, where the index is staged sparse."""
    if not any(file.sparse for file in opened.manifest.files):
        return {}
    return {"bytes fetched": opened.fetched.fetched, "reads of the bucket": opened.fetched.reads}


def _shortfall(found: Retrieval) -> str:
    missing = found.funnel.requested - found.funnel.received
    remedy = "ask for fewer images" if found.nprobe is None else "set a higher nprobe, or ask for fewer"
    return f"the index returned {missing:,} fewer than requested (nprobe {found.nprobe}): {remedy}"


def _found(table: StoredTable) -> str:
    return Provenance.from_footer(table.footer, table.where).found


def _used(settings: Settings, nprobe: int | None, block_list: BlockList | None) -> dict[str, Any]:
    """Settings as they were used, with where each came from."""
    used = settings.values() | {"nprobe": nprobe}
    origins = dict(settings.origins)
    if settings.nprobe is None:
        origins["nprobe"] = CHOSEN
    if block_list is not None:
        used["block_list"], origins["block_list"] = str(block_list), BLOCK_LIST_SETTING
    return used | {"origins": origins}


def _with_origins(used: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{used[name]} ({origin})" for name, origin in used["origins"].items()}


def _labelled(funnel: Funnel | CombinedFunnel) -> dict[str, int]:
    """The counts, named as all other metadata in the UI."""
    return {name.replace("_", " "): count for name, count in asdict(funnel).items()}


def _sentence(funnel: Funnel) -> str:
    lost = [f"{funnel.near_duplicates:,} near-duplicates", f"{funnel.without_url:,} without a URL"]
    lost += [f"{funnel.blocked:,} blocked"] if funnel.blocked else []
    lost += [f"{funnel.filtered:,} filtered out"] if funnel.filtered else []
    return f"{funnel.sentence()} ({', '.join(lost)}; yield {funnel.yielded:.0%})"
