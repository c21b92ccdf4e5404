"""The trained index that encodes every shard, and the queries that measure its recall."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np

from laion_assets.build.answers import Answers
from laion_assets.build.index_key import ROWS_PER_LIST, IndexKey, check_key, training_rows
from laion_assets.build.training import train
from laion_assets.build.workspace import Workspace
from laion_assets.index import nearest_centres, nprobe_rule, transformed
from laion_assets.io.arrays import Bytes, Floats, Ids, unit_rows
from laion_assets.io.errors import InputError
from laion_assets.io.text import count

QUERIES = 200
SCALED_AT_ONCE = 16_384  # rows
COLUMNS_AT_ONCE = 32  # columns moved at a time
ANSWERS = 1000  # rows compared per query
KEPT = ANSWERS + 1  # a query also finds itself
NPROBES = (1, 4, 16, 64, 256, 1024)
FOLDER = "trained"
INDEX, QUERY_VECTORS, QUERY_IDS, RECORD = "trained.index", "queries.npy", "query_ids.npy", "trained.json"


@dataclass(frozen=True)
class Record:
    """The record of a trained index.

    Attributes:
        index_key: faiss factory key.
        vectors: which vectors of the input it was trained on, see `Embeddings.key`.
        dimension: dimension of the vectors.
        rows: number of rows planned at the time of training.
        sample: number of rows that it was trained on.
        nprobes: values of nprobe at which recall is measured; empty without lists.
        seconds: duration of training, including reading.
        checksums: crc32c of the files, by name.
        bytes_per_row: the request's limit for which the key was chosen.

    """

    index_key: str
    vectors: str
    dimension: int
    rows: int
    sample: int
    nprobes: Sequence[int]
    seconds: float
    checksums: dict[str, str]
    bytes_per_row: int | None = None

    @property
    def checksum(self) -> str:
        """The crc32c of the index."""
        return self.checksums[INDEX]


@dataclass(frozen=True)
class Trained:
    """A trained, empty index with its queries and record.

    Attributes:
        index: faiss index without rows.
        queries: (q, d) float32 unit vectors of rows; part of the training sample only if there are few
            rows.
        query_ids: (q,) ids of the queries.
        record: the stored record.

    """

    index: Any
    queries: Floats
    query_ids: Ids
    record: Record

    @property
    def ivf(self) -> Any | None:
        """The inverted file of the index; None if it has none (Flat, HNSW)."""
        found = faiss.try_extract_index_ivf(self.index)
        return None if found is None else faiss.downcast_index(found)

    @property
    def lists(self) -> int:
        """The number of inverted lists; 1 for an index without lists."""
        return 1 if self.ivf is None else int(self.ivf.nlist)

    @property
    def code_size(self) -> int:
        """The size of a code in bytes; that of a float32 vector for an index without lists."""
        return 4 * self.record.dimension if self.ivf is None else int(self.ivf.code_size)

    def search(self, codes: Bytes, ids: Ids, sizes: Ids) -> Mapping[int, Answers]:
        """Search rows that were encoded with this index, at each nprobe of the record.

        Args:
            codes: (n, code size) codes, sorted by list.
            ids: (n,) ids, in the same order.
            sizes: (lists,) number of rows in each list.

        Returns:
            The best `KEPT` rows in the probed lists for each query, by nprobe.

        """
        if not self.record.nprobes:
            return {}
        index = faiss.clone_index(self.index)
        ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
        queries = transformed(index, self.queries)
        probed = {}
        for nprobe in self.record.nprobes:
            probed[nprobe] = nearest_centres(ivf, queries, nprobe)
        needed = np.unique(np.concatenate([lists.ravel() for _, lists in probed.values()]))
        stored = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
        stops = np.cumsum(sizes)
        for number in needed[needed >= 0].tolist():
            rows = slice(stops[number] - sizes[number], stops[number])
            if sizes[number]:
                stored.add_entries(
                    number,
                    int(sizes[number]),
                    faiss.swig_ptr(np.ascontiguousarray(ids[rows])),
                    faiss.swig_ptr(np.ascontiguousarray(codes[rows])),
                )
        ivf.replace_invlists(stored, False)
        index.ntotal = ivf.ntotal = len(ids)
        answers = {}
        for nprobe, (nearness, lists) in probed.items():
            ivf.nprobe = nprobe
            scores, found = ivf.search_preassigned(queries, KEPT, lists, nearness)
            answers[nprobe] = Answers(found, scores).best(KEPT)
        return answers


def train_index(
    workspace: Workspace,
    key_for: Callable[[int], str],
    vectors_key: str,
    dimension: int,
    rows: int,
    sample: Callable[[int], tuple[Floats, Ids]],
    log: Callable[[str], object],
    rows_per_centre: int = ROWS_PER_LIST,
    bytes_per_row: int | None = None,
) -> Trained:
    """Train an index and store it.

    Args:
        workspace: workspace of the build.
        key_for: returns the faiss factory key for a number of usable rows.
        vectors_key: which vectors of the input these are, see `Record`.
        dimension: dimension of the vectors.
        rows: number of rows that the index will have.
        sample: returns about the given number of rows, and their ids; the rows are modified in place.
        log: called with each log line.
        rows_per_centre: rows needed per list and per codebook entry.
        bytes_per_row: the limit for which the key was chosen, see `Record`.

    Raises:
        InputError: the key is not supported or needs more usable rows.

    """
    started = time.perf_counter()
    expected = key_for(rows)
    check_key(expected, dimension, rows, rows_per_centre)  # before reading, which may take long
    sampled, ids = sample(training_rows(expected, rows) + QUERIES)
    vectors, order = _shuffled_unit_rows(sampled)
    if not len(vectors):
        raise InputError(
            f"no row of the {count(len(sampled), 'row')} read for training has a finite, non-zero "
            "vector: check the embeddings",
            "embeddings_uri",
        )
    index_key = key_for(int(rows * len(vectors) / len(sampled)))
    needed = IndexKey.parse(index_key, dimension).fewest_rows(rows_per_centre)
    queries, query_ids = vectors[:QUERIES].copy(), ids[order[:QUERIES]]
    training = vectors[QUERIES:]
    if len(training) < max(len(vectors) // 2, needed, 1):
        training = vectors  # with few rows, all are needed
    log(f"training {index_key} on {count(len(training), 'row')}")
    index = train(index_key, dimension, training, rows_per_centre=rows_per_centre, log=log)
    lists = faiss.try_extract_index_ivf(index)
    folder = workspace / FOLDER
    folder.discard(RECORD)  # if this is killed, the record must not describe files of two indices
    with folder.new(INDEX) as sink:
        sink.write(faiss.serialize_index(index))
    checksums = {
        INDEX: sink.checksum,
        QUERY_VECTORS: folder.write_array(QUERY_VECTORS, queries),
        QUERY_IDS: folder.write_array(QUERY_IDS, query_ids),
    }
    record = Record(
        index_key,
        vectors_key,
        dimension,
        rows,
        len(training),
        () if lists is None else _nprobes(rows, int(lists.nlist)),
        round(time.perf_counter() - started, 1),
        checksums,
        bytes_per_row,
    )
    folder.write_json(RECORD, asdict(record))
    return Trained(index, queries, query_ids, record)


def _shuffled_unit_rows(rows: Floats) -> tuple[Floats, Ids]:
    """Scale rows to length 1 and shuffle the usable ones, in place because a sample can be 20 GB.

    Args:
        rows: (n, d) rows as stored.

    Returns:
        The first (m, d) of the rows, which are the usable ones in random order, and the original number
        of each.

    """
    usable = np.empty(len(rows), bool)
    for start in range(0, len(rows), SCALED_AT_ONCE):  # in float64
        these = slice(start, start + SCALED_AT_ONCE)
        rows[these], usable[these] = unit_rows(rows[these])
    order = np.random.default_rng(0).permutation(np.flatnonzero(usable))
    for start in range(0, rows.shape[1], COLUMNS_AT_ONCE):
        columns = slice(start, start + COLUMNS_AT_ONCE)
        rows[: len(order), columns] = rows[order, columns]
    return rows[: len(order)], order


def read_trained(workspace: Workspace) -> Trained | None:
    """Read the trained index of a workspace; None if there is none.

    Raises:
        InputError: it is damaged.

    """
    record = read_record(workspace)
    if record is None:
        return None
    folder = workspace / FOLDER
    content = folder.read(INDEX, checksum=record.checksum)
    vectors, ids = (folder.read_array(n, record.checksums[n]) for n in (QUERY_VECTORS, QUERY_IDS))
    return Trained(faiss.deserialize_index(np.frombuffer(content, np.uint8)), vectors, ids, record)


def read_record(workspace: Workspace) -> Record | None:
    """Read the record of the trained index of a workspace; None if there is none.

    Raises:
        InputError: it is damaged.

    """
    return (workspace / FOLDER).read_record(RECORD, Record)


def _nprobes(rows: int, lists: int) -> tuple[int, ...]:
    """Return the values of nprobe at which recall is measured: fixed ones and those a search chooses."""
    return tuple(sorted({min(n, lists) for n in (*NPROBES, nprobe_rule(ANSWERS, lists, rows))}))
