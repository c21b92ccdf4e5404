"""Small files of what was derived from others, kept where that is possible."""

import errno
import uuid
from pathlib import Path

CANNOT_BE_KEPT = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}


def keep(path: Path, content: bytes) -> None:
    """Write a file atomically; a folder that is read-only or full does without it.

    Args:
        path: its folder is created if necessary.
        content: of the file.

    """
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}")  # pods on a node share process numbers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.write_bytes(content)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in CANNOT_BE_KEPT:
            raise
