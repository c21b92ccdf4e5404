"""Leases: which pages are held, among all processes that use a cache directory.

A lease is a file that lists pages and is locked by its process. The system releases the lock however the
process ends, and the next process that makes room recognizes the lease as dead.
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
LEASE_RECORD = 3 * 8  # bytes: file number, first page, page after the last

Pages = Mapping[int, Ranges]  # of each file, by its number


class Lease:
    """The pages that one request holds.

    Args:
        cache: the cache directory.

    """

    def __init__(self, cache: Path) -> None:
        self._path = cache / LEASES / uuid.uuid4().hex
        self._file: int | None = None

    def hold(self, pages: Pages) -> None:
        """Hold these pages and no others; requires the ledger lock."""
        if self._file is None:
            self._path.parent.mkdir(exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        records = [np.insert(some, 0, number, axis=1) for number, some in pages.items()]
        os.ftruncate(self._file, 0)
        with open(self._file, "r+b", closefd=False) as file:
            file.write(np.concatenate([np.empty((0, 3), np.int64), *records]).tobytes())

    def release(self) -> None:
        """Hold no pages."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


@dataclass(frozen=True)
class OtherLeases:
    """What other requests hold.

    Attributes:
        held: pages of running requests.
        abandoned: pages of requests whose process died.
        running: number of running requests.
        dead: lease files of requests whose process died; to be removed after their pages were checked.

    """

    held: Pages
    abandoned: Pages
    running: int
    dead: Sequence[Path]


def read_leases(cache: Path) -> OtherLeases:
    """Read all leases; requires the ledger lock, and that the caller holds no lease."""
    held: dict[int, list[Ranges]] = {}
    abandoned: dict[int, list[Ranges]] = {}
    running = 0
    dead: list[Path] = []
    for path in (cache / LEASES).glob("*"):
        try:
            file = path.open("rb")
        except FileNotFoundError:  # released just now
            continue
        with file:
            content = file.read()
            alive = _is_locked(file.fileno())
        running += alive
        complete = len(content) // LEASE_RECORD * LEASE_RECORD  # its process may have died while writing
        records = np.frombuffer(content[:complete], np.int64).reshape(-1, 3)
        for number in np.unique(records[:, 0]):
            pages = held if alive else abandoned
            pages.setdefault(int(number), []).append(records[records[:, 0] == number, 1:])
        if not alive:
            dead.append(path)
    return OtherLeases(_united(held), _united(abandoned), running, dead)


def remove_leases(cache: Path) -> None:
    """Remove leases of dead processes before files change their numbers; only while nobody reads."""
    for path in (cache / LEASES).glob("*"):
        path.unlink()


def _is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _united(pages: Mapping[int, list[Ranges]]) -> Pages:
    return {number: union(*some) for number, some in pages.items()}
