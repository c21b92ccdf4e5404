"""Measure the rates of this machine on a staged index, for `cost`; they are kept in the cache directory.

The processor is measured by the functions of a request, on rows of the index; the second call counts,
and its time is that of the processor, which other processes hardly change. The disk is measured by reads
of the index's own files, after the kernel has dropped them from its page cache.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from laion_assets.index.faiss_index import MIN_NPROBE, Hits, Index
from laion_assets.index.layout import METADATA_FOLDER
from laion_assets.index.metadata import Metadata
from laion_assets.index.shared_lists import LARGEST, PAIRS_OF_A_JOB, WORTH_SHARING
from laion_assets.index.vectors import Coded, unit
from laion_assets.io.arrays import Bytes, Floats, Ids
from laion_assets.io.derived import keep
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import in_threads, one_thread, slices, thread_count
from laion_assets.io.ranges import read_ahead
from laion_assets.io.tables import fixed_size_binary
from laion_assets.search.combined import combine
from laion_assets.search.cost import Pairwise, Rates, Shape, lists_among, mean_probed_rows, touched
from laion_assets.search.links import SIZES
from laion_assets.search.near_duplicates import DEDUP_THRESHOLD, components_of_lists
from laion_assets.search.retrieval import Request, retrieve_table
from laion_assets.search.rounded import RoundedTwice, Tiles, where_may_exceed
from laion_assets.search.sketches import reach_of
from laion_assets.staging import OpenIndex
from laion_assets.staging.opening import sources_of
from laion_assets.staging.sparse.reads import MAX_READ, PAGE_SIZE
from laion_assets.staging.sparse.store import READ_THREADS
from laion_assets.staging.transfer.fetch import Fetcher, TransferStats

KEPT = ".rates.json"  # in the cache directory
VERSION = 8  # increment it if rates are measured in another way
QUERIES = 8
SCANNED = 1 << 20  # rows in the lists that they probe together
FOUND = 1 << 15  # rows found around each
SHORT = 1100, 2200  # rows of short results; of half the queries, more than are compared at once
LONG = FOUND // 4, FOUND  # rows of a long result; of fewer, threads wait longer for each other
WIDTH = SIZES.widths[1] + 1  # of usual sketches
STYLED = 64  # queries that show among how many lists those of all are spread
SHARING = 2 * WORTH_SHARING, 8 * WORTH_SHARING  # queries that share lists
SHARED_ROWS = 1 << 15  # of the lists
MANY_LISTS = 1024  # chosen for a query
SCATTERED, DENSE = 256, 1 << 14  # rows taken from many batches, and from few
PAGES = 1024  # read at random
USUAL_WINDOW = 128 << 10  # bytes; Linux's default
RUN, PIECE = 64 << 20, 1 << 20  # bytes read in a row, and at a time
REQUESTS = 4 * READ_THREADS  # pages requested from the source
LONG_REQUESTS = 8  # of `MAX_READ` pages


def shape_of(opened: OpenIndex, cache: Path) -> Shape:
    """Return the numbers of a staged index.

    Args:
        opened: the staged index.
        cache: its cache directory.

    """
    index, sizes = opened.index, opened.index.list_sizes()
    files = [file for file in opened.manifest.files if not file.name.startswith(f"{METADATA_FOLDER}/")]
    return Shape(
        index.rows,
        len(sizes),
        mean_probed_rows(sizes),
        index.row_size,
        opened.metadata.batches,
        opened.metadata.layout(),
        max(sum(file.size for file in files) - index.rows * index.row_size, 0),
        _window(cache / files[0].path),
        not opened.whole,
    )


def spread_of(index: Index, queries: Floats, nprobe: int) -> float:
    """Return among how many lists those of queries are spread; seeds of one style share most of theirs.

    Args:
        index: the index.
        queries: (q, dimension) float32, of which some are looked at.
        nprobe: lists that each probes.

    """
    some = queries[:: max(len(queries) // STYLED, 1)][:STYLED]
    lists = index.nearest_lists(some, nprobe)
    return lists_among(len(index.list_sizes()), nprobe, len(some), len(np.unique(lists[lists >= 0])))


def _window(path: Path) -> int:
    """Return how many bytes the kernel reads around a page fault in a file: a setting of its disk."""
    device = path.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        return int(setting.read_text()) << 10
    except (OSError, ValueError):  # no such disk, as in some containers
        return USUAL_WINDOW


# --- kept rates -----------------------------------------------------------------------------------


def kept_rates(cache: Path, fingerprint: str) -> Rates | None:
    """Return the rates that were measured on an index by as many cores; None if there are none.

    Args:
        cache: the cache directory.
        fingerprint: of the staged index.

    """
    try:
        kept = json.loads((cache / KEPT).read_text())
        if kept["measured"] != _measured(fingerprint):
            return None
        short, long = (Pairwise(**kept["rates"].pop(name)) for name in ("short", "long"))
        return Rates(short=short, long=long, **kept["rates"])
    except (OSError, ValueError, KeyError, TypeError):  # missing, damaged or of another release
        return None


def keep_rates(cache: Path, fingerprint: str, rates: Rates) -> None:
    """Keep rates for `kept_rates`; a cache that is read-only or full does without."""
    content = json.dumps({"measured": _measured(fingerprint), "rates": asdict(rates)}, indent=1)
    keep(cache / KEPT, content.encode())


def _measured(fingerprint: str) -> dict[str, Any]:
    return {"version": VERSION, "index": fingerprint, "cores": thread_count()}


def bytes_read() -> int | None:
    """Return the bytes that this process has read from disks; None if the kernel does not report them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


