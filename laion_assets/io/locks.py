"""Locks on files, which the system frees however a process ends."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from typing import IO, Any


def lock_exclusively(file: IO[Any], before_waiting: Callable[[], object]) -> None:
    """Lock a file until it is closed.

    Args:
        file: is open for writing.
        before_waiting: is called where another process holds the lock, before this one waits for it.

    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        before_waiting()
        fcntl.flock(file, fcntl.LOCK_EX)
