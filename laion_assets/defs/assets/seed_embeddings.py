"""The seeds of one set, and their centroid.

Dagster's concept: https://docs.dagster.io/guides/build/assets
"""

from dataclasses import replace

import dagster as dg
import pyarrow as pa

from laion_assets.defs import checks, report
from laion_assets.defs.failures import as_failures
from laion_assets.defs.io_manager import Tables
from laion_assets.defs.kubernetes.placement import Placement
from laion_assets.defs.partitions import require_seed_set, seed_sets
from laion_assets.defs.provenance import Provenance, now
from laion_assets.defs.report import Materialized
from laion_assets.defs.resources import SeedFolder
from laion_assets.defs.settings import Defaults, RetrievalConfig
from laion_assets.defs.sources import Version, observe, seed_folder
from laion_assets.io.tables import StoredTable
from laion_assets.seeds import SeedSet, centroid, embeddings_of

FILES_SHOWN = 100


def seed_embeddings_asset(placement: Placement) -> dg.AssetsDefinition:
    """Define the asset for a placement."""
    pod = placement.any_node("seed_embeddings")

    @dg.asset(
        deps=[seed_folder],
        group_name="seeds",
        kinds={"numpy", "parquet"},
        partitions_def=seed_sets,
        code_version="2",
        tags=pod.tags,
        op_tags=pod.op_tags,
        retry_policy=pod.retry_policy,
    )
    def seed_embeddings(
        context: dg.AssetExecutionContext,
        seeds: dg.ResourceParam[SeedFolder],
        retrieval_config: RetrievalConfig,
        defaults: dg.ResourceParam[Defaults],
        tables: dg.ResourceParam[Tables],
    ) -> Materialized:
        """The seeds of one set: checked, scaled to length 1, a row per seed.

        The data version is the fingerprint of the files, by which the sensor knows what is done.
        """
        with as_failures():
            require_seed_set(context)
            seed_set = seeds.find(context.partition_key)
            observe(context, Version(seed_folder.key, seed_set.fingerprint, seed_set.name))
            own = seeds.settings(seed_set)
            retrieval_config.resolve(defaults, own, seed_set.name)  # wrong settings fail here, not later
            found = seeds.read(seed_set)
            count, dimension = found.embeddings.shape
            context.log.info(
                f"{count:,} seeds of {dimension} dimensions from {len(seed_set.files)} files"
            )
            _warn_of_ignored(context, seed_set)
            rows = found.to_table()
            # Later assets take the set's own settings from here, so that all are made with the same.
            settings = RetrievalConfig().resolve(Defaults({}), own, seed_set.name)
            provenance = Provenance(seed_set.name, seed_set.fingerprint, settings, context.run.run_id)
            with tables.new(context, rows.schema) as table:
                table.footer = provenance.to_footer()
                for batch in rows.to_batches():
                    table.write(batch)
            stored = tables.written(context)
            return dg.MaterializeResult(
                data_version=dg.DataVersion(seed_set.fingerprint),
                metadata=report.of_seeds(stored, provenance, table.seconds)
                | {
                    "files": [file.name for file in seed_set.files[:FILES_SHOWN]],
                    "ignored files": list(seed_set.ignored[:FILES_SHOWN]),
                },
            )

    return seed_embeddings


def _warn_of_ignored(context: dg.AssetExecutionContext, seed_set: SeedSet) -> None:
    if seed_set.ignored:
        names = ", ".join(seed_set.ignored[:FILES_SHOWN])
        context.log.warning(f"ignored {len(seed_set.ignored):,} files that hold no seeds: {names}")


def centroid_vector_asset(placement: Placement) -> dg.AssetsDefinition:
    """Define the asset for a placement."""
    pod = placement.any_node("centroid_vector")

    @dg.asset(
        group_name="seeds",
        kinds={"numpy", "parquet"},
        partitions_def=seed_sets,
        code_version="2",
        check_specs=checks.CENTROID,
        tags=pod.tags,
        op_tags=pod.op_tags,
        retry_policy=pod.retry_policy,
    )
    def centroid_vector(
        context: dg.AssetExecutionContext,
        seed_embeddings: StoredTable,
        tables: dg.ResourceParam[Tables],
    ) -> Materialized:
        """The mean of the seeds, scaled to length 1, and how concentrated the seeds are around it."""
        with as_failures():
            origin = Provenance.of(seed_embeddings)
            embeddings = embeddings_of(seed_embeddings.read(["embedding"]))
            mean, length = centroid(embeddings)
            context.log.info(f"the mean of {len(embeddings):,} seeds has length {length:.3f}")
            vector = pa.FixedSizeListArray.from_arrays(pa.array(mean), len(mean))
            row = pa.record_batch(
                {"embedding": vector, "norm_of_mean": [length], "seeds": [len(embeddings)]}
            )
            with tables.new(context, row.schema) as table:
                table.footer = replace(origin, run=context.run.run_id, written=now()).to_footer()
                table.write(row)
            return dg.MaterializeResult(
                metadata={"norm of mean": length, "seeds": len(embeddings)}
                | report.of_table(tables.written(context), table.seconds),
                check_results=checks.logged(context, checks.of_centroid(length)),
            )

    return centroid_vector
