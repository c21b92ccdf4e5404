"""Processes that share work, and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from laion_assets.io import spill
from laion_assets.io.errors import InputError
from laion_assets.io.processes import in_processes
from laion_assets.io.spill import spilled

LARGE = (1 << 10, 1 << 11)


def summed(job: tuple[np.ndarray, int]) -> tuple[int, int]:
    array, number = job
    print("what a library prints is no answer")
    array[:1, :1] += number
    return int(array.sum()), os.getpid()


def refused(name: str) -> None:
    raise InputError(f"{name} is damaged: replace it", "staged_index")


class OddError(Exception):
    """An error that pickle writes and cannot read."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} of {other}")


def odd(place: str) -> object:
    if place == "error":
        raise OddError("a page", "a file")
    return lambda: place


def killed(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600 * number)
    return number


def ended(code: int) -> None:
    os._exit(code)


def waiting(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


@pytest.mark.parametrize("held", [0, 1 << 30], ids=["on the disk", "in memory"])
def test_processes_map_the_same_large_array(held, monkeypatch) -> None:
    monkeypatch.setattr(spill, "HELD_BYTES", held)
    array = spilled(LARGE, np.int32)
    array[:] = 1
    found = in_processes(summed, [(array, 0), (array, 1), (array[:, ::2], 2)])
    size = array.size
    assert [total for total, _ in found] == [size, size + 1, size // 2 + 2]
    assert len({process for _, process in found} | {os.getpid()}) == 4
    assert (array == 1).all()


def test_an_error_of_a_process_is_raised_as_it_is() -> None:
    with pytest.raises(InputError, match="is damaged: replace it") as raised:
        in_processes(refused, ["one", "two"])
    assert raised.value.about == "staged_index"
    assert "in refused" in "".join(raised.value.__notes__)


@pytest.mark.parametrize(("place", "told"), [("error", "a page of a file"), ("result", "lambda")])
def test_what_pickle_cannot_hand_over_is_told_as_it_is(place, told) -> None:
    with pytest.raises(Exception, match=told) as raised:
        in_processes(odd, [place])
    assert not isinstance(raised.value, InputError)
    assert "in a process that shares the work" in str(raised.value) + "".join(
        getattr(raised.value, "__notes__", [])
    )


def test_a_killed_process_is_named_with_the_remedy_and_the_others_end() -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=r"has ended \(SIGKILL\): give this step more memory"):
        in_processes(killed, [0, 1, 2])
    assert time.monotonic() - started < 60


def test_a_process_that_ends_itself_is_no_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match=r"has ended \(exit code 7\)"):
        in_processes(ended, [7])


@pytest.mark.faults
def test_processes_end_with_their_parent_however_it_ends(tmp_path) -> None:
    script = tmp_path / "script.py"  # without a guard of `__main__`, as users write them
    script.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from test_processes import waiting\n"
        "from laion_assets.io.processes import in_processes\n"
        f"in_processes(waiting, [{str(tmp_path)!r}] * 2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen([sys.executable, script], env=environment)
    try:
        until(lambda: len(numbers(tmp_path)) == 2)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not any(Path("/proc", str(number)).exists() for number in numbers(tmp_path)))


def numbers(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def until(happens) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)
