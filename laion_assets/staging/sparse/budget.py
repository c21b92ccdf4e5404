"""Which pages to give up so that others fit: those that have been idle for longest.

What must not live here: the disk; everything is told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from laion_assets.io.arrays import Ids
from laion_assets.io.errors import InputError
from laion_assets.staging.sparse.pages import Stamps

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {f"{unit[0]}iB": 1 << 10 * power for power, unit in enumerate(UNITS) if unit}


def read_bytes(text: str, variable: str) -> int:
    """Read a number of bytes, such as `300GB`, `250 GiB` or `1000000`.

    Raises:
        InputError: it is none.

    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if not found or found[2].lower() not in units:
        raise InputError(f"{variable} is {text!r}: write it as a number of bytes, or like 300GB")
    return int(float(found[1]) * units[found[2].lower()])


def last_uses(portions: Iterable[Stamps]) -> Counter[int]:
    """Count pages by when they were last used; 0, where there is none, does not count."""
    counts: Counter[int] = Counter()
    for stamps in portions:
        used, pages = np.unique(stamps[stamps > 0], return_counts=True)
        counts.update(dict(zip(used.tolist(), pages.tolist(), strict=True)))
    return counts


class LongestIdle:
    """Picks so many pages, those last used first of all.

    Args:
        counts: of all pages that may be given up, by when they were last used.
        wanted: pages.

    """

    def __init__(self, counts: Counter[int], wanted: int) -> None:
        self._before = 0  # pages used earlier than this go
        self._of_then = 0  # and so many that were used at that time
        for used, pages in sorted(counts.items()):
            self._before, self._of_then = used, min(pages, wanted)
            wanted -= self._of_then
            if not wanted:
                break

    def pick(self, stamps: Stamps) -> Ids:
        """Tell the places of those to give up in a portion; all portions are to be gone through once."""
        earlier = (stamps > 0) & (stamps < self._before)
        then = np.flatnonzero(stamps == self._before) if self._of_then else np.empty(0, np.int64)
        some = then[: self._of_then]
        self._of_then -= len(some)
        return np.union1d(np.flatnonzero(earlier), some)


def portions_to_give_up(
    portions: Iterable[tuple[int, Stamps]], longest_idle: LongestIdle
) -> Iterator[Ids]:
    """Go through a file and yield the numbers of the pages to give up, ascending."""
    for first, stamps in portions:
        places = longest_idle.pick(stamps)
        if len(places):
            yield first + places
