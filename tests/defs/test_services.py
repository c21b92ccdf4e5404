"""Services are started again whenever they end, and end with the process that keeps them.

tests/ui kills those of `make dev`.
"""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from laion_assets.defs import services
from laion_assets.defs.services import Service, keep, only_one
from laion_assets.io.errors import InputError


def test_a_service_that_never_comes_up_is_given_up(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(services, "PAUSE", 0)
    missing = Service("clock", ("no_such_module",))
    assert asyncio.run(keep([missing], dict(os.environ), tmp_path / "socket")) == 1
    told = capfd.readouterr().err
    assert told.count("No module named no_such_module") == services.MOST_SHORT
    assert "error: the clock ends right after every start" in told


def test_two_in_one_folder_are_refused_with_the_address_of_the_first(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        only_one("http://127.0.0.1:3000"),
        pytest.raises(InputError, match=r"already runs at http://127\.0\.0\.1:3000: "),
        only_one("http://127.0.0.1:3001"),
    ):
        pass
    with only_one("http://127.0.0.1:3001"):
        pass


@pytest.mark.faults
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_service_comes_back_and_ends_with_its_keeper(tmp_path, sent) -> None:
    (tmp_path / "ticking.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path('socket').write_text('')\n"
        "pathlib.Path('pid').write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    keeper = textwrap.dedent("""
        import asyncio, os, pathlib
        from laion_assets.defs.services import Service, keep
        service = Service("clock", ("ticking",))
        asyncio.run(keep([service], {**os.environ}, pathlib.Path("socket")))
    """)
    process = subprocess.Popen([sys.executable, "-c", keeper], cwd=tmp_path)
    pid = tmp_path / "pid"
    try:
        first = _other_than(pid, "")
        os.kill(int(first), signal.SIGKILL)
        second = _other_than(pid, first)
        process.send_signal(sent)
        assert process.wait(30) == (-sent if sent is signal.SIGKILL else 0)
        _wait_for_end(int(second))
    finally:
        process.kill()


def _other_than(file, before: str) -> str:
    for _ in range(600):
        if file.exists() and (now := file.read_text()) not in ("", before):
            return now
        time.sleep(0.1)
    raise AssertionError("the service does not run")


def _wait_for_end(pid: int) -> None:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the service still runs")
