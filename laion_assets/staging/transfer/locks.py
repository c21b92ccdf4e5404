"""Locks on a cache directory, for readers and for stagers.

They are flock locks, which the operating system releases however a process ends. They work between
processes on one machine; stagers on several machines must not share a directory over a network.
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

from laion_assets.io.locks import lock_exclusively

INDEX_LOCK = ".lock"
STAGER_LOCK = ".stager"
LEDGER_LOCK = ".ledger"
FETCH_LOCK = ".fetching"


@contextmanager
def reading(cache: Path) -> Iterator[None]:
    """Keep stagers from changing the index; needs no write access."""
    with (cache / INDEX_LOCK).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def changing(cache: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Wait for current readers, then keep readers out."""
    with (cache / INDEX_LOCK).open("ab") as file:
        lock_exclusively(file, lambda: log(f"waiting for searches that read {cache}"))
        yield


@contextmanager
def staging(cache: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Wait for another stager and log which one it is, then keep other stagers out."""
    with (cache / STAGER_LOCK).open("a+") as file:
        lock_exclusively(file, lambda: log(f"waiting for {_holder(file)}, which is staging to {cache}"))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": now}, file)
        file.flush()
        yield


@contextmanager
def ledger(cache: Path) -> Iterator[None]:
    """Read or change the records of present and held pages of sparse files; hold this only briefly."""
    with (cache / LEDGER_LOCK).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def fetching(cache: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from fetching pages of sparse files."""
    with (cache / FETCH_LOCK).open("ab") as file:
        lock_exclusively(file, lambda: log(f"waiting for another request that fetches to {cache}"))
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.load(file)
        return f"the stager on {holder['host']} (process {holder['pid']}, since {holder['since']})"
    except (ValueError, KeyError, TypeError):  # it holds the lock, but has not written its name yet
        return "another stager"
