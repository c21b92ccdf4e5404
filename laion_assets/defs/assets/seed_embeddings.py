"""The seeds of one set, and their centroid.

What must not live here: how seed files are read and checked (retrieval.seeds).
Dagster's concept: https://docs.dagster.io/guides/build/assets
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
import pyarrow as pa

from laion_assets.defs import checks
from laion_assets.defs.drawing.presentation import as_markdown, draw, strip
from laion_assets.defs.failures import as_failures
from laion_assets.defs.history import OWN_SETTINGS
from laion_assets.defs.io_manager import StoredTable, TableOutput
from laion_assets.defs.kubernetes.placement import RETRY_POLICY, RUNS_ON_ANY_NODE, on_any_node
from laion_assets.defs.partitions import require_seed_set, seed_sets
from laion_assets.defs.resources import SeedFolder
from laion_assets.defs.settings import RetrievalConfig
from laion_assets.defs.sources import observe
from laion_assets.io.tables import Provenance, Table
from laion_assets.seeds.seed_sets import centroid, embeddings_of

FILES_SHOWN = 100

seed_folder = dg.AssetSpec(
    "seed_folder",
    group_name="sources",
    kinds={"numpy"},
    partitions_def=seed_sets,
    description="A folder of embeddings under LAION_SEEDS_URI, one for each seed set. Not made here: a "
    "sensor looks what is in it, and runs what is new.",
)


@dg.asset(
    deps=[seed_folder],
    group_name="seeds",
    kinds={"numpy", "parquet"},
    partitions_def=seed_sets,
    tags=RUNS_ON_ANY_NODE,
    op_tags=on_any_node("seed_embeddings"),
    retry_policy=RETRY_POLICY,
    code_version="1",
)
def seed_embeddings(
    context: dg.AssetExecutionContext,
    seeds: dg.ResourceParam[SeedFolder],
    retrieval_config: RetrievalConfig,
) -> dg.MaterializeResult[TableOutput]:
    """The seeds of one set: checked, scaled to length 1, a row per seed.

    The data version is the fingerprint of the files, by which the sensor knows what was done.
    """
    with as_failures():
        require_seed_set(context)
        seed_set = seeds.find(context.partition_key)
        observe(context, seed_folder.key, seed_set.fingerprint, seed_set.name)
        own = seeds.settings(seed_set)
        # A wrong setting shows here, not after the index was staged.
        retrieval_config.resolve(os.environ, own, seed_set.name)
        found = seeds.read(seed_set)
    count, dimension = found.embeddings.shape
    context.log.info(f"{count:,} seeds of {dimension} dimensions from {len(seed_set.files)} files")
    if seed_set.ignored:
        names = ", ".join(seed_set.ignored[:FILES_SHOWN])
        context.log.warning(
            f"{len(seed_set.ignored):,} files were not read, as they hold no seeds: {names}"
        )
    provenance = Provenance.now(seed_set.name, seed_set.fingerprint, None, {}, context.run.run_id, own)
    rows = found.to_table()

    def report(stored: StoredTable) -> Mapping[str, Any]:
        sheet = draw([strip(stored, seed_set.name, f"{count:,} seeds")])
        return {
            **({"contact sheet": as_markdown(sheet)} if sheet else {}),
            "seeds": count,
            "dimension": dimension,
            "files": [file.name for file in seed_set.files[:FILES_SHOWN]],
            "ignored files": list(seed_set.ignored[:FILES_SHOWN]),
            "fingerprint": seed_set.fingerprint,
            OWN_SETTINGS: own,
        }

    return dg.MaterializeResult(
        value=TableOutput(Table(rows.schema, rows.to_batches(), provenance.to_footer), report),
        data_version=dg.DataVersion(seed_set.fingerprint),
    )


@dg.asset(
    group_name="seeds",
    kinds={"numpy", "parquet"},
    partitions_def=seed_sets,
    tags=RUNS_ON_ANY_NODE,
    op_tags=on_any_node("centroid_vector"),
    retry_policy=RETRY_POLICY,
    code_version="1",
    check_specs=checks.CENTROID,
)
def centroid_vector(
    context: dg.AssetExecutionContext, seed_embeddings: StoredTable
) -> Iterator[dg.MaterializeResult[TableOutput] | dg.AssetCheckResult]:
    """The mean of the seeds, scaled to length 1, and how concentrated the seeds are about it."""
    with as_failures():
        origin = Provenance.from_footer(seed_embeddings.footer, seed_embeddings.where)
        embeddings = embeddings_of(seed_embeddings.read(["embedding"]))
        mean, length = centroid(embeddings)
    context.log.info(f"the mean of {len(embeddings):,} seeds has length {length:.3f}")
    vector = pa.FixedSizeListArray.from_arrays(pa.array(mean), len(mean))
    row = pa.table({"embedding": vector, "norm_of_mean": [length], "seeds": [len(embeddings)]})
    provenance = Provenance.now(
        origin.seed_set, origin.seeds, None, {}, context.run.run_id, origin.own_settings
    )
    yield dg.MaterializeResult(
        value=TableOutput(
            Table(row.schema, row.to_batches(), provenance.to_footer),
            lambda _: {"norm of mean": length, "seeds": len(embeddings)},
        )
    )
    yield from checks.telling(context, checks.of_centroid(length))
