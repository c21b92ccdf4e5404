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

from laion_assets.defs.io_manager import StoredTable, write_table
from laion_assets.search.combine import combine
from laion_assets.search.retrieve import PICTURES, Request, retrieve

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
    found = retrieve(index, metadata, queries, Request(k, threshold), per_seed=len(queries) > 1)
    write_table(found.table, str(target))
    return {**vars(found.funnel), "nprobe": found.nprobe, "recall": found.recall}


def unite(knn: Path, centroid: Path, target: Path) -> dict[str, Any]:
    """Combine two written tables and write the result."""
    combined = combine(StoredTable(str(knn)), StoredTable(str(centroid)), THRESHOLD, PICTURES)
    write_table(combined.table, str(target))
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
