"""`combined_urls`: both URL sets as one table, whose images are compared in stripes if there are many.

The asset is a graph of three kinds of steps: `stripes` plans the comparison, `compare` finds the links of
one stripe, `unite` writes and reports the table. A usual set has no stripes: `unite` compares its images.
After a failure, Dagster's re-execution compares only what failed.

Dagster's concept: https://docs.dagster.io/guides/build/assets/graph-backed-assets
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import dagster as dg
import pyarrow as pa

from laion_assets.defs import checks, report
from laion_assets.defs.estimate import PLANNED, Meter, planned_combining
from laion_assets.defs.failures import as_failures
from laion_assets.defs.history import URLS_ALIVE
from laion_assets.defs.io_manager import Tables, check_version
from laion_assets.defs.kubernetes.placement import Placement
from laion_assets.defs.partitions import seed_sets
from laion_assets.defs.provenance import Provenance, check_same_origin, now
from laion_assets.defs.resources import LaionIndex, Pictures
from laion_assets.defs.terminal import count
from laion_assets.io.arrays import Ids
from laion_assets.io.errors import InputError
from laion_assets.io.tables import StoredTable, Written
from laion_assets.search.combined import Combined, CombinedFunnel, combine
from laion_assets.search.liveness import measured_liveness
from laion_assets.search.stripes import compare_stripe, links_in, stripes_for, write_plan

NAME = "combined_urls"
VERSION = "2"  # increment it when combining keeps other rows, or cuts images into other stripes
REMEDY = f"materialize {NAME} again"
Value = dict[str, Any]  # passed between steps as JSON


def combined_urls_asset(placement: Placement) -> dg.AssetsDefinition:
    """Return the asset with the pods of its steps from a placement."""
    pod = placement.combining(NAME)

    @dg.op(out=dg.DynamicOut(io_manager_key="handover"), tags=pod.op_tags, retry_policy=pod.retry_policy)
    def stripes(
        context: dg.AssetExecutionContext,
        knn_urls: StoredTable,
        centroid_urls: StoredTable,
        seed_embeddings: StoredTable,
        tables: dg.ResourceParam[Tables],
    ) -> Iterator[dg.DynamicOutput[Value]]:
        """Plan the comparison of many images; a usual set has no stripes."""
        with as_failures():
            origin = check_same_origin(knn_urls, centroid_urls, seed_embeddings)
            threshold = origin.settings.values.dedup_threshold
            number = stripes_for(knn_urls, centroid_urls) if threshold < 1 else 1
            if number == 1:
                return
            meter = Meter.start()
            uri = f"{_folder(tables, context)}/images.parquet"
            planned = write_plan(knn_urls, centroid_urls, threshold, uri, context.log.info)
            shared = {
                "version": VERSION,
                "planned": _to_json(planned, uri),
                "threshold": threshold,
                "inputs": _inputs(knn_urls, centroid_urls),
                "seconds": meter.seconds(),
                "of": number,
            }
        for each in range(number):
            yield dg.DynamicOutput({**shared, "number": each}, f"{each:04d}")

    @dg.op(
        out=dg.Out(io_manager_key="handover"),
        pool="combining",
        tags=pod.op_tags,
        retry_policy=pod.retry_policy,
    )
    def compare(
        context: dg.AssetExecutionContext, stripe: Value, tables: dg.ResourceParam[Tables]
    ) -> Value:
        """Find the links of one stripe."""
        with as_failures():
            meter = Meter.start()
            check_version([stripe], VERSION, REMEDY)
            number, of = stripe["number"], stripe["of"]
            uri = f"{_folder(tables, context)}/links-{number:04d}.parquet"
            found = compare_stripe(_open(stripe["planned"]), stripe["threshold"], (number, of), uri)
            planning = stripe["seconds"] if number == 0 else 0.0
            return {
                "stripe": stripe,
                "links": _to_json(found, uri),
                "seconds": meter.seconds() + planning,
            }

    @dg.op(
        out=checks.outputs_with(NAME, checks.COMBINED),
        tags=pod.op_tags,
        retry_policy=pod.retry_policy,
    )
    def unite(
        context: dg.AssetExecutionContext,
        found: list[Value],
        knn_urls: StoredTable,
        centroid_urls: StoredTable,
        seed_embeddings: StoredTable,
        laion_index: dg.ResourceParam[LaionIndex],
        tables: dg.ResourceParam[Tables],
        pictures: dg.ResourceParam[Pictures],
    ) -> Iterator[Any]:
        """Unite the links of all stripes, or compare the images here; write and report the table."""
        with as_failures():
            meter = Meter.start(sum(each["seconds"] for each in found))
            origin = check_same_origin(knn_urls, centroid_urls, seed_embeddings)
            provenance = replace(
                origin, run=context.run.run_id, counts={}, block_list_matches={}, written=now()
            )
            threshold = origin.settings.values.dedup_threshold
            links = _links(found, _inputs(knn_urls, centroid_urls)) if found else None
            most = origin.settings.images
            combined = combine(knn_urls, centroid_urls, threshold, most, context.log.info, links)
            context.log.info(_united(combined.funnel))
            written = _write(context, tables, combined, provenance)
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
                replace(written, seconds=meter.seconds()),
                remote_pictures=pictures.remote,
            )
            alive = measured_liveness(stored.batches(["url"]), len(stored)) if pictures.remote else None
            metadata |= took | ({URLS_ALIVE: alive.share} if alive and alive.requested else {})
            results = [
                *checks.of_combined(stored, knn_urls, centroid_urls, threshold),
                checks.urls_alive(alive, origin.settings),
            ]
            result: dg.MaterializeResult[Any] = dg.MaterializeResult(
                metadata=report.page(metadata), check_results=checks.logged(context, results)
            )
            tables.remove_handed_over(context)
        yield result

    @dg.graph_asset(
        name=NAME,
        ins={name: dg.AssetIn(name) for name in ("knn_urls", "centroid_urls", "seed_embeddings")},
        description="Both URL sets as one table with a row per image, ready for img2dataset.\n\n"
        "Rows with the same id, the same URL or near-duplicate vectors are one image, of which the row "
        "with the lowest rank is kept. The table is sorted by rank, then id; with a target, it ends "
        "there. Millions of images are compared in stripes, which may run at the same time.",
        group_name="urls",
        kinds={"parquet"},
        partitions_def=seed_sets,
        code_version=VERSION,
        check_specs=checks.COMBINED,
        tags=pod.tags,
    )
    def combined_urls(knn_urls: Any, centroid_urls: Any, seed_embeddings: Any) -> dict[str, Any]:
        cut = stripes(knn_urls, centroid_urls, seed_embeddings)
        outputs = unite(cut.map(compare).collect(), knn_urls, centroid_urls, seed_embeddings)
        return {name: getattr(outputs, name) for name in outputs._fields}

    return combined_urls


def _folder(tables: Tables, context: dg.AssetExecutionContext) -> str:
    return tables.handed_over(NAME, context.partition_key, context.run.run_id)


def _to_json(written: Written, uri: str) -> Value:
    return {"uri": uri, **asdict(written)}


def _open(written: Mapping[str, Any]) -> StoredTable:
    return StoredTable(written["uri"], REMEDY, written["checksum"])


def _inputs(*urls: StoredTable) -> list[list[str]]:
    """Return what identifies URL sets."""
    return [[made.run, made.written] for made in map(Provenance.of, urls)]


def _links(found: Sequence[Value], inputs: list[list[str]]) -> Iterator[tuple[Ids, Ids]]:
    """Return the links of all stripes.

    Raises:
        InputError: the stripes are of another version, of several plans, or of other inputs.

    """
    stripes = sorted((each["stripe"] for each in found), key=lambda stripe: stripe["number"])
    check_version(stripes, VERSION, REMEDY)
    if any(stripe["inputs"] != inputs for stripe in stripes):
        raise InputError(f"a URL set has changed since its images were compared: {REMEDY}")
    plans = {stripe["planned"]["checksum"] for stripe in stripes}
    if len(plans) > 1 or [stripe["number"] for stripe in stripes] != [*range(stripes[0]["of"])]:
        raise InputError(f"the stripes are not those of one plan: {REMEDY}")
    return links_in(_open(each["links"]) for each in found)


def _write(
    context: dg.AssetExecutionContext, tables: Tables, combined: Combined, provenance: Provenance
) -> Written:
    seed_set = pa.field("seed_set", pa.string())
    with tables.new(context, combined.schema.append(seed_set)) as table:
        table.footer = provenance.to_footer()
        for batch in combined.batches:
            names = pa.repeat(provenance.seed_set, len(batch))
            table.write(batch.append_column(seed_set, names))
    return table.written()


def _united(funnel: CombinedFunnel) -> str:
    return (
        f"{funnel.knn:,} + {funnel.centroid:,} rows: {count(funnel.repeated_ids, 'repeated id')}, "
        f"{count(funnel.repeated_urls, 'repeated URL')}, "
        f"{count(funnel.near_duplicates, 'near-duplicate')}, "
        f"{f'{funnel.beyond_target:,} beyond the target, ' if funnel.beyond_target else ''}"
        f"{funnel.kept:,} kept"
    )