# --- measuring ------------------------------------------------------------------------------------


def measured_rates(open_index: Callable[[], AbstractContextManager[OpenIndex]], cache: Path) -> Rates:
    """Measure the rates of this machine, in 5 to 10 seconds.

    Staged sparse, this fetches lists with about a million rows, and reads the source a few hundred times.

    Args:
        open_index: opens the staged index.
        cache: its cache directory.

    Raises:
        InputError: the index is empty, or its source cannot be read.

    """
    # First, because the first calls of a process take longer.
    opening = _opening_seconds(open_index, cache)
    with open_index() as opened:
        page, byte = _disk_rates(opened, cache) if opened.whole else (0.0, 0.0)
        request, fetched = (0.0, 0.0) if opened.whole else _source_rates(opened)
        query, a_list = _choosing_rates(opened.index)
        scanned, found, hits = _search_rates(opened.index)
        decoded, compared = _shared_rates(opened.index)
        short, long, threads = _near_duplicate_laws(opened.index, hits)
        batch, taken = _take_rates(opened.metadata)
        written, combined = _table_rates(opened.metadata, hits.codes)
    return Rates(
        cores=thread_count(),
        threads=threads,
        opening=opening,
        query=query,
        list=a_list,
        scanned=scanned,
        found=found,
        short=short,
        long=long,
        batch=batch,
        taken=taken,
        written=written,
        combined=combined,
        page=page,
        byte=byte,
        request=request,
        fetched=fetched,
        decoded=decoded,
        compared=compared,
    )


def _seconds(work: Callable[[], object]) -> float:
    """Return the seconds of a core that the second call takes."""
    work()
    started = time.process_time()
    work()
    return time.process_time() - started


def _opening_seconds(open_index: Callable[[], AbstractContextManager[OpenIndex]], cache: Path) -> float:
    """Open the index, and search for one image."""
    started = time.process_time()
    with open_index() as opened:
        if not opened.index.rows or not len(opened.metadata):
            raise InputError(f"the index in {cache} is empty", "staged_index")
        query = np.ones((1, opened.index.dimension), np.float32)
        request = Request(1, DEDUP_THRESHOLD, 1)
        retrieve_table(opened.index, opened.metadata, unit(query), request, per_seed=False)
    return time.process_time() - started


def _choosing_rates(index: Index) -> tuple[float, float]:
    """Choose few lists, then many; return the seconds of a query, and those of each list."""
    queries, lists = _rows_as_queries(index), len(index.list_sizes())
    few, many = (min(count, lists) for count in (MIN_NPROBE, MANY_LISTS))
    of_few, of_many = (_seconds(partial(index.nearest_lists, queries, n)) for n in (few, many))
    a_list = max(of_many - of_few, 0) / max(many - few, 1)
    return max(of_few - a_list * few, 0) / len(queries), a_list / len(queries)


def _search_rates(index: Index) -> tuple[float, float, Hits]:
    """Search for one row, then for many.

    Returns:
        The seconds of a row scanned, those of a row found, and what was found.

    """
    queries, sizes = _rows_as_queries(index), index.list_sizes()
    nprobe = _probed_lists(sizes)
    lists, hits = index.nearest_lists(queries, nprobe), index.search(queries, FOUND, nprobe)
    choosing = _seconds(lambda: index.nearest_lists(queries, nprobe))
    one, many = (_seconds(partial(index.search, queries, k, nprobe)) for k in (1, FOUND))
    scanned, found = sizes[lists[lists >= 0]].sum(), (hits.ids >= 0).sum()
    return max(one - choosing, 0) / max(scanned, 1), max(many - one, 0) / max(found, 1), hits


