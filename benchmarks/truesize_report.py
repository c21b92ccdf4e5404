"""The report of `truesize.py`: what is asked, and tables of what it took, with limits and plans.

What must not live here: anything that measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN_SECONDS, OPEN_MEMORY = 1.0, 300e6
SLOWER_THAN_THE_SOURCE = 1.3
SLOWER_THAN_THE_DISK = 2.0
QUICK_SHARE = 8  # of images and seeds


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        seeds: around each of which images are looked for; 0 stands for their centroid.
        k: images requested for each.
        most_read: bytes that it may read.

    """

    seeds: int
    k: int
    most_read: float | None = None

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.k:,} around " + (f"each of {self.seeds:,} seeds" if self.seeds else "a centroid")

    def smaller(self) -> Case:
        """The same for the smaller index."""
        return Case(self.seeds // QUICK_SHARE, self.k // QUICK_SHARE)


REPORT = """# LAION-5B's true size

`make bench-truesize` builds and measures again, here on {cores} cores ({processor}) and
{memory:.0f} GB of memory. The load of the machine was up to {load:.0f}; above {cores}, seconds are
upper bounds.

{rows:,} rows in {lists:,} inverted lists, and {batches:,} record batches in three Arrow
files: {apparent:,} bytes, of which {written:.1f} GB are really written: what these requests read.
The centres are drawn and not trained, in a real HNSW; codes are drawn as well, in groups of copies.
Every measurement is a process of its own. *Cold*: the page cache holds nothing of the index's files.
*The disk*: the pages of the lists that are probed and of the rows that are taken, read by `pread` in
{reads} threads and nothing else; the same pages are the plan. Memory is the peak of anonymous memory and
page tables.

## Opening

{opening}

## Requests in place

In brackets is the limit: twice the seconds of the disk, or the bytes that the request may read.

{requests}

Seconds of each phase, and the bytes read in it:

{phases}

## Planned and taken

What a step expects before it searches, if the machine was measured, and what the requests above took.
The rates of the machine are measured where the stand-in has data: elsewhere it has holes.

{plans}

## Sparse, from a bucket

The bucket is fake-gcs-server on the same machine and disk, which serves the files where they are. Each
request finds in the cache what those above it fetched. *The source alone*: the same reads as to open,
in as many threads, and nothing else; for both, the server has the headers in memory. Both are measured
three times in turn; the round with the median ratio is shown, and its limit is 1.3 times the source. The
plan is made by the rules of sparse staging, for an empty cache and without headers.

{sparse}

## The whole graph

{graph}

## The same rows

{checks}
"""


def report(about: Mapping[str, Any], cases: Mapping[str, Case], results: Mapping[str, Any]) -> str:
    """The report of what was measured.

    Args:
        about: the machine and the stand-in, as the report names them.
        cases: the requests, by name.
        results: of all measurements, by name.

    """
    requests = {name: results[name] for name in cases if name in results}
    took = [each for step in results.values() for each in step.values() if isinstance(each, dict)]
    return REPORT.format(
        **about,
        load=max((each.get("load", 0) for each in took), default=0),
        opening=opening_table(results.get("open", {})),
        requests=request_table(cases, requests),
        phases=phase_table(cases, requests),
        plans=plan_table(cases, requests, results.get("plan", {}).get("requests", {})),
        sparse=sparse_table(cases, results.get("sparse", {})),
        graph=graph_table(results.get("graph")),
        checks=check_table(cases, requests),
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def against(value: float, limit: float | None, text: str = "{:.2f}") -> str:
    """A figure, and its limit if it has one."""
    if limit is None:
        return text.format(value)
    return f"{text.format(value)} ({'above' if value > limit else 'within'} {text.format(limit)})"


def opening_table(opened: Mapping[str, Any]) -> str:
    """Cold and warm."""
    rows = []
    for state, took in opened.items():
        seconds = against(took["seconds"], OPEN_SECONDS if state == "open, warm" else None)
        phases = [f"{spent[0]:.2f}" for spent in took["phases"].values()] or ["", ""]
        memory = against(took["anonymous"] / 1e6, OPEN_MEMORY / 1e6, "{:.0f}")
        rows.append(
            [state, seconds, *phases, f"{took['read'] / 1e6:,.0f}", f"{took['faults']:,}", memory]
        )
    head = ["", "seconds", "the index", "the metadata", "MB read", "major faults", "memory, MB"]
    return markdown(head, rows)


def request_table(cases: Mapping[str, Case], requests: Mapping[str, Any]) -> str:
    """A line for each request, cold and warm."""
    rows = []
    for name, found in requests.items():
        case, disk = cases[name], found["disk"]
        for state in sorted(found.keys() & {"cold", "warm"}):
            took = found[state]
            cold = state == "cold"
            of_disk = SLOWER_THAN_THE_DISK * disk["seconds"]
            rows.append(
                [
                    case.title if cold else "",
                    state,
                    against(took["seconds"], of_disk if cold else None, "{:.1f}"),
                    f"{took['cpu']:.1f}",
                    f"{disk['seconds']:.1f}" if cold else "",
                    against(
                        took["read"] / 1e9, case.most_read and case.most_read / 1e9 if cold else None
                    ),
                    f"{disk['planned'] / 1e9:.2f} in {disk['reads']:,}" if cold else "",
                    f"{took['faults']:,}",
                    f"{took['anonymous'] / 1e6:,.0f}",
                    f"{took['funnel']['kept']:,}" if cold else "",
                    f"{took['recall']:.2f}" if cold else "",
                ]
            )
    head = ["request", "", "seconds", "of CPU", "the disk, seconds", "GB read", "planned, reads"]
    return markdown([*head, "major faults", "memory, MB", "kept", "recall of nprobe"], rows)


def phase_table(cases: Mapping[str, Case], requests: Mapping[str, Any]) -> str:
    """Where the time goes."""
    names = list(next(iter(requests.values()))["cold"]["phases"]) if requests else []
    rows = []
    for name, found in requests.items():
        for state in sorted(found.keys() & {"cold", "warm"}):
            took = found[state]
            cells = [phase_cell(*took["phases"][phase]) for phase in names]
            other = took["seconds"] - sum(seconds for seconds, _ in took["phases"].values())
            rows.append([f"{cases[name].title}, {state}", *cells, f"{other:.1f}"])
    return markdown(["request", *(name.replace("_", " ") for name in names), "other"], rows)


def plan_table(cases: Mapping[str, Case], requests: Mapping[str, Any], plans: Mapping[str, Any]) -> str:
    """The seconds and bytes that were planned, those that were taken, and their quotients."""
    rows = []
    for name, plan in plans.items():
        took = requests.get(name, {})
        cells = [
            planned_and_taken(planned, taken, unit)
            for planned, taken, unit in (
                (plan["cold"], took.get("cold", {}).get("seconds"), "s"),
                (plan["warm"], took.get("warm", {}).get("seconds"), "s"),
                (plan["size"] / 1e9, took.get("cold", {}).get("read", 0) / 1e9, "GB"),
            )
        ]
        rows.append([cases[name].title, *cells])
    return markdown(["request", "cold", "warm", "read"], rows)


def planned_and_taken(planned: float, taken: float | None, unit: str) -> str:
    """Both, and how many times as much was planned."""
    if not taken:
        return f"planned {planned:.1f} {unit}"
    return f"planned {planned:.1f} {unit}, took {taken:.1f} {unit} ({planned / taken:.1f})"


def phase_cell(seconds: float, size: float) -> str:
    """Seconds, and GB if there are any."""
    return f"{seconds:.1f}" + (f", {size / 1e9:.2f} GB" if size > 5e6 else "")


def sparse_table(cases: Mapping[str, Case], found: Mapping[str, Any]) -> str:
    """What was fetched, and the plan."""
    rows = []
    source = found.get("source sparse", {}).get("seconds")
    for step, took in found.items():
        name = step.removesuffix(" again").removeprefix("sparse ")
        title = cases[name].title if name in cases else name.removesuffix(" sparse")
        title = title.replace("source", "the source alone")
        phases = took["phases"]
        limit = SLOWER_THAN_THE_SOURCE * source if step == "open sparse" and source else None
        rows.append(
            [
                title + (", again" if step.endswith("again") else ""),
                against(took["seconds"], limit, "{:.1f}"),
                f"{took['cpu']:.1f}",
                f"{took['fetched'] / 1e9:.2f} in {took.get('reads', 1):,}",
                f"{took['planned'] / 1e9:.2f} in {took['planned_reads']:,}" if "planned" in took else "",
                f"{took['read'] / 1e9:.2f}",
                f"{took['served'] / 1e9:.2f}",
                f"{took['anonymous'] / 1e6:,.0f}",
                ", ".join(f"{n.replace('_', ' ')} {s:.1f}" for n, (s, _) in phases.items() if s >= 0.1),
            ]
        )
    head = [
        "step",
        "seconds",
        "of CPU",
        "GB fetched, reads",
        "planned, reads",
        "GB read from the cache's disk",
    ]
    return markdown([*head, "GB the server read", "memory, MB", "phases, seconds"], rows)


def graph_table(took: Mapping[str, Any] | None) -> str:
    """Its steps, each from the last word of the one before to its own."""
    if took is None:
        return "Not measured."
    rows, before = [], 0.0
    for name, last in sorted(took["last"].items(), key=lambda step: step[1]):
        rows.append([name, f"{last - before:.0f}"])
        before = last
    rows.append(["all", f"{took['seconds']:.0f}"])
    return markdown(["step", "seconds"], rows) + "\n\n```\n" + "".join(took["told"]) + "```"


def check_table(cases: Mapping[str, Case], requests: Mapping[str, Any]) -> str:
    """What was compared."""
    rows = []
    for name, found in requests.items():
        told = found["check"]
        above = f"{told['above 2^32']:.0%}"
        rows.append([cases[name].title, f"{told['texts']:,}", above, f"{told['difference']:.1e}"])
    head = ["request", "rows with the texts that their ids give", "ids above 2^32"]
    return (
        "A sample of each also equals what Arrow's own memory map gives, and ids, similarity and rank of "
        "the first queries equal what faiss itself finds in the same lists.\n\n"
        + markdown([*head, "greatest difference of similarity"], rows)
    )
