"""What finding near-duplicates costs as the rows grow, in several geometries of the vectors.

Writes a Markdown table. Each measurement is a process of its own, which ends when its CPU time is spent.
What must not live here: another way to find near-duplicates than users have.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from generate import BLOCK, DIMENSION, Matrix, Recipe, World, unit
from memory import PeakMemory, cpu_seconds

from laion_assets.search.near_duplicates import DEDUP_THRESHOLD, components

REPORT = """# Near-duplicates

CPU seconds for finding the near-duplicates among vectors of {dimension} numbers, at a threshold of
{threshold}, on a machine with {cores} cores; one run each, in a process of its own. *Power* is the
exponent with which the seconds grow from the line above. Peak memory excludes the vectors. Comparing all
pairs of 100,000 rows in full would take {pairs:,.0f} GFLOP. `make bench-duplicates` measures again.

| geometry | rows | kept | CPU seconds | power | peak memory |
|---|---|---|---|---|---|
{lines}

The geometries are:

{geometries}
"""
ROWS = (10_000, 30_000, 100_000)
CONE = 0.61  # the cosine of images that have nothing in common, as in the results of a large search
COPIES = (1e-3, 2e-2)  # one minus the cosine of a copy with its original


def different(rows: int, decay: float, random: np.random.Generator) -> Matrix:
    """Differences of length one on average; the larger the decay, the fewer directions matter."""
    scale = np.arange(1, DIMENSION + 1) ** -decay
    scale = (scale / np.linalg.norm(scale)).astype(np.float32)
    return random.standard_normal((rows, DIMENSION), np.float32) * scale


def copies_of(originals: Matrix, decay: float, random: np.random.Generator) -> Matrix:
    """A copy of each."""
    distances = np.exp(random.uniform(*np.log(COPIES), size=(len(originals), 1)))
    change = np.sqrt(2 * distances).astype(np.float32)
    return unit(originals + change * different(len(originals), decay, random))


def in_a_cone(rows: int, random: np.random.Generator) -> Matrix:
    """Images that have much in common with each other, and differ in many directions."""
    return around(unit(different(1, 0, random)), rows, random)


def around(shared: Matrix, rows: int, random: np.random.Generator) -> Matrix:
    """Images that have this direction in common."""
    own = different(rows, 0.15, random)
    return unit(np.float32(np.sqrt(CONE)) * shared + np.float32(np.sqrt(1 - CONE)) * own)


def topics(rows: int) -> Matrix:
    """The data of the other benchmarks: images of topics, and copies of them; a few have hundreds."""
    world = World(Recipe(rows=rows))
    return np.concatenate([world.vectors(block) for block in range(-(-rows // BLOCK))])


def cone(rows: int) -> Matrix:
    """Images with a cosine of 0.61 that differ in many directions, and one or two copies of most."""
    random = np.random.default_rng(0)
    originals = in_a_cone(rows * 6 // 10, random)
    return copies_of(originals[random.integers(len(originals), size=rows)], 0.15, random)


def cone_of_eights(rows: int) -> Matrix:
    """The same with eight copies of each."""
    random = np.random.default_rng(0)
    originals = random.permutation(np.repeat(in_a_cone(-(-rows // 8), random), 8, axis=0))
    return copies_of(originals[:rows], 0.15, random)


def clump(rows: int) -> Matrix:
    """All rows are copies of one image."""
    random = np.random.default_rng(0)
    return copies_of(np.repeat(unit(different(1, 0.5, random)), rows, axis=0), 0.5, random)


def all_different(rows: int) -> Matrix:
    """Random directions without any copies."""
    return unit(different(rows, 0, np.random.default_rng(0)))


GEOMETRIES = {
    "topics and copies": topics,
    "a cone, few copies": cone,
    "a cone, eight copies of each": cone_of_eights,
    "copies of one image": clump,
    "all different": all_different,
}


def measure(geometry: str, rows: int) -> dict[str, float]:
    """Find the near-duplicates once."""
    vectors = GEOMETRIES[geometry](rows)
    components(vectors[:5000], DEDUP_THRESHOLD)  # what is loaded at the first call
    with PeakMemory() as memory:
        started = cpu_seconds()
        labels = components(vectors, DEDUP_THRESHOLD)
        seconds = cpu_seconds() - started
    kept = len(np.unique(labels))
    return {"seconds": seconds, "bytes": memory.peak - memory.before, "kept": kept}


def in_process(geometry: str, rows: int, limit: int) -> dict[str, float] | None:
    """Measure in a process of its own; None if it exceeds the limit of CPU seconds."""

    def limit_cpu() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))

    command = [sys.executable, __file__, "--one", geometry, "--rows", str(rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=limit_cpu, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def lines(geometry: str, sizes: list[int], limit: int) -> Iterator[str]:
    """The lines of the table for one geometry."""
    before = None
    for rows in sizes:
        found = in_process(geometry, rows, limit)
        if found is None:
            yield f"| {geometry} | {rows:,} | | more than {limit} | | |"
            return
        power = f"{math.log(found['seconds'] / before[1], rows / before[0]):.1f}" if before else ""
        before = rows, found["seconds"]
        yield (
            f"| {geometry} | {rows:,} | {found['kept']:,} | {found['seconds']:.1f} | {power} "
            f"| {found['bytes'] / 1e6:.0f} MB |"
        )


def main() -> None:
    """Measure everything, or what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--geometries", nargs="+", choices=GEOMETRIES, default=list(GEOMETRIES))
    parser.add_argument("--limit", type=int, default=120, help="CPU seconds of a measurement")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--one", choices=GEOMETRIES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        json.dump(measure(asked.one, *asked.rows), sys.stdout)
        return
    table = []
    for geometry in asked.geometries:
        for line in lines(geometry, asked.rows, asked.limit):
            print(line, file=sys.stderr)
            table.append(line)
    report = REPORT.format(
        dimension=DIMENSION,
        threshold=DEDUP_THRESHOLD,
        cores=os.cpu_count(),
        pairs=100_000**2 / 2 * 2 * DIMENSION / 1e9,
        lines="\n".join(table),
        geometries="\n".join(f"- {name}: {GEOMETRIES[name].__doc__}" for name in asked.geometries),
    )
    asked.output.write_text(report)


if __name__ == "__main__":
    main()
