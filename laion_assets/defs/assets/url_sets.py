"""The URL sets: rows found around each seed, rows found around the centroid, and both combined.

Dagster's concept: https://docs.dagster.io/guides/build/assets
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import dagster as dg
import pyarrow as pa

from laion_assets.defs import checks, report
from laion_assets.defs.assets.staged_laion_index import open_index
from laion_assets.defs.bounds import Bounds
from laion_assets.defs.estimate import Meter, known_machine, planned_combining, share_read
from laion_assets.defs.failures import as_failures
from laion_assets.defs.history import URLS_ALIVE, expected_alive, materializations
from laion_assets.defs.io_manager import Tables
from laion_assets.defs.kubernetes.placement import Placement
from laion_assets.defs.partitions import seed_sets
from laion_assets.defs.provenance import Provenance, check_continues, check_same_origin, now
from laion_assets.defs.report import Materialized
from laion_assets.defs.resources import LaionIndex, Pictures
from laion_assets.defs.settings import ALIVE, Defaults, ResolvedSettings, RetrievalConfig
from laion_assets.defs.sources import current_settings, observe, retrieval_settings, settings_version
from laion_assets.defs.terminal import count
from laion_assets.index.faiss_index import FURTHER
from laion_assets.io.arrays import Floats
from laion_assets.io.progress import Progress
from laion_assets.io.tables import StoredTable, TableWriter
from laion_assets.search.block_list import BlockList
from laion_assets.search.combined import DECODER, CombinedFunnel, combine
from laion_assets.search.cost import Step
from laion_assets.search.filters import Filters, conditions_in
from laion_assets.search.liveness import measured_liveness
from laion_assets.search.retrieval import (
    MOST_REQUESTED,
    Found,
    Funnel,
    Request,
    columns_found,
    retrieve,
)
from laion_assets.search.sizing import EXPECT_ALIVE, USUAL, kept_by_each
from laion_assets.search.target import retrieve_the_rest
from laion_assets.seeds import embeddings_of
from laion_assets.staging import OpenIndex

LOW_RECALL = 0.9
LEAST_SHARE = 1 / MOST_REQUESTED
PLANNED = "planned and taken"
SEARCH_VERSION = "4"  # increment it if a search now finds other rows


def knn_urls_asset(placement: Placement) -> dg.AssetsDefinition:
    """Return the asset with the pod from a placement."""
    return _search_asset(
        placement,
        "knn_urls",
        "seed_embeddings",
        checks.KNN_URLS,
        "Images found around each seed: same context and style.\n\n"
        "Near-duplicates are removed within each seed's results; an image found for two seeds has two "
        "rows.",
        per_seed=True,
    )


def centroid_urls_asset(placement: Placement) -> dg.AssetsDefinition:
    """Return the asset with the pod from a placement."""
    return _search_asset(
        placement,
        "centroid_urls",
        "centroid_vector",
        checks.CENTROID_URLS,
        "Images found around the centroid: same style, varied content; near-duplicates removed.\n\n"
        "With a target, the search goes on until knn_urls and centroid_urls together reach it.",
        per_seed=False,
    )


def _search_asset(
    placement: Placement,
    name: str,
    vectors_of: str,
    check_specs: Sequence[dg.AssetCheckSpec],
    description: str,
    *,
    per_seed: bool,
) -> dg.AssetsDefinition:
    pod = placement.with_index(name)
    # With a target, the search around the centroid adds what the other one leaves to find.
    before = [] if per_seed else ["knn_urls"]

    @dg.asset(
        name=name,
        ins={"vectors": dg.AssetIn(vectors_of)},
        deps=["staged_laion_index", retrieval_settings, *before],
        description=description,
        group_name="urls",
        kinds={"faiss", "parquet"},
        partitions_def=seed_sets,
        pool="retrieval",
        code_version=SEARCH_VERSION,
        check_specs=check_specs,
        tags=pod.tags,
        op_tags=pod.op_tags,
        retry_policy=pod.retry_policy,
    )
    def search_asset(
        context: dg.AssetExecutionContext,
        vectors: StoredTable,
        laion_index: dg.ResourceParam[LaionIndex],
        retrieval_config: RetrievalConfig,
        defaults: dg.ResourceParam[Defaults],
        tables: dg.ResourceParam[Tables],
        pictures: dg.ResourceParam[Pictures],
        bounds: dg.ResourceParam[Bounds],
    ) -> Materialized:
        with as_failures():
            step = _SearchStep(
                context,
                vectors,
                laion_index,
                retrieval_config,
                defaults,
                tables,
                pictures,
                bounds,
                per_seed=per_seed,
            )
            return step.materialize()

    return search_asset


def combined_urls_asset(placement: Placement) -> dg.AssetsDefinition:
    """Return the asset with the pod from a placement."""
    pod = placement.any_node("combined_urls")

    @dg.asset(
        group_name="urls",
        kinds={"parquet"},
        partitions_def=seed_sets,
        code_version="2",
        check_specs=checks.COMBINED,
        tags=pod.tags,
        op_tags=pod.op_tags,
        retry_policy=pod.retry_policy,
    )
    def combined_urls(
        context: dg.AssetExecutionContext,
        knn_urls: StoredTable,
        centroid_urls: StoredTable,
        seed_embeddings: StoredTable,
        laion_index: dg.ResourceParam[LaionIndex],
        tables: dg.ResourceParam[Tables],
        pictures: dg.ResourceParam[Pictures],
    ) -> Materialized:
        """Both URL sets as one table with a row per image, ready for img2dataset.

        Rows with the same id, the same URL or near-duplicate vectors are one image, of which the row with
        the lowest rank is kept. The table is sorted by rank, then id; with a target, it ends there.
        """
        with as_failures():
            meter = Meter.start()
            origin = check_same_origin(knn_urls, centroid_urls, seed_embeddings)
            provenance = replace(
                origin, run=context.run.run_id, counts={}, block_list_matches={}, written=now()
            )
            threshold = origin.settings.values.dedup_threshold
            combined = combine(knn_urls, centroid_urls, threshold, origin.settings.images)
            context.log.info(_united(combined.funnel))
            seed_set = pa.field("seed_set", pa.string())
            with tables.new(context, combined.schema.append(seed_set)) as table:
                table.footer = provenance.to_footer()
                for batch in combined.batches:
                    names = pa.repeat(origin.seed_set, len(batch))
                    table.write(batch.append_column(seed_set, names))
            planned = planned_combining(laion_index, origin.index, len(knn_urls) + len(centroid_urls))
            took = {PLANNED: meter.against_time(planned)} if planned else {}
            stored = tables.written(context)
            context.log.info(f"{count(len(stored), 'row')}, {stored.size:,} bytes in {stored.where}")
            sources = {report.AROUND_SEEDS: knn_urls, report.AROUND_CENTROID: centroid_urls}
            metadata = report.describe_combined(
                stored,
                combined.funnel,
                provenance,
                sources,
                seed_embeddings,
                table,
                remote_pictures=pictures.remote,
            )
            alive = measured_liveness(stored.batches(["url"]), len(stored)) if pictures.remote else None
            metadata |= took | ({URLS_ALIVE: alive.share} if alive and alive.requested else {})
            results = [
                *checks.of_combined(stored, knn_urls, centroid_urls, threshold),
                checks.urls_alive(alive, origin.settings),
            ]
            return dg.MaterializeResult(
                metadata=report.page(metadata), check_results=checks.logged(context, results)
            )

    return combined_urls


def _united(funnel: CombinedFunnel) -> str:
    return (
        f"{funnel.knn:,} + {funnel.centroid:,} rows: {count(funnel.repeated_ids, 'repeated id')}, "
        f"{count(funnel.repeated_urls, 'repeated URL')}, "
        f"{count(funnel.near_duplicates, 'near-duplicate')}, "
        f"{f'{funnel.beyond_target:,} beyond the target, ' if funnel.beyond_target else ''}"
        f"{funnel.kept:,} kept"
    )


@dataclass(frozen=True)
class _Written:
    """A finished search: its result, the provenance in the table, and the table."""

    found: Found
    provenance: Provenance
    table: TableWriter


@dataclass(frozen=True)
class _SearchStep:
    """One step of `knn_urls` or `centroid_urls`: its inputs, its search, and its table and report."""

    context: dg.AssetExecutionContext
    vectors: StoredTable
    laion_index: LaionIndex
    config: RetrievalConfig
    defaults: Defaults
    tables: Tables
    pictures: Pictures
    bounds: Bounds
    per_seed: bool

    def materialize(self) -> Materialized:
        """Search, then write and report the table."""
        meter = Meter.start()
        origin = Provenance.of(self.vectors)
        block_list = self.laion_index.block_list()
        settings = self._settings(origin, block_list)
        queries = embeddings_of(self.vectors.read(["embedding"]))
        with open_index(self.context, self.laion_index) as opened:
            origin = replace(origin, index=opened.manifest.fingerprint, settings=settings)
            knn, origin = self._target(origin)
            seeds = self._seeds(queries)
            self.bounds.check(self.context, origin.settings, seeds, opened.index.rows)
            request = self._request(origin.settings, seeds, block_list)
            self.context.log.info(_looking(request, queries, opened.index.rows, per_seed=self.per_seed))
            planned = self._planned(opened, origin.seed_set, len(queries), request)
            written = self._write(opened, queries, request, origin, knn)
            fetched = _fetched(opened) | ({PLANNED: meter.against(planned, opened)} if planned else {})
            self._log(written.found, request, opened.index.rows)
        return self._report(written, fetched)

    def _target(self, origin: Provenance) -> tuple[StoredTable | None, Provenance]:
        """Settle how many URLs are expected to work, and open the rows that the target builds on."""
        if origin.settings.values.target_images is None:
            return None, origin
        if self.per_seed:
            share, where = expected_alive(self.context.instance, origin.seed_set)
            return None, replace(origin, settings=origin.settings.with_expect_alive(share, where))
        knn = self.tables.open("knn_urls", origin.seed_set)
        theirs = Provenance.of(knn)
        check_continues(theirs, origin)
        settled = theirs.settings
        return knn, replace(
            origin,
            settings=origin.settings.with_expect_alive(
                settled.values.expect_alive or EXPECT_ALIVE, settled.origins[ALIVE]
            ),
        )

    def _planned(self, opened: OpenIndex, seed_set: str, queries: int, request: Request) -> Step | None:
        """Return what the search is expected to take; None if this machine was not measured."""
        machine = known_machine(opened, self.laion_index)
        if machine is None:
            return None
        past = materializations(self.context.instance, self.context.asset_key.path[-1], seed_set)
        share = share_read(next(past, None), USUAL.share)
        k = request.k if request.keep is None else math.ceil(request.keep / max(share, LEAST_SHARE))
        return machine.search(queries, min(k, opened.index.rows), request.nprobe, share)

    def _seeds(self, queries: Floats) -> int:
        """Return the number of seeds: one per query, or those whose mean is the query."""
        if self.per_seed:
            return len(queries)
        seeds: int = self.vectors.read(["seeds"])["seeds"][0].as_py()
        return seeds

    def _request(self, settings: ResolvedSettings, seeds: int, block_list: BlockList | None) -> Request:
        values = settings.values
        keep = settings.images and kept_by_each(settings.images, seeds if self.per_seed else 1)
        k = keep or (values.nb_images_knn if self.per_seed else values.nb_images_centroid)
        filters = Filters(conditions_in(values.filters or ""), block_list)
        return Request(k or 0, values.dedup_threshold, values.nprobe, filters, keep)

    def _write(
        self,
        opened: OpenIndex,
        queries: Floats,
        request: Request,
        origin: Provenance,
        knn: StoredTable | None,
    ) -> _Written:
        """Search, and write the result with its decoder and provenance."""
        with (
            self.tables.new(self.context, self._schema(opened)) as table,
            Progress("queries", len(queries), "", self.context.log.info) as progress,
        ):
            if knn is None:
                found = retrieve(
                    opened.index,
                    opened.metadata,
                    queries,
                    request,
                    table.write,
                    per_seed=self.per_seed,
                    progress=progress.advance,
                )
            else:
                found = retrieve_the_rest(
                    opened.index,
                    opened.metadata,
                    queries,
                    request,
                    origin.settings.images or 0,
                    knn,
                    table.write,
                )
            provenance = replace(
                origin,
                settings=origin.settings.with_nprobe(found.nprobe),
                counts=asdict(found.funnel),
                block_list_matches=asdict(found.block_list) if found.block_list else {},
                run=self.context.run.run_id,
                written=now(),
            )
            table.attach(DECODER, found.decoder)
            table.footer = provenance.to_footer()
        return _Written(found, provenance, table)

    def _schema(self, opened: OpenIndex) -> pa.Schema:
        return columns_found(opened.index, opened.metadata, per_seed=self.per_seed)

    def _report(self, written: _Written, fetched: Mapping[str, int | str]) -> Materialized:
        """Return the metadata of the table, and the results of its checks."""
        stored = self.tables.written(self.context)
        metadata = report.describe_search(
            stored,
            written.found,
            written.provenance,
            report.AROUND_SEEDS if self.per_seed else report.AROUND_CENTROID,
            written.table,
            remote_pictures=self.pictures.remote,
        )
        results = [
            *checks.of_search(stored, written.provenance.settings.values.dedup_threshold),
            checks.block_list_matches(written.found.block_list),
        ]
        return dg.MaterializeResult(
            metadata=report.page({**metadata, **fetched}),
            check_results=checks.logged(self.context, results),
        )

    def _settings(self, origin: Provenance, block_list: BlockList | None) -> ResolvedSettings:
        """Resolve the settings of this run.

        Also report the settings of a run without Launchpad values to `retrieval_settings`, because
        Dagster uses these to decide what is stale.
        """
        own, name = origin.own, origin.seed_set
        listed = None if block_list is None else str(block_list)
        settings = self.config.resolve(self.defaults, own, name, listed)
        current = current_settings(self.defaults, own, name, listed)
        observe(self.context, settings_version(name, current))
        return settings

    def _log(self, found: Found, request: Request, rows: int) -> None:
        log, funnel, k = self.context.log, found.funnel, request.k
        log.info(_sentence(funnel))
        if sentence := str(found.not_utf8):
            log.warning(sentence)
        if found.block_list:
            log.info(f"block list: {found.block_list}")
        if request.nprobe and request.nprobe != found.nprobe:
            there = count(found.nprobe, "list") if found.nprobe else "no lists"
            log.warning(f"nprobe {request.nprobe:,} searches all rows: the index has {there}")
        if found.short:
            log.warning(
                f"the target cannot be reached around {self._around(found.short)}: the index has no more "
                f"images, or fewer than 1 of {MOST_REQUESTED} requested is kept"
            )
        elif k > rows:
            log.warning(f"the index has only {count(rows, 'row')}, but {k:,} were requested per query")
        elif missing := funnel.requested - funnel.received:
            remedy = "request fewer" if found.nprobe is None else "set a higher nprobe, or request fewer"
            log.warning(
                f"the index returned {count(missing, 'fewer image')} than requested (nprobe "
                f"{found.nprobe}): {remedy}"
            )
        if found.recall < LOW_RECALL:
            log.warning(
                f"with {FURTHER} times as many lists probed, nearer images would replace "
                f"{1 - found.recall:.0%} of those found: set nprobe above {found.nprobe}"
            )

    def _around(self, queries: int) -> str:
        return count(queries, "seed") if self.per_seed else "the centroid"


def _looking(request: Request, queries: Floats, rows: int, *, per_seed: bool) -> str:
    around = f"each of {count(len(queries), 'seed')}" if per_seed else "the centroid"
    images = count(request.k, "image") if request.keep is None else f"until {request.keep:,} are kept"
    return f"searching for {images} around {around} among {count(rows, 'row')}"


def _fetched(opened: OpenIndex) -> dict[str, int | str]:
    """Return what this request read from the source; empty unless the index is staged sparse."""
    if opened.whole:
        return {}
    return {"bytes fetched": opened.fetched.fetched, "reads of the bucket": opened.fetched.reads}


def _sentence(funnel: Funnel) -> str:
    lost = [count(funnel.near_duplicates, "near-duplicate"), f"{funnel.without_url:,} without a URL"]
    lost += [f"{funnel.blocked:,} blocked"] if funnel.blocked else []
    lost += [f"{funnel.filtered:,} filtered out"] if funnel.filtered else []
    return f"{funnel.sentence()} ({', '.join(lost)}; yield {funnel.yielded:.0%})"
