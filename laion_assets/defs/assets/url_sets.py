"""A search for a URL set: `centroid_urls`, and what it has in common with `knn_urls`.

Dagster's concept: https://docs.dagster.io/guides/build/assets
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import dagster as dg
import numpy as np
import pyarrow as pa

from laion_assets.defs import checks, report
from laion_assets.defs.assets.staged_laion_index import open_index
from laion_assets.defs.bounds import Bounds
from laion_assets.defs.estimate import PLANNED, Meter, known_machine, share_read
from laion_assets.defs.failures import as_failures
from laion_assets.defs.history import expected_alive, materializations
from laion_assets.defs.io_manager import Tables
from laion_assets.defs.kubernetes.placement import Placement
from laion_assets.defs.partitions import seed_sets
from laion_assets.defs.provenance import Provenance, check_continues, now
from laion_assets.defs.report import Materialized
from laion_assets.defs.resources import LaionIndex, Pictures
from laion_assets.defs.settings import ALIVE, Defaults, ResolvedSettings, RetrievalConfig
from laion_assets.defs.sources import current_settings, observe, retrieval_settings, settings_version
from laion_assets.defs.terminal import count
from laion_assets.index.faiss_index import FURTHER
from laion_assets.io.arrays import Floats, Ids
from laion_assets.io.progress import Progress
from laion_assets.io.tables import StoredTable, Written, new_table
from laion_assets.search.combined import DECODER
from laion_assets.search.cost import Step
from laion_assets.search.filters import Filters, conditions_in
from laion_assets.search.retrieval import (
    MOST_REQUESTED,
    Found,
    Funnel,
    Request,
    all_batches,
    check_dimension,
    columns_found,
    retrieve,
)
from laion_assets.search.shards import ALL, Shard, cut_of
from laion_assets.search.sizing import EXPECT_ALIVE, USUAL, kept_by_each
from laion_assets.search.target import retrieve_the_rest
from laion_assets.seeds import embeddings_of
from laion_assets.staging import OpenIndex

LOW_RECALL = 0.9
LEAST_SHARE = 1 / MOST_REQUESTED
SEARCH_VERSION = "6"  # increment it when a search finds other rows, or cuts seeds into other batches


def centroid_urls_asset(placement: Placement) -> dg.AssetsDefinition:
    """Return the asset with the pod from a placement."""
    pod = placement.with_index("centroid_urls")

    @dg.asset(
        ins={"vectors": dg.AssetIn("centroid_vector")},
        # With a target, the search around the centroid adds what the other one leaves to find.
        deps=["staged_laion_index", retrieval_settings, "knn_urls"],
        group_name="urls",
        kinds={"faiss", "parquet"},
        partitions_def=seed_sets,
        pool="retrieval",
        code_version=SEARCH_VERSION,
        check_specs=checks.CENTROID_URLS,
        tags=pod.tags,
        op_tags=pod.op_tags,
        retry_policy=pod.retry_policy,
    )
    def centroid_urls(
        context: dg.AssetExecutionContext,
        vectors: StoredTable,
        laion_index: dg.ResourceParam[LaionIndex],
        retrieval_config: RetrievalConfig,
        defaults: dg.ResourceParam[Defaults],
        tables: dg.ResourceParam[Tables],
        pictures: dg.ResourceParam[Pictures],
        bounds: dg.ResourceParam[Bounds],
    ) -> Materialized:
        """Images found around the centroid: same style, varied content; near-duplicates removed.

        With a target, the search continues until knn_urls and centroid_urls together reach it.
        """
        with as_failures():
            step = SearchStep(context, vectors, laion_index, tables, pictures, bounds, per_seed=False)
            return step.report(step.write(step.origin(retrieval_config, defaults)))

    return centroid_urls


@dataclass(frozen=True)
class Searched:
    """A finished search.

    Attributes:
        found: what it found.
        provenance: the provenance in its table.
        table: its table.
        figures: more for the report, such as the bytes fetched.
        cut: how all queries were cut into batches, see `cut_of`; empty once shards are joined.

    """

    found: Found
    provenance: Provenance
    table: Written
    figures: Mapping[str, int | str]
    cut: str = ""


@dataclass(frozen=True)
class SearchStep:
    """A step that searches for `knn_urls` or `centroid_urls`, or joins what several have found."""

    context: dg.AssetExecutionContext
    vectors: StoredTable
    laion_index: LaionIndex
    tables: Tables
    pictures: Pictures
    bounds: Bounds
    per_seed: bool

    def origin(self, config: RetrievalConfig, defaults: Defaults) -> Provenance:
        """Return the inputs of the search, with the settings of this run.

        Raises:
            InputError: this run requests more images than it may.

        """
        origin = Provenance.of(self.vectors)
        settings = self._settings(origin, config, defaults)
        if settings.values.target_images is not None:
            settings = settings.with_expect_alive(*self._expect_alive(origin.seed_set))
        self.bounds.check(self.context, settings, self._seeds())
        return replace(origin, settings=settings)

    def _expect_alive(self, seed_set: str) -> tuple[float, str]:
        """Return the share of URLs that is expected to work; both searches must expect the same."""
        if self.per_seed:
            return expected_alive(self.context.instance, seed_set)
        knn = Provenance.of(self.tables.open("knn_urls", seed_set)).settings
        return knn.values.expect_alive or EXPECT_ALIVE, knn.origins.get(ALIVE, "default")

    def write(self, origin: Provenance, part: Shard = ALL, uri: str | None = None) -> Searched:
        """Search, and write the rows with their decoder and provenance.

        Args:
            origin: the inputs.
            part: the shard to search.
            uri: location of its table; that of the asset if None.

        """
        meter = Meter.start()
        queries = embeddings_of(self.vectors.read(["embedding"]))
        with open_index(self.context, self.laion_index) as opened:
            origin = replace(origin, index=opened.manifest.fingerprint)
            check_dimension(opened.index, queries)
            knn = self._found_around_seeds(origin)
            request = self._request(origin.settings)
            every = all_batches(opened.index, opened.metadata, queries, request)
            batches = part.share(every)
            some = np.concatenate([np.empty(0, np.int64), *batches])
            self.context.log.info(_looking(request, len(some), opened.index.rows, per_seed=self.per_seed))
            planned = self._planned(opened, origin.seed_set, queries[some], request)
            schema = columns_found(opened.index, opened.metadata, per_seed=self.per_seed)
            with new_table(uri, schema) if uri else self.tables.new(self.context, schema) as table:
                found = self._search(opened, queries, batches, request, knn, origin, table.write)
                provenance = self.provenance(origin, found)
                table.attach(DECODER, found.decoder)
                table.footer = provenance.to_footer()
            figures = _fetched(opened) | ({PLANNED: meter.against(planned, opened)} if planned else {})
            self._log(found, request, opened.index.rows, is_first=part.number == 0)
        return Searched(found, provenance, table.written(), figures, cut_of(every))

    def _found_around_seeds(self, origin: Provenance) -> StoredTable | None:
        """Open the rows to which a search around the centroid adds; None without a target."""
        if self.per_seed or origin.settings.values.target_images is None:
            return None
        knn = self.tables.open("knn_urls", origin.seed_set)
        check_continues(Provenance.of(knn), origin)
        return knn

    def _planned(
        self, opened: OpenIndex, seed_set: str, queries: Floats, request: Request
    ) -> Step | None:
        """Return what the search is expected to take; None if this machine was not measured."""
        machine = known_machine(opened, self.laion_index)
        if machine is None or not len(queries):
            return None
        past = materializations(self.context.instance, self.context.asset_key.path[-1], seed_set)
        share = share_read(next(past, None), USUAL.share)
        k = request.k if request.keep is None else math.ceil(request.keep / max(share, LEAST_SHARE))
        return machine.search(opened.index, queries, min(k, opened.index.rows), request.nprobe, share)

    def _seeds(self) -> int:
        """Return the number of seeds: one per query, or those whose mean is the query."""
        if self.per_seed:
            return len(self.vectors)
        seeds: int = self.vectors.read(["seeds"])["seeds"][0].as_py()
        return seeds

    def _request(self, settings: ResolvedSettings) -> Request:
        """Return what to look for around each query."""
        values = settings.values
        filters = Filters(conditions_in(values.filters or ""), self.laion_index.block_list())
        keep = self._keep(settings)
        return Request(self.k(settings), values.dedup_threshold, values.nprobe, filters, keep)

    def k(self, settings: ResolvedSettings) -> int:
        """Return the number of images that are requested around each query, with a target at first."""
        values = settings.values
        k = values.nb_images_knn if self.per_seed else values.nb_images_centroid
        return self._keep(settings) or k or 0

    def _keep(self, settings: ResolvedSettings) -> int | None:
        queries = len(self.vectors)  # the seeds, or their mean
        return settings.images and kept_by_each(settings.images, queries)

    def _search(
        self,
        opened: OpenIndex,
        queries: Floats,
        batches: Sequence[Ids],
        request: Request,
        knn: StoredTable | None,
        origin: Provenance,
        write: Callable[[pa.RecordBatch], None],
    ) -> Found:
        index, metadata = opened.index, opened.metadata
        if knn is not None:
            images = origin.settings.images or 0
            return retrieve_the_rest(index, metadata, queries, request, images, knn, write)
        number = sum(map(len, batches))
        with Progress("queries", number, "", self.context.log.info) as progress:
            return retrieve(
                index,
                metadata,
                queries,
                request,
                write,
                per_seed=self.per_seed,
                progress=progress.advance,
                batches=batches,
            )

    def provenance(self, origin: Provenance, found: Found) -> Provenance:
        """Return the provenance of a table of this run."""
        return replace(
            origin,
            settings=origin.settings.with_nprobe(found.nprobe),
            counts=asdict(found.funnel),
            block_list_matches=asdict(found.block_list) if found.block_list else {},
            run=self.context.run.run_id,
            written=now(),
        )

    def report(self, searched: Searched) -> Materialized:
        """Return the metadata of the table, and the results of its checks."""
        stored = self.tables.written(self.context)
        metadata = report.describe_search(
            stored,
            searched.found,
            searched.provenance,
            report.AROUND_SEEDS if self.per_seed else report.AROUND_CENTROID,
            searched.table,
            remote_pictures=self.pictures.remote,
        )
        results = [
            *checks.of_search(stored, searched.provenance.settings.values.dedup_threshold),
            checks.block_list_matches(searched.found.block_list),
        ]
        return dg.MaterializeResult(
            metadata=report.page({**metadata, **searched.figures}),
            check_results=checks.logged(self.context, results),
        )

    def _settings(
        self, origin: Provenance, config: RetrievalConfig, defaults: Defaults
    ) -> ResolvedSettings:
        """Resolve the settings of this run.

        Also report the settings of a run without Launchpad values to `retrieval_settings`, because
        Dagster uses these to decide what is stale.
        """
        own, name, listed = origin.own, origin.seed_set, self.laion_index.block_list_description()
        settings = config.resolve(defaults, own, name, listed)
        current = current_settings(defaults, own, name, listed)
        observe(self.context, settings_version(name, current))
        return settings

    def _log(self, found: Found, request: Request, rows: int, *, is_first: bool) -> None:
        log, funnel, k = self.context.log, found.funnel, request.k
        log.info(_sentence(funnel))
        if sentence := str(found.not_utf8):
            log.warning(sentence)
        if found.block_list:
            log.info(f"block list: {found.block_list}")
        if is_first and request.nprobe and request.nprobe != found.nprobe:
            there = count(found.nprobe, "list") if found.nprobe else "no lists"
            log.warning(f"nprobe {request.nprobe:,} searches all rows: the index has {there}")
        if found.short:
            log.warning(
                f"the target cannot be reached around {self._around(found.short)}: the index has no more "
                f"images, or fewer than 1 of {MOST_REQUESTED} requested is kept"
            )
        elif k > rows:
            if is_first:  # of the shards, for all of which it holds
                there = count(rows, "row")
                log.warning(f"the index has only {there}, but {k:,} were requested per query")
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


def _looking(request: Request, queries: int, rows: int, *, per_seed: bool) -> str:
    around = f"each of {count(queries, 'seed')}" if per_seed else "the centroid"
    images = (
        f"for {count(request.k, 'image')}" if request.keep is None else f"until {request.keep:,} are kept"
    )
    return f"searching {images} around {around} among {count(rows, 'row')}"


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
