"""The images around one query or many, near-duplicates removed within each query's results.

The steps are search, near-duplicates, metadata. Queries pass through them in batches, so memory depends
on the size of a batch and not on the number of queries. A batch holds queries that are near each
other, so most of its lists are read once for all of them. The rows of a query do not depend on the others
in its batch, unless the search continues until enough images are kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.index.faiss_index import Hits, Index
from laion_assets.index.metadata import THUMBNAIL_COLUMN, Metadata
from laion_assets.index.vectors import Coded, unit
from laion_assets.io.arrays import Bytes, Floats, Ids, Mask
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import one_blas_thread, one_thread_each, slices
from laion_assets.io.tables import fixed_size_binary
from laion_assets.io.text import REPLACED, count
from laion_assets.search.block_list import BlockListMatches
from laion_assets.search.filters import NO_FILTERS, Filters
from laion_assets.search.near_duplicates import components_of_lists
from laion_assets.search.neighbours import batches_of_neighbours
from laion_assets.search.sizing import further, share_kept

RESULT_BYTES = 1 << 30  # of results held in memory, unless one query alone asks for more
COPIES = 4  # of a result's code in memory, at most
BESIDE_CODE = 384  # bytes of a result besides its code and metadata: sketch and numbers
OF_A_QUERY = 128  # bytes of its tables and lists, for each dimension of a query; 90 were measured
WRITTEN_ROWS = 1 << 16  # in one batch
RECALL_QUERIES = 16  # the first, whose recall is measured
MOST_REQUESTED = 100  # images for each one to keep; a search that keeps fewer than 1 % ends there
ALWAYS_REQUESTED = 10_000  # images of a query, before it ends there
THUMBNAILS = 48  # that travel with a table
PAIRS = 24  # of near-duplicates that are shown
NEAR_DUPLICATE, KEPT, WITHOUT_URL, BLOCKED, FILTERED = range(OUTCOMES := 5)  # of a row received


@dataclass(frozen=True)
class Request:
    """What to search for around each query.

    With `keep`, k is only where a search starts. For each query that keeps fewer images, it continues
    with a larger k and more lists until that many are kept, or the index is exhausted. The rows are then
    the first `keep` of those that one request for the last k returns.

    Attributes:
        k: images requested for each query.
        dedup_threshold: cosine above which two images are near-duplicates; 1.0 keeps all.
        nprobe: inverted lists to probe; chosen from k when None.
        filters: what keeps images out.
        keep: images to keep for each query; None keeps what is left of k.

    Raises:
        InputError: `k`, `nprobe` or `keep` is below 1, or the threshold is not above 0 and at most 1.

    """

    k: int
    dedup_threshold: float
    nprobe: int | None = None
    filters: Filters = NO_FILTERS
    keep: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.keep is not None and self.keep < 1:
            raise InputError(f"keep is {self.keep}: keep at least 1 image", "keep")
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
    near-duplicate is not read, so it counts as a near-duplicate whatever else it is. A search that ends
    when enough images are kept counts the images up to the last one that it keeps.
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
class NotUtf8:
    """Texts of the metadata that are not UTF-8, among the rows whose metadata was read.

    Attributes:
        urls: number of rows whose URL is not; they count as rows without a URL.
        captions: number of kept rows in whose caption bytes are replaced by U+FFFD.

    """

    urls: int = 0
    captions: int = 0

    def __str__(self) -> str:
        """Describe the numbers in one sentence; empty if there are none."""
        parts = [f"{count(self.urls, 'row')} dropped"] if self.urls else []
        parts += [f"bytes replaced in {count(self.captions, 'caption')}"] if self.captions else []
        return f"texts that are not UTF-8: {', '.join(parts)}" if parts else ""


@dataclass(frozen=True)
class Found:
    """What a search found, besides the rows that it has written.

    Attributes:
        funnel: counts from requested to kept.
        nprobe: inverted lists probed, for the largest k; None where the index has none.
        recall: share of a sample's results that remains when `FURTHER` times the lists are probed; NaN
            where that was not measured.
        sampled: number of queries in the sample.
        removed: examples of near-duplicates, of the first queries.
        decoder: serialised `Decoder` of the codes that were written.
        block_list: how many entries of the block list match; None without one.
        short: queries that keep fewer images than `Request.keep`, because the index has no more for them.
        not_utf8: texts that are not UTF-8.
        blocked_by: hashes of the URLs and hosts of the block list that matched, ascending.

    """

    funnel: Funnel
    nprobe: int | None
    recall: float
    removed: Removed | None
    decoder: bytes
    sampled: int = 0
    block_list: BlockListMatches | None = None
    short: int = 0
    not_utf8: NotUtf8 = NotUtf8()
    blocked_by: Ids = field(default_factory=lambda: np.empty(0, np.int64))


def columns_found(index: Index, metadata: Metadata, *, per_seed: bool) -> pa.Schema:
    """Return the schema of the rows that `retrieve` writes.

    Its columns are id, url, caption, similarity, rank, (seed,) what else the metadata has, and code.
    """
    theirs = {field.name: field.type for field in metadata.schema}
    others = {k: v for k, v in theirs.items() if k not in ("url", "caption", THUMBNAIL_COLUMN)}
    return pa.schema(
        {
            "id": pa.int64(),
            "url": pa.large_string(),
            "caption": pa.large_string(),
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
    batches: Sequence[Ids] | None = None,
) -> Found:
    """Search around each query, keep one row of each group of near-duplicates, and write the rows.

    Args:
        index: where to look.
        metadata: of the rows of the index.
        queries: (q, dimension) float32 unit rows.
        request: how many, how similar.
        write: takes the rows with the columns of `columns_found`: those of a query together, in order of
            rank. Queries come in the order of the batches.
        per_seed: whether a column `seed` holds the number of the query.
        progress: called with the number of queries done since the last call; a query that was searched
            and whose rows are not written yet is half done.
        batches: numbers of the queries to search, see `shards`; None for all. Thumbnails and examples of
            near-duplicates are of the first batch.

    Raises:
        InputError: the queries have another dimension than the index, or the metadata lacks a column
            that a filter names.

    """
    request.filters.check(metadata.columns)
    check_dimension(index, queries)
    schema = columns_found(index, metadata, per_seed=per_seed)
    if batches is None:
        batches = all_batches(index, metadata, queries, request)
    with one_thread_each(1, "recall") as background:
        search = _Search(index, metadata, queries, request, schema, progress, background)
        for numbers in batches:
            for batch in search.rows_of(numbers).to_batches(WRITTEN_ROWS):
                write(batch)
            progress(len(numbers) / 2)
        decoder = index.decoder(search.lists).to_bytes()
        recall, sampled = search.recall()
    return Found(
        search.funnel,
        search.nprobe,
        recall,
        search.removed,
        decoder,
        sampled,
        search.block_list(),
        search.short,
        search.not_utf8(),
        search.blocked_by,
    )


def starting_k(index: Index, request: Request) -> int:
    """Return for how many images of each query a search asks first."""
    return request.k if request.keep is None else min(request.k, index.rows)


def check_dimension(index: Index, queries: Floats) -> None:
    """Check that queries can be compared with the rows of an index.

    Raises:
        InputError: they have another dimension.

    """
    if queries.shape[1] != index.dimension:
        raise InputError(
            f"the seeds have {queries.shape[1]} dimensions, the index has {index.dimension}: embed the "
            "seeds with the model the index was made with"
        )


def all_batches(index: Index, metadata: Metadata, queries: Floats, request: Request) -> list[Ids]:
    """Cut all queries of a request into batches, see `batches_of`."""
    return batches_of(index, metadata, queries, np.arange(len(queries)), starting_k(index, request))


def batches_of(index: Index, metadata: Metadata, queries: Floats, numbers: Ids, k: int) -> list[Ids]:
    """Cut queries into batches whose results fit into memory, of neighbours if the index has lists.

    Args:
        index: the index.
        metadata: of the rows of the index.
        queries: (q, dimension) float32 unit rows.
        numbers: (n,) ascending numbers of those to cut.
        k: images requested of each.

    """
    at_once = max(1, RESULT_BYTES // query_bytes(index, metadata, k))
    if index.nlist:
        return batches_of_neighbours(queries, numbers, at_once)
    return [numbers[batch] for batch in slices(len(numbers), at_once)]


def query_bytes(index: Index, metadata: Metadata, k: int) -> int:
    """Return about how many bytes of memory a query adds to its batch.

    All machines cut queries by it, so it depends only on the index, the carried columns and k. Decoded
    vectors are not counted: they are held for one long list at a time.

    Args:
        index: the index.
        metadata: of the rows of the index.
        k: images requested of the query.

    """
    row = COPIES * index.code_size + BESIDE_CODE + metadata.row_bytes()
    return k * row + OF_A_QUERY * index.dimension


def retrieve_table(
    index: Index, metadata: Metadata, queries: Floats, request: Request, *, per_seed: bool
) -> tuple[pa.Table, Found]:
    """Search as `retrieve` does, and return a table in memory, in order of query and rank."""
    batches: list[pa.RecordBatch] = []
    found = retrieve(index, metadata, queries, request, batches.append, per_seed=per_seed)
    table = pa.Table.from_batches(batches, columns_found(index, metadata, per_seed=per_seed))
    if per_seed and len(batches) > 1:
        table = _in_order_of_seed(table)
    return table, found


def _in_order_of_seed(table: pa.Table) -> pa.Table:
    """Put the rows of each seed, which are together, in order of seed; they are not copied."""
    seed = table["seed"].to_numpy()
    starts = np.flatnonzero(np.diff(seed, prepend=-1))
    lengths = np.diff(starts, append=len(seed))
    in_order = np.argsort(seed[starts])
    slices_of_seeds = [table.slice(int(starts[each]), int(lengths[each])) for each in in_order]
    return pa.concat_tables([table.slice(0, 0), *slices_of_seeds])


class _Search:
    """What accumulates over the batches of queries."""

    def __init__(
        self,
        index: Index,
        metadata: Metadata,
        queries: Floats,
        request: Request,
        schema: pa.Schema,
        progress: Callable[[float], None],
        background: Executor,
    ) -> None:
        self._index = index
        self._decoder = index.decoder()
        self._metadata = metadata
        self._queries = queries
        self._request = request
        self._schema = schema
        self._columns = list(
            dict.fromkeys(
                name
                for name in (*metadata.schema.names, *request.filters.columns)
                if name != THUMBNAIL_COLUMN
            )
        )
        self._progress = progress
        self.k = starting_k(index, request)
        self.nprobe = index.nprobe_for(self.k, request.nprobe)
        self._background = background
        self._recalls: list[tuple[int, Future[float]]] = []  # of how many queries, and what it is
        self.lists = np.empty(0, np.int64)
        self.funnel = Funnel()
        self.short = 0
        self.removed: Removed | None = None
        self._shown: Ids = np.empty(0, np.int64)  # queries whose thumbnails travel
        self._odd_urls: Ids = np.empty(0, np.int64)
        self._odd_captions = 0
        self.blocked_by: Ids = np.empty(0, np.int64)

    def rows_of(self, numbers: Ids) -> pa.Table:
        """Return the rows that are kept of a batch of queries, in order of query and rank."""
        is_first = numbers[0] == 0
        self._shown = numbers[:THUMBNAILS] if is_first else numbers[:0]
        parts = list(self._rounds(numbers, self.k))
        if len(parts) == 1:
            return parts[0].table
        query = np.concatenate([part.query for part in parts])
        table = pa.concat_tables([part.table for part in parts])
        return table.take(pa.array(np.argsort(query, kind="stable")))

    def _rounds(self, numbers: Ids, k: int) -> Iterator[_Kept]:
        """Search for k rows, then with a larger k for the queries that keep too few of them."""
        kept, going_on, deeper = self._round(numbers, k)
        yield kept
        for some in batches_of(self._index, self._metadata, self._queries, going_on, deeper):
            yield from self._rounds(some, deeper)

    def _round(self, numbers: Ids, k: int) -> tuple[_Kept, Ids, int]:
        """Return the rows of the queries that end here, the queries that continue, and their next k."""
        queries, nprobe = self._queries[numbers], self._index.nprobe_for(k, self._request.nprobe)
        is_first = k == self.k
        hits = self._index.search(
            queries, k, nprobe, lambda searched: self._progress(searched / 2 if is_first else 0)
        )
        received = _FoundRows.of(hits, numbers)
        query = np.searchsorted(numbers, received.query)  # place of each row's query in `numbers`
        ends = self._has_all(np.bincount(query, minlength=len(numbers)), k)
        sampled = numbers < RECALL_QUERIES
        self._measure_recall(hits, queries, ends & sampled, nprobe)
        outcome = np.full(len(received), NEAR_DUPLICATE)
        distinct = _first_of_each(received.query, received.ids)
        covers = self._metadata.covers(received.ids[distinct])
        outcome[distinct[~covers]] = WITHOUT_URL
        rows = distinct[covers]
        labels = self._labels(received[rows], hits.codes)

        # Metadata is the slowest to read, so it is not read for queries that continue in any case.
        images = np.bincount(query[rows[labels == np.arange(len(labels))]], minlength=len(numbers))
        ended = ends | self._is_enough(images)
        here = ended[query[rows]]
        rows, labels = rows[here], (np.cumsum(here) - 1)[labels[here]]
        best, columns, outcome[rows] = self._best_allowed(received.ids[rows], labels)
        images = np.where(ended, np.bincount(query[rows[best]], minlength=len(numbers)), images)
        ended = ends | self._is_enough(images)

        wanted, depth = self._cut(received.rank[rows[best]], query[rows[best]], ended, k)
        if not wanted.all():
            best, columns = best[wanted], columns.filter(pa.array(wanted))
        counted = ended[query] & (received.rank <= depth[query])
        self._count(np.bincount(outcome[counted], minlength=OUTCOMES), int(depth[ended].sum()))
        if self._request.keep is not None:
            self.short += int((ended & ~self._is_enough(images)).sum())
        if len(self._shown) and self.removed is None and ended.any():
            self.removed = self._examples(received[rows], labels, best, hits.codes)
        if nprobe is not None:
            self.nprobe = max(nprobe, self.nprobe or 0)
        self._measure_recall(hits, queries, ended & ~ends & sampled, nprobe)
        kept = received[rows[best]]
        table = self._as_table(kept, columns, hits.codes)
        return _Kept(kept.query, table), numbers[~ended], self._next_k(k, images[~ended])

    def recall(self) -> tuple[float, int]:
        """Wait for the share of the sample's results that remains, and return it with the sample's size.

        It is NaN without a sample, to which belong the queries whose recall can be measured.
        """
        measured = [(number, recall.result()) for number, recall in self._recalls]
        measured = [(number, recall) for number, recall in measured if not math.isnan(recall)]
        sampled = sum(number for number, _ in measured)
        remained = sum(number * recall for number, recall in measured)
        return remained / sampled if sampled else math.nan, sampled

    def _measure_recall(self, hits: Hits, queries: Floats, sample: Mask, nprobe: int | None) -> None:
        """Begin to measure the recall of some queries of a batch, in the background."""
        if sample.any():
            without_codes = replace(hits.of(sample), codes=hits.codes[:0])  # they are large
            recall = self._background.submit(self._index.recall, queries[sample], without_codes, nprobe)
            self._recalls.append((int(sample.sum()), recall))

    def _has_all(self, received: Ids, k: int) -> Mask:
        """Return whether queries that received this many rows of k would get no more with a larger k."""
        if k >= self._largest_k:
            return np.ones(len(received), np.bool_)
        cannot_probe_more = self._request.nprobe is not None
        has_all: Mask = (received < k) & cannot_probe_more
        return has_all

    @property
    def _largest_k(self) -> int:
        keep = self._request.keep
        if keep is None:
            return self.k
        return min(self._index.rows, max(self.k, MOST_REQUESTED * keep, ALWAYS_REQUESTED))

    def _is_enough(self, images: Ids) -> Mask:
        enough: Mask = images >= (self._request.keep or 0)
        return enough

    def _next_k(self, k: int, images: Ids) -> int:
        """Return the next k for queries that keep this many images of k rows."""
        if not len(images):
            return k
        return min(further(k, float(images.mean()), self._request.keep or 1), self._largest_k)

    def _cut(self, rank: Ids, query: Ids, ended: Mask, k: int) -> tuple[Mask, Ids]:
        """Return which kept rows are wanted, and the rank at which each query has enough; k if never.

        Args:
            rank: (n,) of rows, ascending within each query.
            query: (n,) ascending places in `ended`.
            ended: (q,) which queries do not continue.
            k: rows requested.

        """
        depth = np.full(len(ended), k)
        wanted: Mask = ended[query]
        if self._request.keep is not None:
            turn = np.arange(len(query)) - np.searchsorted(query, query)
            last = turn == self._request.keep - 1
            depth[query[last]] = rank[last]
            wanted &= turn < self._request.keep
        return wanted, depth

    def _count(self, outcomes: Ids, requested: int) -> None:
        """Add images to the funnel, where `outcomes` holds the rows of each outcome."""
        funnel = self.funnel
        funnel.requested += requested
        funnel.received += int(outcomes.sum())
        funnel.without_url += int(outcomes[WITHOUT_URL])
        funnel.blocked += int(outcomes[BLOCKED])
        funnel.filtered += int(outcomes[FILTERED])
        funnel.near_duplicates += int(outcomes[NEAR_DUPLICATE])
        funnel.kept += int(outcomes[KEPT])

    def block_list(self) -> BlockListMatches | None:
        """Count the entries of the block list that match the index and the rows so far."""
        listed = self._request.filters.block_list
        return None if listed is None else listed.matches(self._index.rows, self.blocked_by)

    def not_utf8(self) -> NotUtf8:
        """Count the texts that are not UTF-8 so far."""
        return NotUtf8(len(self._odd_urls), self._odd_captions)

    def _take(self, ids: Ids, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the metadata of some ids.

        A URL that is not UTF-8 is null: with bytes replaced, it would name another image.
        """
        rows = self._metadata.take(ids, columns)
        if "url" in rows.column_names:
            odd = _has_replaced(rows["url"])
            if odd.any():
                self._odd_urls = np.union1d(self._odd_urls, ids[odd])
                place = rows.column_names.index("url")
                usable = pc.if_else(pa.array(odd), None, rows["url"])
                rows = rows.set_column(place, rows.schema.field(place), usable)
        return rows

    def _labels(self, rows: _FoundRows, codes: Bytes) -> Ids:
        """Label each row with its best-ranked near-duplicate; at a threshold of 1 there are none."""
        threshold, keep = self._request.dedup_threshold, self._request.keep
        if threshold == 1:
            return np.arange(len(rows))
        vectors = Coded(codes, self._decoder)
        with self._metadata.reading_ahead(self._columns) as read_ahead:

            def foreseen(entries: Ids) -> None:
                if len(entries) >= (keep or 0):
                    read_ahead(rows.ids[entries[:keep]])

            return components_of_lists(vectors, rows.code, rows.query, threshold, foreseen=foreseen)

    def _best_allowed(self, ids: Ids, labels: Ids) -> tuple[Ids, pa.Table, Ids]:
        """Return the best-ranked allowed row of each component, its metadata, and each row's outcome.

        A row without a URL is of no use and a filtered one is unwanted: neither displaces its
        near-duplicate that is allowed.
        """
        outcome = np.full(len(ids), NEAR_DUPLICATE)
        best = np.flatnonzero(labels == np.arange(len(labels)))
        columns = self._take(ids[best], self._columns)
        outcome[best] = self._outcomes(ids[best], columns)
        self._note_blocked(outcome[best], columns)
        allowed = outcome[best] == KEPT
        if allowed.all():
            return best, columns, outcome
        others = np.setdiff1d(np.flatnonzero(np.isin(labels, best[~allowed])), best)
        looked_at = self._take(ids[others], self._request.filters.columns)
        outcome[others] = self._outcomes(ids[others], looked_at)
        self._note_blocked(outcome[others], looked_at)
        candidates = others[outcome[others] == KEPT]
        _, first = np.unique(labels[candidates], return_index=True)
        instead = candidates[first]
        outcome[np.setdiff1d(candidates, instead)] = NEAR_DUPLICATE
        columns = pa.concat_tables(
            [columns.filter(pa.array(allowed)), self._take(ids[instead], self._columns)]
        )
        best = np.concatenate([best[allowed], instead])
        order = np.argsort(best)
        return best[order], columns.take(pa.array(order)), outcome

    def _outcomes(self, ids: Ids, columns: pa.Table) -> Ids:
        filters = self._request.filters
        reasons = [~_has_url(columns), filters.blocked(ids, columns), filters.failed(columns)]
        return np.select(reasons, [WITHOUT_URL, BLOCKED, FILTERED], KEPT)

    def _note_blocked(self, outcome: Ids, columns: pa.Table) -> None:
        """Collect the entries that block rows, which are few, so that hashing them again is cheap."""
        listed, blocked = self._request.filters.block_list, outcome == BLOCKED
        if listed is not None and blocked.any():
            found = listed.found_among(columns["url"].filter(pa.array(blocked)))
            self.blocked_by = np.union1d(self.blocked_by, found)

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
        both = np.concatenate([removed, representative[removed]])
        looked_at = self._take(rows.ids[both], wanted)
        outcomes = self._outcomes(rows.ids[removed], looked_at.slice(0, len(removed)))
        allowed = np.flatnonzero(outcomes == KEPT)[:PAIRS]
        pairs = both.reshape(2, -1)[:, allowed]
        with one_blas_thread():
            ends = [unit(self._decoder.decode_to_compare(codes[rows.code[each]])) for each in pairs]
        texts = looked_at.select(shown)
        return Removed(
            removed=texts.take(pa.array(allowed)),
            representatives=texts.take(pa.array(allowed + len(removed))),
            cosine=np.einsum("ij,ij->i", *ends),
        )

    def _as_table(self, kept: _FoundRows, columns: pa.Table, codes: Bytes) -> pa.Table:
        kept_codes = codes[kept.code]
        self._odd_captions += int(np.count_nonzero(_has_replaced(columns["caption"])))
        self.lists = np.union1d(self.lists, self._index.lists_of(kept_codes))
        found = {name: columns[name] for name in columns.column_names} | {
            "id": kept.ids,
            "similarity": kept.similarity,
            "rank": kept.rank.astype(np.int32),
            "seed": kept.query.astype(np.int32),
            "code": fixed_size_binary(kept_codes),
        }
        if THUMBNAIL_COLUMN in self._schema.names:
            found[THUMBNAIL_COLUMN] = self._thumbnails(kept)
        return pa.table({name: found[name] for name in self._schema.names}, schema=self._schema)

    def _thumbnails(self, kept: _FoundRows) -> pa.ChunkedArray:
        """Return thumbnails of the first rows of the first queries, null for all others."""
        each = math.ceil(THUMBNAILS / max(len(self._shown), 1))
        starts = np.flatnonzero(np.diff(kept.query, prepend=-1))
        lengths = np.diff(starts, append=len(kept.query))
        place = np.arange(len(kept.query)) - np.repeat(starts, lengths)
        shown = np.isin(kept.query, self._shown) & (place < each)
        thumbnails = self._take(kept.ids[shown], [THUMBNAIL_COLUMN])[THUMBNAIL_COLUMN]
        slot = np.cumsum(shown) - 1
        return thumbnails.take(pa.array(slot, mask=~shown))


