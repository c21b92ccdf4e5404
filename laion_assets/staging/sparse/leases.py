"""Who holds which pages, among all processes that use a cache directory.

A lease is a file that lists pages, locked for as long as its process lives: the system frees it however
that ends, and whoever makes room next finds it dead. What must not live here: which pages to give up.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laion_assets.io.ranges import Ranges, union

LEASES = ".leases"
LINE = 3 * 8  # bytes: number of the file, first page, page beyond the last

Pages = Mapping[int, Ranges]  # of each file, by its number


class Lease:
    """The pages that a request holds.

    Args:
        cache: the directory that they are in.

    """

    def __init__(self, cache: Path) -> None:
        self._path = cache / LEASES / uuid.uuid4().hex
        self._file: int | None = None

    def take(self, pages: Pages) -> None:
        """Hold these pages and no others; to be called with the ledger locked."""
        if self._file is None:
            self._path.parent.mkdir(exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        lines = [np.insert(some, 0, number, axis=1) for number, some in pages.items()]
        os.ftruncate(self._file, 0)
        with open(self._file, "r+b", closefd=False) as file:
            file.write(np.concatenate([np.empty((0, 3), np.int64), *lines]).tobytes())

    def drop(self) -> None:
        """Hold nothing any more."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


@dataclass(frozen=True)
class Others:
    """What others hold.

    Attributes:
        pages: of requests at work.
        left: pages of requests whose process ended in the middle of them.
        leases: how many are at work.
        ended: the leases of the dead: to be removed once their pages were seen to.

    """

    pages: Pages
    left: Pages
    leases: int
    ended: Sequence[Path]


def leases_of_others(cache: Path) -> Others:
    """Read all leases; with the ledger locked, and no lease of one's own."""
    living: dict[int, list[Ranges]] = {}
    dead: dict[int, list[Ranges]] = {}
    count = 0
    ended: list[Path] = []
    for path in (cache / LEASES).glob("*"):
        try:
            file = path.open("rb")
        except FileNotFoundError:  # dropped this moment
            continue
        with file:
            content = file.read()
            alive = _is_locked(file.fileno())
        count += alive
        whole = len(content) // LINE * LINE  # it may have died while writing
        lines = np.frombuffer(content[:whole], np.int64).reshape(-1, 3)
        for number in np.unique(lines[:, 0]):
            held = living if alive else dead
            held.setdefault(int(number), []).append(lines[lines[:, 0] == number, 1:])
        if not alive:
            ended.append(path)
    return Others(_united(living), _united(dead), count, ended)


def forget_leases(cache: Path) -> None:
    """Remove leases of the dead, whose numbers of files will mean others; while nobody reads."""
    for path in (cache / LEASES).glob("*"):
        path.unlink()


def _is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _united(held: Mapping[int, list[Ranges]]) -> Pages:
    return {number: union(*some) for number, some in held.items()}
