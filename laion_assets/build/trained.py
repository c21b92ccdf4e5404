"""The trained index, which every shard is encoded with, and the queries that measure its recall."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np

from laion_assets.build.answers import Answers
from laion_assets.build.index_key import ROWS_PER_LIST
from laion_assets.build.quantizer import IndexKey, train, training_rows
from laion_assets.build.workspace import Workspace
from laion_assets.index import nprobe_rule
from laion_assets.io.arrays import Bytes, Floats, Ids, unit_rows
from laion_assets.io.checksums import checksum_text, crc32c
from laion_assets.io.errors import InputError

QUERIES = 200
ANSWERS = 1000  # rows that are compared for each query
KEPT = ANSWERS + 1  # a query finds itself too
SCALED_AT_ONCE = 16_384  # rows
COLUMNS_AT_ONCE = 32  # that are moved at a time
NPROBES = (1, 4, 16, 64, 256, 1024)
INDEX, QUERY_VECTORS, QUERY_IDS, RECORD = "trained.index", "queries.npy", "query_ids.npy", "trained.json"


@dataclass(frozen=True)
class Record:
    """What is known of a trained index.

    Attributes:
        index_key: faiss factory key.
        dimension: of the vectors.
        rows: that were planned when it was trained.
        sample: rows that it was trained on.
        nprobes: numbers of probed lists at which recall is measured; none without lists.
        seconds: that training took, reading included.
        checksum: crc32c of the file.

    """

    index_key: str
    dimension: int
    rows: int
    sample: int
    nprobes: tuple[int, ...]
    seconds: float
    checksum: str


@dataclass(frozen=True)
class Trained:
    """An empty index and what goes with it.

    Attributes:
        index: faiss index without rows.
        queries: (q, d) unit vectors of rows that it was not trained on.
        query_ids: (q,) their ids.
        record: what is known of it.

    """

    index: Any
    queries: Floats
    query_ids: Ids
    record: Record

    @property
    def ivf(self) -> Any | None:
        """Its inverted file; None where it has none (Flat, HNSW)."""
        found = faiss.try_extract_index_ivf(self.index)
        return None if found is None else faiss.downcast_index(found)

    @property
    def lists(self) -> int:
        """Inverted lists; 1 where it has none."""
        return 1 if self.ivf is None else int(self.ivf.nlist)

    @property
    def code_size(self) -> int:
        """Bytes of a code; of a float32 vector where there are no lists."""
        return 4 * self.record.dimension if self.ivf is None else int(self.ivf.code_size)

    def search(self, codes: Bytes, ids: Ids, sizes: Ids, nprobe: int) -> Answers:
        """Search rows that were encoded with this index.

        Args:
            codes: (n, code size) in the order of the lists.
            ids: (n,) likewise.
            sizes: (lists,) rows of each list.
            nprobe: lists to probe.

        """
        index = faiss.clone_index(self.index)
        ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
        queries = _transformed(index, self.queries)
        quantizer = faiss.downcast_index(ivf.quantizer)
        if isinstance(quantizer, faiss.IndexHNSW):
            quantizer.hnsw.efSearch = 2 * nprobe
        nearness, probed = quantizer.search(queries, nprobe)
        stored = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
        stops = np.cumsum(sizes)
        for number in np.unique(probed[probed >= 0]).tolist():
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
        ivf.nprobe = nprobe
        scores, found = ivf.search_preassigned(queries, KEPT, probed, nearness)
        return Answers(found, scores).best(KEPT)


def _transformed(index: Any, rows: Floats) -> Floats:
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            rows = faiss.downcast_VectorTransform(index.chain.at(number)).apply(rows)
    return rows


def train_index(
    workspace: Workspace,
    index_key: str,
    dimension: int,
    rows: int,
    sample: Callable[[int], tuple[Floats, Ids]],
    log: Callable[[str], object],
    rows_per_centre: int = ROWS_PER_LIST,
) -> Trained:
    """Train an index and store it, unless the workspace has one of the same key and dimension.

    Args:
        workspace: of the build.
        index_key: faiss factory key.
        dimension: of the vectors.
        rows: that the index will have.
        sample: returns about so many of the rows, and their ids; the rows are changed.
        log: is told what is done.
        rows_per_centre: rows needed for each list and each entry of a codebook.

    Raises:
        InputError: a key that is not supported, or too few usable rows for it.

    """
    if (found := read_trained(workspace)) and (found.record.index_key, found.record.dimension) == (
        index_key,
        dimension,
    ):
        return found
    started = time.perf_counter()
    IndexKey.parse(index_key, dimension).check_rows(rows, rows_per_centre)  # reading may take long
    wanted = training_rows(index_key, rows)
    sampled, ids = sample(wanted + QUERIES)
    vectors, order = _shuffled_unit_rows(sampled)
    if not len(vectors):
        raise InputError(
            f"none of the {len(sampled):,} rows read for training has a vector that is finite and not "
            "zero: check the embeddings",
            "embeddings_uri",
        )
    # Queries come from everywhere too. A small pool is used whole for training.
    queries, query_ids = vectors[:QUERIES].copy(), ids[order[:QUERIES]]
    rest = vectors[len(queries) :]
    training = rest if len(rest) >= len(vectors) // 2 else vectors
    log(f"training {index_key} on {len(training):,} rows")
    index = train(index_key, dimension, training, rows_per_centre=rows_per_centre, log=log)
    content = faiss.serialize_index(index)
    lists = faiss.try_extract_index_ivf(index)
    record = Record(
        index_key,
        dimension,
        rows,
        len(training),
        () if lists is None else _nprobes(rows, int(lists.nlist)),
        round(time.perf_counter() - started, 1),
        checksum_text(crc32c(content.tobytes())),
    )
    with workspace.new(INDEX) as sink:
        sink.write(content.tobytes())
    workspace.write_array(QUERY_VECTORS, queries)
    workspace.write_array(QUERY_IDS, query_ids)
    workspace.write_json(RECORD, asdict(record))
    return Trained(index, queries, query_ids, record)


def _shuffled_unit_rows(rows: Floats) -> tuple[Floats, Ids]:
    """Scale rows to length 1 and shuffle the usable ones, in place: a sample can be 20 GB.

    Args:
        rows: (n, d) as stored.

    Returns:
        The first (m, d) of the rows, now the usable ones in random order, and where each was before.

    """
    usable = np.empty(len(rows), bool)
    for start in range(0, len(rows), SCALED_AT_ONCE):
        these = slice(start, start + SCALED_AT_ONCE)
        rows[these], usable[these] = unit_rows(rows[these])
    order = np.random.default_rng(0).permutation(np.flatnonzero(usable))
    for start in range(0, rows.shape[1], COLUMNS_AT_ONCE):
        columns = slice(start, start + COLUMNS_AT_ONCE)
        rows[: len(order), columns] = rows[order, columns]
    return rows[: len(order)], order


def read_trained(workspace: Workspace) -> Trained | None:
    """Read the trained index of a workspace; None where there is none.

    Raises:
        InputError: it is damaged.

    """
    record = read_trained_record(workspace)
    if record is None:
        return None
    content = workspace.read(INDEX)
    if checksum_text(crc32c(content)) != record.checksum:
        raise workspace.damaged(INDEX, "is not what was written")
    index = faiss.deserialize_index(np.frombuffer(content, np.uint8))
    return Trained(index, workspace.read_array(QUERY_VECTORS), workspace.read_array(QUERY_IDS), record)


def read_trained_record(workspace: Workspace) -> Record | None:
    """Read what is known of the trained index of a workspace, and nothing of the index itself."""
    stored = workspace.read_json(RECORD)
    return None if stored is None else Record(**{**stored, "nprobes": tuple(stored["nprobes"])})


def _nprobes(rows: int, lists: int) -> tuple[int, ...]:
    """Return the numbers of lists at which recall is measured: some, and those that a search chooses."""
    return tuple(sorted({min(n, lists) for n in (*NPROBES, nprobe_rule(ANSWERS, lists, rows))}))
