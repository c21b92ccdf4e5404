"""The LAION index on the local disk.

Dagster's concept: https://docs.dagster.io/guides/build/assets
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg

from laion_assets.defs import checks, report
from laion_assets.defs.crashes import reported
from laion_assets.defs.failures import as_failures
from laion_assets.defs.history import FINGERPRINT, NODE, ROW_COUNT
from laion_assets.defs.kubernetes.placement import Placement
from laion_assets.defs.partitions import require_seed_set
from laion_assets.defs.report import Materialized
from laion_assets.defs.resources import LaionIndex
from laion_assets.defs.sources import Version, laion_index_source, last_version, observe
from laion_assets.io.errors import InputError
from laion_assets.io.text import count
from laion_assets.staging import OpenIndex, Staged

NAME = "staged_laion_index"
RECORD_SECONDS = 10  # Dagster records a materialization a moment after the index can be opened


def staged_laion_index_asset(placement: Placement, source: dg.AssetKey) -> dg.AssetsDefinition:
    """Return the asset with the pod from a placement.

    Args:
        placement: where it runs.
        source: the index to stage, either an external asset or a built one.

    """
    pod = placement.staging(NAME)

    @dg.asset(
        deps=[source],
        group_name="index",
        kinds={"faiss", "arrow"},
        pool="staging",
        code_version="1",
        check_specs=checks.STAGED,
        tags=pod.tags,
        op_tags=pod.op_tags,
        retry_policy=pod.retry_policy,
    )
    def staged_laion_index(
        context: dg.AssetExecutionContext, laion_index: dg.ResourceParam[LaionIndex]
    ) -> Materialized:
        """The index and its metadata, verified and staged to the local disk for searches.

        They are copied if the source has changed or the disk lacks them; otherwise they are only checked,
        which is cheap. The data version is the fingerprint of all files.
        """
        with as_failures():
            require_seed_set(context)
            staged = laion_index.stage(context.log.info)
            if source == laion_index_source.key:
                observe(context, Version(source, staged.source_version))
            with _opened(context, laion_index) as opened:
                metadata = report.page(_figures(staged, laion_index) | _shape(opened))
                results = checks.of_staged_index(opened, laion_index.cache_dir)
        context.log.info(_sentence(staged, laion_index))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(staged.manifest.fingerprint),
            metadata=metadata,
            check_results=checks.logged(context, results),
        )

    return staged_laion_index


@contextmanager
def open_index(context: dg.AssetExecutionContext, laion_index: LaionIndex) -> Iterator[OpenIndex]:
    """Open the staged index for a step that needs it, even if the disk has lost it.

    On a cluster every node has a copy of its own, and the node of this step may have none yet, or an
    older one. If LAION_LOST_INDEX allows it, the index is then staged here, which is recorded as a
    materialization of `staged_laion_index`.
    """
    missing = _what_is_missing(context, laion_index)
    if missing and laion_index.lost_index == "restage":
        context.log.warning(f"{missing}. LAION_LOST_INDEX is restage: staging it now")
        _restage(context, laion_index)
    elif missing:
        time.sleep(RECORD_SECONDS)
        if missing := _what_is_missing(context, laion_index):
            raise InputError(missing, "staged_index")
    with _opened(context, laion_index) as index:
        yield index


@contextmanager
def _opened(context: dg.AssetExecutionContext, laion_index: LaionIndex) -> Iterator[OpenIndex]:
    step = context.op_execution_context.get_step_execution_context().step.key
    with reported(step, context.run.run_id), laion_index.open(context.log.info) as index:
        yield index


def _what_is_missing(context: dg.AssetExecutionContext, laion_index: LaionIndex) -> str | None:
    return laion_index.what_is_missing(
        last_version(context.instance, dg.AssetKey(NAME)), context.log.info
    )


def _restage(context: dg.AssetExecutionContext, laion_index: LaionIndex) -> None:
    staged = laion_index.stage(context.log.info)
    key = dg.AssetKey(NAME)
    if staged.manifest.fingerprint == last_version(context.instance, key) and not (
        staged.fetched or staged.mended
    ):
        return  # another step staged it while this one waited for the lock
    context.log_event(
        dg.AssetMaterialization(
            key,
            description=f"staged by {context.asset_key.to_user_string()}, whose disk had no current copy",
            metadata=report.page(_figures(staged, laion_index)),
            tags={"dagster/data_version": staged.manifest.fingerprint},
        )
    )


def _shape(opened: OpenIndex) -> dict[str, Any]:
    return {
        ROW_COUNT: opened.index.rows,
        "metadata rows": len(opened.metadata),
        "dimension": opened.index.dimension,
        "inverted lists": opened.index.nlist,
    }


def _figures(staged: Staged, laion_index: LaionIndex) -> dict[str, Any]:
    return {
        "about": _sentence(staged, laion_index),
        "source": staged.manifest.source,
        "dagster/uri": laion_index.cache_dir,
        **({NODE: laion_index.node} if laion_index.node else {}),
        FINGERPRINT: staged.manifest.fingerprint,
        "files": len(staged.manifest.files),
        "bytes": staged.manifest.size,
        "bytes on the disk": staged.manifest.bytes_on_disk(laion_index.cache_dir),
        "damaged files mended": staged.mended,
        "bytes fetched": staged.bytes_fetched,
        "bytes reused": staged.bytes_reused,
        "bytes per second": round(staged.bytes_fetched / staged.seconds),
        "retries": staged.retries,
        "seconds": round(staged.seconds, 2),
        "verified": staged.verified,
    }


def _sentence(staged: Staged, laion_index: LaionIndex) -> str:
    in_place = laion_index.staging == "in-place"
    where = {"in-place": "used in place", "sparse": f"fetched to {laion_index.cache_dir} as needed"}
    parts = [
        f"{count(len(staged.manifest.files), 'file')}, {staged.manifest.size:,} bytes "
        + where.get(laion_index.staging, f"in {laion_index.cache_dir}")
    ]
    if staged.bytes_fetched:
        parts.append(f"{staged.bytes_fetched:,} of them fetched in {staged.seconds:.1f} s")
    elif not in_place:
        parts.append("nothing to do")
    if staged.mended:
        parts.append(f"{count(staged.mended, 'damaged file')} mended")
    if staged.retries:
        parts.append(f"{count(staged.retries, 'read')} retried")
    return "; ".join(parts)
