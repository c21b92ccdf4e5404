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

SECONDS_BETWEEN_LINES = 15.0  # at first; in long work, a line for each twentieth of its time
TWENTIETH = 0.05


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
        self._done_before = 0  # when the last line was said
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
        self._unit = unit

    def advance(self, amount: int) -> None:
        """Add work done."""
        with self._lock:
            self._done += amount
            self._bar.update(amount)
            now = time.monotonic()
            pause = max(SECONDS_BETWEEN_LINES, TWENTIETH * (now - self._started))
            news = self._done > self._done_before
            if self._bar.disable and news and now - self._said >= pause:
                self._log(self._line(now - self._said))
                self._said, self._done_before = now, self._done

    def _line(self, seconds: float) -> str:
        """Tell how far it is, at the rate of the last seconds: a copy may have gone on from before."""
        rate = (self._done - self._done_before) / seconds
        left = told((self._total - self._done) / rate)
        done, total, speed = (self._amount(count) for count in (self._done, self._total, rate))
        return f"{self._what}: {done} of {total}, {speed}/s, {left} left"

    def _amount(self, count: float) -> str:
        number = tqdm.format_sizeof(count) if self._unit == "B" else f"{count:,.4g}"
        return f"{number}{self._unit}"

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


def told(seconds: float) -> str:
    """Return a time as people say it."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 120 else f"{seconds:.0f} s"
