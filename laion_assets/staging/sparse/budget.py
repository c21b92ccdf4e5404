"""The budget of sparse files, and which pages to evict to stay within it: the least recently used."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from laion_assets.io.arrays import Ids
from laion_assets.io.errors import InputError
from laion_assets.staging.sparse.pages import Stamps

DEFAULT_BUDGET = 100 * 10**9  # bytes
BYTE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTE_UNITS |= {f"{unit[0]}iB": 1 << 10 * power for power, unit in enumerate(BYTE_UNITS) if unit}


def parse_size(text: str) -> int:
    """Parse a number of bytes, such as `300GB`, `250 GiB` or `1000000`.

    Args:
        text: the number, with a unit or without.

    Raises:
        InputError: it is not a number of bytes.

    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in BYTE_UNITS.items()}
    if not found or found[2].lower() not in units:
        raise InputError(f"{text!r} is not a number of bytes: write it like 300GB or 1000000")
    return int(float(found[1]) * units[found[2].lower()])


def count_last_uses(blocks: Iterable[Stamps]) -> Counter[int]:
    """Count pages by their last use; pages without data (0) are not counted."""
    counts: Counter[int] = Counter()
    for stamps in blocks:
        used, pages = np.unique(stamps[stamps > 0], return_counts=True)
        counts.update(dict(zip(used.tolist(), pages.tolist(), strict=True)))
    return counts


class LeastRecentlyUsed:
    """Picks a number of pages, the least recently used first.

    Args:
        counts: number of evictable pages by their last use.
        wanted: number of pages to pick.

    """

    def __init__(self, counts: Counter[int], wanted: int) -> None:
        self._cutoff = 0  # every page used before it is picked,
        self._at_cutoff = 0  # and so many of those used at it
        for used, pages in sorted(counts.items()):
            self._cutoff, self._at_cutoff = used, min(pages, wanted)
            wanted -= self._at_cutoff
            if not wanted:
                break

    def pick(self, stamps: Stamps) -> Ids:
        """Return the positions to evict in a block, ascending; to be called once for each block."""
        before = (stamps > 0) & (stamps < self._cutoff)
        at = np.flatnonzero(stamps == self._cutoff) if self._at_cutoff else np.empty(0, np.int64)
        some = at[: self._at_cutoff]
        self._at_cutoff -= len(some)
        return np.union1d(np.flatnonzero(before), some)


def pages_to_evict(blocks: Iterable[tuple[int, Stamps]], lru: LeastRecentlyUsed) -> Iterator[Ids]:
    """Yield the numbers of the pages of a file to evict, ascending."""
    for first, stamps in blocks:
        positions = lru.pick(stamps)
        if len(positions):
            yield first + positions
