"""Estimate what a request reads and how long it takes: pure functions of its numbers and of the index's.

The counts of lists, rows, pages and pairs follow from laws, which are stated with each function. Seconds
follow from the counts and from `Rates`, which `probe` measures. Counts are expectations, so they are
floats. Where queries may share what they read, the counts are upper bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from laion_assets.index.faiss_index import FURTHER, nprobe_rule, sampled_lists
from laion_assets.index.inverted_lists import WORTH_READING_AHEAD
from laion_assets.index.metadata_file import BatchLayout
from laion_assets.index.shared_lists import WORTH_SHARING
from laion_assets.io.arrays import Ids
from laion_assets.search.links import SIZES
from laion_assets.search.retrieval import RECALL_QUERIES
from laion_assets.staging.sparse.reads import MAX_READ, MERGE_GAP, PAGE_SIZE


@dataclass(frozen=True)
class Shape:
    """The numbers of an index from which the counts follow.

    Attributes:
        rows: rows of the index.
        lists: inverted lists; 1 for an index without lists.
        probed_rows: rows of a probed list, on average, see `mean_probed_rows`.
        row_size: bytes of a row in its list, code and id.
        batches: record batches of the metadata.
        layout: what reading rows of a batch reads.
        centres: bytes of the index beside its lists, which are mapped and soon read.
        window: bytes that the kernel reads around a page fault.
        sparse: whether only what requests need is on the disk.

    """

    rows: int
    lists: int
    probed_rows: float
    row_size: int
    batches: int
    layout: BatchLayout
    centres: int = 0
    window: int = 0
    sparse: bool = False


@dataclass(frozen=True)
class Search:
    """A search around one query or many.

    Attributes:
        queries: number of queries.
        k: images requested for each query.
        nprobe: lists probed for each query; 1 for an index without lists.
        read: share of the requested images whose metadata is read: all but near-duplicates.
        among: lists among which those of the queries are spread, see `lists_among`; infinite if the
            queries may have nothing in common.

    """

    queries: int
    k: int
    nprobe: int
    read: float
    among: float = math.inf


@dataclass(frozen=True)
class Pairwise:
    """The law of near-duplicates: ``linear * n + quadratic * n^2`` seconds of a core for n rows.

    The linear part decodes, sketches and compares rows within cells; the quadratic part compares the
    different images among them, see `near_duplicates`.
    """

    linear: float
    quadratic: float

    def seconds(self, rows: float) -> float:
        """Return the core-seconds of comparing a number of rows with each other."""
        return self.linear * rows + self.quadratic * rows**2

    @classmethod
    def through(
        cls,
        few: float,
        seconds_of_few: float,
        many: float,
        seconds_of_many: float,
        least: float = 0.0,
    ) -> Pairwise:
        """Return the law through two measurements; neither part is negative.

        Args:
            few: rows of the first measurement.
            seconds_of_few: its seconds.
            many: rows of the second.
            seconds_of_many: its seconds.
            least: the least that the quadratic part can be; few rows hardly show it.

        """
        if not 0 < few < many:
            return cls(seconds_of_many / max(many, 1), least)
        quadratic = (seconds_of_many / many - seconds_of_few / few) / (many - few)
        quadratic = min(max(quadratic, least), seconds_of_many / many**2)
        return cls(seconds_of_many / many - quadratic * many, quadratic)


@dataclass(frozen=True)
class Rates:
    """What a machine takes, in seconds. Those of the processor are of one core, with all in memory.

    Attributes:
        cores: cores that the work is divided among.
        threads: cores that are busy with near-duplicates while threads look for them: they wait for the
            interpreter, and processes that share the longest part do not.
        opening: to open the index and its metadata, and to search for the first time.
        query: to choose the lists of a query, however many.
        list: for each list chosen.
        scanned: for each row of a list.
        found: for each row returned.
        short: near-duplicates within a result of at most `SIZES.small` rows.
        long: near-duplicates within a longer one.
        batch: to take rows from a record batch, however many.
        taken: for each row taken.
        written: for each row written to a table.
        combined: for each row that is combined, without near-duplicates.
        page: to read a page at a random place of the disk, while many are read.
        byte: to read a byte of a long run from the disk.
        request: to request a range from the source, while many are requested; 0 unless staged sparse.
        fetched: to read a byte of a long range from the source; likewise.
        decoded: for each row of a list that many queries share; 0 if they never do.
        compared: for each pair of such a row and a query; likewise.

    """

    cores: int
    threads: float
    opening: float
    query: float
    list: float
    scanned: float
    found: float
    short: Pairwise
    long: Pairwise
    batch: float
    taken: float
    written: float
    combined: float
    page: float
    byte: float
    request: float = 0.0
    fetched: float = 0.0
    decoded: float = 0.0
    compared: float = 0.0


@dataclass(frozen=True)
class Step:
    """What a step takes.

    Attributes:
        size: bytes that it reads, if none of them is in memory or, staged sparse, on the disk.
        reads: requests to the source for them; 0 unless staged sparse.
        cold: seconds if it reads them all.
        warm: seconds if it reads none.

    """

    size: float = 0.0
    reads: float = 0.0
    cold: float = 0.0
    warm: float = 0.0

    def __add__(self, other: Step) -> Step:
        """Return the cost of both in sequence."""
        return Step(
            self.size + other.size,
            self.reads + other.reads,
            self.cold + other.cold,
            self.warm + other.warm,
        )


Steps = Mapping[str, Step]


def search_of(shape: Shape, queries: int, k: int, read: float, nprobe: int | None = None) -> Search:
    """Return a search with the lists that it probes, see `nprobe_rule`.

    Args:
        shape: of the index.
        queries: number of queries.
        k: images requested for each query.
        read: share of the requested images whose metadata is read.
        nprobe: the user's choice, capped at the number of lists.

    """
    lists = min(nprobe, shape.lists) if nprobe else nprobe_rule(k, shape.lists, shape.rows)
    return Search(queries, k, lists, read)


def total(steps: Steps) -> Step:
    """Return what all steps take."""
    return sum(steps.values(), Step())


def together(*some: Steps) -> Steps:
    """Add up the steps of the same name."""
    names = dict.fromkeys(name for steps in some for name in steps)
    return {name: sum((steps.get(name, Step()) for steps in some), Step()) for name in names}


# --- lists ----------------------------------------------------------------------------------------


def mean_probed_rows(sizes: Ids) -> float:
    """Return the rows of a probed list, on average: E[s^2] / E[s], where s is the size of a list.

    A query lies near rows, so it finds a list the more often the more rows that has. The sizes of a
    trained index are lognormal, so this is more than the mean.

    Args:
        sizes: (lists,) rows of each list.

    """
    wide = sizes.astype(np.float64)
    return float(wide @ wide / max(wide.sum(), 1))


def rows_scanned(shape: Shape, lists: float) -> float:
    """Return the rows in a number of lists: ``lists * probed_rows``, at most all rows."""
    return min(lists * shape.probed_rows, shape.rows)


def distinct_lists(among: float, nprobe: float, queries: float) -> float:
    """Return how many different lists queries probe: ``among * (1 - (1 - nprobe/among)^q)``.

    This is the expectation for queries whose lists are spread at random among some. Those of queries that
    have nothing in common are spread among all: 1,000 seeds of random styles probe 50,343 of 131,072
    lists at 64 each, where this is 50,600.
    """
    missed: float = (1 - min(nprobe / among, 1)) ** queries
    return among * (1 - missed)


def lists_among(lists: int, nprobe: int, queries: int, distinct: int) -> float:
    """Return among how many lists those of some queries are spread: the inverse of `distinct_lists`.

    Args:
        lists: of the index.
        nprobe: lists that each query probes.
        queries: number of queries.
        distinct: different lists that they probe together.

    """
    low, high = float(max(distinct, nprobe)), float(lists)
    if distinct_lists(high, nprobe, queries) <= distinct:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        too_many = distinct_lists(middle, nprobe, queries) > distinct
        low, high = (low, middle) if too_many else (middle, high)
    return high


def list_bytes(shape: Shape, lists: float, window: int) -> float:
    """Return the bytes read of a number of lists of b bytes each.

    A page fault reads a window of w bytes around it, so a list takes ``1 + b/w`` windows at random
    places. Lists that are read ahead take b bytes.

    Args:
        shape: of the index.
        lists: number of different lists.
        window: w; 0 if they are read ahead.

    """
    size = rows_scanned(shape, lists) * shape.row_size
    if not window:
        return size
    return window * touched(shape.rows * shape.row_size / window, lists + size / window)


def recall_lists(shape: Shape, nprobe: int) -> int:
    """Return the further lists that the check of the recall searches for a query, see `Index.recall`.

    Sparse staging has no such check.
    """
    return 0 if shape.sparse else min(sampled_lists(nprobe), shape.lists - nprobe)


# --- metadata -------------------------------------------------------------------------------------


def touched(places: float, visits: float) -> float:
    """Return how many of some places are visited at random at least once: ``p * (1 - exp(-v/p))``."""
    return places * -math.expm1(-visits / places) if places else 0.0


def buffer_reads(size: float, rows_of_batch: float, rows: float, gap: int) -> tuple[float, float]:
    """Return reads and pages for some rows of one buffer of a record batch.

    A row of b bytes lies on ``1 + b/4096`` pages. Each page is needed with the same probability p. Pages
    at most `gap` apart are read together with those between them, so a read begins at a page that is
    needed with probability ``p * (1-p)^(gap+1)``, and a page is read without need with probability
    ``sum of j * p^2 * (1-p)^j for j up to gap``.

    Args:
        size: bytes of the buffer.
        rows_of_batch: rows whose elements it holds.
        rows: rows that are read, at random.
        gap: pages between two reads that are merged; 0 for page faults, which are never merged.

    """
    pages = max(size / PAGE_SIZE, 1.0)
    p = touched(pages, rows * (1 + size / rows_of_batch / PAGE_SIZE)) / pages
    between = sum(j * p**2 * (1 - p) ** j for j in range(1, gap + 1))
    read = pages * min(p + between, 1.0)
    if not gap:
        return read, read
    return max(pages * p * (1 - p) ** (gap + 1), read / MAX_READ, min(rows, 1.0)), read


def metadata_reads(shape: Shape, rows: float) -> tuple[float, float]:
    """Return the reads and bytes of taking rows from the metadata, whose ids are random.

    For each row, every column takes a page of offsets or numbers and, if it is text, one of values, and
    each batch with such a row what is always read of it. For LAION, URL and caption of 2,500 rows take
    4.7 page faults a row; sparse staging merges near pages.
    """
    layout, gap = shape.layout, MERGE_GAP if shape.sparse else 0
    batches = touched(shape.batches, rows)
    if not batches:
        return 0.0, 0.0
    always = math.ceil(layout.always / PAGE_SIZE)
    of_buffers = [buffer_reads(size, layout.rows, rows / batches, gap) for size in layout.buffers]
    reads, pages = (sum(each) for each in zip((0.0, 0.0), *of_buffers, strict=True))
    reads += min(always, 1) if shape.sparse else always
    return batches * reads, batches * (always + pages) * PAGE_SIZE


# --- the steps of a request -----------------------------------------------------------------------


def search_steps(shape: Shape, rates: Rates, search: Search) -> Steps:
    """Return what the steps of a search take, by name.

    Arrow metadata is read while the images of a long result are compared.
    """
    found, read = rows_found(shape, search), rows_read(shape, search)
    of_a_query = found / search.queries
    near_duplicates = _near_duplicates_step(rates, search.queries, of_a_query)
    metadata = _metadata_step(shape, rates, read)
    if of_a_query > SIZES.small and not shape.sparse and shape.layout.buffers:
        hidden = min(metadata.cold - metadata.warm, near_duplicates.warm)
        metadata = replace(metadata, cold=metadata.cold - hidden)
    return {
        "opening": _opening_step(shape, rates),
        "search": _search_step(shape, rates, search),
        "metadata": metadata,
        "near-duplicates": near_duplicates,
        "tables": _computed(rates.written * read),
    }


def combine_steps(rates: Rates, rows: float) -> Steps:
    """Return an upper bound of the cost of combining a number of rows: all may be different images."""
    return {
        "near-duplicates": _near_duplicates_step(rates, 1, rows),
        "tables": _computed(rates.combined * rows),
    }


def rows_found(shape: Shape, search: Search) -> float:
    """Return the rows that a search returns at most: no more than the probed lists have."""
    return search.queries * min(search.k, rows_scanned(shape, search.nprobe))


def rows_read(shape: Shape, search: Search) -> float:
    """Return the rows whose metadata is read, which are written at most."""
    return min(rows_found(shape, search), search.queries * search.k * search.read)


def _computed(seconds: float) -> Step:
    return Step(cold=seconds, warm=seconds)


def _opening_step(shape: Shape, rates: Rates) -> Step:
    """Sparse staging has copied the centres before."""
    size = 0 if shape.sparse else shape.centres
    return Step(size, 0, rates.opening + size * rates.byte, rates.opening)


def _search_step(shape: Shape, rates: Rates, search: Search) -> Step:
    """Search, and check the recall; lists that are read ahead are read while others are searched."""
    nprobe, further = search.nprobe, recall_lists(shape, search.nprobe)
    sample = min(search.queries, RECALL_QUERIES)
    among = max(min(search.among, shape.lists), nprobe)
    lists = distinct_lists(among, nprobe, search.queries)
    scanning = _scanning(shape, rates, search, lists)
    computing = _searching(rates, search.queries, nprobe, scanning, rows_found(shape, search))
    if further:
        scanning = sample * rates.scanned * rows_scanned(shape, further)
        chosen = min(FURTHER * nprobe, shape.lists)
        computing += _searching(rates, sample, chosen, scanning, 0)
    window = 0 if shape.sparse or _are_long(shape, nprobe) else shape.window
    size = list_bytes(shape, lists, window)
    more = distinct_lists(among, further, sample) * (1 - lists / among)  # others were read by the search
    size += list_bytes(shape, more, window)
    size = min(size, shape.rows * shape.row_size)
    if not shape.sparse:
        reading = size * rates.byte
        cold = computing + reading if window else max(computing, reading)
        return Step(size, 0, cold, computing)
    reads = max(lists, size / PAGE_SIZE / MAX_READ)
    return Step(size, reads, computing + _fetching(rates, reads, size), computing)


def _searching(rates: Rates, queries: int, chosen: int, scanning: float, found: float) -> float:
    """Return the seconds to choose lists for each query, to scan them and to return rows."""
    choosing = queries * (rates.query + rates.list * chosen)
    return (choosing + scanning + rates.found * found) / min(rates.cores, queries)


def _scanning(shape: Shape, rates: Rates, search: Search, lists: float) -> float:
    """Return the core-seconds to scan different lists for all queries, see `shared_lists`."""
    pairs = search.queries * rows_scanned(shape, search.nprobe)
    rows = rows_scanned(shape, lists)
    if rates.compared and _are_long(shape, search.nprobe) and pairs >= WORTH_SHARING * rows:
        return rates.decoded * rows + rates.compared * pairs
    return rates.scanned * pairs


def _are_long(shape: Shape, nprobe: int) -> bool:
    """Return whether the lists of a query are read ahead, see `InvertedLists.are_long`."""
    return rows_scanned(shape, nprobe) * shape.row_size >= WORTH_READING_AHEAD


def _metadata_step(shape: Shape, rates: Rates, rows: float) -> Step:
    reads, size = metadata_reads(shape, rows)
    computing = rates.batch * touched(shape.batches, rows) + rates.taken * rows
    if shape.sparse:
        return Step(size, reads, computing + _fetching(rates, reads, size), computing)
    reading = reads * rates.page if shape.layout.buffers else size * rates.byte
    return Step(size, 0, computing + reading, computing)


def _near_duplicates_step(rates: Rates, results: int, rows: float) -> Step:
    """Near-duplicates are removed within each result."""
    law = rates.short if rows <= SIZES.small else rates.long
    cores = rates.cores if rows > SIZES.shared else rates.threads  # that compare the different images
    seconds = law.linear * rows / rates.threads + law.quadratic * rows**2 / cores
    return _computed(results * seconds)


def _fetching(rates: Rates, reads: float, size: float) -> float:
    return reads * rates.request + size * rates.fetched
