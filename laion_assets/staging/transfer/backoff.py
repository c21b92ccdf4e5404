"""Exponential backoff between retries of a read."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from laion_assets.io.errors import InputError
from laion_assets.staging.transfer.range_readers import TransientError, reason

MAX_TRIES = 8  # consecutive tries without a byte; with the pauses between them about a minute
PATIENCE = 60.0  # seconds without a byte after which there is no further try
FIRST_PAUSE = 0.5  # seconds
LONGEST_PAUSE = 32.0


class Backoff:
    """Waits between the tries of a read, longer each time, and limits their number and duration.

    Args:
        url: URL that is read, for messages.
        stop: ends a wait when set.
        log: called with a line about each wait.

    """

    def __init__(self, url: str, stop: threading.Event, log: Callable[[str], None]) -> None:
        self._url = url
        self._stop = stop
        self._log = log
        self.reset()

    def wait(self, error: TransientError) -> None:
        """Wait before the next try.

        Raises:
            InputError: that was the last try.

        """
        self._failures += 1
        silence = time.monotonic() - self._progress
        if self._failures >= MAX_TRIES or silence >= PATIENCE:
            raise InputError(
                f"{self._url} could not be read in {self._failures} tries and {silence:.0f} s "
                f"({reason(error)}): check the source and the connection, then try again; what is "
                "complete is kept"
            ) from error
        pause = min(FIRST_PAUSE * 2 ** (self._failures - 1), LONGEST_PAUSE)
        pause *= random.uniform(0.5, 1)  # so that clients do not retry simultaneously  # noqa: S311
        self._log(f"{self._url}: {reason(error)}; trying again in {pause:.1f} s")
        self._stop.wait(pause)

    def reset(self) -> None:
        """Start counting again, after a successful read."""
        self._failures = 0
        self._progress = time.monotonic()