def _shared_rates(index: Index) -> tuple[float, float]:
    """Compare codes with some queries, then with more, as `shared_lists` does.

    Returns:
        The seconds of a code, and those of a pair; 0 if the index has other codes.

    """
    codebook, random = index.codebook, np.random.default_rng(0)
    if codebook is None:
        return 0.0, 0.0
    codes = random.integers(0, 256, (SHARED_ROWS, codebook.parts), np.uint8)

    def seconds(number: int) -> float:
        queries = random.standard_normal((number, len(codebook.steps)), np.float32)
        rounded, every = codebook.rounded(queries), np.arange(number)
        limits = np.full(number, LARGEST, np.int32)

        def compare(rows: slice) -> None:
            rounded.reaching(every, limits, codebook, codes[rows])

        jobs = slices(len(codes), PAIRS_OF_A_JOB // number)
        return _seconds(lambda: in_threads(compare, jobs)) / len(codes)

    few, many = seconds(SHARING[0]), seconds(SHARING[1])
    compared = max(many - few, 0) / (SHARING[1] - SHARING[0])
    return max(few - SHARING[0] * compared, 0), compared


def _probed_lists(sizes: Ids) -> int:
    of_a_query = SCANNED / QUERIES / max(mean_probed_rows(sizes), 1)
    return int(np.clip(of_a_query, 1, len(sizes)))


def _rows_as_queries(index: Index) -> Floats:
    """Return rows near random directions."""
    random = np.random.default_rng(0).standard_normal((QUERIES, index.dimension), np.float32)
    hits = index.search(unit(random), 1, _probed_lists(index.list_sizes()))
    return unit(index.decoder().decode(hits.codes[hits.code[hits.code >= 0]]))


def _near_duplicate_laws(index: Index, hits: Hits) -> tuple[Pairwise, Pairwise, float]:
    """Find the near-duplicates in the short results of some queries, and in a long one of one query.

    Returns:
        The laws of both, and how many cores threads keep busy.

    """

    def seconds(code: Ids) -> float:
        """Of the results whose rows have these codes, (results, rows), in one thread."""
        with one_thread():
            return _seconds(lambda: compare(code))

    def compare(code: Ids) -> Ids:
        result, place = np.nonzero(code >= 0)
        distinct, members = np.unique(code[result, place], return_inverse=True)
        vectors = Coded(hits.codes[distinct], decoder)
        return components_of_lists(vectors, members, result, DEDUP_THRESHOLD)

    def of_a_short_result(rows: int) -> tuple[float, float]:
        """Return rows and seconds of each further result: what all results share is done once."""
        code, half = hits.code[:, :rows], len(hits.code) // 2
        further = max(seconds(code) - seconds(code[:half]), 0)
        return (code[half:] >= 0).sum() / (len(code) - half), further / (len(code) - half)

    def of_a_long_result(rows: int) -> tuple[float, float]:
        code = hits.code[longest : longest + 1, :rows]
        return float((code >= 0).sum()), seconds(code)

    decoder = index.decoder()
    longest = int(np.argmax((hits.code >= 0).sum(axis=1)))
    few, many = (of_a_short_result(rows) for rows in SHORT)
    short = Pairwise.through(*few, *many)
    few, many = (of_a_long_result(rows) for rows in LONG)
    together = math.inf
    for _ in range(2):  # what else the machine does makes either longer
        started = time.perf_counter()
        labels = compare(hits.code[longest : longest + 1])
        together = min(together, time.perf_counter() - started)
    kept = len(np.unique(labels)) / max(many[0], 1)
    long = Pairwise.through(*few, *many, least=kept**2 * _seconds_of_a_pair())
    return short, long, float(np.clip(many[1] / together, 1, thread_count()))


def _seconds_of_a_pair() -> float:
    """Compare the sketches of rows, as the quadratic part of `near_duplicates` does at the least.

    The different images are compared with those that follow, as caps with all their rows, or as rows.
    """
    random, number = np.random.default_rng(0), SIZES.tile * SIZES.tiles
    block, after = (
        RoundedTwice.of(unit(random.standard_normal((rows, WIDTH), np.float32)), reach_of(WIDTH))
        for rows in (SIZES.block, number)
    )
    some, tiles = block.coarse(), Tiles.of(after, SIZES.tile)
    return _seconds(lambda: where_may_exceed(some, tiles, DEDUP_THRESHOLD)) / (SIZES.block * number)


def _take_rates(metadata: Metadata) -> tuple[float, float]:
    """Take rows from few batches, then from many; return the seconds of a batch, and of a row."""
    dense, scattered = _run_of_ids(metadata), _scattered_ids(metadata)
    taken = _seconds(lambda: metadata.take(dense)) / len(dense)
    batches = touched(metadata.batches, len(scattered))
    batch = (_seconds(lambda: metadata.take(scattered)) - taken * len(scattered)) / batches
    return max(batch, 0), taken


def _scattered_ids(metadata: Metadata) -> Ids:
    return np.random.default_rng(0).integers(len(metadata), size=SCATTERED)


def _run_of_ids(metadata: Metadata) -> Ids:
    return np.arange(min(DENSE, len(metadata)))


def _table_rates(metadata: Metadata, codes: Bytes) -> tuple[float, float]:
    """Write found rows, then combine them at a threshold of 1; return the seconds of a row for both."""
    table = _found_table(metadata, codes)
    sets = InMemory(table), InMemory(table.drop_columns("seed"))

    def write() -> None:
        pq.write_table(table, io.BytesIO(), compression="zstd")

    def combined() -> None:
        for _ in combine(*sets, 1.0).batches:
            pass

    written = _seconds(write) / len(table)
    return written, _seconds(combined) / (2 * len(table)) + written


def _found_table(metadata: Metadata, codes: Bytes) -> pa.Table:
    ids = _run_of_ids(metadata)
    rows = np.arange(len(ids))
    found = {
        "id": ids,
        "rank": rows.astype(np.int32),
        "seed": np.zeros(len(rows), np.int32),
        "similarity": np.zeros(len(rows), np.float32),
        "code": fixed_size_binary(codes[rows % len(codes)]),
    }
    table = metadata.take(ids)
    for name, column in found.items():
        table = table.append_column(name, pa.array(column))
    return table


@dataclass(frozen=True)
class InMemory:
    """A table for `combine`."""

    table: pa.Table

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        return self.table.schema

    def attachment(self, name: str) -> bytes:
        """Raise: a table in memory has none."""
        raise KeyError(name)

    def batches(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Read the rows in order."""
        return iter(self.table.select(list(columns or self.schema.names)).to_batches())


# --- reading --------------------------------------------------------------------------------------


def _disk_rates(opened: OpenIndex, cache: Path) -> tuple[float, float]:
    """Read the largest file, parts of which the kernel was advised to drop from its page cache.

    Returns:
        The seconds of a page at a random place, and of a byte of a run.

    """
    file = max(opened.manifest.files, key=lambda file: file.size)
    path, size = cache / file.path, file.size
    random = np.random.default_rng(0)
    pages = random.integers(max(size // PAGE_SIZE, 1), size=PAGES) * PAGE_SIZE
    run = min(size, RUN)
    start = int(random.integers(size - run + 1))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        of_pages = _page_seconds(descriptor, pages)
        return of_pages / len(pages), _run_seconds(descriptor, path, start, run) / run
    finally:
        os.close(descriptor)


def _page_seconds(descriptor: int, pages: Ids) -> float:
    """Read pages at random as `Metadata.take` does: all are requested before the first is read."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    for page in pages.tolist():
        os.posix_fadvise(descriptor, page, PAGE_SIZE, os.POSIX_FADV_DONTNEED)
    started = time.monotonic()
    for page in pages.tolist():
        os.posix_fadvise(descriptor, page, PAGE_SIZE, os.POSIX_FADV_WILLNEED)
    for page in pages.tolist():
        os.pread(descriptor, PAGE_SIZE, page)
    return time.monotonic() - started


def _run_seconds(descriptor: int, path: Path, start: int, size: int) -> float:
    """Read a run as a search does: the kernel is advised to read ahead."""
    os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)
    started = time.monotonic()
    read_ahead(path, np.array([[start, start + size]]))
    for at in range(start, start + size, PIECE):
        os.pread(descriptor, min(PIECE, start + size - at), at)
    return time.monotonic() - started


def _source_rates(opened: OpenIndex) -> tuple[float, float]:
    """Read from the source of a sparse index, and keep nothing.

    Returns:
        The seconds of a request for a page, and of a byte of a long range.

    """
    reader, files = sources_of([file for file in opened.manifest.files if file.sparse])
    file = max(files, key=lambda file: file.size)
    random = np.random.default_rng(0)

    def seconds(size: int, requests: int) -> float:
        size = min(size, file.size)
        starts = random.integers(file.size - size + 1, size=requests).tolist()
        fetcher = Fetcher(reader, min(requests, READ_THREADS), lambda _: None, TransferStats())

        def read(start: int) -> None:
            for _ in fetcher.read(file, start, start + size):
                pass

        started = time.monotonic()
        fetcher.run(iter(starts), read)
        return (time.monotonic() - started) / requests

    long = MAX_READ * PAGE_SIZE
    return seconds(PAGE_SIZE, REQUESTS), seconds(long, LONG_REQUESTS) / min(long, file.size)
