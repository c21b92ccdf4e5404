"""Many seeds to Parquet, then both sets as one: time and memory of the two longest streams.

Prints JSON. What must not live here: a way to write or to combine that users do not have.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from memory import PeakMemory
from ours import open_folder

from laion_assets.io.tables import StoredTable, new_table
from laion_assets.search.combined import DECODER, combine
from laion_assets.search.retrieval import Request, columns_found, retrieve

THRESHOLD = 0.94


def measured(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work tells of itself, with its seconds and its peak of anonymous memory."""
    with PeakMemory() as memory:
        started = time.perf_counter()
        told = work()
        seconds = time.perf_counter() - started
    return {**told, "seconds": seconds, "peak_bytes": memory.peak}


def stream(
    folder: Path, queries: Any, k: int, target: Path, threshold: float = THRESHOLD
) -> dict[str, Any]:
    """Retrieve and write; one query is a centroid."""
    index, metadata = open_folder(folder)
    per_seed = len(queries) > 1
    with new_table(str(target), columns_found(index, metadata, per_seed=per_seed)) as table:
        request = Request(k, threshold)
        found = retrieve(index, metadata, queries, request, table.write, per_seed=per_seed)
        table.attach(DECODER, found.decoder)
    return {**vars(found.funnel), "nprobe": found.nprobe, "recall": found.recall}


def unite(knn: Path, centroid: Path, target: Path) -> dict[str, Any]:
    """Combine two written tables and write the result."""
    combined = combine(StoredTable(str(knn)), StoredTable(str(centroid)), THRESHOLD)
    with new_table(str(target), combined.schema) as table:
        for batch in combined.batches:
            table.write(batch)
    return vars(combined.funnel)


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder with image.index and metadata, and seeds")
    parser.add_argument("output", type=Path, help="a folder for the tables")
    parser.add_argument("step", choices=["knn", "all", "centroid", "combined"])
    parser.add_argument("--seeds", type=int, default=20_000)
    parser.add_argument("--k", type=int, default=200)
    asked = parser.parse_args()
    tables = {name: asked.output / f"{name}.parquet" for name in ("knn", "all", "centroid", "combined")}
    seeds = np.load(asked.folder / "seeds.npy")[: asked.seeds]
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "knn": lambda: stream(asked.folder, seeds, asked.k, tables["knn"]),
        # Near-duplicates kept, so that combining has as many rows as were received.
        "all": lambda: stream(asked.folder, seeds, asked.k, tables["all"], threshold=1.0),
        "centroid": lambda: stream(
            asked.folder, np.load(asked.folder / "centroid.npy")[None], asked.k, tables["centroid"]
        ),
        "combined": lambda: unite(tables["all"], tables["centroid"], tables["combined"]),
    }
    json.dump(measured(steps[asked.step]), sys.stdout)


if __name__ == "__main__":
    main()
