"""Search an index folder with one call, for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from laion_assets.index import Index, Metadata, open_folder
from laion_assets.io.arrays import Floats, unit_rows
from laion_assets.io.errors import InputError
from laion_assets.search.filters import Filters, conditions_in
from laion_assets.search.near_duplicates import DEDUP_THRESHOLD
from laion_assets.search.retrieval import Request, retrieve_table
from laion_assets.staging import is_staged, open_staged

NOT_SHOWN = ("code", "thumbnail")


def search(
    index: str | Path,
    vectors: ArrayLike,
    k: int,
    *,
    dedup_threshold: float = DEDUP_THRESHOLD,
    nprobe: int | None = None,
    filters: str = "",
    metadata: str | Path | None = None,
) -> pa.Table:
    """Find the images nearest to each vector, and drop near-duplicates within its results.

    Args:
        index: folder of an index, or a cache directory that an index was staged to.
        vectors: (n, d) or (d,) numbers; each vector is scaled to length 1.
        k: number of images requested per vector.
        dedup_threshold: cosine above which two images are near-duplicates; 1 keeps all.
        nprobe: number of inverted lists to probe; None chooses it from k.
        filters: conditions on metadata columns, such as `punsafe < 0.5 and width >= 256`.
        metadata: folder of the metadata; by default `metadata` in the index folder.

    Returns:
        A row per image found, with id, url, caption, similarity, rank, seed (the number of the vector)
        and the other metadata columns.

    Raises:
        InputError: the index is missing, a vector is zero, not finite or of another dimension, the
            metadata lacks a column named in `filters`, or a number is out of bounds.

    """
    queries = _queries(vectors)
    request = Request(k, dedup_threshold, nprobe, Filters(conditions_in(filters)))
    with _opened(Path(index), metadata) as (opened, rows):
        table, _ = retrieve_table(opened, rows, queries, request, per_seed=True)
    return table.drop_columns([name for name in NOT_SHOWN if name in table.column_names])


def _queries(vectors: ArrayLike) -> Floats:
    queries, usable = unit_rows(np.atleast_2d(np.asarray(vectors, np.float64)))
    if not usable.all():
        raise InputError(f"vector {np.argmin(usable)} is zero or not finite: remove it")
    return queries


@contextmanager
def _opened(folder: Path, metadata: str | Path | None) -> Iterator[tuple[Index, Metadata]]:
    if metadata is None and is_staged(folder):
        with open_staged(folder) as staged:
            yield staged.index, staged.metadata
        return
    yield open_folder(folder, metadata=metadata)
