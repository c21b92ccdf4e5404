"""Show the progress of long work: a bar on a terminal, occasional lines in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0  # at least
SHARE_BETWEEN_LINES = 0.05  # of the elapsed time, if that is longer


class Progress:
    """Count work done towards a total. Any thread may call `advance`.

    Args:
        what: label of the bar and of each line.
        total: units of work.
        unit: name of the unit; "B" is shown in bytes with SI prefixes.
        log: called with each line if standard error is not a terminal.

    """

    def __init__(self, what: str, total: int, unit: str, log: Callable[[str], None]) -> None:
        self._lock = threading.Lock()
        self._what = what
        self._total = total
        self._log = log
        self._done = 0.0
        self._done_before = 0.0  # at the last line
        self._last_line = self._started = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=what,
            total=total,
            unit=unit,
            unit_scale=unit == "B",
            leave=False,
            disable=not terminal,
        )
        self._unit = unit

    def advance(self, amount: float) -> None:
        """Add work done."""
        with self._lock:
            self._done += amount
            self._bar.update(amount)
            now = time.monotonic()
            pause = max(SECONDS_BETWEEN_LINES, SHARE_BETWEEN_LINES * (now - self._started))
            advanced = self._done > self._done_before
            if self._bar.disable and advanced and now - self._last_line >= pause:
                self._log(self._line(now - self._last_line))
                self._last_line, self._done_before = now, self._done

    def _line(self, seconds: float) -> str:
        """Describe the progress, with the rate since the last line: a resumed copy starts above 0."""
        rate = (self._done - self._done_before) / seconds
        left = format_duration((self._total - self._done) / rate)
        done, total, speed = (self._amount(count) for count in (self._done, self._total, rate))
        return f"{self._what}: {done} of {total}, {speed}/s, {left} left"

    def _amount(self, count: float) -> str:
        number = tqdm.format_sizeof(count) if self._unit == "B" else f"{count:,.4g}"
        return f"{number}{self._unit}"

    def close(self) -> None:
        """Remove the bar from the terminal."""
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


def format_duration(seconds: float) -> str:
    """Format a time as "45 s", "12 min" or "3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 120 else f"{seconds:.0f} s"
