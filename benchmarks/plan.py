"""What `laion-assets plan` estimates for a request, against what the request takes.

The index is that of `make bench`, made if it is missing, and used in place. Each request is a process of
its own. A cold one begins after the page cache has forgotten the index. A plan is that of a machine
that has nothing else to do: on a busy one, compare CPU times. What must not live here: another estimate
than users see.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from generate import Recipe, generate
from memory import cpu_seconds

from laion_assets.io.tables import new_table
from laion_assets.search.combined import DECODER
from laion_assets.search.cost import search_of, search_steps, total
from laion_assets.search.near_duplicates import DEDUP_THRESHOLD
from laion_assets.search.probe import bytes_read, keep_rates, kept_rates, measured_rates, shape_of
from laion_assets.search.retrieval import Request, columns_found, retrieve
from laion_assets.search.sizing import USUAL_SHARE
from laion_assets.staging import open_staged, stage

SHOWN = [*("planned", "took", "ratio"), *("CPU", "took", "ratio"), *("bytes", "read", "ratio")]
REQUESTS = {
    "1,000 around a centroid": (0, 1_000),
    "10,000 around a centroid": (0, 10_000),
    "100,000 around a centroid": (0, 100_000),
    "830 around each of 200 seeds": (200, 830),
}
ROW = "{:30}{:5}" + "{:>10}{:>10}{:>7}" * 3


def measure(cache: Path, queries: np.ndarray, k: int) -> dict[str, float]:
    """Search, and write the table, as a step of the graph does; with the CPU time of both."""
    read, started, used = bytes_read(), time.monotonic(), cpu_seconds()
    per_seed = len(queries) > 1
    with open_staged(cache) as opened, TemporaryDirectory() as folder:
        schema = columns_found(opened.index, opened.metadata, per_seed=per_seed)
        with new_table(f"{folder}/found.parquet", schema) as table:
            request = Request(k, DEDUP_THRESHOLD)
            found = retrieve(
                opened.index, opened.metadata, queries, request, table.write, per_seed=per_seed
            )
            table.attach(DECODER, found.decoder)
        return {
            "seconds": time.monotonic() - started,
            "core seconds": cpu_seconds() - used,
            "bytes": bytes_read() - read,
            "share": found.funnel.kept / found.funnel.requested,
        }


@dataclass(frozen=True)
class Plan:
    """What is estimated for a request: seconds cold and warm, and on one core; bytes."""

    cold: float
    warm: float
    core_seconds: float
    size: float


def planned(cache: Path) -> dict[str, Plan]:
    """Measure the machine, and estimate all requests; what is mapped is let go."""
    plans = {}
    started, used = time.monotonic(), cpu_seconds()
    measured = measured_rates(partial(open_staged, cache), cache)
    wall, cpu = time.monotonic() - started, cpu_seconds() - used
    with open_staged(cache) as opened:
        keep_rates(cache, opened.manifest.fingerprint, measured)
        rates, shape = kept_rates(cache, opened.manifest.fingerprint), shape_of(opened, cache)
        print(f"probe: {wall:.1f} s, {cpu:.1f} of CPU\n")
        for what, (seeds, k) in REQUESTS.items():
            search = search_of(shape, max(seeds, 1), k, USUAL_SHARE)
            whole = total(search_steps(shape, rates, search))
            alone = total(search_steps(shape, replace(rates, cores=1, threads=1.0), search))
            plans[what] = Plan(whole.cold, whole.warm, alone.warm, whole.size)
    return plans


def forget(folder: Path) -> None:
    """Let the page cache forget all files; pages that another process maps stay."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    """Plan and measure each request, cold and warm, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="of generate.py; made if not given")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.folder or generate(Recipe())
    queries = np.load(folder / "seeds.npy")
    if given.one:
        cache, seeds, k = given.one
        vectors = queries[: int(seeds)] if int(seeds) else queries.mean(axis=0, keepdims=True)
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        print(json.dumps(measure(Path(cache), vectors, int(k))))
        return
    with TemporaryDirectory() as name:
        cache = Path(name)
        stage(str(folder), None, cache, in_place=True)
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        plans = planned(cache)
        print(ROW.format("request", "", *SHOWN))
        for what, (seeds, k) in REQUESTS.items():
            for state in ("cold", "warm"):
                if state == "cold":
                    forget(folder)
                command = [
                    sys.executable,
                    __file__,
                    "--folder",
                    folder,
                    "--one",
                    cache,
                    str(seeds),
                    str(k),
                ]
                took = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
                plan = plans[what]
                figures = [
                    (getattr(plan, state), took["seconds"], "{:.2f} s"),
                    (plan.core_seconds, took["core seconds"], "{:.2f} s"),
                    (plan.size / 1e6 * (state == "cold"), took["bytes"] / 1e6, "{:.0f} MB"),
                ]
                cells = [
                    text
                    for estimate, real, form in figures
                    for text in (
                        form.format(estimate),
                        form.format(real),
                        f"{estimate / real:.2f}" if estimate and real else "",
                    )
                ]
                print(ROW.format(what if state == "cold" else "", state, *cells), flush=True)


if __name__ == "__main__":
    main()
