"""Search inverted lists that many queries share.

faiss looks up a number for each part of a code, and does so anew for each query. Where many queries probe
a list, it takes less time to decode its rows once, in eight bits, and to multiply them with all these
queries, see `codebook`. Such products are not exact, but their error has a bound. So they rule out nearly
all rows, and faiss scores the others: the results are the same, bit for bit.

The nearest lists show how similar the k-th row of a query is at least. Rows that cannot be as similar are
ruled out. Where too many rows are nearly as similar, a query is left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import faiss
import numpy as np

from laion_assets.index.codebook import LARGEST_PRODUCT, Codebook, lengths
from laion_assets.index.decoder import emptied
from laion_assets.index.inverted_lists import QUERIES_AT_ONCE, InvertedLists, prepare
from laion_assets.index.scores import NONE, ROW, fill_in_best, rows_above
from laion_assets.io.arrays import Bytes, Doubles, Floats, Ids, Mask
from laion_assets.io.parallel import in_threads, slices

WORTH_SHARING = 20  # queries that probe the list of a row, on average: there it takes as long as faiss
NEAREST = 2  # rows of the nearest lists, for each row wanted
PAIRS_OF_A_JOB = 1 << 20  # of a row and a query: so many take longer than threads wait for each other
ROWS_OF_A_JOB = 1 << 9  # at least
PAIRS_AT_ONCE = 1 << 26  # which are compared before more are ruled out
MORE_LEFT = 1 << 20  # pairs that may be left until then
MOST_LEFT, MOST_LEFT_OF_K = 1 << 12, 16  # rows of a query that stay, and for each row wanted
ROUNDING = 2.0**-23  # of the sum of absolute values, for each of them: twice what float32 loses
SMALLEST = 2.0**-149  # number of float32, which a product below it loses
LARGEST = LARGEST_PRODUCT - 1


@dataclass(frozen=True)
class Job:
    """Some rows of a list, and who probes it.

    Attributes:
        list: number of the list.
        rows: some of its rows.
        visits: (v,) ascending numbers of visits: ``query * nprobe + rank`` of the list.

    """

    list: int
    rows: slice
    visits: Ids

    @property
    def pairs(self) -> int:
        """Number of pairs of a row and a query."""
        return int(self.rows.stop - self.rows.start) * len(self.visits)


@dataclass(frozen=True)
class Left:
    """Pairs of a row and a query that are not ruled out; n of them.

    Attributes:
        pair: (n,) number of the visit, << 32 | row of the list.
        near: (n,) float32, nearly the similarity.

    """

    pair: Ids
    near: Floats

    @classmethod
    def joined(cls, some: list[Left]) -> Left:
        """Return all pairs."""
        return cls(
            np.concatenate([np.empty(0, np.int64), *(each.pair for each in some)]),
            np.concatenate([np.empty(0, np.float32), *(each.near for each in some)]),
        )

    @property
    def visit(self) -> Ids:
        """Number of the visit of each pair."""
        return self.pair >> 32

    def __len__(self) -> int:
        return len(self.pair)

    def __getitem__(self, which: Mask | slice | Ids) -> Left:
        return Left(self.pair[which], self.near[which])


class SharedLists:
    """The search of one batch of queries.

    Args:
        ivf: an IVF + PQ index.
        codebook: of its quantizer.
        lists: its lists on the disk.
        queries: (q, d) float32, transformed, finite.
        probed: (q, nprobe) the lists of each query, the nearest first; -1 for none.
        nearness: (q, nprobe) float32, of these lists.
        k: rows wanted for each query.

    """

    def __init__(
        self,
        ivf: Any,
        codebook: Codebook,
        lists: InvertedLists,
        queries: Floats,
        probed: Ids,
        nearness: Floats,
        k: int,
    ) -> None:
        self._ivf, self._codebook, self._lists = ivf, codebook, lists
        self._queries, self._probed, self._nearness, self._k = queries, probed, nearness, k
        self._lengths = lengths(queries)
        self._rounded = codebook.rounded(queries)
        self._off = np.zeros(probed.shape)  # of similarities, at most
        self._least = np.full(len(queries), -np.inf)  # the k-th similarity
        self._number = np.zeros(len(queries), np.int64)  # of rows that are left
        self._too_many = np.zeros(len(queries), np.bool_)

    def search(
        self,
        found: Callable[[int, Floats, Ids], None],
        progress: Callable[[int], None],
    ) -> Mask:
        """Find the k most similar rows of each query, and a few others.

        Args:
            found: called, in any thread, with a query, and similarity and location of its rows.
            progress: called with the number of queries searched since the last call.

        Returns:
            (q,) the queries that are left to the caller.

        """
        rows = self._lists.size[self._probed] * (self._probed >= 0)
        self._find_least(np.cumsum(rows, axis=1) - rows < NEAREST * self._k)
        left = self._all_left(rows > 0, progress)
        edges = self._edges(left)

        def score(queries: slice) -> None:
            some = left[edges[queries.start] : edges[queries.stop]]
            for query, similarity, locations in self._scored(some):
                found(query, similarity, locations)

        in_threads(score, slices(len(self._queries), QUERIES_AT_ONCE))
        return self._too_many

    def _find_least(self, nearest: Mask) -> None:
        """Find how similar the k-th row of each query is at least, from its nearest lists."""
        lists = np.where(nearest, self._probed, -1)[:, : nearest.sum(axis=1).max()]
        lists, nearness = np.ascontiguousarray(lists), self._nearness[:, : lists.shape[1]].copy()
        numbers = np.unique(lists[lists >= 0])
        prepare(self._ivf, threads=0, all_ahead=self._lists.all_fit_ahead(numbers))  # see `visit_long`
        self._lists.read_ahead(numbers)
        best = np.full((len(lists), self._k), NONE, np.float32)
        places = np.full((len(lists), self._k), -1)

        def search(queries: slice) -> None:
            given = self._queries[queries], lists[queries], nearness[queries]
            fill_in_best(self._ivf, *given, best[queries], places[queries])

        in_threads(search, slices(len(lists), QUERIES_AT_ONCE))
        self._least = np.where(places[:, -1] >= 0, best[:, -1], -np.inf).astype(np.float64)

    def _all_left(self, wanted: Mask, progress: Callable[[int], None]) -> Left:
        """Return the pairs that are left of some visits, in order."""
        jobs = list(self._jobs(wanted))
        pairs = np.cumsum([job.pairs for job in jobs])
        edges = np.flatnonzero(np.diff(pairs // PAIRS_AT_ONCE, prepend=-1, append=-1))
        searched = (len(self._queries) * (pairs[edges[1:] - 1] / pairs[-1])).astype(np.int64)
        batches = [jobs[first:last] for first, last in pairwise(edges)]
        lists = [np.array(sorted({job.list for job in batch}), np.int64) for batch in batches]
        prepare(self._ivf, threads=0, all_ahead=all(map(self._lists.all_fit_ahead, lists)))
        left, most, nothing = [Left.joined([])], MORE_LEFT, np.empty(0, np.int64)
        with ThreadPoolExecutor(1, "read-ahead") as reader:
            reading = [reader.submit(self._lists.read_ahead, lists[0])]
            for batch, following, more in zip(
                batches, [*lists[1:], nothing], np.diff(searched, prepend=0), strict=True
            ):
                reading.append(reader.submit(self._lists.read_ahead, following))
                left += in_threads(self._left_of, batch)
                if sum(map(len, left)) > most:
                    left = [self._with_fewer(Left.joined(left))]
                    most = len(left[0]) + MORE_LEFT
                progress(int(more))
                reading.pop(0).result()
        return self._with_fewer(Left.joined(left))

    def _left_of(self, job: Job) -> Left:
        """Return the pairs that are left of a job."""
        query = self._query(job.visits)
        of_centre, off = self._of_centre(job)
        step = self._rounded.step[query]
        self._too_many[query[~np.isfinite(of_centre + off)]] = True
        limit = np.nan_to_num((self._least[query] - off - of_centre) / step)
        at_least = np.ceil(np.clip(limit, -LARGEST, LARGEST)).astype(np.int32)
        at_least[self._too_many[query]] = LARGEST
        codes = self._codes(job.list)[job.rows]
        rows, products = self._rounded.reaching(query, at_least, self._codebook, codes)
        reach = products >= at_least
        self._number[query] += np.count_nonzero(reach, axis=0)
        many = self._number[query] > 2 * self._most_left
        self._too_many[query[many]] = True
        place, visit = np.nonzero(reach & ~many)
        near = of_centre[visit] + step[visit] * products[place, visit]
        row = job.rows.start + rows[place]
        return Left(job.visits[visit] << 32 | row, near.astype(np.float32))

    def _with_fewer(self, left: Left) -> Left:
        """Rule out rows that cannot be among the k most similar; return the others in order."""
        left = left[~self._too_many[self._query(left.visit)]]
        left = left[np.argsort(left.pair)]
        off = self._off.reshape(-1)[left.visit]
        least, most = left.near - off, left.near + off
        stay = np.zeros(len(left), np.bool_)
        for query, (first, last) in enumerate(pairwise(self._edges(left))):
            if last - first > self._k:
                kth = float(np.partition(least[first:last], -self._k)[-self._k])
                self._least[query] = max(self._least[query], kth)
            stay[first:last] = most[first:last] >= self._least[query]
            self._number[query] = np.count_nonzero(stay[first:last])
            self._too_many[query] |= self._number[query] > self._most_left
            stay[first:last] &= not self._too_many[query]
        return left[stay]

    def _scored(self, left: Left) -> Iterator[tuple[int, Floats, Ids]]:
        """Yield each query of some pairs, and similarity and location of its rows, as faiss scores them.

        faiss searches a small index of all these rows, in the lists that they are from.
        """
        if not len(left):
            return
        lists = self._probed.reshape(-1)[left.visit]
        rows = np.unique(lists << 32 | left.pair & ROW)
        numbers, first = np.unique(rows >> 32, return_index=True)
        small = emptied(self._ivf, self._ivf.quantizer.reconstruct_batch(numbers))
        for place, of_list in enumerate(np.split(rows, first[1:])):
            codes = self._codes(int(numbers[place]))[of_list & ROW]
            small.invlists.add_entries(
                place, len(of_list), faiss.swig_ptr(of_list), faiss.swig_ptr(codes)
            )
        visits = np.unique(left.visit)
        for of_query in np.split(visits, np.flatnonzero(np.diff(self._query(visits))) + 1):
            query = int(self._query(of_query[0]))
            nearness = self._nearness.reshape(-1)[of_query]
            places = np.searchsorted(numbers, self._probed.reshape(-1)[of_query])
            score = np.nextafter(np.float32(self._least[query]), NONE)
            yield (
                query,
                *rows_above(small, self._queries[query], places, nearness, score, locations=False),
            )

    def _of_centre(self, job: Job) -> tuple[Doubles, Doubles]:
        """Return (v,) the product of each query with the centre, and how far similarities may be off."""
        query, centre = self._query(job.visits), self._ivf.quantizer.reconstruct(job.list)
        if not self._ivf.by_residual:
            centre[:] = 0
        terms = len(centre) + self._codebook.parts
        absolute = self._lengths[query] * lengths(centre) + self._rounded.of_residuals[query]
        off: Doubles = self._rounded.off[query] + terms * (ROUNDING * absolute + SMALLEST)
        self._off.reshape(-1)[job.visits] = off
        with np.errstate(over="ignore", invalid="ignore"):
            return (self._queries[query] @ centre).astype(np.float64), off

    def _codes(self, number: int) -> Bytes:
        """Return the codes of a list, (rows, m)."""
        rows, width = int(self._lists.size[number]), int(self._ivf.code_size)
        codes: Bytes = faiss.rev_swig_ptr(self._ivf.invlists.get_codes(number), rows * width)
        return codes.reshape(rows, width)

    def _jobs(self, wanted: Mask) -> Iterator[Job]:
        """Yield the rows of each list that wanted visits, (q, nprobe), are to, in turn."""
        visits = np.flatnonzero(wanted)
        visits = visits[np.argsort(self._probed.reshape(-1)[visits], kind="stable")]
        lists = self._probed.reshape(-1)[visits]
        for first, last in pairwise(np.flatnonzero(np.diff(lists, prepend=-1, append=-1))):
            number = int(lists[first])
            at_once = max(PAIRS_OF_A_JOB // int(last - first), ROWS_OF_A_JOB)
            for rows in slices(int(self._lists.size[number]), at_once):
                yield Job(number, rows, visits[first:last])

    def _query(self, visits: Ids) -> Ids:
        query: Ids = visits // self._probed.shape[1]
        return query

    def _edges(self, left: Left) -> Ids:
        """Return (q + 1,) where the pairs of each query begin, and where those of the last end."""
        return np.searchsorted(self._query(left.visit), np.arange(len(self._queries) + 1))

    @property
    def _most_left(self) -> int:
        return MOST_LEFT + MOST_LEFT_OF_K * self._k
