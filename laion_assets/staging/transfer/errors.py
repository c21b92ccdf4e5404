"""What can go wrong while reading a source, and how long to be patient.

What must not live here: clients, and their own errors.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from laion_assets.io.errors import InputError
from laion_assets.staging.plan import SourceFile

TRIES = 8  # in a row without a byte: about a minute
FIRST_PAUSE = 0.5  # seconds
LONGEST_PAUSE = 32.0


class TransientError(Exception):
    """Reading failed in a way that passes: a reset connection, 429, 5xx, silence."""


class ChangedError(Exception):
    """A file of the source is no longer as it was listed."""

    def __init__(self, file: SourceFile, reason: str) -> None:
        super().__init__(reason)
        self.file = file


def not_allowed(url: str, error: Exception) -> InputError:
    """Return the error to raise where reading is forbidden."""
    return InputError(
        f"no right to read {url} ({_first_line(error)}): give the account that this runs as the role "
        "Storage Object Viewer on the bucket, or what goes by that name there, and check its credentials"
    )


class Patience:
    """Waits between tries, longer each time, and gives up when nothing helps.

    Args:
        url: what is being read, for people.
        stop: set when others want the work to end.
        log: takes a line about each pause.

    """

    def __init__(self, url: str, stop: threading.Event, log: Callable[[str], None]) -> None:
        self._url = url
        self._stop = stop
        self._log = log
        self._failures = 0

    def wait(self, error: TransientError) -> None:
        """Wait before the next try.

        Raises:
            InputError: there were enough tries.

        """
        self._failures += 1
        if self._failures >= TRIES:
            raise InputError(
                f"{self._url} could not be read in {TRIES} tries ({_first_line(error)}): check the "
                "connection and materialize staged_laion_index again, which goes on from here"
            ) from error
        pause = min(FIRST_PAUSE * 2 ** (self._failures - 1), LONGEST_PAUSE)
        pause *= random.uniform(0.5, 1)  # so that many do not come back at once  # noqa: S311
        self._log(f"{self._url}: {_first_line(error)}; trying again in {pause:.1f} s")
        self._stop.wait(pause)

    def reset(self) -> None:
        """Start counting anew: something arrived."""
        self._failures = 0


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
