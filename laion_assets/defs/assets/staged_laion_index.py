"""The LAION index on the local disk.

What must not live here: how it is copied and verified (retrieval.staging).
Dagster's concept: https://docs.dagster.io/guides/build/assets
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg

from laion_assets.defs import checks
from laion_assets.defs.failures import as_failures
from laion_assets.defs.kubernetes.placement import RETRY_POLICY, RUNS_WITH_INDEX, with_index
from laion_assets.defs.partitions import require_seed_set
from laion_assets.defs.resources import LaionIndex
from laion_assets.defs.sources import last_version, observe
from laion_assets.io.errors import InputError
from laion_assets.staging import OpenIndex, Staged

STAGED = dg.AssetKey("staged_laion_index")
SECONDS_TO_A_RECORD = 10  # of what was staged: the step opens the index before Dagster notes it

laion_index_source = dg.AssetSpec(
    "laion_index_source",
    group_name="sources",
    kinds={"faiss", "arrow"},
    description="The published index and its metadata, where LAION_INDEX_URI says. Not made here: a "
    "sensor looks every few minutes whether it has changed; `staged_laion_index` is then out of date.",
)


@dg.asset(
    deps=[laion_index_source],
    group_name="index",
    kinds={"faiss", "arrow"},
    tags=RUNS_WITH_INDEX,
    op_tags=with_index("staged_laion_index"),
    retry_policy=RETRY_POLICY,
    pool="staging",
    code_version="1",
    check_specs=checks.STAGED,
)
def staged_laion_index(
    context: dg.AssetExecutionContext, laion_index: dg.ResourceParam[LaionIndex]
) -> dg.MaterializeResult:  # type: ignore[type-arg]  # with checks Dagster takes no other form
    """The index and its metadata on the local disk, verified.

    Copied from the source when that has changed or the disk does not hold it; otherwise only checked,
    so a run of it costs little. Searches read it there. The data version is the fingerprint of all files.
    """
    with as_failures():
        require_seed_set(context)
        staged = laion_index.stage(context.log.info)
        observe(context, laion_index_source.key, staged.source_version)
        with laion_index.open(context.log.info) as opened:
            rows, metadata_rows = opened.index.rows, len(opened.metadata)
            dimension, nlist = opened.index.dimension, opened.index.nlist
            checked = checks.of_staged_index(opened, laion_index.cache_dir)
    context.log.info(_sentence(staged, laion_index))
    return dg.MaterializeResult(
        data_version=dg.DataVersion(staged.manifest.fingerprint),
        metadata={
            **_figures(staged, laion_index),
            "dagster/row_count": rows,
            "metadata rows": metadata_rows,
            "dimension": dimension,
            "inverted lists": nlist,
        },
        check_results=[*checks.telling(context, checked)],
    )


@contextmanager
def open_index(context: dg.AssetExecutionContext, laion_index: LaionIndex) -> Iterator[OpenIndex]:
    """Open the staged index for a step that needs it, on a disk that may have lost it.

    A node can come back under its name with an empty disk, or with that of another time. Then the index
    is staged again, as LAION_LOST_INDEX says, and that is a materialization of `staged_laion_index` like
    any other.
    """
    missing = _what_is_missing(context, laion_index)
    if missing and laion_index.lost_index == "restage":
        context.log.warning(f"{missing}. LAION_LOST_INDEX is restage: staging it now")
        _restage(context, laion_index)
    elif missing:
        _look_again(context, laion_index)
    with laion_index.open(context.log.info) as index:
        yield index


def _what_is_missing(context: dg.AssetExecutionContext, laion_index: LaionIndex) -> str | None:
    return laion_index.what_is_missing(last_version(context.instance, STAGED))


def _look_again(context: dg.AssetExecutionContext, laion_index: LaionIndex) -> None:
    """Fail if it stays: between staging in another run and Dagster's record of it lies a moment."""
    time.sleep(SECONDS_TO_A_RECORD)
    if missing := _what_is_missing(context, laion_index):
        raise InputError(missing)


def _restage(context: dg.AssetExecutionContext, laion_index: LaionIndex) -> None:
    staged = laion_index.stage(context.log.info)
    if staged.manifest.fingerprint == last_version(context.instance, STAGED) and not staged.fetched:
        return  # another step did it while this one waited for the lock
    context.log_event(
        dg.AssetMaterialization(
            STAGED,
            description=f"staged again by {context.asset_key.to_user_string()}: the disk did not hold it",
            metadata=_figures(staged, laion_index),
            tags={"dagster/data_version": staged.manifest.fingerprint},
        )
    )


def _figures(staged: Staged, laion_index: LaionIndex) -> dict[str, Any]:
    return {
        "source": staged.manifest.source,
        "dagster/uri": laion_index.cache_dir,
        "fingerprint": staged.manifest.fingerprint,
        "files": len(staged.manifest.files),
        "bytes": staged.manifest.size,
        "bytes on the disk": staged.manifest.bytes_on_disk(laion_index.cache_dir),
        "bytes fetched": staged.bytes_fetched,
        "bytes reused": staged.bytes_reused,
        "bytes per second": round(staged.bytes_fetched / staged.seconds),
        "retries": staged.retries,
        "seconds": round(staged.seconds, 2),
        "verified": staged.verified,
    }


def _sentence(staged: Staged, laion_index: LaionIndex) -> str:
    in_place = laion_index.staging == "in-place"
    where = {"in-place": "used where they are", "sparse": f"to come to {laion_index.cache_dir} as needed"}
    parts = [
        f"{len(staged.manifest.files)} files, {staged.manifest.size:,} bytes "
        + where.get(laion_index.staging, f"in {laion_index.cache_dir}")
    ]
    if staged.bytes_fetched:
        done = "checked" if in_place else "fetched"
        parts.append(f"{staged.bytes_fetched:,} of them {done} in {staged.seconds:.1f} s")
    else:
        parts.append("nothing to do")
    if staged.retries:
        parts.append(f"{staged.retries} reads tried again")
    return "; ".join(parts)
