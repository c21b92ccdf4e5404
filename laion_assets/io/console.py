"""Keeps the chatter of C++ libraries off the standard output.

What must not live here: anything else that prints.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Send what is printed in this block nowhere.

    faiss prints a line whenever it opens or resizes lists on disk, whatever is set. It does so from C,
    so it has to be caught at the file descriptor, which is that of the whole process.
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
