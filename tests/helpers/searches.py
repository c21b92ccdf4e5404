"""Many searches of one staged index, for processes that run at the same time."""

import hashlib
import random
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from laion_assets.search.retrieval import Request, retrieve_table
from laion_assets.staging import open_staged
from laion_assets.staging.sparse import store
from laion_assets.staging.transfer.range_readers import FsspecReader


def digest_of_searches(cache: Path, budget: int, order: int, result: Connection) -> None:
    """Send a digest of what twelve searches find, done in a random order and with slow reads."""
    store.POLL_INTERVAL = 0.01
    _slow_down_reads()
    numbers = list(range(12))
    random.Random(order).shuffle(numbers)
    answers = {number: _search(cache, budget, number) for number in numbers}
    result.send(hashlib.sha256(repr(sorted(answers.items())).encode()).hexdigest())


def _slow_down_reads() -> None:
    read = FsspecReader.read

    def slowly(*args: Any) -> Iterator[bytes]:
        time.sleep(random.random() / 500)
        yield from read(*args)

    FsspecReader.read = slowly  # type: ignore[method-assign]


def _search(cache: Path, budget: int, number: int) -> str:
    with open_staged(cache, budget=budget) as opened:
        queries = np.random.default_rng(number).standard_normal((3, opened.index.dimension))
        request = Request(20 + number, 0.94, 3 + number)
        queries = queries.astype(np.float32)
        table, _ = retrieve_table(opened.index, opened.metadata, queries, request, per_seed=True)
        return hashlib.sha256(repr(table.to_pydict()).encode()).hexdigest()
