"""What a request is expected to take on this machine, and what a step of it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

from laion_assets.defs.history import PastMaterialization
from laion_assets.defs.resources import LaionIndex
from laion_assets.index.faiss_index import Index
from laion_assets.io.arrays import Floats
from laion_assets.io.errors import InputError
from laion_assets.io.progress import format_duration
from laion_assets.io.public_urls import is_same
from laion_assets.io.text import as_bytes
from laion_assets.search.cost import (
    Rates,
    Shape,
    Step,
    Steps,
    combine_steps,
    rows_read,
    search_of,
    search_steps,
    together,
    total,
)
from laion_assets.search.probe import (
    bytes_read,
    keep_rates,
    kept_rates,
    measured_rates,
    shape_of,
    spread_of,
)
from laion_assets.staging import OpenIndex

PLANNED = "planned and taken"  # metadata of a table
SHOWN_SECONDS, SHOWN_SHARE = 0.5, 0.01  # of the time; shorter steps are not named


@dataclass(frozen=True)
class Machine:
    """A machine with a staged index.

    Attributes:
        shape: numbers of the index.
        rates: what the machine takes.

    """

    shape: Shape
    rates: Rates

    def request(
        self, seeds: int, k_seeds: int, k_centroid: int, nprobe: int | None, read: tuple[float, float]
    ) -> Steps:
        """Estimate a whole request, with the search around the seeds and the centroid.

        Args:
            seeds: number of seeds.
            k_seeds: images requested around each seed.
            k_centroid: images requested around the centroid.
            nprobe: lists to probe; chosen if None.
            read: share of the images whose metadata is read, for both searches.

        """
        searches = [
            search_of(self.shape, queries, k, share, nprobe)
            for queries, k, share in zip((seeds, 1), (k_seeds, k_centroid), read, strict=True)
        ]
        rows = sum(rows_read(self.shape, search) for search in searches)
        return together(
            *(search_steps(self.shape, self.rates, search) for search in searches),
            combine_steps(self.rates, rows),
        )

    def search(self, index: Index, queries: Floats, k: int, nprobe: int | None, read: float) -> Step:
        """Estimate one of the searches, whose queries are known.

        Args:
            index: the index.
            queries: (q, dimension) float32.
            k: images requested around each.
            nprobe: lists to probe; chosen if None.
            read: share of the images whose metadata is read.

        """
        search = search_of(self.shape, len(queries), k, read, nprobe)
        search = replace(search, among=spread_of(index, queries, search.nprobe))
        return total(search_steps(self.shape, self.rates, search))


def known_machine(opened: OpenIndex, laion_index: LaionIndex) -> Machine | None:
    """Return this machine if it was measured before."""
    rates = kept_rates(laion_index.cache_dir, opened.manifest.fingerprint)
    return Machine(shape_of(opened, laion_index.cache_dir), rates) if rates else None


def planned_combining(laion_index: LaionIndex, fingerprint: str | None, rows: int) -> Step | None:
    """Estimate combining tables; None if this machine was not measured on the index.

    The index itself is not needed.
    """
    rates = kept_rates(laion_index.cache_dir, fingerprint) if fingerprint else None
    return total(combine_steps(rates, rows)) if rates else None


def measured_machine(laion_index: LaionIndex) -> Machine:
    """Return the rates of this machine; measure them first if necessary.

    Raises:
        InputError: the index is not staged, or another one is; or it is empty or cannot be read.

    """
    cache, open_index = laion_index.cache_dir, partial(laion_index.open, lambda _: None)
    with open_index() as opened:
        if not is_same(opened.manifest.source, laion_index.index_uri):
            raise InputError(
                f"{cache} holds {opened.manifest.source} and not {laion_index.index_uri}: set another "
                "cache directory, and materialize staged_laion_index",
                "cache_dir",
            )
        known = known_machine(opened, laion_index)
        if known:
            return known
        rates = measured_rates(open_index, cache)
        keep_rates(cache, opened.manifest.fingerprint, rates)
        return Machine(shape_of(opened, cache), rates)


def share_read(past: PastMaterialization | None, usual: float) -> float:
    """Return which share of the requested images has its metadata read: that of the last search.

    Args:
        past: the last search; None if there is none.
        usual: the share without one.

    """
    figures = past.figures if past else {}
    if not {"received", "near duplicates", "requested"} <= figures.keys():
        return usual
    share: float = (figures["received"] - figures["near duplicates"]) / max(figures["requested"], 1)
    return share


def as_comments(steps: Steps, machine: Machine) -> list[str]:
    """Describe the steps of a request as comments of a plan."""
    whole, sparse = total(steps), machine.shape.sparse
    shortest = max(SHOWN_SECONDS, SHOWN_SHARE * whole.cold)
    named = [f"{name} {_duration(each.cold)}" for name, each in steps.items() if each.cold >= shortest]
    of_it = f" ({', '.join(named)})" if named else ""
    requests = f", in {whole.reads:,.0f} requests to the source" if sparse else ""
    where = "on the disk" if sparse else "in memory"
    return [
        f"# reads: at most {as_bytes(whole.size)} cold{requests}",
        f"# time: about {_duration(whole.cold)}{of_it}, {_duration(whole.warm)} if the index is {where}",
        f"#   at the speed of this machine, measured on the index with {machine.rates.cores} cores",
    ]


@dataclass(frozen=True)
class Meter:
    """Measures a step from when it began.

    Attributes:
        started: seconds of a monotonic clock.
        read: bytes that this process had read from disks; None if that is not known.

    """

    started: float
    read: int | None

    @classmethod
    def start(cls, seconds: float = 0.0) -> Meter:
        """Begin to measure, after seconds that other steps took."""
        return cls(time.monotonic() - seconds, bytes_read())

    def seconds(self) -> float:
        """Return the seconds since the step began."""
        return round(time.monotonic() - self.started, 2)

    def against(self, planned: Step, opened: OpenIndex) -> str:
        """Describe what the step was planned to take and took: bytes from the disk or the source."""
        read = bytes_read()
        size = None if read is None or self.read is None else read - self.read
        if not opened.whole:
            size = opened.fetched.fetched
        took = f"{as_bytes(size)}, " if size is not None else ""
        return (
            f"planned at most {as_bytes(planned.size)}, {_duration(planned.cold)} cold and "
            f"{_duration(planned.warm)} warm; took {took}{self._elapsed()}"
        )

    def against_time(self, planned: Step) -> str:
        """Describe the time that a step was planned to take, if it needs no index, and took."""
        return f"planned at most {_duration(planned.warm)}; took {self._elapsed()}"

    def _elapsed(self) -> str:
        return _duration(time.monotonic() - self.started)


def _duration(seconds: float) -> str:
    return format_duration(max(seconds, 1))
