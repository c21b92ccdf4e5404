import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import gcsfs
import numpy as np
import pyarrow as pa
import pytest
from helpers import indices
from helpers.faults import proxy_before
from helpers.gcs import Bucket, gcs_server
from helpers.staging import write_many_lists, write_source

from laion_assets.staging.transfer import backoff

numbers = count()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An index and its metadata in a local folder."""
    return write_source(tmp_path / "source")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def staging_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server only for these tests, because they change its files; its URL and its folder."""
    root = tmp_path_factory.mktemp("server") / "objects"
    with gcs_server(root) as url:
        yield url, root


@pytest.fixture
def bucket(
    staging_server: tuple[str, Path], source: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    """A bucket with the index that is in the folder `source` too; pauses between retries are short."""
    url, root = staging_server
    fs = gcsfs.GCSFileSystem(endpoint_url=url, token="anon", skip_instance_cache=True)
    name = f"staging-{next(numbers)}"
    fs.mkdir(name)
    monkeypatch.setattr(backoff, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(backoff, "LONGEST_PAUSE", 0.05)
    with proxy_before(url) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        made = Bucket(fs, name, root, proxy)
        made.put(source)
        yield made


@pytest.fixture(scope="session")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of many pages: 400 lists, and metadata in two files."""
    folder = tmp_path_factory.mktemp("scattered") / "source"
    rows = 30_000
    write_many_lists(folder, rows, seed=1)
    texts = pa.array([f"https://example.org/{n}/{'x' * (n % 97)}.jpg" for n in range(rows)])
    table = pa.table({"url": texts, "caption": texts, "punsafe": np.linspace(0, 1, rows)})
    indices.write_files(folder / "metadata", np.array_split(np.arange(rows), 2), table, batch=4096)
    return folder


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where durability costs nothing."""
    folder = Path("/dev/shm") / f"laion-sparse-{os.getpid()}-{next(numbers)}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)
