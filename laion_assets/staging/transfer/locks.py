"""Locks on a cache directory: who may read it, and who may change it.

They are flock locks, which the system releases when their process ends, however it ends. They work among
the processes of one machine; stagers on several machines must not share a directory over a network.
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
    """Keep stagers from changing the index; requires no write access."""
    with (cache / INDEX_LOCK).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def changing(cache: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keep readers out; waits for those at work."""
    with (cache / INDEX_LOCK).open("ab") as file:
        lock_exclusively(file, lambda: log(f"waiting for the searches that read {cache}"))
        yield


@contextmanager
def staging(cache: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keep other stagers out; waits for the one at work, and logs which one it is."""
    with (cache / STAGER_LOCK).open("a+") as file:
        lock_exclusively(file, lambda: log(f"waiting for {_holder(file)}, which is staging to {cache}"))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": now}, file)
        file.flush()
        yield


@contextmanager
def ledger(cache: Path) -> Iterator[None]:
    """Read and change which pages of sparse files are present and held; always brief."""
    with (cache / LEDGER_LOCK).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def fetching(cache: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Be the only process that fetches pages of sparse files."""
    with (cache / FETCH_LOCK).open("ab") as file:
        lock_exclusively(file, lambda: log(f"waiting for another request that fetches to {cache}"))
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.load(file)
        return f"the stager on {holder['host']} (process {holder['pid']}, since {holder['since']})"
    except (ValueError, KeyError, TypeError):  # it has the lock, but has not written yet
        return "another stager"
