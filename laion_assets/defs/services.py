"""Dagster on one machine: code server, webserver and daemon, each restarted when it ends.

`dagster dev` stops everything when its webserver or daemon ends, and leaves a dead code server dead.

Dagster's concept: https://docs.dagster.io/deployment/oss/oss-deployment-architecture
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import signal
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from laion_assets.defs.places import DATA
from laion_assets.defs.run_origin import LOCATION
from laion_assets.io.errors import InputError

LOCK = DATA / "dagster" / "dev.lock"
MODULE = "laion_assets.definitions"
PAUSE = 1.0  # seconds before a restart
SHORT = 20.0  # seconds; a service that ends sooner has not come up
MOST_SHORT = 5  # short lives in a row after which a service cannot be helped
GRACE_PERIOD = 10.0  # seconds for a service to end after its signal
PR_SET_PDEATHSIG = 1  # see prctl(2)
POLL = 0.1  # seconds
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Service:
    """A process to keep running.

    Attributes:
        name: for messages.
        command: the arguments after `python -m`.
        stop: the signal that stops it.

    """

    name: str
    command: tuple[str, ...]
    stop: signal.Signals = signal.SIGTERM


class GivenUpError(Exception):
    """A service ends right after every start."""


def serve(host: str, port: int, home: Path, environment: Mapping[str, str]) -> int:
    """Run Dagster until SIGINT or SIGTERM, and return the exit status.

    Args:
        host: address of the UI.
        port: port of the UI.
        home: Dagster's home, with `dagster.yaml`.
        environment: variables of the services.

    Raises:
        InputError: it already runs in this folder.

    """
    with only_one(f"http://{host}:{port}"), tempfile.TemporaryDirectory() as folder:
        socket, workspace = Path(folder) / "code.sock", Path(folder) / "workspace.yaml"
        server = {"location_name": LOCATION, "socket": str(socket)}
        workspace.write_text(yaml.safe_dump({"load_from": [{"grpc_server": server}]}))
        services = _services(host, port, socket, workspace)
        return asyncio.run(keep(services, {**environment, "DAGSTER_HOME": str(home)}, socket))


def _services(host: str, port: int, socket: Path, workspace: Path) -> list[Service]:
    """Return the code server first, because the others need it."""
    location = ["--module-name", MODULE, "--location-name", LOCATION, "--lazy-load-user-code"]
    code = ["dagster", "api", "grpc", "--socket", str(socket), "--log-level", "warning", *location]
    web = ["laion_assets.defs.webserver", "--host", host, "--port", str(port)]
    daemon = ["dagster._daemon", "run"]
    of_both = ["--workspace", str(workspace)]
    return [
        # Runs end with the code server; asked politely, it would wait for them.
        Service("code server", tuple(code), stop=signal.SIGKILL),
        Service("webserver", (*web, *of_both)),
        Service("daemon", (*daemon, *of_both)),
    ]


@contextmanager
def only_one(url: str) -> Iterator[None]:
    """Hold a lock in the block: two daemons with one history would each start every run.

    Args:
        url: address of the UI, for the message of the other.

    Raises:
        InputError: another process holds the lock.

    """
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"the UI of this folder already runs at {file.read()}: open it, or stop it first"
            ) from None
        file.truncate(0)
        file.write(url)
        file.flush()
        yield


async def keep(services: Sequence[Service], environment: Mapping[str, str], socket: Path) -> int:
    """Keep services running until SIGINT or SIGTERM, and return the exit status.

    Args:
        services: the first creates the socket, and the others start once it exists.
        environment: their variables.
        socket: path of the socket.

    """
    stopped = asyncio.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(each, stopped.set)
    waiting = asyncio.create_task(stopped.wait())
    kept: list[asyncio.Task[None]] = []
    try:
        for service in services:
            kept.append(asyncio.create_task(_keep(service, environment)))
            while not (socket.exists() or waiting.done() or kept[0].done()):
                await asyncio.sleep(POLL)
        await asyncio.wait([waiting, *kept], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in kept:
            task.cancel()
        ends = await asyncio.gather(*kept, return_exceptions=True)
    for end in ends:
        if isinstance(end, GivenUpError):
            print(f"error: {end}", file=sys.stderr)
            return 1
    return 0


async def _keep(service: Service, environment: Mapping[str, str]) -> None:
    """Restart a service whenever it ends; stop it when this task is cancelled.

    Raises:
        GivenUpError: it ends right after every start.

    """
    short = 0
    while True:
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *service.command,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process only, which stops the others in order
            preexec_fn=_end_with_this_process,
        )
        try:
            status = await process.wait()
        except asyncio.CancelledError:
            await _stop(process, service.stop)
            raise
        short = short + 1 if time.monotonic() - began < SHORT else 0
        if short == MOST_SHORT:
            raise GivenUpError(f"the {service.name} ends right after every start, see its output above")
        print(f"the {service.name} {_how(status)}: starting it again", file=sys.stderr, flush=True)
        await asyncio.sleep(PAUSE)


async def _stop(process: Process, how: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(how)
    try:
        await asyncio.wait_for(process.wait(), GRACE_PERIOD)
    except TimeoutError:
        process.kill()
        await process.wait()


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"


def _end_with_this_process() -> None:
    """Let the kernel kill a service whose parent is gone, which would keep the port and start runs."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
