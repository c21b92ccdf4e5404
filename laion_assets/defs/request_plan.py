"""Plan a request for a target: about how many images it requests, in what time and disk space.

A run continues until its target is reached. A plan expects the yield of the set's last run, and
without a staged index scales the time of that run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from laion_assets.defs.estimate import Machine, as_comments, share_read
from laion_assets.defs.history import (
    FINGERPRINT,
    FOR_THE_TARGET,
    PastMaterialization,
    materializations,
    measured_yield,
    rows_of_the_index,
    staged_indices,
)
from laion_assets.defs.terminal import count
from laion_assets.io.progress import format_duration
from laion_assets.io.public_urls import is_same
from laion_assets.io.text import as_bytes
from laion_assets.search.needs import HOUR, NODE, Needs
from laion_assets.search.sizing import USUAL, Counts, Yield, expected_counts, images_wanted

NODES = 4  # for which a plan says how long combining takes, beside one
TABLES = ("knn_urls", "centroid_urls", "combined_urls")


@dataclass(frozen=True)
class History:
    """Measurements of past runs for a plan.

    Attributes:
        yielded: share of the requested images that is kept.
        last_run: the last run that made all three tables, by table; empty if there is none.
        index_rows: number of rows in the staged index; None if unknown.
        index_size: size of the staged index in bytes; None if unknown.

    """

    yielded: Yield = USUAL
    last_run: Mapping[str, PastMaterialization] = field(default_factory=dict)
    index_rows: int | None = None
    index_size: int | None = None


@dataclass(frozen=True)
class RequestPlan:
    """The images that a run is expected to request, and the expected cost.

    Attributes:
        target: images wanted whose URLs work.
        expect_alive: share of URLs that is expected to work.
        counts: images expected to be requested around each seed and around the centroid.
        requested: images requested for each table.
        needs: what combining is expected to take.
        seconds: expected duration for each table, scaled from the last run; empty without one.
        sizes: expected size of each table in bytes, scaled from the last run; empty without one.
        known: measurements of past runs.

    """

    target: int
    expect_alive: float
    counts: Counts
    requested: Mapping[str, int]
    needs: Needs
    seconds: Mapping[str, float]
    sizes: Mapping[str, int]
    known: History

    @property
    def images(self) -> int:
        """Images that the combined table must hold."""
        return images_wanted(self.target, self.expect_alive)


def read_history(
    instance: dg.DagsterInstance, index_uri: str, seed_set: str | None, asked: Mapping[str, Any]
) -> History:
    """Read the measurements for a plan.

    Args:
        instance: the instance with the history of past runs.
        index_uri: the index; how large others were does not count.
        seed_set: the set, if it already exists.
        asked: its settings, see `ResolvedSettings.asked`.

    """
    every = staged_indices(instance)
    own = {each[FINGERPRINT] for each in every if is_same(each.get("source") or "", index_uri)}
    staged = [each for each in every if each[FINGERPRINT] in own]
    return History(
        measured_yield(instance, seed_set, asked, own) if seed_set else USUAL,
        _last_run(instance, seed_set, own) if seed_set else {},
        rows_of_the_index(staged),
        staged[0].get("bytes") if staged else None,
    )


def plan_request(target: int, seeds: int, known: History, expect_alive: float) -> RequestPlan:
    """Plan a run for a target; a pure function.

    Args:
        target: images wanted whose URLs work.
        seeds: number of seeds.
        known: measurements of past runs.
        expect_alive: share of URLs that is expected to work.

    """
    images = images_wanted(target, expect_alive)
    counts = expected_counts(images, seeds, known.yielded.share, known.index_rows)
    searches = counts.nb_images_knn * seeds, counts.nb_images_centroid
    requested = dict(zip(TABLES, (*searches, sum(searches)), strict=True))
    last = {name: past.figures for name, past in known.last_run.items()}
    scale = {name: requested[name] / int(figures["requested"]) for name, figures in last.items()}
    different = images if known.index_rows is None else min(images, known.index_rows)
    needs = Needs.of(different)
    longer = dict(scale)
    if scale.get("combined_urls"):  # its time grows with the square
        then = Needs.of(max(1, round(different / scale["combined_urls"])))
        longer["combined_urls"] = needs.core_seconds / then.core_seconds
    return RequestPlan(
        target,
        expect_alive,
        counts,
        requested,
        needs,
        {name: factor * last[name]["seconds"] for name, factor in longer.items()},
        {name: round(factor * last[name]["bytes"]) for name, factor in scale.items()},
        known,
    )


def estimated(plan: RequestPlan, seeds: int, machine: Machine, nprobe: int | None) -> list[str]:
    """Return what the request is expected to take on this machine, as comments.

    Args:
        plan: the numbers of images to request.
        seeds: number of seeds.
        machine: this machine.
        nprobe: lists to probe; chosen if None.

    """
    counts, known = plan.counts, plan.known
    knn, centroid, _ = (share_read(known.last_run.get(name), known.yielded.share) for name in TABLES)
    steps = machine.request(
        seeds, counts.nb_images_knn, counts.nb_images_centroid, nprobe, (knn, centroid)
    )
    return as_comments(steps, machine)


def as_yaml(plan: RequestPlan, seeds: int, times: Sequence[str] = ()) -> list[str]:
    """Return a plan as YAML to paste, with the target as setting and the rest as comments.

    Args:
        plan: the plan.
        seeds: number of seeds.
        times: comments about reads and time, see `estimated`; those of `scaled` if empty.

    """
    counts, requested, alive = plan.counts, plan.requested, f"{plan.expect_alive:.0%}"
    size = plan.known.index_size
    index = "not staged yet" if size is None else as_bytes(size)
    sizes = ", ".join(f"{name} {as_bytes(size)}" for name, size in plan.sizes.items())
    return [
        f"target_images: {plan.target}",
        f"# {plan.images:,} images from {count(seeds, 'seed')}, if {alive} of the URLs work",
        f"# about {requested['knn_urls']:,} requested around the seeds, {counts.nb_images_knn:,} each,",
        f"#   and {requested['centroid_urls']:,} around their mean; of these, {plan.known.yielded}",
        *limits_of_the_index(plan),
        *(times or scaled(plan)),
        f"# {plan.needs}; twice the images take four times as long",
        *in_stripes(plan.needs),
        f"# disk: tables {sizes or 'unknown before the first run of the set'}; index {index}",
    ]


def limits_of_the_index(plan: RequestPlan) -> list[str]:
    """Return what the size of the index rules out, as a comment; empty if nothing."""
    rows, counts = plan.known.index_rows, plan.counts
    last = plan.known.last_run.get("combined_urls")
    if rows is None:
        return []
    if plan.images > rows:
        return [f"# the index has only {count(rows, 'row')}, fewer than the target needs"]
    if last and last.figures["kept"] < min(plan.images, last.figures.get(FOR_THE_TARGET, 0)):
        return [
            f"# run {last.run[:8]} had a target and kept only {count(last.figures['kept'], 'image')}, "
            "because the index has no more"
        ]
    if rows in (counts.nb_images_knn, counts.nb_images_centroid):
        return [f"# the index has only {count(rows, 'row')}, which caps requests"]
    return []


def in_stripes(needs: Needs) -> list[str]:
    """Return how long combining takes on one node and on some, as a comment; empty if it is one step."""
    if needs.stripes == 1:
        return []
    nodes = min(NODES, needs.stripes)
    one, some = (format_duration(HOUR * needs.hours(number)) for number in (1, nodes))
    stripes = f"in {needs.stripes:,} stripes"
    return [f"#   {stripes}: {one} on one node of {NODE} cores, {some} on {nodes} such nodes"]


def scaled(plan: RequestPlan) -> list[str]:
    """Return the time of the set's last run, scaled to the request, as comments."""
    if not plan.seconds:
        return [
            "# time: unknown until the index is staged or the set has run; for LAION-5B: docs/scale.md"
        ]
    times = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in plan.seconds.items())
    last = plan.known.last_run["combined_urls"]
    return [
        f"# time: {times}",
        f"#   scaled from run {last.run[:8]}, which requested {last.figures['requested']:,}",
    ]


def _last_run(
    instance: dg.DagsterInstance, seed_set: str, indices: Collection[str]
) -> dict[str, PastMaterialization]:
    """Return the last run on an index that made all three tables, by table; empty if there is none."""
    by_run = {
        name: {made.run: made for made in materializations(instance, name, seed_set)} for name in TABLES
    }
    for run, made in by_run["combined_urls"].items():
        tables = {name: by_run[name][run] for name in TABLES if run in by_run[name]}
        is_whole = len(tables) == len(TABLES) and all(
            made.figures["requested"] for made in tables.values()
        )
        if is_whole and made.asked is not None and made.index in indices:
            return tables
    return {}
