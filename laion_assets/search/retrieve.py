"""The images around one query or many, near-duplicates removed within each query's results.

The steps are search, decode, near-duplicates, metadata; queries pass through them in batches, so that
memory depends on the rows of a batch and not on the number of queries.
What must not live here: how files are opened or written, how two tables become one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.index.faiss_index import Hits, Index
from laion_assets.index.metadata import THUMBNAIL_COLUMN, Metadata
from laion_assets.index.vectors import decoded, unit
from laion_assets.io.arrays import Bytes, Floats, Ids, Mask
from laion_assets.io.errors import InputError
from laion_assets.io.tables import Table, decoder_footer
from laion_assets.search.filters import NO_FILTERS, Filters
from laion_assets.search.near_duplicates import components_of_lists
from laion_assets.search.sizing import share_kept

BYTES_AT_ONCE = 1 << 30  # of results held in memory, unless one query alone asks for more
COPIES = 4  # of a row's code, at most, at a time
CHECKED_QUERIES = 16  # whose recall is measured
PICTURES = 48  # thumbnails that travel with a table
PAIRS = 24  # near-duplicates that are shown beside what stays
ALLOWED, WITHOUT_URL, BLOCKED, FILTERED = range(FATES := 4)  # of a row that was looked at


@dataclass(frozen=True)
class Request:
    """What to look for around each query.

    Attributes:
        k: images wanted for each query.
        dedup_threshold: cosine above which two images are near-duplicates; 1.0 keeps all.
        nprobe: inverted lists to probe; chosen from k when None.
        filters: what keeps images out.

    """

    k: int
    dedup_threshold: float
    nprobe: int | None = None
    filters: Filters = NO_FILTERS


@dataclass
class Funnel:
    """Where the images went, from asked for to kept; complete once the table was read.

    A row that goes is counted once, under the first that holds: it has no URL, is on the block list,
    fails a condition, is a near-duplicate of one that stays. A near-duplicate of a row that may stay is
    not looked at further.
    """

    requested: int = 0
    received: int = 0
    without_url: int = 0
    blocked: int = 0
    filtered: int = 0
    near_duplicates: int = 0
    kept: int = 0

    def sentence(self) -> str:
        """The three counts that people compare."""
        return f"{self.requested:,} requested, {self.received:,} received, {self.kept:,} kept"

    @property
    def yielded(self) -> float:
        """Share of the images asked for that were kept."""
        return share_kept(self.kept, self.requested)


@dataclass(frozen=True)
class Removed:
    """Some near-duplicates that were removed, and what stays in their place; n pairs.

    Attributes:
        removed: url, caption and, where the metadata has it, thumbnail; n rows.
        stays: the same of what each is a near-duplicate of.
        cosine: (n,) of the two; below the threshold where others connect them.

    """

    removed: pa.Table
    stays: pa.Table
    cosine: Floats


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

    Raises:
        InputError: the queries have another dimension than the index, or the metadata lacks a column
            that a filter asks for.
    """
    request.filters.check(metadata.schema)
    if queries.shape[1] != index.dimension:
        raise InputError(
            f"the seeds have {queries.shape[1]} dimensions, the index has {index.dimension}: embed the "
            "seeds with the model the index was made with"
        )
    return Retrieval(index, metadata, queries, request, per_seed, progress)


