"""A faiss index on disk: opened without loading it, searched in batches, decoded exactly.

What a row looks like to the index is its *code*: for an OPQ + IVF + PQ index the number of its
inverted list followed by its PQ code (131 bytes a row for LAION-5B), for any other index the vector
itself. A `Decoder` turns codes back into vectors without the index.
What must not live here: near-duplicates, metadata, where files come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from laion_assets.index.vectors import unit
from laion_assets.io.arrays import Bytes, Floats, Ids
from laion_assets.io.console import silent_stdout
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import in_threads, one_blas_thread
from laion_assets.io.ranges import Disk, Hold, Ranges, WholeFiles, ranges_of, union

MIN_NPROBE = 64
QUERIES_AT_ONCE = 16
ROUNDING = 1e-6  # scores of the same row in two scans differ by less
ID_SIZE = 8  # bytes of a row's id in a list
FURTHER = 4  # how many times the lists a check of the recall looks into
ORTHONORMAL = 1e-4  # how far from it a matrix may be that faiss trained to be orthonormal
UNSUPPORTED = (faiss.IndexIDMap, faiss.IndexRefine, faiss.IndexFastScan, faiss.IndexIVFFastScan)
CANDIDATES_PER_RESULT = 16  # rows in the probed lists for each row asked for, as with clip-retrieval


@dataclass(frozen=True)
class Hits:
    """What a batch of queries found, best first, ties by id.

    Attributes:
        ids: (q, k) int64; -1 where the probed lists held fewer than k rows.
        similarity: (q, k) float32, inner product of the query and the decoded row.
        code: (q, k) int64, where in `codes` the row's code is; -1 likewise.
        codes: (c, code size) uint8, of each row found, once however many queries found it.

    """

    ids: Ids
    similarity: Floats
    code: Ids
    codes: Bytes


class Index:
    """A faiss index by inner product, memory-mapped and read-only.

    Args:
        path: the faiss file.
        lists: its on-disk inverted lists, if they are a file of their own beside it.
        disk: is told which parts of that file are about to be read.

    Raises:
        InputError: not a whole faiss index, lists shorter than their table, another metric or kind.

    To be used by one thread at a time: how far a search looks is set on the index itself.
    """

    def __init__(self, path: Path, lists: Path | None = None, disk: Disk | None = None) -> None:
        self._index = _read(path, on_disk_lists=lists is not None)
        if self._index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise InputError(
                f"{path} measures by L2 distance; this needs inner product: build the index with "
                'metric_type="ip"'
            )
        _check_kind(self._index, path)
        self._ivf = faiss.try_extract_index_ivf(self._index)
        self._lists: InvertedLists | None = None
        if self._ivf is not None:
            self._ivf = faiss.downcast_index(self._ivf)
            self._lists = _lists_of(self._ivf, lists or path)
            _check_lists_are_whole(self._lists)
        self._disk = disk or WholeFiles()
        self.dimension: int = self._index.d
        self.rows: int = self._index.ntotal

    @property
    def nlist(self) -> int:
        """Inverted lists; 0 where the index has none (Flat, HNSW)."""
        return 0 if self._ivf is None else int(self._ivf.nlist)

    def nprobe_for(self, k: int, wanted: int | None = None) -> int | None:
        """Return how many lists to probe to find k rows; None where there are no lists.

        A stored nprobe is often 1, and a search returns only what the probed lists hold: at the
        average list length, k rows need k / length lists, and good ones need several times that.

        Args:
            k: rows asked for.
            wanted: a number of the user's own; more than there are lists means all of them.
        """
        if self._ivf is None:
            return None
        enough = -(-CANDIDATES_PER_RESULT * k * self.nlist // max(self.rows, 1))
        return min(wanted or max(MIN_NPROBE, enough), self.nlist)

    def search(self, queries: Floats, k: int, nprobe: int | None) -> Hits:
        """Find the k rows with the largest inner product with each query.

        Args:
            queries: (q, dimension) float32.
            k: rows wanted for each query; more than the index holds is allowed.
            nprobe: inverted lists to look into; ignored where the index has none.

        """
        k = min(k, self.rows)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        with self._disk.hold() as held:
            if self._ivf is None:
                similarity, places = self._index.search(queries, k)
            else:
                similarity, places = self._search_lists(held, self._transformed(queries), k, nprobe)
            found = places >= 0
            rows, number = np.unique(places[found], return_inverse=True)
            row_ids, codes = self._rows_at(held, rows)
        ids, code = np.full_like(places, -1), np.full_like(places, -1)
        ids[found], code[found] = row_ids[number], number
        query = np.arange(len(ids))[:, None]
        order = np.lexsort((ids, -similarity), axis=1)  # faiss orders ties differently in batches
        return Hits(ids[query, order], similarity[query, order], code[query, order], codes)

    def _search_lists(
        self, held: Hold, transformed: Floats, k: int, nprobe: int | None
    ) -> tuple[Floats, Ids]:
        """Return similarity and place (list << 32 | row in it) of the rows nearest to each query.

        Which lists are nearest is settled first, and once: what is held is what is searched.
        """
        parameters = self._parameters(nprobe)
        lists = np.empty((len(transformed), parameters.nprobe), np.int64)
        nearness = np.empty(lists.shape, np.float32)
        similarity = np.empty((len(transformed), k), np.float32)
        places = np.empty((len(transformed), k), np.int64)
        portions = [
            slice(first, first + QUERIES_AT_ONCE) for first in range(0, len(transformed), QUERIES_AT_ONCE)
        ]

        def choose_lists(some: slice) -> None:
            nearness[some], lists[some] = self._ivf.quantizer.search(transformed[some], parameters.nprobe)

        def search(some: slice) -> None:
            # In threads of ours: this call of faiss, the one that returns places, uses one.
            self._ivf.search_preassigned_c(
                len(lists[some]), faiss.swig_ptr(transformed[some]), k, faiss.swig_ptr(lists[some]),
                faiss.swig_ptr(nearness[some]), faiss.swig_ptr(similarity[some]),
                faiss.swig_ptr(places[some]), True, parameters,
            )  # fmt: skip

        in_threads(choose_lists, portions)
        self._need(held, np.unique(lists[lists >= 0]))
        in_threads(search, portions)
        return similarity, places

    def _need(self, held: Hold, lists: Ids, rows: Ids | int | None = None) -> None:
        """See that lists are on the disk, or so many rows of each; nothing is read without."""
        if self._lists is not None and not self._disk.whole:
            held.need({self._lists.path: self._lists.ranges(lists, rows)})

    def _rows_at(self, held: Hold, places: Ids) -> tuple[Ids, Bytes]:
        """Return ids and codes of the rows at some places, ascending."""
        if self._ivf is None:
            vectors = (
                self._index.reconstruct_batch(places) if len(places) else np.empty((0, self.dimension))
            )
            return places, np.ascontiguousarray(vectors, np.float32).view(np.uint8)
        lists, rows = places >> 32, places & 0xFFFFFFFF
        wide, size = self._ivf.coarse_code_size(), self._ivf.code_size
        ids, codes = np.empty_like(places), np.empty((len(places), wide + size), np.uint8)
        codes[:, :wide] = _list_bytes(lists, wide)
        stored = self._ivf.invlists
        edges = np.flatnonzero(np.diff(lists, prepend=-1, append=-1))
        self._need(held, lists[edges[:-1]], rows[edges[1:] - 1] + 1)
        for first, last in pairwise(edges):
            number = int(lists[first])
            length, there = stored.list_size(number), rows[first:last]
            ids[first:last] = faiss.rev_swig_ptr(stored.get_ids(number), length)[there]
            in_list = faiss.rev_swig_ptr(stored.get_codes(number), length * size)
            codes[first:last, wide:] = in_list.reshape(length, size)[there]
        if self._portable:
            return ids, codes
        return ids, self._index.sa_decode(codes).view(np.uint8)

    def recall(self, queries: Floats, hits: Hits, nprobe: int | None) -> float:
        """Measure which share of what the queries found is also found when probing further.

        The same queries at `FURTHER` times the lists: of the rows received, those that no other row
        pushes out count. Cheap, because only rows better than the worst received are collected. NaN
        where lists come from far when they are needed: nobody has asked for the further ones.

        Args:
            queries: (q, dimension) float32.
            hits: what `search` found for them, and perhaps for more after them.
            nprobe: the lists that were probed for it.
        """
        if self._ivf is None or nprobe is None or nprobe >= self.nlist or not (hits.ids >= 0).any():
            return 1.0
        if not self._disk.whole:
            return math.nan
        parameters = self._parameters(FURTHER * nprobe)
        stayed = received = 0
        sampled = slice(len(queries))
        for query, ids, similarity in zip(
            queries, hits.ids[sampled], hits.similarity[sampled], strict=True
        ):
            found, found_ids = similarity[ids >= 0], ids[ids >= 0]
            if not len(found):
                continue
            rounding = ROUNDING * max(1, abs(float(found[0])))
            transformed = self._transformed(query[None].astype(np.float32))
            worst = float(found[-1]) - rounding
            _, further, further_ids = self._ivf.range_search(transformed, worst, params=parameters)
            # Not all that was found need be among `further`: a graph over the lists is not exact.
            _, distinct = np.unique(np.concatenate([found_ids, further_ids]), return_index=True)
            best_first = -np.sort(-np.concatenate([found, further])[distinct])
            stayed += int((found >= best_first[: len(found)][-1] - rounding).sum())
            received += len(found)
        return stayed / received

    def sample(self, lists: int, rows: int) -> Iterator[tuple[Ids, Floats]]:
        """Yield ids and unit vectors of rows chosen by chance, always the same ones.

        Rows of one inverted list come together, and are neighbours more often than others.

        Args:
            lists: to look into; all where there are fewer. Without any, the whole index is one.
            rows: of each list, one after another from a place chosen by chance, as lists are filled in
                the order of the ids; all where there are fewer.

        """
        random = np.random.default_rng(0)
        decode = self.decoder().decode_to_compare
        with self._disk.hold() as held:
            if self._ivf is None:
                some = np.sort(random.permutation(self.rows)[: lists * rows])
                ids, codes = self._rows_at(held, some)
                yield ids, unit(decode(codes))
                return
            lengths = np.array([self._ivf.invlists.list_size(number) for number in range(self.nlist)])
            filled = np.flatnonzero(lengths)
            for number in np.sort(random.permutation(filled)[:lists]):
                start = random.integers(max(lengths[number] - rows, 0) + 1)
                stop = min(start + rows, lengths[number])
                ids, codes = self._rows_at(held, (number << 32) + np.arange(start, stop))
                yield ids, unit(decode(codes))

    @property
    def code_size(self) -> int:
        """Bytes of a code."""
        if not self._portable:
            return self.dimension * 4
        return int(self._ivf.coarse_code_size() + self._ivf.code_size)

    def lists_of(self, codes: Bytes) -> Ids:
        """Return the inverted lists that (n, code size) codes come from, each once, ascending."""
        if not self._portable:
            return np.empty(0, np.int64)
        return np.unique(_list_numbers(codes, self._ivf.coarse_code_size()))

    def decoder(self, lists: Ids | None = None) -> Decoder:
        """Return what turns codes into vectors: all codes, or those of some lists.

        Args:
            lists: ascending; the decoder then holds only the centres of these, and is small.

        """
        if not self._portable:
            return Decoder(None, np.empty(0, np.int64), self.dimension)
        if lists is None:
            return self._whole_decoder
        centres = np.empty((len(lists), self._ivf.d), np.float32)
        for place, number in enumerate(lists):
            centres[place] = self._ivf.quantizer.reconstruct(int(number))
        return Decoder(_emptied(self._index, self._ivf, centres), lists, self.dimension)

    @cached_property
    def _whole_decoder(self) -> Decoder:
        return Decoder(self._index, np.arange(self.nlist), self.dimension)

    @property
    def _portable(self) -> bool:
        """Whether codes are PQ codes that a small decoder can carry."""
        return isinstance(self._ivf, faiss.IndexIVFPQ)

    def _transformed(self, queries: Floats) -> Floats:
        """Queries as the inverted lists see them: after OPQ, if there is one."""
        if isinstance(self._index, faiss.IndexPreTransform):
            for i in range(self._index.chain.size()):
                queries = faiss.downcast_VectorTransform(self._index.chain.at(i)).apply(queries)
        return queries

    def _parameters(self, nprobe: int | None) -> Any:
        nprobe = min(nprobe or self._ivf.nprobe, self.nlist)
        quantizer = faiss.downcast_index(self._ivf.quantizer)
        if isinstance(quantizer, faiss.IndexHNSW):
            # To find the nearest lists the graph has to look at more than nprobe.
            quantizer.hnsw.efSearch = 2 * nprobe
        return faiss.SearchParametersIVF(nprobe=nprobe)


class Decoder:
    """Turns codes into vectors; small enough to travel with the codes.

    Args:
        index: an empty faiss index that decodes; None where the codes are the vectors.
        lists: (n,) the inverted lists whose centres the index holds, ascending.
        dimension: of the vectors.

    """

    def __init__(self, index: Any, lists: Ids, dimension: int) -> None:
        self._index = index
        self._lists = lists
        self._dimension = dimension

    @cached_property
    def _superfluous(self) -> Floats | None:
        with one_blas_thread():
            return _superfluous_directions(self._index)

    def decode(self, codes: Bytes) -> Floats:
        """Return (n, dimension) float32 vectors for (n, code size) codes, not normalised."""
        if self._index is None:
            return np.ascontiguousarray(codes).view(np.float32)
        decoded: Floats = self._index.sa_decode(self._renumbered(codes))
        return decoded

    def decode_to_compare(self, codes: Bytes) -> Floats:
        """Return vectors with the inner products of the decoded ones, for a third of the work.

        Decoding ends with the transpose of OPQ's matrix A, (m, d) with orthonormal columns if m >= d, or
        orthonormal rows. Inner products do not need that: A'y . A'z = y . AA'z, and AA' leaves z as it
        is but for the directions outside of A's columns, of which there are few (LAION-5B: 128 of 896).

        Args:
            codes: (n, code size).

        Returns:
            (n, m) float32; m is the width that OPQ gives.

        """
        if self._superfluous is None:
            return self.decode(codes)
        vectors: Floats = faiss.extract_index_ivf(self._index).sa_decode(self._renumbered(codes))
        if self._superfluous.size:
            vectors -= (vectors @ self._superfluous) @ self._superfluous.T
        return vectors

    def _renumbered(self, codes: Bytes) -> Bytes:
        """Codes with the list numbers that the index in here knows."""
        ivf = faiss.extract_index_ivf(self._index)
        wide = codes.shape[1] - ivf.code_size
        numbers = np.searchsorted(self._lists, _list_numbers(codes, wide))
        mine = _list_bytes(numbers, ivf.coarse_code_size())
        return np.hstack([mine, codes[:, wide:]])

    def merged(self, other: Decoder) -> Decoder:
        """Return a decoder for the codes of both; both must come from the same index."""
        if self._index is None:
            return self
        lists, first = np.unique(np.concatenate([self._lists, other._lists]), return_index=True)
        centres = np.concatenate([self._centres(), other._centres()])[first]
        ivf = faiss.downcast_index(faiss.extract_index_ivf(self._index))
        return Decoder(_emptied(self._index, ivf, centres), lists, self._dimension)

    def _centres(self) -> Floats:
        ivf = faiss.extract_index_ivf(self._index)
        centres: Floats = ivf.quantizer.reconstruct_n(0, len(self._lists))
        return centres

    def to_bytes(self) -> bytes:
        """Serialise: dimension, number of lists, list numbers (int64), faiss index."""
        head = np.array([self._dimension, len(self._lists)], np.int64)
        body = b"" if self._index is None else faiss.serialize_index(self._index).tobytes()
        return head.tobytes() + self._lists.tobytes() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Decoder:
        """Read back what `to_bytes` wrote."""
        dimension, count = (int(n) for n in np.frombuffer(data, np.int64, 2))
        lists = np.frombuffer(data, np.int64, count, offset=16)
        body = np.frombuffer(data, np.uint8, offset=16 + lists.nbytes)
        return cls(faiss.deserialize_index(body) if body.size else None, lists, dimension)


def _superfluous_directions(index: Any) -> Floats | None:
    """Return the directions that the transpose of the index's one linear transform takes to nothing.

    Returns:
        (m, max(m - d, 0)) orthonormal columns; None where the index has no such transform, or one
        that changes inner products.

    """
    if not isinstance(index, faiss.IndexPreTransform) or index.chain.size() != 1:
        return None
    transform = faiss.downcast_VectorTransform(index.chain.at(0))
    if not isinstance(transform, faiss.LinearTransform) or transform.have_bias:
        return None
    matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
    out, into = matrix.shape
    inner = matrix.T @ matrix if out >= into else matrix @ matrix.T
    if not np.allclose(inner, np.eye(len(inner)), atol=ORTHONORMAL):
        return None
    others = np.random.default_rng(0).standard_normal((out, max(out - into, 0)), np.float32)
    for _ in range(2):  # once would leave rounding errors
        others = np.linalg.qr(others - matrix @ (matrix.T @ others))[0]
    return np.ascontiguousarray(others)


def _emptied(index: Any, ivf: Any, centres: Floats) -> Any:
    """Return an index without rows that decodes the codes of the lists with these centres."""
    quantizer = faiss.IndexFlatIP(ivf.d)
    quantizer.add(centres)
    empty = faiss.IndexIVFPQ(
        quantizer, ivf.d, len(centres), ivf.pq.M, ivf.pq.nbits, faiss.METRIC_INNER_PRODUCT
    )
    empty.pq = ivf.pq
    empty.by_residual = ivf.by_residual
    empty.is_trained = True
    if not isinstance(index, faiss.IndexPreTransform):
        return empty
    whole = faiss.IndexPreTransform(empty)
    for i in reversed(range(index.chain.size())):
        whole.prepend_transform(index.chain.at(i))
    # The transforms still belong to the index they are from: a copy owns its own.
    return faiss.deserialize_index(faiss.serialize_index(whole))


def _list_numbers(codes: Bytes, wide: int) -> Ids:
    """Read the little-endian list number in the first `wide` bytes of each code."""
    padded = np.zeros((len(codes), 8), np.uint8)
    padded[:, :wide] = codes[:, :wide]
    return padded.view("<i8").ravel().astype(np.int64)


def _list_bytes(numbers: Ids, wide: int) -> Bytes:
    return numbers.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :wide]


def _read(path: Path, *, on_disk_lists: bool) -> Any:
    # Without READ_ONLY the lists would be mapped writable.
    where = faiss.IO_FLAG_ONDISK_SAME_DIR if on_disk_lists else faiss.IO_FLAG_MMAP
    try:
        with silent_stdout():
            return faiss.read_index(str(path), where | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        raise InputError(
            f"{path} is not a whole faiss index ({reason}): stage the index again, and if it stays, "
            "copy the file to the source again"
        ) from error


def _check_kind(index: Any, path: Path) -> None:
    """Refuse what has no codes to decode, or gives other ids than the places of its rows."""
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    if isinstance(index, UNSUPPORTED):
        raise InputError(
            f"{path} is a faiss {type(index).__name__}, which cannot be used here: build it as Flat, HNSW"
            " or IVF with Flat or PQ, as autofaiss does, its ids the numbers of the rows"
        )


@dataclass(frozen=True)
class InvertedLists:
    """Where inverted lists are in their file: all codes of a list, then all its ids.

    Attributes:
        path: of the file.
        offset: (lists,) where each begins.
        capacity: (lists,) rows that each has room for.
        size: (lists,) rows of each.
        code_size: bytes of a code.

    """

    path: Path
    offset: Ids
    capacity: Ids
    size: Ids
    code_size: int

    @property
    def end(self) -> int:
        """Bytes that the file must have."""
        return int((self.offset + self.capacity * (self.code_size + ID_SIZE)).max(initial=0))

    def ranges(self, numbers: Ids, first: Ids | int | None = None) -> Ranges:
        """What is read of some lists, or of so many rows at the beginning of each."""
        codes, rows = self.offset[numbers], self.size[numbers]
        rows = rows if first is None else np.minimum(rows, first)
        ids = codes + self.capacity[numbers] * self.code_size
        return union(
            ranges_of(codes, codes + rows * self.code_size), ranges_of(ids, ids + rows * ID_SIZE)
        )


def _lists_of(ivf: Any, path: Path) -> InvertedLists | None:
    """Read the lists' table; None where they are not on disk."""
    stored = faiss.downcast_InvertedLists(ivf.invlists)
    if not isinstance(stored, faiss.OnDiskInvertedLists):
        return None
    table = [(one.offset, one.capacity, one.size) for one in map(stored.lists.at, range(ivf.nlist))]
    # An offset means nothing where there is no room for a row.
    rows = np.array([(offset if room else 0, room, size) for offset, room, size in table], np.int64)
    offset, capacity, size = rows.reshape(-1, 3).T
    return InvertedLists(path, offset, capacity, size, stored.code_size)


def _check_lists_are_whole(lists: InvertedLists | None) -> None:
    """Compare the size of the lists' file with their table: reading past its end kills the process."""
    if lists is None:
        return
    size = lists.path.stat().st_size
    if size < lists.end:
        raise InputError(
            f"{lists.path} has {size:,} bytes, its inverted lists need {lists.end:,}: it is truncated; "
            "stage the index again, and if it stays, copy the file to the source again"
        )
