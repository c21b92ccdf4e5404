"""Who may read and who may change a cache directory.

The locks are flock's: the system frees them when their process ends, however it ends. They hold among the
processes of one machine; a directory shared over a network by stagers on many machines is not supported.
What must not live here: what is done under them.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

DATA = ".lock"
STAGER = ".stager"
LEDGER = ".ledger"
FETCHING = ".fetching"


@contextmanager
def reading(cache: Path) -> Iterator[None]:
    """Keep stagers from changing what is read; needs no right to write."""
    with (cache / DATA).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def changing(cache: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keep readers out; waits until those who read are done."""
    with (cache / DATA).open("ab") as file:
        _exclusively(file, lambda: log(f"waiting until the searches that read {cache} are done"))
        yield


@contextmanager
def staging(cache: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keep other stagers out; waits for the one at work, and says which that is."""
    with (cache / STAGER).open("a+") as file:
        _exclusively(file, lambda: log(f"waiting until {_holder(file)} is done with {cache}"))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": now}, file)
        file.flush()
        yield


@contextmanager
def ledger(cache: Path) -> Iterator[None]:
    """See and change, for a moment, which pages of sparse files are there and who holds them."""
    with (cache / LEDGER).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def fetching(cache: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Be the only one that fetches pages of sparse files."""
    with (cache / FETCHING).open("ab") as file:
        _exclusively(file, lambda: log(f"waiting until another request has fetched its part to {cache}"))
        yield


def _exclusively(file: IO[str] | IO[bytes], before_waiting: Callable[[], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        before_waiting()
        fcntl.flock(file, fcntl.LOCK_EX)


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.load(file)
        return f"the stager on {holder['host']} (process {holder['pid']}, since {holder['since']})"
    except (ValueError, KeyError, TypeError):  # it has only just got the lock
        return "another stager"
