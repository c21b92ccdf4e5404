"""Our retrieval over the same index, asked the same as the peer.

Prints JSON of the same form as `peer.py` does: for each request the ids kept, the time of each phase and
the peak of memory. What must not live here: a way to retrieve that users do not have.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from memory import PeakMemory

from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.io.parallel import thread_count
from laion_assets.search import retrieval as retrieval
from laion_assets.search.retrieval import Request, retrieve_table

PHASES = {
    "search": (Index, "search"),
    "recall_check": (retrieval._Search, "recall"),  # the wait for it: it runs beside the others
    "near_duplicates": (retrieval, "components_of_lists"),
    "metadata": (Metadata, "take"),
}


@contextmanager
def clocks(phases: Mapping[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """Count the seconds spent in each of some functions while the block runs."""
    seconds = dict.fromkeys(phases, 0.0)
    plain = {name: getattr(owner, function) for name, (owner, function) in phases.items()}

    def timed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return plain[name](*arguments, **named)
            finally:
                seconds[name] += time.perf_counter() - started

        return call

    for name, (owner, function) in phases.items():
        setattr(owner, function, timed(name))
    try:
        yield seconds
    finally:
        for name, (owner, function) in phases.items():
            setattr(owner, function, plain[name])


def open_folder(folder: Path) -> tuple[Index, Metadata]:
    """The index and the metadata of generated data."""
    files = folder / "image.index"
    index = Index(files / "populated.index", files / "merged_index.ivfdata")
    return index, Metadata(sorted((folder / "metadata").iterdir()))


def ask(index: Index, metadata: Metadata, queries: Any, request: Request) -> dict[str, Any]:
    """All queries as one request, and what it took."""
    started = time.perf_counter()
    with clocks(PHASES) as seconds:
        table, found = retrieve_table(index, metadata, queries, request, per_seed=len(queries) > 1)
    total = time.perf_counter() - started
    return {
        "received": found.funnel.received,
        "recall": found.recall,
        "ids": table["id"].to_pylist(),
        "seeds": table["seed"].to_pylist() if "seed" in table.column_names else [],
        "similarities": table["similarity"].to_pylist(),
        "seconds": {"total": total, **seconds, "other": total - sum(seconds.values())},
    }


def main() -> None:
    """Answer the queries."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder with image.index and metadata")
    parser.add_argument("queries", type=Path, help="an .npy file: one query, or one per row")
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--nprobe", type=int)
    parser.add_argument("--first", type=int, help="only so many of the queries")
    arguments = parser.parse_args()
    queries = np.atleast_2d(np.load(arguments.queries))[: arguments.first]
    request = Request(arguments.k, 0.94, arguments.nprobe)
    with PeakMemory() as memory:
        index, metadata = open_folder(arguments.folder)
        ask(index, metadata, queries[:1], Request(10, 0.94, 1))  # what is loaded at the first request
        gc.collect()  # or chance decides which request pays for all that was imported
        answer = ask(index, metadata, queries, request)
    packages = ("laion_assets", "faiss-cpu", "numpy", "pyarrow")
    about = {
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        "k": arguments.k,
        "nprobe": index.nprobe_for(arguments.k, arguments.nprobe),
        "threads": thread_count(),
        "anonymous_bytes": {"before": memory.before, "peak": memory.peak},
    }
    json.dump({**about, "requests": [answer]}, sys.stdout)


if __name__ == "__main__":
    main()