class Retrieval:
    """A table of images, found while it is read, and the figures that go with it.

    Attributes:
        table: id, url, caption, similarity, rank, (seed,) what else travels, and code; in order of
            query and rank. To be read once.
        nprobe: inverted lists probed; None where the index has none.
        funnel: complete once the table was read.
        recall: share of a sample's results that stays when many more lists are probed; NaN before the
            table was read.
        removed: some of the near-duplicates of the first queries; None before the table was read.
    """

    def __init__(
        self,
        index: Index,
        metadata: Metadata,
        queries: Floats,
        request: Request,
        per_seed: bool,
        progress: Callable[[int], None],
    ) -> None:
        self._index = index
        self._decode = index.decoder().decode_to_compare
        self._metadata = metadata
        self._queries = queries
        self._request = request
        self._progress = progress
        self._lists = np.empty(0, np.int64)
        self._schema = _schema(metadata, index.code_size, per_seed)
        self.nprobe = index.nprobe_for(request.k, request.nprobe)
        self.funnel = Funnel()
        self.recall = math.nan
        self.removed: Removed | None = None
        self.table = Table(self._schema, self._batches(), self._footer)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        row = COPIES * self._index.code_size + 4 * self._index.dimension
        at_once = max(1, BYTES_AT_ONCE // (row * self._request.k))
        for first in range(0, len(self._queries), at_once):
            some = self._queries[first : first + at_once]
            hits = self._index.search(some, self._request.k, self.nprobe)
            self.funnel.requested += self._request.k * len(some)
            if first == 0:
                self.recall = self._index.recall(some[:CHECKED_QUERIES], hits, self.nprobe)
            yield from self._kept_rows(hits, first).to_batches(1 << 16)
            self._progress(len(some))

    def _footer(self) -> dict[str, str]:
        return decoder_footer(self._index.decoder(self._lists).to_bytes())

    def _kept_rows(self, hits: Hits, first: int) -> pa.Table:
        """Return what stays of a batch of queries, the first of which has number `first`."""
        received = _Rows.of(hits, first)
        distinct = received[_first_of_each(received.query, received.ids)]
        covered = distinct[self._metadata.covers(distinct.ids)]
        labels = self._labels(covered, hits.codes)
        best, columns, fates = self._best_allowed(covered.ids, labels)
        if self.removed is None:
            self.removed = self._removed(covered, labels, best, hits.codes)
        without_url = int(fates[WITHOUT_URL]) + len(distinct) - len(covered)
        gone = without_url + int(fates[BLOCKED] + fates[FILTERED])
        self.funnel.received += len(received)
        self.funnel.without_url += without_url
        self.funnel.blocked += int(fates[BLOCKED])
        self.funnel.filtered += int(fates[FILTERED])
        self.funnel.near_duplicates += len(received) - gone - len(best)
        self.funnel.kept += len(best)
        return self._as_table(covered[best], columns, hits.codes)

    def _labels(self, rows: _Rows, codes: Bytes) -> Ids:
        """Label each row with its best-ranked near-duplicate; at a threshold of 1 there are none."""
        threshold = self._request.dedup_threshold
        if threshold < 1:
            return components_of_lists(decoded(codes, self._decode), rows.code, rows.query, threshold)
        return np.arange(len(rows))

    def _best_allowed(self, ids: Ids, labels: Ids) -> tuple[Ids, pa.Table, Ids]:
        """Return the best-ranked row of each component that may stay, their metadata, and fates counted.

        A row without a URL has nothing to give, one that is filtered out must not: it never displaces its
        near-duplicate that may stay.
        """
        best = np.flatnonzero(labels == np.arange(len(labels)))
        columns = self._metadata.take(ids[best])
        fate = self._fates(ids[best], columns)
        allowed = fate == ALLOWED
        if allowed.all():
            return best, columns, np.bincount(fate, minlength=FATES)
        members = np.flatnonzero(np.isin(labels, best[~allowed]))
        looked_at = self._metadata.take(ids[members], self._request.filters.columns)
        fate = self._fates(ids[members], looked_at)
        heirs = members[fate == ALLOWED]
        _, first = np.unique(labels[heirs], return_index=True)
        best = np.sort(np.concatenate([best[allowed], heirs[first]]))
        return best, self._metadata.take(ids[best]), np.bincount(fate, minlength=FATES)

    def _fates(self, ids: Ids, columns: pa.Table) -> Ids:
        filters = self._request.filters
        reasons = [~_has_url(columns), filters.blocked(ids, columns), filters.failed(columns)]
        return np.select(reasons, [WITHOUT_URL, BLOCKED, FILTERED], ALLOWED)

    def _removed(self, rows: _Rows, labels: Ids, best: Ids, codes: Bytes) -> Removed:
        """Choose near-duplicates that may be shown: one of each group, of every query in turn."""
        heir = np.full(len(labels), -1)
        heir[labels[best]] = best
        stays = heir[labels]
        gone = np.flatnonzero((stays >= 0) & (stays != np.arange(len(labels))))
        _, first = np.unique(stays[gone], return_index=True)
        gone = gone[first]
        starts = np.flatnonzero(np.diff(rows.query[gone], prepend=-1))
        turn = np.arange(len(gone)) - np.repeat(starts, np.diff(starts, append=len(gone)))
        gone = gone[np.argsort(turn, kind="stable")[: 2 * PAIRS]]
        looked_at = self._metadata.take(rows.ids[gone], self._request.filters.columns)
        gone = gone[self._fates(rows.ids[gone], looked_at) == ALLOWED][:PAIRS]
        there = self._metadata.schema.names
        shown = [name for name in ("url", "caption", THUMBNAIL_COLUMN) if name in there]
        stays = stays[gone]
        ends = [unit(self._decode(codes[rows.code[each]])) for each in (gone, stays)]
        return Removed(
            removed=self._metadata.take(rows.ids[gone], shown),
            stays=self._metadata.take(rows.ids[stays], shown),
            cosine=np.einsum("ij,ij->i", *ends),
        )

    def _as_table(self, kept: _Rows, columns: pa.Table, codes: Bytes) -> pa.Table:
        kept_codes = codes[kept.code]
        self._lists = np.union1d(self._lists, self._index.lists_of(kept_codes))
        found = {name: columns[name] for name in columns.column_names} | {
            "id": kept.ids,
            "similarity": kept.similarity,
            "rank": kept.rank.astype(np.int32),
            "seed": kept.query.astype(np.int32),
            "code": _fixed_size_binary(kept_codes),
        }
        if THUMBNAIL_COLUMN in self._schema.names:
            found[THUMBNAIL_COLUMN] = self._thumbnails(kept)
        return pa.table({name: found[name] for name in self._schema.names}, schema=self._schema)

    def _thumbnails(self, kept: _Rows) -> pa.ChunkedArray:
        """Pictures of the first rows of the first queries, null for all others."""
        each = math.ceil(PICTURES / min(len(self._queries), PICTURES))
        starts = np.flatnonzero(np.diff(kept.query, prepend=-1))
        lengths = np.diff(starts, append=len(kept.query))
        place = np.arange(len(kept.query)) - np.repeat(starts, lengths)
        shown = (kept.query < PICTURES) & (place < each)
        pictures = self._metadata.take(kept.ids[shown], [THUMBNAIL_COLUMN])[THUMBNAIL_COLUMN]
        slot = np.cumsum(shown) - 1
        return pictures.take(pa.array(slot, mask=~shown))


@dataclass(frozen=True)
class _Rows:
    """What queries found, n rows in order of query and rank; of a code, only where it is."""

    ids: Ids
    similarity: Floats
    rank: Ids
    query: Ids
    code: Ids

    @classmethod
    def of(cls, hits: Hits, first: int) -> _Rows:
        """All rows received, where the first query has number `first`."""
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

    def __getitem__(self, rows: Ids | Mask) -> _Rows:
        return _Rows(
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


def _fixed_size_binary(codes: Bytes) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(codes))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(codes.shape[1]), len(codes), [None, data])
