"""The budget of sparse files, and which pages to evict to stay within it: the least recently used."""

from __future__ import annotations

import re
from collections.abc import Sequence

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


def least_recently_used(last_uses: Sequence[Stamps], wanted: int) -> list[Ids]:
    """Return the positions of the pages to evict, ascending, in each of several files.

    Args:
        last_uses: of the pages of each file that may be evicted.
        wanted: number of pages to evict; all where there are fewer.

    """
    every = np.concatenate(last_uses)
    chosen = np.arange(len(every))
    if wanted < len(every):
        chosen = np.sort(np.argpartition(every, wanted)[:wanted])
    starts = np.cumsum([0, *map(len, last_uses)])
    of_files = np.split(chosen, np.searchsorted(chosen, starts[1:-1]))
    return [some - start for some, start in zip(of_files, starts[:-1], strict=True)]
