"""Progress of long work: a bar on a terminal, a line now and then in a log.

What must not live here: knowledge of what is being done.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Counts work done towards a total; many threads may add to it.

    Args:
        what: what is being done, for people.
        total: units of work in all.
        unit: "B" is shown as bytes with prefixes.
        log: takes a line of text; used where there is no terminal.

    """

    def __init__(self, what: str, total: int, unit: str, log: Callable[[str], None]) -> None:
        self._lock = threading.Lock()
        self._what = what
        self._total = total
        self._log = log
        self._done = 0
        self._said = self._started = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=what,
            total=total,
            unit=unit,
            unit_scale=unit == "B",
            leave=False,
            disable=not terminal,
        )
        self._format = tqdm.format_sizeof if unit == "B" else str
        self._unit = unit

    def advance(self, amount: int) -> None:
        """Add work done."""
        with self._lock:
            self._done += amount
            self._bar.update(amount)
            now = time.monotonic()
            if self._bar.disable and now - self._said >= SECONDS_BETWEEN_LINES:
                self._said = now
                self._log(self._line(now - self._started))

    def _line(self, seconds: float) -> str:
        rate = self._done / seconds
        left = (self._total - self._done) / rate if rate else float("inf")
        done, total = self._format(self._done), self._format(self._total)
        return (
            f"{self._what}: {done} of {total} {self._unit}, "
            f"{self._format(round(rate, 1))} {self._unit}/s, {left:.0f} s left"
        )

    def close(self) -> None:
        """Take the bar off the terminal."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
