"""The seeds of one set and their centroid.

Dagster's concept: https://docs.dagster.io/guides/build/assets
"""

from dataclasses import replace

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.defs import checks, report
from laion_assets.defs.failures import as_failures
from laion_assets.defs.history import materializations
from laion_assets.defs.io_manager import Tables
from laion_assets.defs.kubernetes.placement import Placement
from laion_assets.defs.partitions import require_seed_set, seed_sets
from laion_assets.defs.provenance import Provenance, now
from laion_assets.defs.report import Materialized
from laion_assets.defs.resources import Embedder, LaionIndex, SeedFolder
from laion_assets.defs.settings import Defaults, RetrievalConfig
from laion_assets.defs.sources import observe, seed_folder, seeds_version, show_seeds
from laion_assets.io.errors import InputError
from laion_assets.io.progress import Progress
from laion_assets.io.tables import StoredTable, vector_column
from laion_assets.io.text import count
from laion_assets.seeds import (
    PROMPT,
    KnownImages,
    Model,
    Seeds,
    SeedSet,
    UnfinishedImages,
    centroid,
    embeddings_of,
    read_seeds,
)

FILES_LOGGED = 20
OF_KNOWN_IMAGES = (
    "content",
    "thumbnail",
    "embedding",
)  # columns; "content" exists only if the set has images


def seed_embeddings_asset(placement: Placement) -> dg.AssetsDefinition:
    """Return the asset with the pod from a placement."""
    pod = placement.embedding("seed_embeddings")

    @dg.asset(
        deps=[seed_folder],
        group_name="seeds",
        kinds={"numpy", "parquet"},
        partitions_def=seed_sets,
        code_version="4",
        tags=pod.tags,
        op_tags=pod.op_tags,
        retry_policy=pod.retry_policy,
    )
    def seed_embeddings(
        context: dg.AssetExecutionContext,
        seeds: dg.ResourceParam[SeedFolder],
        embedder: dg.ResourceParam[Embedder],
        laion_index: dg.ResourceParam[LaionIndex],
        retrieval_config: RetrievalConfig,
        defaults: dg.ResourceParam[Defaults],
        tables: dg.ResourceParam[Tables],
    ) -> Materialized:
        """The seeds of one set as unit vectors, one row per seed.

        Vectors are read; images and prompts are embedded with the index's model. The data version is the
        fingerprint of the files, and of the model if it embedded them.
        """
        with as_failures():
            require_seed_set(context)
            seed_set = seeds.find(context.partition_key)
            observe(context, seeds_version(seed_set))
            own = seeds.settings(seed_set)
            # Wrong settings fail here, not after the index is staged. The set's own settings fail even if
            # a value of this run replaces them.
            RetrievalConfig().resolve(Defaults({}), own, seed_set.name)
            settings = retrieval_config.resolve(defaults, own, seed_set.name)
            context.log.info(f"{seed_set.name} holds {seed_set.contents()}")
            model = _model_for(context, seed_set, embedder, laion_index)
            unfinished = UnfinishedImages(
                tables.unfinished(context),
                model.fingerprint if model else "",
                context.log.warning,
            )
            with Progress("images", len(seed_set.images), "", context.log.info) as progress, unfinished:
                found = read_seeds(
                    seeds.uri,
                    seed_set,
                    model,
                    known=_known_images(context, tables, model, unfinished) if model else None,
                    max_bad_images=settings.values.max_bad_images,
                    progress=progress.advance,
                    keep=unfinished.keep,
                )
            _log(context, seed_set, found)
            show_seeds(context, seed_set, found)
            provenance = Provenance(
                seed_set.name,
                seed_set.fingerprint,
                settings,
                context.run.run_id,
                # Later assets read the set's own settings from here, so that all use the same.
                own=dict(own),
                model=model.fingerprint if model else None,
            )
            rows = found.to_table()
            with tables.new(context, rows.schema) as table:
                table.footer = provenance.to_footer()
                for batch in rows.to_batches():
                    table.write(batch)
            unfinished.remove()
            return dg.MaterializeResult(
                data_version=dg.DataVersion(provenance.seeds_version),
                metadata=report.page(
                    report.describe_seeds(
                        tables.written(context), seed_set, found, provenance, table.written()
                    )
                ),
            )

    return seed_embeddings


