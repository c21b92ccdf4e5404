"""What this machine has to give: its cores, and its free memory and disk."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: no more than its container has time for (cgroup v2).

    Args:
        root: folder of `proc` and `sys`.

    """
    usable = len(os.sched_getaffinity(0))
    for group in _control_groups(root):
        with suppress(OSError, ValueError):  # no such file without cgroup v2, and "max" is no limit
            quota, period = map(int, (group / "cpu.max").read_text().split())
            usable = min(usable, math.ceil(quota / period))
    return usable


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process can still take.

    They are what the machine has, or less in a container with a limit (cgroup v2). Pages of files do not
    count as taken, because the kernel gives them up.

    Args:
        root: folder of `proc` and `sys`.

    """
    meminfo = (root / "proc/meminfo").read_text()
    available = re.search(r"^MemAvailable: *(\d+) kB", meminfo, re.MULTILINE)
    free = int(available[1]) * 1024 if available else 0
    for group in _control_groups(root):
        with suppress(OSError, ValueError):  # no such files without cgroup v2, and "max" is no limit
            limit = int((group / "memory.max").read_text())
            held = re.search(r"^anon (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            free = min(free, max(0, limit - int(held[1] if held else 0)))
    return free


def free_disk() -> int:
    """Return the free bytes in the folder of temporary files."""
    return shutil.disk_usage(tempfile.gettempdir()).free


def _control_groups(root: Path) -> list[Path]:
    """Return the folders of the groups whose limits hold for this process: its own, and those above."""
    named = re.search(r"^0::/(.*)$", (root / "proc/self/cgroup").read_text(), re.MULTILINE)
    top = root / "sys/fs/cgroup"
    group = top / (named[1] if named else "")
    return [group, *(above for above in group.parents if above.is_relative_to(top))]
