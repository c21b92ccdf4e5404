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
SHORT_WRITE = 16 << 10  # bytes, which are copied sooner than another thread would run
ALLOCATE, KEEP_SIZE, PUNCH_HOLE = 0, 1, 2  # modes of Linux's fallocate


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all bytes at an offset; `os.pwrite` may write fewer."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def fill_hole(descriptor: int, data: bytes, start: int, path: Path, *, wait: bool) -> None:
    """Allocate blocks for bytes of a sparse file, and write them.

    Without blocks of its own, each page that lies apart takes three times as long to become durable:
    ext4 then searches for blocks around it too. A short write that does not wait for the disk keeps the
    interpreter: to get it back from many threads takes longer than to write. While the disk stalls, all
    threads stall.

    Args:
        descriptor: of the file.
        data: the bytes.
        start: offset.
        path: of the file.
        wait: whether the calls are likely to wait for the disk, so that other threads should run.

    Raises:
        InputError: the file system cannot allocate parts of a file.
        OSError: the disk is full or damaged.

    """
    wait = wait or len(data) > SHORT_WRITE
    number = _fallocate(descriptor, ALLOCATE, start, len(data), wait=wait)
    _raise_for(number, path)
    if wait or _pwrite(descriptor, bytes(data), start) < len(data):
        write_at(descriptor, data, start)  # if there is an error, it raises it


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
    _raise_for(_fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, start, length), path)


def _raise_for(number: int, path: Path) -> None:
    """Raise the error of a call to `_fallocate`, if there is one."""
    if number == errno.EOPNOTSUPP:
        raise InputError(
            f"the file system of {path} cannot punch holes into files: choose a folder on ext4, XFS or "
            "tmpfs",
            "cache_dir",
        )
    if number:
        raise OSError(number, os.strerror(number), str(path))


def _fallocate(descriptor: int, mode: int, start: int, length: int, *, wait: bool = True) -> int:
    """Call Linux's fallocate, which Python does not wrap; return the error number, 0 for success."""
    return ctypes.get_errno() if _libc(wait).fallocate(descriptor, mode, start, length) else 0


def _pwrite(descriptor: int, data: bytes, start: int) -> int:
    """Call pwrite without letting other threads run; return the bytes written, -1 for an error."""
    written: int = _libc(False).pwrite(descriptor, data, len(data), start)
    return written


@cache
def _libc(wait: bool) -> Any:
    """Return the C library; other threads run during a call that may wait."""
    libc = ctypes.CDLL(None, use_errno=True) if wait else ctypes.PyDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    libc.pwrite.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int64]
    libc.pwrite.restype = ctypes.c_ssize_t
    return libc