def _model_for(
    context: dg.AssetExecutionContext, seed_set: SeedSet, embedder: Embedder, laion_index: LaionIndex
) -> Model | None:
    """Open the model if there is anything to embed."""
    if not seed_set.needs_model:
        return None
    dimensions = (
        past.figures["dimension"]
        for past in materializations(context.instance, "staged_laion_index")
        if "dimension" in past.figures
    )
    return embedder.open(laion_index, next(dimensions, None), context.log.info)


def _known_images(
    context: dg.AssetExecutionContext, tables: Tables, model: Model, unfinished: UnfinishedImages
) -> KnownImages:
    """Return the images that the model embedded for the set's last table or for an unfinished one."""
    found = unfinished.tables()
    last = tables.find(context.asset_key.path[-1], context.partition_key)
    try:
        if last is not None and Provenance.of(last).model == model.fingerprint:
            found.append(last.read([name for name in OF_KNOWN_IMAGES if name in last.schema.names]))
    except InputError as error:
        context.log.info(f"embedding the images of the last table again: {error}")
    return KnownImages.of(*found)


def _log(context: dg.AssetExecutionContext, seed_set: SeedSet, found: Seeds) -> None:
    seeds, dimension = found.embeddings.shape
    reused = f", {found.reused:,} of them reused" if found.reused else ""
    context.log.info(f"{count(seeds, 'seed')} of {dimension} dimensions{reused}")
    for what, noun, names in (
        ("not embedded because the set already has embeddings", "image", seed_set.not_embedded),
        ("cannot be embedded", "image", [str(image) for image in found.bad_images]),
        ("cut", "prompt", [str(prompt) for prompt in found.cut_prompts]),
        ("ignored, without seeds", "file", seed_set.ignored),
        ("about values of seed files", "note", found.notes),
    ):
        if names:
            context.log.warning(f"{count(len(names), noun)} {what}: {'; '.join(names[:FILES_LOGGED])}")


def centroid_vector_asset(placement: Placement) -> dg.AssetsDefinition:
    """Return the asset with the pod from a placement."""
    pod = placement.any_node("centroid_vector")

    @dg.asset(
        group_name="seeds",
        kinds={"numpy", "parquet"},
        partitions_def=seed_sets,
        code_version="4",
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
        """The mean of the seeds, scaled to length 1, with a measure of how concentrated the seeds are."""
        with as_failures():
            origin = Provenance.of(seed_embeddings)
            rows = seed_embeddings.read(["kind", "embedding"])
            is_prompt = pc.equal(rows["kind"], PROMPT)
            prompts = embeddings_of(rows.filter(is_prompt))
            # Text vectors lie apart from image vectors, so prompts count only in a set without images.
            embeddings = embeddings_of(rows.filter(pc.invert(is_prompt)))
            if not len(embeddings):
                embeddings, prompts = prompts, embeddings
            mean, length = centroid(embeddings)
            context.log.info(f"the mean of {count(len(embeddings), 'seed')} has length {length:.3f}")
            vector = vector_column(mean[None])
            row = pa.record_batch(
                {"embedding": vector, "norm_of_mean": [length], "seeds": [len(embeddings)]}
            )
            with tables.new(context, row.schema) as table:
                table.footer = replace(origin, run=context.run.run_id, written=now()).to_footer()
                table.write(row)
            return dg.MaterializeResult(
                metadata=report.page(report.describe_centroid(tables.written(context), table.written())),
                check_results=checks.logged(
                    context, checks.of_centroid(len(embeddings), length, mean, prompts)
                ),
            )

    return centroid_vector
