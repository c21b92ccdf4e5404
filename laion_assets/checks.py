"""What must be true of a table once it is written, as asset checks with a remedy.

They run inside the step that made the table, on the file as it was written: a check of its own would be
another pod. What must not live here: repairs.
Dagster's concept: https://docs.dagster.io/guides/test/asset-checks
"""

import warnings

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.io_managers import StoredTable
from laion_assets.partitions import seed_sets

with warnings.catch_warnings():
    # Partitions of checks are new in Dagster. Without them one failed run would turn the check red for
    # all seed sets.
    warnings.simplefilter("ignore", dg.PreviewWarning)
    ONE_ROW_PER_IMAGE = dg.AssetCheckSpec(
        "one_row_per_image",
        asset="combined_urls",
        description="No id and no URL stands in two rows.",
        partitions_def=seed_sets,
    )


def one_row_per_image(combined: StoredTable) -> dg.AssetCheckResult:
    """Count repeated ids and URLs; combining must have left none."""
    rows = combined.read(["id", "url"])
    repeated = {name: len(rows) - _distinct(rows[name]) for name in ("id", "url")}
    return dg.AssetCheckResult(
        check_name=ONE_ROW_PER_IMAGE.name,
        passed=not any(repeated.values()),
        metadata={f"repeated {name}s": count for name, count in repeated.items()},
        description=f"{len(rows):,} rows, {repeated['id']} repeated ids, {repeated['url']} repeated URLs",
    )


def _distinct(column: pa.ChunkedArray) -> int:
    return int(pc.count_distinct(column).as_py())
