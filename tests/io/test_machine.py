"""The limits of this machine and of the container that the process runs in."""

import os
from pathlib import Path

import pytest

from laion_assets.io import parallel
from laion_assets.io.machine import cores, free_memory


@pytest.mark.parametrize(
    ("limit", "free"), [("max", 6_000_000 * 1024), ("3000000000", 1_000_000_000), ("1000000000", 0)]
)
def test_memory_is_free_up_to_the_limit_of_the_container_and_files_do_not_count(tmp_path, limit, free):
    write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 9000000 kB\nMemFree: 100000 kB\nMemAvailable:    6000000 kB\n",
            "sys/fs/cgroup/pod/memory.max": f"{limit}\n",
            "sys/fs/cgroup/pod/memory.stat": "anon 2000000000\nfile 9000000000\n",
        },
    )
    assert free_memory(tmp_path) == free
    (tmp_path / "sys/fs/cgroup/pod/memory.max").unlink()
    assert free_memory(tmp_path) == 6_000_000 * 1024
    assert free_memory(Path("/")) > 0


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("50000 100000", 1), ("250000 100000", 3), ("1600000 100000", 8)],
)
def test_a_container_uses_as_many_cores_as_it_has_time_for(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    write(tmp_path, {"sys/fs/cgroup/pod/cpu.max": f"{quota}\n"})
    assert cores(tmp_path) == expected


def test_limits_of_the_groups_above_hold_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    write(
        tmp_path,
        {
            "proc/meminfo": "MemAvailable: 6000000 kB\n",
            "sys/fs/cgroup/job/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/job/memory.max": "3000000000\n",
            "sys/fs/cgroup/job/memory.stat": "anon 2000000000\n",
            "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n",
        },
        group="job/step",
    )
    assert cores(tmp_path) == 3
    assert free_memory(tmp_path) == 1_000_000_000


def test_without_a_limit_all_cores_are_used(tmp_path):
    write(tmp_path, {})
    assert cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("of_faiss", "usable"), [(8, 3), (3, 8)])
def test_threads_are_no_more_than_those_of_faiss_and_the_usable_cores(monkeypatch, of_faiss, usable):
    monkeypatch.setattr(parallel.faiss, "omp_get_max_threads", lambda: of_faiss)
    monkeypatch.setattr(parallel, "cores", lambda: usable)
    assert parallel.thread_count() == 3


def write(root: Path, files: dict[str, str], group: str = "pod") -> None:
    """Write files of `proc` and `sys`, in which this process belongs to a group."""
    for name, text in {**files, "proc/self/cgroup": f"0::/{group}\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
