"""What it takes to keep a number of images: how many to ask for, how long, how much disk.

Times and sizes are those of the last run of the seed set, scaled; before there is one, times come from
the benchmark and sizes are not known. What must not live here: the sum itself (retrieval.sizing).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import dagster as dg

from laion_assets.io_managers import OUTPUT_SETTING
from laion_assets.past_runs import MADE_WITH, Materialized, materializations, measured_yield
from laion_assets.retrieval.progress import told
from laion_assets.retrieval.sizing import USUAL, Counts, Yield, as_measured, counts_for
from laion_assets.retrieval.storage import open_storage, reaching
from laion_assets.settings import Settings

TABLES = ("knn_urls", "centroid_urls", "combined_urls")
BENCHMARK = "benchmarks/results.md (2 cores, an index of 1,000,000 images in memory)"


@dataclass(frozen=True)
class Plan:
    """What to ask for, and what is to be expected of it.

    Attributes:
        counts: images to ask for.
        yielded: what they are computed with.
        seconds: of each table.
        basis_of_seconds: where these are from.
        sizes: bytes of each table; empty where nothing is known.
        index_size: bytes of the staged index; None before it was staged.

    """

    counts: Counts
    yielded: Yield
    seconds: Mapping[str, float]
    basis_of_seconds: str
    sizes: Mapping[str, int]
    index_size: int | None


def plan(
    instance: dg.DagsterInstance, target: int, seeds: int, seed_set: str | None, settings: Settings
) -> Plan:
    """Plan a run that keeps `target` images.

    Args:
        instance: whose history knows past runs.
        target: images wanted in the combined table.
        seeds: how many there are.
        seed_set: the set, if it is there already.
        settings: of the set, for a yield that was measured with the same.

    """
    yielded = measured_yield(instance, seed_set, settings) if seed_set else USUAL
    staged = next(materializations(instance, "staged_laion_index"), None)
    rows = staged.figures.get("dagster/row_count") if staged else None
    counts = counts_for(target, seeds, yielded.share, rows)
    requested = {
        "knn_urls": counts.nb_images_knn * seeds,
        "centroid_urls": counts.nb_images_centroid,
    }
    requested["combined_urls"] = sum(requested.values())
    past = _last_run(instance, seed_set) if seed_set else {}
    usual = as_measured(requested["knn_urls"], counts.nb_images_centroid)
    seconds = dict(zip(TABLES, usual, strict=True))
    sizes: dict[str, int] = {}
    basis = BENCHMARK
    if past:
        before = {name: _requested(past, name) for name in TABLES}
        as_before = as_measured(before["knn_urls"], before["centroid_urls"])
        for name, curve in zip(TABLES, as_before, strict=True):
            seconds[name] *= past[name].figures["seconds"] / curve
            size = _size(str(past[name].figures["dagster/uri"]))
            sizes |= {name: round(size * requested[name] / before[name])} if size else {}
        run = past["combined_urls"].run[:8]
        basis = f"run {run}, which requested {before['combined_urls']:,}, scaled by {BENCHMARK}"
    return Plan(counts, yielded, seconds, basis, sizes, staged.figures.get("bytes") if staged else None)


def in_words(found: Plan, target: int, seeds: int) -> list[str]:
    """Tell a plan as YAML to paste: the two numbers, and all else in comments."""
    counts = found.counts
    requested = counts.nb_images_knn * seeds, counts.nb_images_centroid
    times = ", ".join(f"{name} {told(seconds)}" for name, seconds in found.seconds.items())
    sizes = ", ".join(f"{name} {_as_bytes(size)}" for name, size in found.sizes.items())
    index = "not staged yet" if found.index_size is None else _as_bytes(found.index_size)
    return [
        f"# {target:,} images from {seeds:,} seeds, at {found.yielded}:",
        f"# {requested[0]:,} requested around the seeds and {requested[1]:,} around their mean",
        f"nb_images_knn: {counts.nb_images_knn}",
        f"nb_images_centroid: {counts.nb_images_centroid}",
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


def _requested(past: Mapping[str, Materialized], name: str) -> int:
    return int(past[name].figures["requested"])


def _size(uri: str) -> int | None:
    fs, path = open_storage(uri, OUTPUT_SETTING)
    with reaching(uri, OUTPUT_SETTING):
        return int(fs.size(path)) if fs.exists(path) else None


def _as_bytes(size: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{max(1, round(size / 1000))} kB"
