"""Estimate which share of a table's URLs still work, by requesting a sample of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from laion_assets.io.remote_images import Bounds, NotFetched, check_urls

SAMPLE = 200  # URLs; the 95 % interval is then at most 14 percentage points wide
BOUNDS = Bounds(seconds=60, at_once=32)
Z = 1.96  # of a normal distribution: 95 % lie within so many standard deviations


@dataclass(frozen=True)
class Liveness:
    """How many URLs of a sample work.

    Attributes:
        working: number of URLs that work.
        requested: number of URLs that answered, or were found dead, in time.
        reasons: why the others do not work, the most frequent first.

    """

    working: int
    requested: int
    reasons: str

    @property
    def share(self) -> float:
        """Share of the URLs that work, to four digits; 0 if none was requested."""
        return round(self.working / self.requested, 4) if self.requested else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the share, by Wilson's method; 0 to 1 if none was requested."""
        n = self.requested
        if not n:
            return 0.0, 1.0
        share, spread = self.working / n, Z**2 / n
        middle = share + spread / 2
        half = Z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
        return max((middle - half) / (1 + spread), 0.0), min((middle + half) / (1 + spread), 1.0)


def measured_liveness(batches: Iterable[pa.RecordBatch], rows: int, bounds: Bounds = BOUNDS) -> Liveness:
    """Request a sample of URLs; only call this if the user has allowed it.

    Args:
        batches: column url.
        rows: number of rows in all batches.
        bounds: limits on requests; URLs that are not reached in time say nothing.

    """
    found = check_urls(sampled(batches, rows), bounds)
    dead = [each for each in found if isinstance(each, NotFetched)]
    reasons = Counter(each.reason for each in dead if not each.late)
    return Liveness(
        working=len(found) - len(dead),
        requested=len(found) - sum(each.late for each in dead),
        reasons="; ".join(f"{number} {reason}" for reason, number in reasons.most_common()),
    )


def sampled(batches: Iterable[pa.RecordBatch], rows: int) -> list[str | None]:
    """Return URLs drawn at random with a fixed seed, in order of their rows."""
    drawn = np.sort(np.random.default_rng(0).choice(rows, min(SAMPLE, rows), replace=False))
    found: list[str | None] = []
    start = 0
    for batch in batches:
        low, high = np.searchsorted(drawn, [start, start + len(batch)])
        found += batch["url"].take(pa.array(drawn[low:high] - start)).to_pylist()
        start += len(batch)
    return found
