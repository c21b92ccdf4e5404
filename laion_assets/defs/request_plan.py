"""What it takes to keep a number of images: how many to ask for, how long, how much disk.

Times and sizes are those of the last run of the seed set, scaled; before there is one, times come from
the benchmark and sizes are not known. What must not live here: the sum itself (retrieval.sizing).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from laion_assets.defs.history import MADE_WITH, Materialized, materializations, measured_yield
from laion_assets.io.progress import told
from laion_assets.search.sizing import USUAL, Counts, Yield, as_measured, counts_for

TABLES = ("knn_urls", "centroid_urls", "combined_urls")
ROWS = "dagster/row_count"
BENCHMARK = "benchmarks/results.md (2 cores, an index of 1,000,000 images in memory)"


@dataclass(frozen=True)
class History:
    """What past runs tell a plan.

    Attributes:
        yielded: which share of what is requested is kept.
        last_run: what the last run that made all three tables told of each; empty where there is none.
        index_rows: of the staged index; None where that is not known.
        index_size: in bytes, likewise.

    """

    yielded: Yield = USUAL
    last_run: Mapping[str, Materialized] = field(default_factory=dict)
    index_rows: int | None = None
    index_size: int | None = None


@dataclass(frozen=True)
class Plan:
    """What to ask for, and what is to be expected of it.

    Attributes:
        counts: images to ask for.
        yielded: what they are computed with.
        requested: images for each table.
        seconds: of each table.
        basis_of_seconds: where these are from.
        sizes: bytes of each table; empty where nothing is known.
        index_size: bytes of the staged index; None before it was staged.
        index_rows: of it; None where that is not known.

    """

    counts: Counts
    yielded: Yield
    requested: Mapping[str, int]
    seconds: Mapping[str, float]
    basis_of_seconds: str
    sizes: Mapping[str, int]
    index_size: int | None
    index_rows: int | None


def history(instance: dg.DagsterInstance, seed_set: str | None, asked: Mapping[str, Any]) -> History:
    """Look up what a plan rests on.

    Args:
        instance: whose history knows past runs.
        seed_set: the set, if it is there already.
        asked: settings of the set and the block list, for a yield that was measured with the same.

    """
    told_of_index = (past.figures for past in materializations(instance, "staged_laion_index"))
    # What people report by hand in the UI says nothing of the files.
    staged = [figures for figures in told_of_index if "fingerprint" in figures]
    held = staged[0] if staged else {}
    # A step that had to stage the index again did not count its rows: an earlier one did.
    rows = (
        figures[ROWS]
        for figures in staged
        if ROWS in figures and figures["fingerprint"] == held["fingerprint"]
    )
    return History(
        measured_yield(instance, seed_set, asked) if seed_set else USUAL,
        _last_run(instance, seed_set) if seed_set else {},
        next(rows, None),
        held.get("bytes"),
    )


def plan(target: int, seeds: int, known: History) -> Plan:
    """Plan a run that keeps `target` images; a pure function.

    Args:
        target: images wanted in the combined table.
        seeds: how many there are.
        known: of past runs.

    """
    counts = counts_for(target, seeds, known.yielded.share, known.index_rows)
    of_searches = counts.nb_images_knn * seeds, counts.nb_images_centroid
    requested = dict(zip(TABLES, (*of_searches, sum(of_searches)), strict=True))
    seconds = dict(zip(TABLES, as_measured(*of_searches), strict=True))
    sizes: dict[str, int] = {}
    basis = BENCHMARK
    if past := known.last_run:
        before = {name: int(past[name].figures["requested"]) for name in TABLES}
        as_before = as_measured(before["knn_urls"], before["centroid_urls"])
        for name, curve in zip(TABLES, as_before, strict=True):
            seconds[name] *= past[name].figures["seconds"] / curve
            sizes[name] = round(past[name].figures["bytes"] * requested[name] / before[name])
        run = past["combined_urls"].run[:8]
        basis = f"run {run}, which requested {before['combined_urls']:,}, scaled by {BENCHMARK}"
    return Plan(
        counts, known.yielded, requested, seconds, basis, sizes, known.index_size, known.index_rows
    )


def in_words(found: Plan, target: int, seeds: int) -> list[str]:
    """Tell a plan as YAML to paste: the two numbers, and all else in comments."""
    counts, requested = found.counts, found.requested
    times = ", ".join(f"{name} {told(seconds)}" for name, seconds in found.seconds.items())
    sizes = ", ".join(f"{name} {_as_bytes(size)}" for name, size in found.sizes.items())
    index = "not staged yet" if found.index_size is None else _as_bytes(found.index_size)
    rows = found.index_rows
    bounded = rows is not None and (
        target > rows or rows in (counts.nb_images_knn, counts.nb_images_centroid)
    )
    return [
        f"# {target:,} images from {seeds:,} seeds, at {found.yielded}:",
        f"# {requested['knn_urls']:,} requested around the seeds and {requested['centroid_urls']:,} "
        "around their mean",
        f"nb_images_knn: {counts.nb_images_knn}",
        f"nb_images_centroid: {counts.nb_images_centroid}",
        *([f"# the index has {rows:,} rows: no more than that can be found"] if bounded else []),
        f"# time: {times}",
        f"#   by {found.basis_of_seconds}",
        f"# disk: {sizes or 'of the tables not known before a first run of the set'}; index {index}",
    ]


def _last_run(instance: dg.DagsterInstance, seed_set: str) -> dict[str, Materialized]:
    """Return what the last run that made all three tables told of them; empty where there is none."""
    by_run = {
        name: {made.run: made for made in materializations(instance, name, seed_set)} for name in TABLES
    }
    for run, made in by_run["combined_urls"].items():
        if MADE_WITH in made.figures and all(run in by_run[name] for name in TABLES):
            return {name: by_run[name][run] for name in TABLES}
    return {}


def _as_bytes(size: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{max(1, round(size / 1000))} kB"
