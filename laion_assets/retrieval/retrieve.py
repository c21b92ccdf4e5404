"""The images around one query or many, near-duplicates removed within each query's results.

The steps are search, decode, near-duplicates, metadata; queries pass through them in batches, so that
memory depends on the rows of a batch and not on the number of queries.
What must not live here: how files are opened or written, how two tables become one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.retrieval.arrays import Bytes, Floats, Ids
from laion_assets.retrieval.errors import InputError
from laion_assets.retrieval.index import Hits, Index
from laion_assets.retrieval.metadata import THUMBNAIL_COLUMN, Metadata
from laion_assets.retrieval.near_duplicates import components
from laion_assets.retrieval.tables import Table, decoder_footer
from laion_assets.retrieval.vectors import Coded

ROWS_AT_ONCE = 1 << 18  # results held in memory at a time, unless one query alone asks for more
PICTURES = 48  # thumbnails that travel with a table


@dataclass(frozen=True)
class Request:
    """What to look for around each query.

    Attributes:
        k: images wanted for each query.
        dedup_threshold: cosine above which two images are near-duplicates; 1.0 keeps all.
        nprobe: inverted lists to probe; chosen from k when None.

    """

    k: int
    dedup_threshold: float
    nprobe: int | None = None


@dataclass
class Funnel:
    """Where the images went, from asked for to kept; complete once the table was read."""

    requested: int = 0
    received: int = 0
    without_url: int = 0
    near_duplicates: int = 0
    kept: int = 0

    def sentence(self) -> str:
        """The three counts that people compare."""
        return f"{self.requested:,} requested, {self.received:,} received, {self.kept:,} kept"

    @property
    def yielded(self) -> float:
        """Share of the images asked for that were kept."""
        return self.kept / self.requested if self.requested else 0.0


@dataclass
class Retrieval:
    """A table of images and the figures that go with it."""

    table: Table
    nprobe: int | None
    funnel: Funnel


@dataclass
class _Found:
    """The kept rows of one batch of queries."""

    ids: list[Ids] = field(default_factory=list)
    similarity: list[Floats] = field(default_factory=list)
    rank: list[Ids] = field(default_factory=list)
    query: list[Ids] = field(default_factory=list)
    codes: list[Bytes] = field(default_factory=list)


def retrieve(
    index: Index,
    metadata: Metadata,
    queries: Floats,
    request: Request,
    *,
    per_seed: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> Retrieval:
    """Look around each query and keep one row of each group of near-duplicates.

    Args:
        index: where to look.
        metadata: of the rows of the index.
        queries: (q, dimension) float32 unit rows.
        request: how many, how alike.
        per_seed: whether the table names the query of each row in a column `seed`.
        progress: called with the number of queries done since the last call.

    Returns:
        A table with id, url, caption, similarity, rank, (seed,) code and what else travels, in
        order of query and rank; the work is done while its batches are read.

    Raises:
        InputError: the queries have another dimension than the index.

    """
    if queries.shape[1] != index.dimension:
        raise InputError(
            f"the seeds have {queries.shape[1]} dimensions, the index has {index.dimension}: embed the "
            "seeds with the model the index was made with"
        )
    nprobe = index.nprobe_for(request.k, request.nprobe)
    funnel = Funnel()
    lists = np.empty(0, np.int64)

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal lists
        step = max(1, ROWS_AT_ONCE // request.k)
        for first in range(0, len(queries), step):
            some = queries[first : first + step]
            found = _search(index, metadata, some, first, request, nprobe, funnel)
            rows = _with_metadata(metadata, found, per_seed, len(queries), funnel)
            lists = np.union1d(lists, index.lists_of(np.concatenate(found.codes)))
            yield from rows.to_batches(max_chunksize=1 << 16)
            progress(len(some))

    def footer() -> dict[str, str]:
        return decoder_footer(index.decoder(lists).to_bytes())

    schema = _schema(metadata, index.code_size, per_seed)
    return Retrieval(Table(schema, batches(), footer), nprobe, funnel)


def _search(
    index: Index,
    metadata: Metadata,
    queries: Floats,
    first: int,
    request: Request,
    nprobe: int | None,
    funnel: Funnel,
) -> _Found:
    hits = index.search(queries, request.k, nprobe)
    decoder = index.decoder()
    found = _Found()
    for row in range(len(queries)):
        kept = _kept(hits, row, metadata, request, funnel, decode=decoder.decode)
        found.ids.append(hits.ids[row, kept])
        found.similarity.append(hits.similarity[row, kept])
        found.rank.append(kept + 1)
        found.query.append(np.full(len(kept), first + row))
        found.codes.append(hits.codes[row, kept])
    funnel.requested += request.k * len(queries)
    return found


def _kept(
    hits: Hits,
    row: int,
    metadata: Metadata,
    request: Request,
    funnel: Funnel,
    decode: Callable[[Bytes], Floats],
) -> Ids:
    """Return the places of one query's results that stay.

    A row without metadata has no URL to give: it goes first, so that it never displaces its
    near-duplicate that has one.
    """
    ids = hits.ids[row]
    received = np.flatnonzero(ids >= 0)
    funnel.received += len(received)
    _, first_place = np.unique(ids[received], return_index=True)
    usable = received[np.sort(first_place)]
    funnel.near_duplicates += len(received) - len(usable)  # the same id twice
    covered = usable[metadata.covers(ids[usable])]
    funnel.without_url += len(usable) - len(covered)
    labels = components(Coded(hits.codes[row, covered], decode), request.dedup_threshold)
    kept: Ids = covered[labels == np.arange(len(labels))]
    funnel.near_duplicates += len(covered) - len(kept)
    return kept


def _with_metadata(
    metadata: Metadata, found: _Found, per_seed: bool, queries: int, funnel: Funnel
) -> pa.Table:
    ids = np.concatenate(found.ids)
    query = np.concatenate(found.query)
    codes = np.concatenate(found.codes)
    columns = metadata.take(ids)
    rows = pa.table(
        {
            "id": ids,
            "url": columns["url"],
            "caption": columns["caption"],
            "similarity": np.concatenate(found.similarity),
            "rank": np.concatenate(found.rank).astype(np.int32),
        }
        | ({"seed": query.astype(np.int32)} if per_seed else {})
        | {name: columns[name] for name in columns.column_names[2:]}
        | _thumbnails(metadata, ids, query, queries)
        | {"code": _fixed_size_binary(codes)}
    ).cast(_schema(metadata, codes.shape[1], per_seed))
    with_url = rows.filter(pc.greater(pc.binary_length(rows["url"]), 0))
    funnel.without_url += len(rows) - len(with_url)
    funnel.kept += len(with_url)
    return with_url


def _schema(metadata: Metadata, code_size: int, per_seed: bool) -> pa.Schema:
    theirs = {field.name: field.type for field in metadata.schema}
    travelling = {k: v for k, v in theirs.items() if k not in ("url", "caption", THUMBNAIL_COLUMN)}
    return pa.schema(
        {
            "id": pa.int64(),
            "url": pa.string(),
            "caption": pa.string(),
            "similarity": pa.float32(),
            "rank": pa.int32(),
        }
        | ({"seed": pa.int32()} if per_seed else {})
        | travelling
        | ({THUMBNAIL_COLUMN: pa.binary()} if THUMBNAIL_COLUMN in theirs else {})
        | {"code": pa.binary(code_size)}
    )


def _thumbnails(metadata: Metadata, ids: Ids, query: Ids, queries: int) -> dict[str, pa.Array]:
    """Pictures of the first rows of the first queries, null for all others."""
    if THUMBNAIL_COLUMN not in metadata.schema.names:
        return {}
    each = math.ceil(PICTURES / min(queries, PICTURES))
    starts = np.flatnonzero(np.diff(query, prepend=-1))
    place = np.arange(len(query)) - np.repeat(starts, np.diff(starts, append=len(query)))
    shown = (query < PICTURES) & (place < each)
    pictures = metadata.take(ids[shown], [THUMBNAIL_COLUMN])[THUMBNAIL_COLUMN]
    slot = np.where(shown, np.cumsum(shown) - 1, -1)
    return {THUMBNAIL_COLUMN: pictures.take(pa.array(slot, mask=~shown))}


def _fixed_size_binary(codes: Bytes) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(codes))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(codes.shape[1]), len(codes), [None, data])
