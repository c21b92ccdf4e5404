"""A faiss index on disk: memory-mapped, searched in batches, its rows returned with their codes.

See `decoder` for what a code is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import faiss
import numpy as np

from laion_assets.index.codebook import Codebook
from laion_assets.index.decoder import Decoder, list_bytes, list_numbers
from laion_assets.index.faiss_consistency import contradictions
from laion_assets.index.faiss_file import read_with_lists_beside
from laion_assets.index.inverted_lists import ID_SIZE, QUERIES_AT_ONCE, InvertedLists
from laion_assets.index.scores import NONE, ROW, fill_in_best, rows_above
from laion_assets.index.shared_lists import WORTH_SHARING, SharedLists
from laion_assets.index.vectors import unit
from laion_assets.io.arrays import Bytes, Floats, Ids, Mask
from laion_assets.io.console import silent_stdout
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import in_threads, slices, thread_count
from laion_assets.io.ranges import Disk, Hold, WholeFiles, ranges_of, read_ahead

MIN_NPROBE = 64
CANDIDATES_PER_RESULT = 16  # rows in the probed lists for each row requested, as with clip-retrieval
SCORE_ROUNDING = 1e-6  # scores of the same row in two scans differ by less
FURTHER = 4  # a check of the recall probes this many times as many lists
SAMPLED = 4  # it looks into the quotient of nprobe and this number of further lists
ROWS_OF_THE_FIRST_ROUND = 1 << 15  # of the lists of a query, see `Index._best_in_rounds`
GROWTH = 4  # each further round ends at this many times the rows of those before it
TRANSFORMED_AT_ONCE = 4  # queries: a tile of a processor's product of matrices, so none is at its edge
UNKNOWN_KIND = re.compile("could not load|not recognized")  # faiss's words
TOO_LARGE = "deserialization_vector_byte_limit"  # likewise
READING = Lock()  # one limit at a time: faiss has one for the whole process
ROOM = 1 << 30  # bytes, the lowest limit: other threads read decoders meanwhile, which are smaller
MIN_SAMPLED_LISTS = 16  # but into no fewer
# Kinds whose stored rows decode to vectors with the scores that a search returns, exactly these classes:
# subclasses may store rows otherwise.
SUPPORTED = {
    faiss.IndexFlat,
    faiss.IndexFlatIP,
    faiss.IndexScalarQuantizer,
    faiss.IndexHNSWFlat,
    faiss.IndexHNSWSQ,
    faiss.IndexIVFFlat,
    faiss.IndexIVFPQ,
    faiss.IndexIVFScalarQuantizer,
}
BUILD_AS = (
    "build it as Flat, HNSW, IVF + Flat, IVF + SQ or IVF + PQ, as autofaiss does, with row numbers as ids"
)


@dataclass(frozen=True)
class Hits:
    """The results of a batch of queries, best first, ties by id.

    Attributes:
        ids: (q, k) int64; -1 where the probed lists held fewer than k rows.
        similarity: (q, k) float32, inner product of the query and the decoded row.
        code: (q, k) int64, the row of `codes` with the code of this result; -1 likewise.
        codes: (c, code size) uint8, one for each distinct row that any of the queries found.
        lists: (q, nprobe) int64, the lists that were probed; -1 for none.

    """

    ids: Ids
    similarity: Floats
    code: Ids
    codes: Bytes
    lists: Ids

    def of(self, queries: Mask) -> Hits:
        """Return the results of some of the queries."""
        found = (self.ids[queries], self.similarity[queries], self.code[queries])
        return Hits(*found, self.codes, self.lists[queries])


class Index:
    """A faiss index by inner product, memory-mapped and read-only.

    One thread at a time may use it, beside those that run `recall`.

    Args:
        path: the faiss file.
        lists: its on-disk inverted lists, where they are a file of their own.
        disk: fetches the parts of that file that are about to be read, where it is not complete.

    Attributes:
        dimension: of the vectors.
        rows: how many the index holds; their ids are 0 to rows - 1.

    Raises:
        InputError: not a complete faiss index, a file of lists that is too short, another metric than
            inner product, or an unsupported kind of index.

    """

    def __init__(self, path: Path, lists: Path | None = None, disk: Disk | None = None) -> None:
        self._path = path
        self._index = _read_index(path, lists)
        if self._index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise InputError(
                f"{path} compares vectors by L2 distance, not by inner product: build the index with "
                'metric_type="ip"'
            )
        _check_kind(self._index, path)
        for contradiction in contradictions(self._index):
            raise _incomplete(path, contradiction)
        self._ivf = faiss.try_extract_index_ivf(self._index)
        self._lists: InvertedLists | None = None
        if self._ivf is not None:
            self._ivf = faiss.downcast_index(self._ivf)
            self._lists = InvertedLists.read(self._ivf, lists or path)
        if self._lists is not None:
            self._lists.check(self._index.ntotal)
        self._disk = disk or WholeFiles()
        self.dimension: int = self._index.d
        self.rows: int = self._index.ntotal

    @property
    def nlist(self) -> int:
        """Inverted lists; 0 where the index has none (Flat, HNSW)."""
        return 0 if self._ivf is None else int(self._ivf.nlist)

    def nprobe_for(self, k: int, wanted: int | None = None) -> int | None:
        """Return how many lists to probe to find k rows, see `nprobe_rule`; None without lists.

        Args:
            k: rows requested.
            wanted: the user's choice, capped at the number of lists.

        """
        if self._ivf is None:
            return None
        return min(wanted, self.nlist) if wanted else nprobe_rule(k, self.nlist, self.rows)

    def search(
        self,
        queries: Floats,
        k: int,
        nprobe: int | None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Hits:
        """Find the k rows with the largest inner product with each query.

        Args:
            queries: (q, dimension) float32.
            k: rows requested for each query, capped at the rows of the index.
            nprobe: inverted lists to probe; ignored where the index has none.
            progress: called, in any thread, with the number of queries searched since the last call.

        """
        k = min(k, self.rows)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        with self._disk.hold() as held:
            if self._ivf is None:
                similarity, locations = self._index.search(queries, k)
                progress(len(queries))
                lists = np.empty((len(queries), 0), np.int64)
            else:
                similarity, locations, lists = self._search_lists(
                    held, self._transformed(queries), k, nprobe, progress
                )
            found = locations >= 0
            distinct, number = np.unique(locations[found], return_inverse=True)
            row_ids, codes = self._rows_at(held, distinct)
        ids, code = np.full_like(locations, -1), np.full_like(locations, -1)
        ids[found], code[found] = row_ids[number], number

        def rank(some: slice) -> None:  # faiss orders ties differently in batches
            order = np.lexsort((ids[some], -similarity[some]), axis=1)
            for values in (ids, similarity, code):
                values[some] = np.take_along_axis(values[some], order, axis=1)

        in_threads(rank, slices(len(ids), QUERIES_AT_ONCE))
        return Hits(ids, similarity, code, codes, lists)

    def nearest_lists(self, queries: Floats, nprobe: int) -> Ids:
        """Return the inverted lists that a search probes, (q, nprobe); -1 for none.

        Args:
            queries: (q, dimension) float32.
            nprobe: inverted lists to probe; an index without lists counts as one.

        """
        if self._ivf is None:
            return np.zeros((len(queries), 1), np.int64)
        return self._nearest_lists(self._transformed(queries), self._probed(nprobe))[1]

    def _search_lists(
        self,
        held: Hold,
        transformed: Floats,
        k: int,
        nprobe: int | None,
        progress: Callable[[int], None],
    ) -> tuple[Floats, Ids, Ids]:
        """Return similarity and location of the rows nearest to each query, and the lists probed.

        A location is list << 32 | row of the list. The lists are chosen first, all at once, so that
        exactly the lists that are searched are fetched.
        """
        nprobe = self._probed(nprobe)
        nearness, lists = self._nearest_lists(transformed, nprobe)
        self._fetch(held, np.unique(lists[lists >= 0]))
        similarity = np.full((len(lists), k), NONE, np.float32)
        locations, alone = np.full((len(lists), k), -1), np.arange(len(lists))

        def found(query: int, best: Floats, at: Ids) -> None:
            best, at = _best(best, at, k)
            similarity[query, : len(best)], locations[query, : len(at)] = best, at

        shared = self._shared_lists(transformed, lists, nearness, k)
        if shared is not None:
            alone = np.flatnonzero(shared.search(found, progress))
            progress = _told_already
        alone = alone[np.argsort(lists[alone, 0], kind="stable")]
        similarity[alone], locations[alone] = self._search_alone(
            transformed[alone], lists[alone], nearness[alone], k, progress
        )
        return similarity, locations, lists

    def _shared_lists(
        self, transformed: Floats, lists: Ids, nearness: Floats, k: int
    ) -> SharedLists | None:
        """Return the search for all queries at once, if lists are long and many queries share them."""
        if self._lists is None or not self._lists.are_long(lists.shape[1]):
            return None
        rows, probed = self._lists.size, lists[lists >= 0]
        pairs, distinct = int(rows[probed].sum()), int(rows[np.unique(probed)].sum())
        if not distinct or pairs < WORTH_SHARING * distinct or not np.isfinite(transformed).all():
            return None
        if self.codebook is None:  # made only where it is needed: it takes longer than a small search
            return None
        return SharedLists(self._ivf, self.codebook, self._lists, transformed, lists, nearness, k)

    @cached_property
    def codebook(self) -> Codebook | None:
        """Return the rounded centroids of codes that can be compared with many queries at once."""
        return Codebook.of(self._ivf.pq) if self._has_pq_codes else None

    def _search_alone(
        self,
        transformed: Floats,
        lists: Ids,
        nearness: Floats,
        k: int,
        progress: Callable[[int], None],
    ) -> tuple[Floats, Ids]:
        """Return similarity and location of the rows nearest to each query.

        Queries with the same nearest list, which share most of their lists, come together.
        """
        similarity = np.full((len(lists), k), NONE, np.float32)
        locations, nprobe = np.full((len(lists), k), -1), lists.shape[1]

        def with_heaps(batch: slice) -> None:
            fill_in_best(
                self._ivf,
                transformed[batch],
                lists[batch],
                nearness[batch],
                similarity[batch],
                locations[batch],
            )
            progress(len(lists[batch]))

        def in_rounds(batch: slice) -> None:
            for number in range(batch.start, batch.stop):
                best, at = self._best_rows(transformed[number], lists[number], nearness[number], k)
                similarity[number, : len(best)], locations[number, : len(at)] = best, at
                progress(1)

        if self._lists is None:
            in_threads(with_heaps, slices(len(lists), QUERIES_AT_ONCE))
        elif self._lists.are_long(nprobe):
            self._lists.visit_long(self._ivf, in_rounds, lists)
        else:
            self._lists.visit_short(self._ivf, with_heaps, lists)
        return similarity, locations

    def _best_rows(self, query: Floats, lists: Ids, nearness: Floats, k: int) -> tuple[Floats, Ids]:
        """Return similarity and location of the k best rows of some lists, ties by location.

        Each thread finds the best of its share of the lists. faiss's own threads would do the same, but
        on a busy machine they spin for 20 ms while they wait for each other.
        """
        threads = thread_count()

        def best_of(first: int) -> tuple[Floats, Ids]:
            numbers, near = lists[first::threads], nearness[first::threads]
            share = np.ascontiguousarray(numbers), np.ascontiguousarray(near)
            return self._best_in_rounds(query, *share, k)

        best, at = zip(*in_threads(best_of, range(min(threads, len(lists)))), strict=True)
        return _best(np.concatenate(best), np.concatenate(at), k)

    def _best_in_rounds(self, query: Floats, lists: Ids, nearness: Floats, k: int) -> tuple[Floats, Ids]:
        """Return similarity and location of the k best rows of some lists, in the calling thread.

        Rounds of more and more lists return the rows that are as good as the k best so far. A heap, in
        which faiss finds the best, takes longer than that if k is large.
        """
        best, at = np.empty(0, np.float32), np.empty(0, np.int64)
        enough = -np.inf
        sizes = self.list_sizes()[lists] * (lists >= 0)
        for some in _rounds(sizes, max(2 * k, ROWS_OF_THE_FIRST_ROUND)):
            found, places = rows_above(
                self._ivf, query, lists[some], nearness[some], enough, locations=True
            )
            best, at = _best(np.append(best, found), np.append(at, places), k)
            if len(best) == k:
                enough = np.nextafter(best.min(), np.float32(-np.inf))
        return best, at

    def _transformed(self, queries: Floats) -> Floats:
        """Apply the transforms that come before the lists, always to so many queries at a time.

        In a product of matrices, the last bit of a row may depend on how many rows there are, but not on
        what the others are.
        """
        rows = np.pad(queries, ((0, -len(queries) % TRANSFORMED_AT_ONCE), (0, 0)))
        batches = slices(len(rows), TRANSFORMED_AT_ONCE)
        each = in_threads(lambda batch: transformed(self._index, rows[batch]), batches)
        return np.concatenate(each)[: len(queries)] if each else queries

    def _nearest_lists(self, transformed: Floats, nprobe: int) -> tuple[Floats, Ids]:
        """Return nearness and number of the lists to probe, each (q, nprobe); -1 for none.

        The centres are mapped: few queries read those that they visit, many read all.
        """
        if self._lists is not None and len(transformed) >= QUERIES_AT_ONCE:
            read_ahead(self._path, ranges_of(np.array([0]), np.array([self._path.stat().st_size])))
        nearness = np.empty((len(transformed), nprobe), np.float32)
        lists = np.empty((len(transformed), nprobe), np.int64)

        def choose(batch: slice) -> None:
            nearness[batch], lists[batch] = nearest_centres(self._ivf, transformed[batch], nprobe)

        in_threads(choose, slices(len(transformed), QUERIES_AT_ONCE))
        return nearness, lists

    def _fetch(self, held: Hold, lists: Ids, rows: Ids | int | None = None) -> None:
        """Fetch lists, or that many rows of each, unless the file is complete."""
        if self._lists is not None and not self._disk.whole:
            held.need({self._lists.path: self._lists.ranges(lists, rows)})

    def _rows_at(self, held: Hold, locations: Ids) -> tuple[Ids, Bytes]:
        """Return ids and codes of the rows at ascending locations."""
        if self._ivf is None:
            vectors = (
                self._index.reconstruct_batch(locations)
                if len(locations)
                else np.empty((0, self.dimension))
            )
            return locations, np.ascontiguousarray(vectors, np.float32).view(np.uint8)
        lists, rows = locations >> 32, locations & ROW
        width, size = self._ivf.coarse_code_size(), self._ivf.code_size
        ids, codes = np.empty_like(locations), np.empty((len(locations), width + size), np.uint8)
        codes[:, :width] = list_bytes(lists, width)
        stored = self._ivf.invlists
        edges = np.flatnonzero(np.diff(lists, prepend=-1, append=-1))
        self._fetch(held, lists[edges[:-1]], rows[edges[1:] - 1] + 1)
        for first, last in pairwise(edges):
            number = int(lists[first])
            length, wanted = stored.list_size(number), rows[first:last]
            ids[first:last] = faiss.rev_swig_ptr(stored.get_ids(number), length)[wanted]
            in_list = faiss.rev_swig_ptr(stored.get_codes(number), length * size)
            codes[first:last, width:] = in_list.reshape(length, size)[wanted]
        if self._has_pq_codes:
            return ids, codes
        return ids, self._index.sa_decode(codes).view(np.uint8)

    def recall(self, queries: Floats, hits: Hits, nprobe: int | None) -> float:
        """Estimate which share of the results remains when the search goes `FURTHER` times as far.

        A result remains unless better rows push it out. In a graph they are looked for by a search with
        a larger efSearch. In an index with lists they are looked for in a quarter as many lists as
        were probed: in the nearest further lists, and in a sample of the rest, each of which stands for
        the lists between it and the next. NaN if the lists are not all on the disk: the check would
        fetch lists that no request needs.

        It may run in a thread of its own, beside searches: it leaves the limit on BLAS alone, which
        holds for the whole process.

        Args:
            queries: (q, dimension) float32.
            hits: what `search` found for these queries.
            nprobe: the lists that were probed for `hits`.

        """
        if not (hits.ids >= 0).any():
            return 1.0
        if isinstance(graph := _without_transforms(self._index), faiss.IndexHNSW):
            return _recall_of_graph(graph, transformed(self._index, queries), hits)
        if self._ivf is None or nprobe is None or nprobe >= self.nlist:
            return 1.0
        if not self._disk.whole:
            return math.nan
        rotated = transformed(self._index, np.ascontiguousarray(queries, np.float32))
        nearness, lists = nearest_centres(self._ivf, rotated, self._probed(FURTHER * nprobe))

        def counts(number: int) -> tuple[int, int]:
            found = hits.similarity[number][hits.ids[number] >= 0]
            if not len(found):
                return 0, 0
            rounding = SCORE_ROUNDING * max(1, abs(float(found[0])))
            further = np.flatnonzero((lists[number] >= 0) & ~np.isin(lists[number], hits.lists[number]))
            better, weight = np.empty(0, np.float32), np.empty(0)
            samples = _sample(further, sampled_lists(nprobe))
            if self._lists is not None and samples:
                self._lists.read_ahead(lists[number][np.concatenate([some for some, _ in samples])])
            for sampled, each in samples:
                rows, _ = rows_above(
                    self._ivf,
                    rotated[number],
                    lists[number][sampled],
                    nearness[number][sampled],
                    found[-1] + rounding,
                    locations=True,
                )
                better, weight = np.append(better, rows), np.append(weight, np.full(len(rows), each))
            order = np.argsort(-better)
            ahead = np.append(0, np.cumsum(weight[order]))
            place = ahead[np.searchsorted(-better[order], -(found + rounding))] + np.arange(len(found))
            return int((place < len(found)).sum()), len(found)

        remained, returned = np.array([counts(number) for number in range(len(queries))]).sum(axis=0)
        return float(remained / returned)

    def sample(self, lists: int, rows: int) -> Iterator[tuple[Ids, Floats]]:
        """Yield ids and unit vectors of rows drawn at random with a fixed seed.

        Rows of one inverted list come together; they are neighbours more often than other rows.

        Args:
            lists: lists to draw; all where there are fewer. An index without lists counts as one.
            rows: rows of each list, consecutive from a random start, because lists are filled in order
                of id; all where there are fewer.

        """
        random = np.random.default_rng(0)
        decode = self.decoder().decode_to_compare
        with self._disk.hold() as held:
            if self._ivf is None:
                drawn = np.sort(random.permutation(self.rows)[: lists * rows])
                ids, codes = self._rows_at(held, drawn)
                yield ids, unit(decode(codes))
                return
            lengths = self.list_sizes()
            filled = np.flatnonzero(lengths)
            for number in np.sort(random.permutation(filled)[:lists]):
                start = random.integers(max(lengths[number] - rows, 0) + 1)
                stop = min(start + rows, lengths[number])
                ids, codes = self._rows_at(held, (number << 32) + np.arange(start, stop))
                yield ids, unit(decode(codes))

    def list_sizes(self) -> Ids:
        """Return the rows of each inverted list, (lists,); an index without lists counts as one."""
        if self._ivf is None:
            return np.array([self.rows])
        if self._lists is not None:
            return self._lists.size
        return np.array([self._ivf.invlists.list_size(number) for number in range(self.nlist)])

    @property
    def row_size(self) -> int:
        """Bytes that a row takes in the file, with its id if it is in a list."""
        return self.dimension * 4 if self._ivf is None else int(self._ivf.code_size) + ID_SIZE

    @property
    def code_size(self) -> int:
        """Bytes of a code."""
        if not self._has_pq_codes:
            return self.dimension * 4
        return int(self._ivf.coarse_code_size() + self._ivf.code_size)

    def lists_of(self, codes: Bytes) -> Ids:
        """Return the ascending, distinct inverted lists that (n, code size) codes come from."""
        if not self._has_pq_codes:
            return np.empty(0, np.int64)
        return np.unique(list_numbers(codes, self._ivf.coarse_code_size()))

    def decoder(self, lists: Ids | None = None) -> Decoder:
        """Return the decoder of all codes, or of those in some lists.

        Args:
            lists: (n,) ascending; the decoder then holds only their centres, and is small.

        """
        if not self._has_pq_codes:
            return Decoder(None, np.empty(0, np.int64), self.dimension)
        return self._whole_decoder if lists is None else Decoder.of_index(self._index, lists)

    @cached_property
    def _whole_decoder(self) -> Decoder:
        return Decoder(self._index, np.arange(self.nlist), self.dimension)

    @property
    def _has_pq_codes(self) -> bool:
        """Whether codes are a list number and a PQ code; else they are vectors."""
        return isinstance(self._ivf, faiss.IndexIVFPQ)

    def _probed(self, nprobe: int | None) -> int:
        """Return how many lists a search probes, at most all."""
        return min(nprobe or int(self._ivf.nprobe), self.nlist)


def _told_already(_: int) -> None:
    """Tell nothing: the search of shared lists has told that all queries are searched."""


def _rounds(sizes: Ids, first: int) -> Iterator[slice]:
    """Cut lists into rounds, of which the first has at least `first` rows.

    Args:
        sizes: (lists,) rows of each.
        first: above 0.

    """
    ends, start, rows = np.cumsum(sizes), 0, first
    while start < len(ends):
        stop = min(int(np.searchsorted(ends, rows)) + 1, len(ends))
        yield slice(start, stop)
        start, rows = stop, GROWTH * int(ends[stop - 1])


def _best(similarity: Floats, locations: Ids, k: int) -> tuple[Floats, Ids]:
    """Choose the k most similar rows, in any order; among ties those with the first locations."""
    if len(similarity) <= k:
        return similarity, locations
    least = np.partition(similarity, -k)[-k]
    above, ties = np.flatnonzero(similarity > least), np.flatnonzero(similarity == least)
    ties = ties[np.argsort(locations[ties])][: k - len(above)]
    chosen = np.append(above, ties)
    return similarity[chosen], locations[chosen]


def sampled_lists(nprobe: int) -> int:
    """Return how many further lists a check of the recall searches for each query, at most."""
    return max(nprobe // SAMPLED, MIN_SAMPLED_LISTS)


def _sample(lists: Ids, most: int) -> list[tuple[Ids, float]]:
    """Sample the lists, and return how many lists each of the sample represents.

    Args:
        lists: ascending by distance. Half of the sample is the nearest; the other half is spread evenly
            over the rest, so each of its lists represents several.
        most: size of the sample.

    """
    if len(lists) <= most:
        return [(lists, 1.0)] if len(lists) else []
    near, rest = lists[: most // 2], lists[most // 2 :]
    middles = (np.arange(most // 2) + 0.5) * len(rest) / (most // 2)
    return [(near, 1.0), (rest[middles.astype(np.int64)], len(rest) / (most // 2))]


def transformed(index: Any, rows: Floats) -> Floats:
    """Apply the transforms that come before the inverted lists, such as OPQ.

    Args:
        index: faiss index.
        rows: (n, d) float32.

    """
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            rows = faiss.downcast_VectorTransform(index.chain.at(number)).apply(rows)
    return rows


def _without_transforms(index: Any) -> Any:
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def _recall_of_graph(graph: Any, queries: Floats, hits: Hits) -> float:
    """Estimate which share of the results of a graph remains in a search that visits more rows."""
    k = hits.ids.shape[1]
    further = faiss.SearchParametersHNSW(efSearch=FURTHER * max(graph.hnsw.efSearch, k))
    best, _ = graph.search(queries, k, params=further)
    found = hits.ids >= 0
    last = np.take_along_axis(best, np.maximum(found.sum(axis=1, keepdims=True) - 1, 0), axis=1)
    remained = found & (hits.similarity >= last - SCORE_ROUNDING * np.maximum(1, np.abs(last)))
    return float(remained.sum() / max(found.sum(), 1))


def nearest_centres(ivf: Any, rows: Floats, nprobe: int) -> tuple[Floats, Ids]:
    """Return nearness and number of the lists to probe, each (q, nprobe); -1 for none.

    Args:
        ivf: the IVF index.
        rows: (q, dimension of its lists) float32.
        nprobe: how many lists.

    """
    is_graph = isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexHNSW)
    # The graph must visit more lists than nprobe to find the nearest ones.
    depth = faiss.SearchParametersHNSW(efSearch=2 * nprobe) if is_graph else None
    nearness, lists = ivf.quantizer.search(rows, nprobe, params=depth)
    return nearness, lists


def nprobe_rule(k: int, lists: int, rows: int) -> int:
    """Return how many lists to probe to find k rows.

    A stored nprobe is often 1, and a search returns only rows of the probed lists. At the average length
    of a list, k rows need k / length lists, and good ones need several times that.

    Args:
        k: rows requested.
        lists: that the index has.
        rows: that it has.

    """
    enough = -(-CANDIDATES_PER_RESULT * k * lists // max(rows, 1))
    return min(max(MIN_NPROBE, enough), lists)


def _read_index(path: Path, lists: Path | None) -> Any:
    try:
        with silent_stdout(), _no_array_larger_than(path):
            if lists is not None:
                return read_with_lists_beside(path, lists.name)
            # READ_ONLY: lists would be mapped writable otherwise.
            return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except (RuntimeError, MemoryError) as error:  # a damaged size may be larger than the memory
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        if TOO_LARGE in reason:
            reason = "an array in it would be larger than the file"
        if UNKNOWN_KIND.search(reason):
            raise InputError(
                f"{path} is of a kind that this version of faiss does not read ({reason}), or damaged: "
                f"{BUILD_AS}, or stage it again",
                "staged_index",
            ) from error
        raise _incomplete(path, reason) from error


@contextmanager
def _no_array_larger_than(path: Path) -> Iterator[None]:
    """Make faiss refuse an array larger than the file.

    Otherwise it allocates and fills a damaged size before it notices the end of the file. The limit
    applies to the whole process.
    """
    size = path.stat().st_size if path.exists() else 0  # faiss says that it is missing
    with READING:
        before = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(max(size, ROOM))
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before)


def _incomplete(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is not a complete faiss index ({reason}): stage the index again, and if that does not "
        "help, replace the file at the source",
        "staged_index",
    )


def _check_kind(index: Any, path: Path) -> None:
    """Refuse an index whose codes cannot be decoded, or whose ids are not its row numbers."""
    kind = type(_without_transforms(index))
    if kind not in SUPPORTED:
        raise InputError(f"{path} is a faiss {kind.__name__}, which is not supported: {BUILD_AS}")
