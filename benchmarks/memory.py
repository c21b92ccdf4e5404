"""What a piece of work takes, all its processes together: anonymous memory and page tables, and cores."""

from __future__ import annotations

import resource
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType


def anonymous_bytes() -> int:
    """The memory that this process and its children hold and no file backs, and their page tables."""
    held = bytes_of(Path("/proc/self"))
    for task in Path("/proc/self/task").iterdir():
        children: list[str] = []
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            children = (task / "children").read_text().split()
        for child in children:
            with suppress(FileNotFoundError, ProcessLookupError, KeyError):  # so has the child
                held += bytes_of(Path("/proc", child))
    return held


def bytes_of(process: Path) -> int:
    """The memory of a process, by its folder in /proc."""
    lines = (process / "status").read_text().splitlines()
    told = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(told[name].split()[0]) for name in ("RssAnon", "VmPTE"))


def cpu_seconds() -> float:
    """The time that this process and its children that ended have used of processor cores."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class PeakMemory:
    """`with PeakMemory() as memory: ...`, then `memory.peak` and `memory.before`, in bytes."""

    measured = staticmethod(anonymous_bytes)

    def __init__(self, interval: float = 0.02) -> None:
        self.interval = interval
        self.before = self.peak = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self.peak = max(self.peak, self.measured())

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = self.measured()
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._watcher.join()
        self.peak = max(self.peak, self.measured())
