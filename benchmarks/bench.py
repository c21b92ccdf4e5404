"""`make bench`: both sides in turn on the same data, and what came out as `results.md` and a plot.

Every figure is the median of runs in processes of their own, ours and the peer's alternating.
What must not live here: how either side does its work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import peer
from generate import Recipe, generate
from machine import processor

HERE = Path(__file__).parent
GB = 1e9


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    recipe: Recipe
    centroid: tuple[int, ...]
    nprobe: int
    seeds: tuple[int, int]  # how many, images for each
    seeds_nprobe: int
    curve: tuple[int, ...]
    streams: tuple[int, int]  # seeds, images for each
    repeats: int
    wanted: dict[str, int]  # how many times faster the largest request of a kind should be


FULL = Plan(
    recipe=Recipe(),
    centroid=(1_000, 10_000, 50_000, 100_000),
    nprobe=256,
    seeds=(1_000, 830),
    seeds_nprobe=32,
    curve=(10_000, 30_000, 100_000, 300_000, 1_000_000),
    streams=(20_000, 200),
    repeats=3,
    wanted={"centroid": 30, "seeds": 10},
)
QUICK = Plan(
    recipe=Recipe(rows=100_000, lists=256, seeds=2_000),
    centroid=(1_000, 10_000, 20_000),
    nprobe=64,
    seeds=(100, 830),
    seeds_nprobe=32,
    curve=(3_000, 10_000, 30_000, 100_000),
    streams=(2_000, 200),
    repeats=3,
    wanted={},
)


@dataclass
class Compared:
    """One request on both sides."""

    what: str
    kind: str
    ours: list[dict[str, Any]] = field(default_factory=list)
    theirs: list[dict[str, Any]] = field(default_factory=list)

    def seconds(self, side: str) -> float:
        """Median over the runs of the sum over the requests of a run."""
        runs = getattr(self, side)
        return median(sum(r["seconds"]["total"] for r in run["requests"]) for run in runs)

    @property
    def ratio(self) -> float:
        """How many times longer the peer takes."""
        return self.seconds("theirs") / self.seconds("ours")

    def kept(self, side: str) -> int:
        """Rows in the first run."""
        return sum(len(r["ids"]) for r in getattr(self, side)[0]["requests"])

    def differing(self) -> int:
        """Rows that only one side keeps; ties and roundings are allowed a few (see make test-peer)."""
        (ours,) = self.ours[0]["requests"]
        seeds = ours["seeds"] or [0] * len(ours["ids"])
        theirs = {(n, row) for n, r in enumerate(self.theirs[0]["requests"]) for row in r["ids"]}
        return len(set(zip(seeds, ours["ids"], strict=True)) ^ theirs)


def run(program: str, *arguments: object) -> dict[str, Any]:
    """Run a program of this folder and return the JSON it prints.

    Each side gets the faster matrix products. OpenBLAS chooses them by the processor; the one in faiss's
    wheel, of 2021, which does most of the peer's work, takes processors made since for very old ones.
    """
    chosen = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    if program == "peer.py":
        chosen["OPENBLAS_CORETYPE"] = "Haswell"
    command = [sys.executable, str(HERE / program), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=chosen)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def warm(folder: Path) -> None:
    """Read all files, so that the page cache holds them for the first request as for the others."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def compare(plan: Plan, folder: Path) -> list[Compared]:
    """Ask both sides the same, in turn."""
    asked = [
        (f"centroid, k = {k:,}", "centroid", ["centroid.npy", k, plan.nprobe, 1]) for k in plan.centroid
    ]
    count, k = plan.seeds
    asked.append((f"{count:,} seeds x {k:,}", "seeds", ["seeds.npy", k, plan.seeds_nprobe, count]))
    found = []
    for what, kind, (queries, k, nprobe, first) in asked:
        compared = Compared(what, kind)
        for _ in range(plan.repeats):
            options = (folder, folder / queries, "--k", k, "--nprobe", nprobe, "--first", first)
            compared.ours.append(run("ours.py", *options))
            compared.theirs.append(run("peer.py", *options))
            say(f"{what}: {compared.seconds('ours'):.2f} s, peer {compared.seconds('theirs'):.2f} s")
        found.append(compared)
    return found


