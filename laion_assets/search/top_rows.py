"""Find the best few rows around a few queries, for a quick look at an index."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import THUMBNAIL_COLUMN, Metadata
from laion_assets.index.vectors import Coded, held
from laion_assets.io.arrays import Floats, Ids
from laion_assets.io.tables import code_bytes
from laion_assets.search.block_list import BlockListMatches
from laion_assets.search.filters import NO_FILTERS, Filters
from laion_assets.search.near_duplicates import components
from laion_assets.search.retrieval import Request, retrieve_table

OVERSAMPLING = 4  # rows requested per row wanted: on LAION about 70 % are near-duplicates
MIN_PER_QUERY = 16  # rows requested
MAX_ROUNDS = 3
GROWTH = 4  # factor between the rows of two rounds


def best_rows(
    index: Index,
    metadata: Metadata,
    queries: Floats,
    top: int,
    *,
    dedup_threshold: float,
    nprobe: int | None = None,
    filters: Filters = NO_FILTERS,
) -> tuple[pa.Table, BlockListMatches | None]:
    """Find the best rows around some queries, without near-duplicates.

    Rows are sorted by their rank in a query's results, then by similarity, then by id: ranks of different
    queries are comparable, similarities are not.

    Args:
        index: the index to search.
        metadata: the metadata of its rows.
        queries: (q, dimension) float32 unit rows.
        top: number of rows wanted.
        dedup_threshold: cosine above which two rows are near-duplicates; 1 keeps all.
        nprobe: number of inverted lists to probe; None chooses it from the rows requested.
        filters: conditions and block list that drop rows.

    Returns:
        At most `top` rows of id, url, caption, similarity, rank (from 1), seed (the number of the query)
        and the other metadata columns; and how many entries of the block list match.

    Raises:
        InputError: see `retrieve`.

    """
    k = max(MIN_PER_QUERY, -(-OVERSAMPLING * top // len(queries)))
    for _ in range(MAX_ROUNDS):
        request = Request(min(k, index.rows), dedup_threshold, nprobe, filters)
        rows, found = retrieve_table(index, metadata, queries, request, per_seed=True)
        rows = rows.take(pa.array(_distinct(index, rows, dedup_threshold)[:top]))
        if len(rows) == top or k >= index.rows:
            break
        k *= GROWTH
    return _as_shown(rows, metadata), found.block_list


def _distinct(index: Index, found: pa.Table, threshold: float) -> Ids:
    """Return the positions of distinct images, best first."""
    ids, rank, similarity = (found[name].to_numpy() for name in ("id", "rank", "similarity"))
    best_first = np.lexsort((ids, -similarity, rank))
    _, first = np.unique(ids[best_first], return_index=True)
    places = best_first[np.sort(first)]
    if not len(places):
        return places
    codes = code_bytes(found["code"])[places]
    labels = components(held(Coded(codes, index.decoder())), threshold)
    distinct: Ids = places[labels == np.arange(len(places))]
    return distinct


def _as_shown(rows: pa.Table, metadata: Metadata) -> pa.Table:
    ranks = pa.array(np.arange(1, len(rows) + 1, dtype=np.int32))
    rows = rows.drop_columns(["code"]).set_column(rows.column_names.index("rank"), "rank", ranks)
    if THUMBNAIL_COLUMN not in rows.column_names:
        return rows
    thumbnails = metadata.take(rows["id"].to_numpy(), [THUMBNAIL_COLUMN])[THUMBNAIL_COLUMN]
    return rows.drop_columns([THUMBNAIL_COLUMN]).append_column(THUMBNAIL_COLUMN, thumbnails)
