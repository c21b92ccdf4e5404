"""Estimate the rows, bytes and core-hours of a build, from rates measured on the current machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm import tqdm

from laion_assets.build.codebooks import WideCodebooks
from laion_assets.build.index_key import IndexKey, training_rows
from laion_assets.build.nearest import CANDIDATES, EXACT_CENTRES, GROUP_CENTRES, Centres, unit_or_zero
from laion_assets.index import ID_SIZE
from laion_assets.io.parallel import thread_count

ROWS_MEASURED = 16_384
# At most; rates for more lists are scaled by the number of centres that a row is compared with.
LISTS_MEASURED = 16_384
# The next two fit training of 65,536, 163,840 and 327,680 rows of 768 dimensions with 1,024, 4,096 and
# 8,192 lists to within a tenth.
TRAINING_ROUNDS = 3  # time to train on a row, in units of the time to find its list when encoding
CODEBOOK_SECONDS = 36  # of a core, for rotation and codebooks, whatever the number of rows
METADATA_BYTES = 154  # per row of LAION-5B: 900 GB for 5.85e9 rows


@dataclass(frozen=True)
class Rates:
    """Core-seconds per row for one type of index.

    Attributes:
        assigning: time to find the row's list.
        coding: time to rotate the row and choose its code.

    """

    assigning: float
    coding: float


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a build, or of what is left of it.

    Attributes:
        index_key: faiss factory key.
        rows: number of rows in the index.
        encoded_rows: number of these that are encoded already.
        shards: number of shards to encode; this can be done in parallel.
        is_trained: whether the index is trained already.
        sample: number of rows that training reads.
        training_memory: size of that sample in bytes.
        vectors: bytes of vectors that encoding reads.
        metadata: bytes of metadata, written as Arrow.
        lists: bytes of codes and ids of the whole index, which merging reads and writes.
        codes: the bytes of these that encoding writes.
        training: core-hours of training.
        encoding: core-hours of encoding.

    """

    index_key: str
    rows: int
    encoded_rows: int
    shards: int
    is_trained: bool
    sample: int
    training_memory: int
    vectors: int
    metadata: int
    lists: int
    codes: int
    training: float
    encoding: float

    def lines(self, core_price: float | None = None) -> list[str]:
        """Describe the cost, with one line per step.

        Args:
            core_price: price of a core-hour in any currency; None leaves out the price of the build.

        """
        hours = self.training + self.encoding
        size = partial(tqdm.format_sizeof, suffix="B")
        before = f", {self.encoded_rows:,} of them encoded already" if self.encoded_rows else ""
        parallel = ", which can be encoded in parallel" if self.shards > 1 else ""
        facts = {
            "rows": f"{self.rows:,}{before}",
            "index": self.index_key,
            "shards": f"{self.shards:,}{' left' if before else ''}{parallel}",
            "training": "done already"
            if self.is_trained
            else f"{self.sample:,} rows, {size(self.training_memory)} in memory, "
            f"{self.training:,.2f} core-hours",
            "encoding": f"reads {size(self.vectors)} of vectors and the metadata, writes "
            f"{size(self.codes)} of codes, {self.encoding:,.2f} core-hours"
            if self.shards
            else "done already",
            "merging": f"reads and writes {size(self.lists)}",
            "disk": f"index {size(self.lists)}, metadata {size(self.metadata)}; {size(self.disk)} with "
            "the codes needed to add rows later",
        }
        if core_price is not None:
            facts["cost"] = f"{hours * core_price:,.2f} at {core_price:g} a core-hour, without storage"
        return [f"{name:10}{fact}" for name, fact in facts.items()]

    @property
    def disk(self) -> int:
        """Disk space after a build, in bytes: the index and the codes that later builds reuse."""
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
    encoded_rows: int = 0,
    shards: int | None = None,
    is_trained: bool = False,
) -> Cost:
    """Compute the cost of a build, or of what is left of it; a pure function.

    Args:
        rows: number of rows in the index.
        dimension: dimension of the vectors.
        index_key: faiss factory key.
        rates: rates returned by `measured`.
        shard_rows: number of rows per shard.
        vector_bytes: size of the vectors to encode at the source; that of float16 by default.
        metadata_bytes: size of all metadata; by default LAION-5B's size per row.
        encoded_rows: number of rows that are encoded already.
        shards: number of shards to encode; by default it follows from the rows.
        is_trained: whether the index is trained already.

    """
    key = IndexKey.parse(index_key, dimension)
    sample = 0 if is_trained else training_rows(index_key, rows)
    left = rows - encoded_rows
    code = key.pq or 4 * dimension
    return Cost(
        index_key,
        rows,
        encoded_rows=encoded_rows,
        shards=-(-left // shard_rows) if shards is None else shards,
        is_trained=is_trained,
        sample=sample,
        training_memory=4 * sample * dimension,
        vectors=2 * left * dimension if vector_bytes is None else vector_bytes,
        metadata=metadata_bytes or METADATA_BYTES * rows,
        lists=rows * (code + ID_SIZE),
        codes=left * (code + ID_SIZE),
        training=(TRAINING_ROUNDS * sample * rates.assigning + CODEBOOK_SECONDS * bool(key.pq)) / 3600
        if not is_trained
        else 0.0,
        encoding=left * (rates.assigning + rates.coding) / 3600,
    )


def measured(index_key: str, dimension: int) -> Rates:
    """Measure how fast this machine encodes rows, with random centres and codebooks.

    Args:
        index_key: faiss factory key.
        dimension: dimension of the vectors.

    Raises:
        InputError: the key is not supported.

    """
    key = IndexKey.parse(index_key, dimension)
    random = np.random.default_rng(0)
    width = key.width or dimension
    rows = unit_or_zero(random.standard_normal((ROWS_MEASURED, dimension), np.float32))
    rotation = random.standard_normal((width, dimension), np.float32)
    lists = min(key.lists, LISTS_MEASURED)
    cores = thread_count()

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
    """Return the number of centres that a row is compared with, see `Centres`."""
    return lists if lists <= EXACT_CENTRES else lists // GROUP_CENTRES + CANDIDATES