def curve(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """Our centroid requests of growing size, every list probed."""
    found = []
    for k in plan.curve:
        repeats = plan.repeats if k <= 100_000 else 1
        options = (folder, folder / "centroid.npy", "--k", k, "--nprobe", plan.recipe.lists)
        runs = [run("ours.py", *options) for _ in range(repeats)]
        runs.sort(key=lambda r: r["requests"][0]["seconds"]["total"])
        found.append(runs[len(runs) // 2])
        say(f"k = {k:,}: {found[-1]['requests'][0]['seconds']['total']:.2f} s")
    return found


def streams(plan: Plan, folder: Path) -> dict[str, dict[str, Any]]:
    """Many seeds to Parquet, a centroid, both combined."""
    seeds, k = plan.streams
    with TemporaryDirectory(dir=peer.cache()) as output:
        steps = {
            "knn": ("--seeds", seeds, "--k", k),
            "all": ("--seeds", seeds, "--k", k),
            "centroid": ("--k", max(plan.centroid)),
            "combined": (),
        }
        found = {}
        for step, options in steps.items():
            found[step] = run("streams.py", folder, output, step, *options)
            say(f"{step}: {found[step]['seconds']:.1f} s, {found[step]['peak_bytes'] / GB:.2f} GB")
    return found


def exponent(rows: list[int], seconds: list[float]) -> float:
    """The power of k that the time grows with: the slope of a line through the logarithms."""
    return float(np.polyfit(np.log(rows), np.log(seconds), 1)[0])


def brief(seconds: float) -> str:
    """Seconds with two digits that tell something."""
    return f"{seconds:.{3 if 0.0005 < seconds < 0.1 else 2}f}"


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)


def report(
    plan: Plan,
    compared: list[Compared],
    ours: list[dict[str, Any]],
    streamed: dict[str, dict[str, Any]],
    load: float,
) -> str:
    """The results as Markdown."""
    ours_with, theirs_with = (
        ", ".join(f"{name} {number}" for name, number in runs[0]["versions"].items())
        for runs in (compared[0].ours, compared[0].theirs)
    )
    seconds = [r["requests"][0]["seconds"]["total"] for r in ours]
    grows = exponent([r["k"] for r in ours], seconds)
    recipe = plan.recipe
    lines = [
        "# Results",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {processor()}, {os.cpu_count()} cores, "
        f"load at the start {load:.1f}. Ours: {ours_with}. The peer: {theirs_with}.",
        "",
        f"Data: {recipe.rows:,} x 768, `{recipe.index_key}`, lists on disk, Arrow metadata "
        f"(`benchmarks/generate.py`). Medians of {plan.repeats} runs, each in a process of its own, page "
        "cache warm. Seconds are from the query to the rows with their metadata.",
        "",
        "## The same request on both sides",
        "",
        "| request | kept | ours | peer | ratio | wanted | rows that differ | memory | peer memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in compared:
        wanted = plan.wanted.get(one.kind, "") if one is biggest(compared, one.kind) else ""
        peaks = [max(r["anonymous_bytes"]["peak"] for r in side) / GB for side in (one.ours, one.theirs)]
        lines.append(
            f"| {one.what} | {one.kept('ours'):,} | {brief(one.seconds('ours'))} s | "
            f"{brief(one.seconds('theirs'))} s | **{one.ratio:.1f}** | {wanted} | "
            f"{one.differing()} | {peaks[0]:.2f} GB | {peaks[1]:.2f} GB |"
        )
    lines += [
        "",
        "A row may differ where two scores, or a cosine and the threshold, are the same but for rounding "
        "(`make test-peer` allows nothing else). "
        "Memory is the peak of anonymous memory and page tables (mapped files do not count). The peer is "
        "told to use OpenBLAS's products for Haswell: the OpenBLAS in faiss's wheel is of 2021, and "
        "takes processors made since for very old ones.",
        "",
        "## Where the time goes",
        "",
        "| request | side | search | recall check | near-duplicates | metadata | other |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in compared:
        for side in ("ours", "theirs"):
            spent = phases(getattr(one, side))
            lines.append(
                f"| {one.what} | {'ours' if side == 'ours' else 'peer'} | "
                + " | ".join(brief(spent.get(name, 0)) for name in PHASES)
                + " |"
            )
    lines += [
        "",
        "The peer decodes while it searches, ours while it finds near-duplicates. Our recall check runs "
        "beside the other phases: what counts is the wait for it.",
    ]
    lines += [
        "",
        "## How the cost grows",
        "",
        "Centroid requests of ours, every list probed.",
        "",
        "| k | kept | seconds | near-duplicates | anonymous memory |",
        "|---|---|---|---|---|",
    ]
    for r in ours:
        (request,) = r["requests"]
        lines.append(
            f"| {r['k']:,} | {len(request['ids']):,} | {request['seconds']['total']:.2f} | "
            f"{request['seconds']['near_duplicates']:.2f} | {r['anonymous_bytes']['peak'] / GB:.2f} GB |"
        )
    peer_seconds = predicted(compared, max(plan.curve))
    lines += [
        "",
        f"Seconds grow with k to the power of {grows:.2f}. The peer would need about "
        f"{peer_seconds / 3600:.1f} hours for k = {max(plan.curve):,} (a line through the logarithms of "
        "its two largest requests above; not run).",
        "",
        "## Many seeds",
        "",
        "| step | rows in | rows out | seconds | rows in per second | anonymous memory |",
        "|---|---|---|---|---|---|",
    ]
    for step, told in streamed.items():
        rows = told["received"] if "received" in told else told["knn"] + told["centroid"]
        lines.append(
            f"| {step} | {rows:,} | {told['kept']:,} | {told['seconds']:.1f} | "
            f"{rows / told['seconds']:,.0f} | {told['peak_bytes'] / GB:.2f} GB |"
        )
    seeds, k = plan.streams
    lines += [
        "",
        f"{seeds:,} seeds x {k:,}, written to Parquet: once as users do, once with near-duplicates left "
        "in, so that all those rows are combined with a centroid's.",
    ]
    return "\n".join([*lines, "", "![Images requested and kept against time](results.png)", ""])


PHASES = ("search", "recall_check", "near_duplicates", "metadata", "other")


def phases(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of each phase, all requests of a run together."""
    names = runs[0]["requests"][0]["seconds"]
    return {
        name: median(sum(r["seconds"][name] for r in run["requests"]) for run in runs) for name in names
    }


def biggest(compared: list[Compared], kind: str) -> Compared:
    """The last of a kind, which is the one the aim is set for."""
    return [one for one in compared if one.kind == kind][-1]


def predicted(compared: list[Compared], k: int) -> float:
    """The peer's seconds for a request too long to run, from its two largest."""
    largest = [one for one in compared if one.kind == "centroid"][-2:]
    sizes = [one.ours[0]["k"] for one in largest]
    seconds = [one.seconds("theirs") for one in largest]
    return float(seconds[-1] * (k / sizes[-1]) ** exponent(sizes, seconds))


def draw(compared: list[Compared], ours: list[dict[str, Any]], path: Path) -> None:
    """Images requested and received against time: the plot that users of the peer know."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    centroid = [one for one in compared if one.kind == "centroid"]
    sides = {
        "laion_assets": ([r["requests"][0] for r in ours], [r["k"] for r in ours], "#1f6f8b"),
        "clip-retrieval": (
            [one.theirs[0]["requests"][0] for one in centroid],
            [one.ours[0]["k"] for one in centroid],
            "#c8553d",
        ),
    }
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, (requests, asked, colour) in sides.items():
        seconds = [request["seconds"]["total"] for request in requests]
        kept = [len(request["ids"]) for request in requests]
        axes.plot(seconds, asked, "o-", color=colour, label=f"{name}: requested")
        axes.plot(seconds, kept, "o--", color=colour, alpha=0.6, label=f"{name}: kept")
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="images", title="One centroid request")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of an hour")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of results.md")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    load = os.getloadavg()[0]
    folder = generate(plan.recipe)
    peer.environment()
    warm(folder)
    compared = compare(plan, folder)
    ours = curve(plan, folder)
    streamed = streams(plan, folder)
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(compared, ours, arguments.output / "results.png")
    text = report(plan, compared, ours, streamed, load)
    (arguments.output / "results.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
