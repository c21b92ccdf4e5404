"""The local disk: complete and durable writes, allocated bytes, holes."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

from laion_assets.io.errors import InputError

DISK_FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
STAT_BLOCK = 512  # bytes, the unit of st_blocks
KEEP_SIZE, PUNCH_HOLE = 1, 2  # modes of Linux's fallocate


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all bytes at an offset; `os.pwrite` may write fewer."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allocated_bytes(path: Path) -> int:
    """Return the bytes of disk that a file occupies, which is less than its size if it has holes."""
    return path.stat().st_blocks * STAT_BLOCK


def cannot_write(folder: Path, error: OSError) -> InputError:
    """Return the error for a folder that is not writable."""
    return InputError(
        f"cannot write to {folder} ({error.strerror}): choose a folder with free space and write access",
        "cache_dir",
    )


def punch_hole(descriptor: int, start: int, length: int, path: Path) -> None:
    """Free a part of a file, which then reads as zeros.

    Raises:
        InputError: the file system does not support it.

    """
    number = _fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, start, length)
    if number == errno.EOPNOTSUPP:
        raise InputError(
            f"the file system of {path} cannot punch holes into files: choose a folder on ext4, XFS or "
            "tmpfs",
            "cache_dir",
        )
    if number:
        raise OSError(number, os.strerror(number), str(path))


def _fallocate(descriptor: int, mode: int, start: int, length: int) -> int:
    """Call Linux's fallocate, which Python does not wrap; return the error number, 0 for success."""
    return ctypes.get_errno() if _libc_fallocate()(descriptor, mode, start, length) else 0


@cache
def _libc_fallocate() -> Any:
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return call
