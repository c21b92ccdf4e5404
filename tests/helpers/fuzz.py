"""Tests that try at random: how often, from which seed, and what came of it. See `make fuzz`."""

from __future__ import annotations

import os
import random
from collections import Counter

FUZZ = int(os.environ.get("FUZZ", "1"))  # multiplies the attempts


def attempts(number: int) -> range:
    """So many attempts in `make test-faults`, FUZZ times as many in `make fuzz`."""
    return range(number * FUZZ)


def random_numbers() -> random.Random:
    """Random numbers whose seed is printed; FUZZ_SEED repeats a run."""
    seed = int(os.environ.get("FUZZ_SEED", random.randrange(1 << 32)))
    print(f"FUZZ_SEED={seed}")
    return random.Random(seed)


class Tally:
    """What came of the attempts of a test: all of them count, and those that break a promise fail it."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._counts: Counter[str] = Counter()
        self._broken: list[str] = []

    def add(self, outcome: str) -> None:
        self._counts[outcome] += 1

    def add_broken(self, outcome: str, what: str) -> None:
        """Count an attempt that ended as promised nowhere."""
        self._counts[outcome] += 1
        self._broken.append(f"{outcome}: {what}")

    def check(self, *always: str) -> None:
        """Print the counts, of some outcomes also if there are none, and fail if a promise was broken."""
        counts = dict.fromkeys(always, 0) | dict(self._counts)
        told = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        print(f"{self._subject}: {self._counts.total():,} tried: {told}")
        assert not self._broken, "\n".join(self._broken[:20])
