"""The local disk: what makes writing to it last, what it holds, and when it takes no more.

What must not live here: what the files mean.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from laion_assets.io.errors import InputError

TAKES_NO_MORE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
BLOCK = 512  # bytes, the unit of st_blocks


def sync_folder(folder: Path) -> None:
    """Make what was renamed and removed in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def bytes_held(path: Path) -> int:
    """Bytes of the disk that a file takes: less than its size where parts of it are not there."""
    return path.stat().st_blocks * BLOCK


def cannot_write(folder: Path, error: OSError) -> InputError:
    """Return the error to raise where a folder takes no more."""
    return InputError(
        f"cannot write to {folder} ({error.strerror}): set LAION_CACHE_DIR to a folder with room that "
        "you can write to"
    )
