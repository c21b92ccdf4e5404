"""Silence C++ libraries that print to standard output."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Discard everything that is printed to standard output inside the block.

    faiss prints a line whenever it opens or resizes lists on disk, and has no option to disable this. It
    prints from C, so the file descriptor is redirected, which affects all threads of the process.
    """
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    saved = os.dup(1)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
