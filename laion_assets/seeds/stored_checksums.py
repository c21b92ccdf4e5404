"""Compute checksums of files whose storage keeps none; an unchanged file is read only once."""

from __future__ import annotations

import math
import time
from typing import Any

from laion_assets.io.checksums import checksum_text, crc32c
from laion_assets.io.errors import InputError
from laion_assets.io.storage import Listed, first_line, is_regular
from laion_assets.io.text import printable
from laion_assets.seeds.seed_files import MAX_BYTES, NOT_REGULAR

READ_AT_ONCE = 1 << 20  # bytes
FILES_KEPT = 1 << 18
SHORTEST = 1.0  # seconds that each seed set may take

# Checksum and number of the bytes read so far, by path, size and time of the last write.
_known: dict[tuple[str, int, str], tuple[int, int]] = {}


class Deadline:
    """A time limit for listing seed sets.

    Args:
        seconds: time from now; None never stops.

    """

    def __init__(self, seconds: float | None = None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def share(self, parts: int) -> Deadline:
        """Return the deadline of one of several parts that start one after the other."""
        if self._end == math.inf:
            return self
        left = self._end - time.monotonic()
        return Deadline(min(left, max(left / parts, SHORTEST)))

    def check(self, what: str) -> None:
        """Check the time.

        Raises:
            InputError: the time is over; the message starts with `what`.

        """
        if time.monotonic() >= self._end:
            raise InputError(f"{printable(what)} is still being read; this continues at the next tick")


def checksum_of(fs: Any, listed: Listed, deadline: Deadline) -> str:
    """Return the crc32c of a file as a bucket reports it, or why it cannot be read.

    Args:
        fs: the file system.
        listed: the file.
        deadline: when to stop; the next call continues where this one ended.

    Raises:
        InputError: the time is over.

    """
    if listed.size > MAX_BYTES:
        return f"unreadable: {listed.size} bytes"
    try:
        return _read(fs, listed, deadline)
    except OSError as error:  # must not block other sets; reading this set reports the file
        return f"unreadable: {first_line(error)}"


def _read(fs: Any, listed: Listed, deadline: Deadline) -> str:
    key = (listed.path, listed.size, listed.written)
    checksum, done = _known.pop(key, (0, -1))
    try:
        if done < listed.size:
            if not is_regular(fs, listed.path):
                raise OSError(NOT_REGULAR)
            done = max(done, 0)
            with fs.open(listed.path, "rb") as file:
                file.seek(done)
                while piece := file.read(READ_AT_ONCE):
                    checksum, done = crc32c(piece, checksum), done + len(piece)
                    deadline.check(listed.path)
    finally:
        if done >= 0:
            _known[key] = checksum, done
        if len(_known) > FILES_KEPT:
            del _known[next(iter(_known))]
    return checksum_text(checksum)
