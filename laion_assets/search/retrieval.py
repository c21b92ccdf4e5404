"""The images around one query or many, near-duplicates removed within each query's results.

The steps are search, decode, near-duplicates, metadata. Queries pass through them in batches, so memory
depends on the rows of a batch and not on the number of queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.index.faiss_index import Hits, Index
from laion_assets.index.metadata import THUMBNAIL_COLUMN, Metadata
from laion_assets.index.vectors import decoded_codes, unit
from laion_assets.io.arrays import Bytes, Floats, Ids, Mask
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import one_blas_thread
from laion_assets.io.tables import fixed_size_binary
from laion_assets.search.block_list import BlockListMatches
from laion_assets.search.filters import NO_FILTERS, Filters
from laion_assets.search.near_duplicates import components_of_lists
from laion_assets.search.sizing import share_kept

RESULT_BYTES = 1 << 30  # of results held in memory, unless one query alone asks for more
COPIES = 4  # of a row's code, at most, at a time
WRITTEN_ROWS = 1 << 16  # in one batch
RECALL_QUERIES = 16  # whose recall is measured
THUMBNAILS = 48  # that travel with a table
PAIRS = 24  # of near-duplicates that are shown
KEPT, WITHOUT_URL, BLOCKED, FILTERED = range(OUTCOMES := 4)  # of a row whose metadata was read


@dataclass(frozen=True)
class Request:
    """What to look for around each query.

    Attributes:
        k: images requested for each query.
        dedup_threshold: cosine above which two images are near-duplicates; 1.0 keeps all.
        nprobe: inverted lists to probe; chosen from k when None.
        filters: what keeps images out.

    Raises:
        InputError: `k` or `nprobe` is below 1, or the threshold is not above 0 and at most 1.

    """

    k: int
    dedup_threshold: float
    nprobe: int | None = None
    filters: Filters = NO_FILTERS

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.k < 1:
            raise InputError(f"k is {self.k}: request at least 1 image", "k")
        if self.nprobe is not None and self.nprobe < 1:
            raise InputError(
                f"nprobe is {self.nprobe}: probe at least 1 list, or leave it to be chosen", "nprobe"
            )
        if not 0 < self.dedup_threshold <= 1:  # NaN neither
            raise InputError(
                f"dedup_threshold is {self.dedup_threshold}: use a cosine above 0 and at most 1",
                "dedup_threshold",
            )


@dataclass
class Funnel:
    """How many images each step left, from requested to kept.

    A dropped row is counted once, under the first reason that applies: it has no URL, is on the block
    list, fails a condition, or is a near-duplicate of a row that is kept. The metadata of a
    near-duplicate is not read, so it counts as a near-duplicate whatever else it is.
    """

    requested: int = 0
    received: int = 0
    without_url: int = 0
    blocked: int = 0
    filtered: int = 0
    near_duplicates: int = 0
    kept: int = 0

    def sentence(self) -> str:
        """Return the three counts that people compare."""
        return f"{self.requested:,} requested, {self.received:,} received, {self.kept:,} kept"

    @property
    def yielded(self) -> float:
        """Share of the requested images that were kept."""
        return share_kept(self.kept, self.requested)


@dataclass(frozen=True)
class Removed:
    """Examples of near-duplicates that were removed, each with its representative; n pairs.

    Attributes:
        removed: url, caption and, where the metadata has it, thumbnail; n rows.
        representatives: the same columns of the row that is kept instead.
        cosine: (n,) of the two; below the threshold where other rows connect them.

    """

    removed: pa.Table
    representatives: pa.Table
    cosine: Floats


@dataclass(frozen=True)
class Found:
    """What a search found, besides the rows that it has written.

    Attributes:
        funnel: counts from requested to kept.
        nprobe: inverted lists probed; None where the index has none.
        recall: share of a sample's results that remains when `FURTHER` times the lists are probed; NaN
            where that was not measured.
        removed: examples of near-duplicates, of the first queries.
        decoder: serialised `Decoder` of the codes that were written.
        block_list: how many entries of the block list match; None without one.

    """

    funnel: Funnel
    nprobe: int | None
    recall: float
    removed: Removed | None
    decoder: bytes
    block_list: BlockListMatches | None = None


def columns_found(index: Index, metadata: Metadata, *, per_seed: bool) -> pa.Schema:
    """Return the schema of the rows that `retrieve` writes.

    Its columns are id, url, caption, similarity, rank, (seed,) what else the metadata has, and code.
    """
    theirs = {field.name: field.type for field in metadata.schema}
    others = {k: v for k, v in theirs.items() if k not in ("url", "caption", THUMBNAIL_COLUMN)}
    return pa.schema(
        {
            "id": pa.int64(),
            "url": pa.string(),
            "caption": pa.string(),
            "similarity": pa.float32(),
            "rank": pa.int32(),
        }
        | ({"seed": pa.int32()} if per_seed else {})
        | others
        | ({THUMBNAIL_COLUMN: pa.binary()} if THUMBNAIL_COLUMN in theirs else {})
        | {"code": pa.binary(index.code_size)}
    )


def retrieve(
    index: Index,
    metadata: Metadata,
    queries: Floats,
    request: Request,
    write: Callable[[pa.RecordBatch], None],
    *,
    per_seed: bool,
    progress: Callable[[float], None] = lambda _: None,
) -> Found:
    """Search around each query, keep one row of each group of near-duplicates, and write the rows.

    Args:
        index: where to look.
        metadata: of the rows of the index.
        queries: (q, dimension) float32 unit rows.
        request: how many, how similar.
        write: takes the rows, in order of query and rank, with the columns of `columns_found`.
        per_seed: whether a column `seed` holds the number of the query.
        progress: called with the number of queries done since the last call; a query that was searched
            and whose rows are not written yet is half done.

    Raises:
        InputError: the queries have another dimension than the index, or the metadata lacks a column
            that a filter names.

    """
    request.filters.check(metadata.schema)
    if queries.shape[1] != index.dimension:
        raise InputError(
            f"the seeds have {queries.shape[1]} dimensions, the index has {index.dimension}: embed the "
            "seeds with the model the index was made with"
        )
    search = _Search(index, metadata, request, columns_found(index, metadata, per_seed=per_seed))
    row = COPIES * index.code_size + 4 * index.dimension
    at_once = max(1, RESULT_BYTES // (row * request.k))
    recall = math.nan
    for first in range(0, len(queries), at_once):
        some = queries[first : first + at_once]
        hits = index.search(some, request.k, search.nprobe, lambda searched: progress(searched / 2))
        if first == 0:
            recall = index.recall(some[:RECALL_QUERIES], hits, search.nprobe)
        for batch in search.kept_rows(hits, first, len(queries)).to_batches(WRITTEN_ROWS):
            write(batch)
        progress(len(some) / 2)
    decoder = index.decoder(search.lists).to_bytes()
    return Found(search.funnel, search.nprobe, recall, search.removed, decoder, search.block_list())


def retrieve_table(
    index: Index, metadata: Metadata, queries: Floats, request: Request, *, per_seed: bool
) -> tuple[pa.Table, Found]:
    """Search as `retrieve` does, and return the rows as a table in memory."""
    batches: list[pa.RecordBatch] = []
    found = retrieve(index, metadata, queries, request, batches.append, per_seed=per_seed)
    schema = columns_found(index, metadata, per_seed=per_seed)
    return pa.Table.from_batches(batches, schema), found


class _Search:
    """What accumulates over the batches of queries."""

    def __init__(self, index: Index, metadata: Metadata, request: Request, schema: pa.Schema) -> None:
        self._index = index
        self._decode = index.decoder().decode_to_compare
        self._metadata = metadata
        self._request = request
        self._schema = schema
        self.nprobe = index.nprobe_for(request.k, request.nprobe)
        self.lists = np.empty(0, np.int64)
        self.funnel = Funnel()
        self.removed: Removed | None = None
        self._blocked_by: Ids = np.empty(0, np.int64)

    def block_list(self) -> BlockListMatches | None:
        """Count the entries of the block list that match the index and the rows so far."""
        listed = self._request.filters.block_list
        return None if listed is None else listed.matches(self._index.rows, self._blocked_by)

    def kept_rows(self, hits: Hits, first: int, queries: int) -> pa.Table:
        """Return the rows that are kept of a batch of queries, the first of which has number `first`."""
        received = _FoundRows.of(hits, first)
        distinct = received[_first_of_each(received.query, received.ids)]
        covered = distinct[self._metadata.covers(distinct.ids)]
        labels = self._labels(covered, hits.codes)
        best, columns, outcomes = self._best_allowed(covered.ids, labels)
        if self.removed is None:
            self.removed = self._examples(covered, labels, best, hits.codes)
        without_url = int(outcomes[WITHOUT_URL]) + len(distinct) - len(covered)
        dropped = without_url + int(outcomes[BLOCKED] + outcomes[FILTERED])
        self.funnel.requested += self._request.k * len(hits.ids)
        self.funnel.received += len(received)
        self.funnel.without_url += without_url
        self.funnel.blocked += int(outcomes[BLOCKED])
        self.funnel.filtered += int(outcomes[FILTERED])
        self.funnel.near_duplicates += len(received) - dropped - len(best)
        self.funnel.kept += len(best)
        return self._as_table(covered[best], columns, hits.codes, queries)

    def _labels(self, rows: _FoundRows, codes: Bytes) -> Ids:
        """Label each row with its best-ranked near-duplicate; at a threshold of 1 there are none."""
        threshold = self._request.dedup_threshold
        if threshold < 1:
            vectors = decoded_codes(codes, self._decode)
            return components_of_lists(vectors, rows.code, rows.query, threshold)
        return np.arange(len(rows))

    def _best_allowed(self, ids: Ids, labels: Ids) -> tuple[Ids, pa.Table, Ids]:
        """Return the best-ranked allowed row of each component, its metadata, and outcomes counted.

        A row without a URL is of no use and a filtered one is unwanted: neither displaces its
        near-duplicate that is allowed.
        """
        best = np.flatnonzero(labels == np.arange(len(labels)))
        columns = self._metadata.take(ids[best])
        outcome = self._outcomes(ids[best], columns)
        self._note_blocked(outcome, columns)
        allowed = outcome == KEPT
        counts = np.bincount(outcome, minlength=OUTCOMES)
        if allowed.all():
            return best, columns, counts
        others = np.setdiff1d(np.flatnonzero(np.isin(labels, best[~allowed])), best)
        looked_at = self._metadata.take(ids[others], self._request.filters.columns)
        outcome = self._outcomes(ids[others], looked_at)
        self._note_blocked(outcome, looked_at)
        counts += np.bincount(outcome, minlength=OUTCOMES)
        candidates = others[outcome == KEPT]
        _, first = np.unique(labels[candidates], return_index=True)
        instead = candidates[first]
        columns = pa.concat_tables([columns.filter(pa.array(allowed)), self._metadata.take(ids[instead])])
        best = np.concatenate([best[allowed], instead])
        order = np.argsort(best)
        return best[order], columns.take(pa.array(order)), counts

    def _outcomes(self, ids: Ids, columns: pa.Table) -> Ids:
        filters = self._request.filters
        reasons = [~_has_url(columns), filters.blocked(ids, columns), filters.failed(columns)]
        return np.select(reasons, [WITHOUT_URL, BLOCKED, FILTERED], KEPT)

    def _note_blocked(self, outcome: Ids, columns: pa.Table) -> None:
        """Collect the entries that block rows, which are few, so that hashing them again is cheap."""
        listed, blocked = self._request.filters.block_list, outcome == BLOCKED
        if listed is not None and blocked.any():
            found = listed.found_among(columns["url"].filter(pa.array(blocked)))
            self._blocked_by = np.union1d(self._blocked_by, found)

    def _examples(self, rows: _FoundRows, labels: Ids, best: Ids, codes: Bytes) -> Removed:
        """Choose near-duplicates to show: one of each group, of every query in turn, all allowed."""
        representative = np.full(len(labels), -1)
        representative[labels[best]] = best
        representative = representative[labels]
        removed = np.flatnonzero((representative >= 0) & (representative != np.arange(len(labels))))
        _, first = np.unique(representative[removed], return_index=True)
        removed = removed[first]
        starts = np.flatnonzero(np.diff(rows.query[removed], prepend=-1))
        turn = np.arange(len(removed)) - np.repeat(starts, np.diff(starts, append=len(removed)))
        removed = removed[np.argsort(turn, kind="stable")[: 2 * PAIRS]]
        there = self._metadata.schema.names
        shown = [name for name in ("url", "caption", THUMBNAIL_COLUMN) if name in there]
        wanted = list(dict.fromkeys(shown + self._request.filters.columns))
        looked_at = self._metadata.take(rows.ids[removed], wanted)
        allowed = np.flatnonzero(self._outcomes(rows.ids[removed], looked_at) == KEPT)[:PAIRS]
        removed = removed[allowed]
        kept = representative[removed]
        with one_blas_thread():
            ends = [unit(self._decode(codes[rows.code[each]])) for each in (removed, kept)]
        return Removed(
            removed=looked_at.select(shown).take(pa.array(allowed)),
            representatives=self._metadata.take(rows.ids[kept], shown),
            cosine=np.einsum("ij,ij->i", *ends),
        )

    def _as_table(self, kept: _FoundRows, columns: pa.Table, codes: Bytes, queries: int) -> pa.Table:
        kept_codes = codes[kept.code]
        self.lists = np.union1d(self.lists, self._index.lists_of(kept_codes))
        found = {name: columns[name] for name in columns.column_names} | {
            "id": kept.ids,
            "similarity": kept.similarity,
            "rank": kept.rank.astype(np.int32),
            "seed": kept.query.astype(np.int32),
            "code": fixed_size_binary(kept_codes),
        }
        if THUMBNAIL_COLUMN in self._schema.names:
            found[THUMBNAIL_COLUMN] = self._thumbnails(kept, queries)
        return pa.table({name: found[name] for name in self._schema.names}, schema=self._schema)

    def _thumbnails(self, kept: _FoundRows, queries: int) -> pa.ChunkedArray:
        """Return thumbnails of the first rows of the first queries, null for all others."""
        each = math.ceil(THUMBNAILS / min(queries, THUMBNAILS))
        starts = np.flatnonzero(np.diff(kept.query, prepend=-1))
        lengths = np.diff(starts, append=len(kept.query))
        place = np.arange(len(kept.query)) - np.repeat(starts, lengths)
        shown = (kept.query < THUMBNAILS) & (place < each)
        thumbnails = self._metadata.take(kept.ids[shown], [THUMBNAIL_COLUMN])[THUMBNAIL_COLUMN]
        slot = np.cumsum(shown) - 1
        return thumbnails.take(pa.array(slot, mask=~shown))


@dataclass(frozen=True)
class _FoundRows:
    """What queries found: n rows in order of query and rank; `code` is a place in `Hits.codes`."""

    ids: Ids
    similarity: Floats
    rank: Ids
    query: Ids
    code: Ids

    @classmethod
    def of(cls, hits: Hits, first: int) -> _FoundRows:
        """Return all rows found, where the first query has number `first`."""
        query, place = np.nonzero(hits.ids >= 0)
        return cls(
            hits.ids[query, place],
            hits.similarity[query, place],
            place + 1,
            query + first,
            hits.code[query, place],
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Ids | Mask) -> _FoundRows:
        return _FoundRows(
            self.ids[rows], self.similarity[rows], self.rank[rows], self.query[rows], self.code[rows]
        )


def _has_url(columns: pa.Table) -> Mask:
    named = pc.greater(pc.binary_length(columns["url"]), 0)
    found: Mask = pc.fill_null(named, False).to_numpy()
    return found


def _first_of_each(query: Ids, ids: Ids) -> Ids:
    """Return the places, ascending, at which each query has an id for the first time."""
    by_id = np.lexsort((ids, query))
    repeated = (np.diff(query[by_id]) == 0) & (np.diff(ids[by_id]) == 0)
    return np.sort(np.delete(by_id, np.flatnonzero(repeated) + 1))
