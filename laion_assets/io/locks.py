"""File locks, which the operating system releases however a process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from laion_assets.io.storage import writing


def lock_exclusively(file: IO[Any], before_waiting: Callable[[], object]) -> None:
    """Lock a file until it is closed.

    Args:
        file: a file that is open for writing.
        before_waiting: called before waiting, if another process holds the lock.

    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        before_waiting()
        fcntl.flock(file, fcntl.LOCK_EX)


@contextmanager
def locked(path: Path, before_waiting: Callable[[], object]) -> Iterator[None]:
    """Hold the lock on a file, which is created if needed and kept.

    Args:
        path: path of the file.
        before_waiting: see `lock_exclusively`.

    Raises:
        InputError: the file cannot be created.

    """
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    with file:
        lock_exclusively(file, before_waiting)
        yield


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Hold the lock on a folder, which need not be writable; wait for other processes that hold it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
