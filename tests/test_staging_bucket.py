"""Staging from a real Google Cloud Storage server, and from one that fails."""

from pathlib import Path

import gcsfs
import pytest
from conftest import contents
from test_staging import data, is_readable, write_source

from laion_assets.retrieval.staging import stage

pytest_plugins = "gcs"


@pytest.fixture
def bucket(gcs: str, tmp_path: Path) -> str:  # noqa: ARG001
    """A bucket of one's own, with an index in the folder `laion`."""
    fs = gcsfs.GCSFileSystem()
    name = tmp_path.name.replace("_", "-")
    fs.mkdir(name)
    fs.put(f"{write_source(tmp_path / 'source')}/", f"{name}/laion/", recursive=True)
    return f"gs://{name}"


def test_a_copy_from_a_bucket_is_whole_verified_and_not_made_twice(bucket, tmp_path):
    cache, there = tmp_path / "cache", contents(tmp_path / "source")
    done = stage(f"{bucket}/laion", None, cache)
    assert data(cache) == there
    assert done.bytes_fetched == sum(map(len, there.values()))
    assert done.verified == "size and the source's crc32c of every file"
    assert is_readable(cache)
    again = stage(f"{bucket}/laion", None, cache)
    assert (again.bytes_fetched, again.bytes_reused) == (0, done.bytes_fetched)
