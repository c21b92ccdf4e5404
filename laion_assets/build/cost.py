"""Estimate a build: rows, bytes and core-hours. Rates are measured on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import faiss
import numpy as np
from tqdm import tqdm

from laion_assets.build.codebooks import WideCodebooks
from laion_assets.build.index_key import ID_BYTES, IndexKey, training_rows
from laion_assets.build.nearest import CANDIDATES, EXACT_CENTRES, GROUP_CENTRES, Centres, unit_or_zero

ROWS_MEASURED = 16_384
LISTS_MEASURED = 16_384  # at most; more are scaled by the centres that a row is compared with
TRAINING_ROUNDS = (
    3  # times that training, which has large batches, takes for its sample what encoding does
)
CODEBOOK_SECONDS = 36  # of a core, for rotation and codebooks, whatever the rows. Both fit training of
# 65,536, 163,840 and 327,680 rows of 768 dimensions with 1,024, 4,096 and 8,192 lists, to within a tenth.
METADATA_BYTES = 154  # a row of LAION-5B's: 900 GB for 5.85e9 rows


@dataclass(frozen=True)
class Rates:
    """Seconds of one core for a row of one kind of index.

    Attributes:
        assigning: to find its list.
        coding: to rotate it and choose its code.

    """

    assigning: float
    coding: float


@dataclass(frozen=True)
class Cost:
    """What a build takes.

    Attributes:
        index_key: faiss factory key.
        rows: of the index.
        shards: that can be encoded at the same time.
        sample: rows that training reads.
        training_memory: bytes of that sample.
        vectors: bytes of vectors that encoding reads.
        metadata: bytes of metadata, written as Arrow.
        lists: bytes of codes and ids. Encoding writes them, merging reads and writes them again.
        training: core-hours.
        encoding: core-hours.

    """

    index_key: str
    rows: int
    shards: int
    sample: int
    training_memory: int
    vectors: int
    metadata: int
    lists: int
    training: float
    encoding: float

    def lines(self, core_price: float | None = None) -> list[str]:
        """Describe it, a line for each step.

        Args:
            core_price: of a core for an hour, in any currency; None leaves out what it costs.

        """
        hours = self.training + self.encoding
        size = partial(tqdm.format_sizeof, suffix="B")
        facts = {
            "rows": f"{self.rows:,}",
            "index": self.index_key,
            "shards": f"{self.shards:,}, which may be encoded at the same time",
            "training": f"{self.sample:,} rows, {size(self.training_memory)} in memory, "
            f"{self.training:,.2f} core-hours",
            "encoding": f"reads {size(self.vectors)} of vectors and the metadata, writes "
            f"{size(self.lists)} of codes, {self.encoding:,.2f} core-hours",
            "merging": f"reads and writes {size(self.lists)}",
            "disk": f"index {size(self.lists)}, metadata {size(self.metadata)}; {size(self.disk)} with "
            "the codes that adding rows later needs",
        }
        if core_price is not None:
            facts["cost"] = f"{hours * core_price:,.2f} at {core_price:g} a core-hour, without storage"
        return [f"{name:10}{fact}" for name, fact in facts.items()]

    @property
    def disk(self) -> int:
        """Bytes at the end of a build on one disk: index, and codes that a later build needs again."""
        return self.metadata + 2 * self.lists


def cost_of(
    rows: int,
    dimension: int,
    index_key: str,
    rates: Rates,
    *,
    shard_rows: int,
    vector_bytes: int | None = None,
    metadata_bytes: int | None = None,
) -> Cost:
    """Return what a build takes; a pure function.

    Args:
        rows: of the index.
        dimension: of the vectors.
        index_key: faiss factory key.
        rates: as `measured`.
        shard_rows: rows of a shard.
        vector_bytes: of all vectors at the source; float16 by default.
        metadata_bytes: of all metadata; by default LAION-5B's for each row.

    """
    key = IndexKey.parse(index_key, dimension)
    sample = training_rows(index_key, rows)
    code = key.pq or 4 * dimension
    return Cost(
        index_key,
        rows,
        shards=-(-rows // shard_rows),
        sample=sample,
        training_memory=4 * sample * dimension,
        vectors=vector_bytes or 2 * rows * dimension,
        metadata=metadata_bytes or METADATA_BYTES * rows,
        lists=rows * (code + ID_BYTES),
        training=(TRAINING_ROUNDS * sample * rates.assigning + CODEBOOK_SECONDS * bool(key.pq)) / 3600,
        encoding=rows * (rates.assigning + rates.coding) / 3600,
    )


def measured(index_key: str, dimension: int) -> Rates:
    """Measure how fast this machine encodes rows, with centres and codebooks of random numbers.

    Args:
        index_key: faiss factory key.
        dimension: of the vectors.

    Raises:
        InputError: a key that cannot be built.

    """
    key = IndexKey.parse(index_key, dimension)
    random = np.random.default_rng(0)
    width = key.width or dimension
    rows = unit_or_zero(random.standard_normal((ROWS_MEASURED, dimension), np.float32))
    rotation = random.standard_normal((width, dimension), np.float32)
    lists = min(key.lists, LISTS_MEASURED)
    cores = int(faiss.omp_get_max_threads())

    def seconds(work: Callable[[], object]) -> float:
        work()
        started = time.perf_counter()
        work()
        return float(time.perf_counter() - started) * cores / len(rows)

    rotated = rows @ rotation.T if key.opq else rows
    assigning = coding = 0.0
    if lists > 1:
        centres = Centres(unit_or_zero(random.standard_normal((lists, width), np.float32)))
        assigning = seconds(lambda: centres.nearest(rotated)) * _compared(key.lists) / _compared(lists)
    if key.opq:
        coding += seconds(lambda: rows @ rotation.T)
    if key.pq:
        codebooks = WideCodebooks(random.standard_normal((key.pq, 256, width // key.pq), np.float32))
        coding += seconds(lambda: codebooks.codes(rotated))
    return Rates(assigning, coding)


def _compared(lists: int) -> int:
    """Return how many centres a row is compared with, see `Centres`."""
    return lists if lists <= EXACT_CENTRES else lists // GROUP_CENTRES + CANDIDATES