@dataclass(frozen=True)
class _Kept:
    """The rows that are kept, in order of query and rank, and the query of each."""

    query: Ids
    table: pa.Table


@dataclass(frozen=True)
class _FoundRows:
    """What queries found: n rows in order of query and rank; `code` is a place in `Hits.codes`."""

    ids: Ids
    similarity: Floats
    rank: Ids
    query: Ids
    code: Ids

    @classmethod
    def of(cls, hits: Hits, numbers: Ids) -> _FoundRows:
        """Return all rows found, where the queries have these numbers."""
        query, place = np.nonzero(hits.ids >= 0)
        return cls(
            hits.ids[query, place],
            hits.similarity[query, place],
            place + 1,
            numbers[query],
            hits.code[query, place],
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Ids | Mask) -> _FoundRows:
        return _FoundRows(
            self.ids[rows], self.similarity[rows], self.rank[rows], self.query[rows], self.code[rows]
        )


def _has_replaced(texts: pa.ChunkedArray) -> Mask:
    """Return which texts have bytes that are replaced; rarely any, and to see that takes little time."""
    if not any(re.search(REPLACED.encode(), chunk.buffers()[-1] or b"") for chunk in texts.chunks):
        return np.zeros(len(texts), np.bool_)
    found: Mask = pc.fill_null(pc.match_substring(texts, REPLACED), False).to_numpy()
    return found


def _has_url(columns: pa.Table) -> Mask:
    named = pc.greater(pc.binary_length(columns["url"]), 0)
    found: Mask = pc.fill_null(named, False).to_numpy()
    return found


def _first_of_each(query: Ids, ids: Ids) -> Ids:
    """Return the places, ascending, at which each query has an id for the first time."""
    keys = query * (ids.max(initial=0) + 1) + ids
    if np.diff(np.sort(keys)).all():  # as nearly always: this takes a tenth of the time
        return np.arange(len(keys))
    _, first = np.unique(keys, return_index=True)
    return np.sort(first)
