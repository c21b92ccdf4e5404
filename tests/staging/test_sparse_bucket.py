"""Sparse reads from a Google Cloud Storage server: their number, their ranges and their version."""

import re
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.faults import first
from helpers.gcs import Bucket
from helpers.project import Demo, failures, new_project, reported

from laion_assets.io.errors import InputError
from laion_assets.search.retrieval import Request, retrieve_table
from laion_assets.staging import NotStagedError, OpenIndex, TransferOptions, open_staged, stage
from laion_assets.staging.sparse.reads import PAGE_SIZE
from laion_assets.staging.transfer import backoff

METADATA = "metadata/000.arrow"
IN_A_REQUEST = "metadata%2F000%2Earrow"
FIRST_IN_FILE = 15_000  # the first id that the second file of the metadata has


@pytest.fixture
def filled(bucket: Bucket, scattered: Path) -> Bucket:
    """A bucket with an index of many pages."""
    bucket.put(scattered)
    bucket.remove("metadata/002.arrow")  # of the index that was there
    return bucket


def found(opened: OpenIndex, seed: int = 0, queries: int = 3) -> pa.Table:
    """What a request finds."""
    vectors = np.random.default_rng(seed).standard_normal((queries, opened.index.dimension))
    asked = Request(30, 0.94, 2)
    table, _ = retrieve_table(
        opened.index, opened.metadata, vectors.astype(np.float32), asked, per_seed=True
    )
    return table


@pytest.fixture
def expected(scattered: Path, tmp_path: Path) -> pa.Table:
    stage(str(scattered), None, tmp_path / "full")
    with open_staged(tmp_path / "full") as opened:
        return found(opened)


def test_only_what_is_touched_is_read_and_only_once(filled, cache, expected):
    proxy, size = filled.proxy, sum(p.stat().st_size for p in filled.objects.rglob("*") if p.is_file())
    paths: set[str] = set()
    proxy.rule = lambda path: paths.add(path)  # type: ignore[func-returns-value]
    done = stage(filled.uri, None, cache, sparse=True)
    assert (
        proxy.bytes_read
        == done.bytes_fetched
        == (filled.objects / "image.index" / "populated.index").stat().st_size
    )
    before = proxy.reads, proxy.bytes_read
    with open_staged(cache) as opened:
        assert found(opened) == expected
        fetched = opened.fetched
        assert (proxy.reads - before[0], proxy.bytes_read - before[1]) == (fetched.reads, fetched.fetched)
    lists = 3 * 2  # of 400, a read each if they are not neighbours
    rows = 90 * 2 * 2  # two texts of each row, their offsets and their bytes
    described = 2 * 3 + 2 * 4  # ends, footer and headers of two files with a few batches
    assert fetched.reads <= lists + rows + described
    assert fetched.fetched <= PAGE_SIZE * 3 * (rows + described) + size / 10
    assert fetched.fetched < size / 2
    versions = {file.name: file.version for file in done.manifest.files}
    assert all(any(f"generation={version}" in path for version in versions.values()) for path in paths)
    with open_staged(cache) as opened:
        assert found(opened) == expected
        assert (opened.fetched.reads, opened.fetched.fetched) == (0, 0)
        found(opened, seed=1)
        assert 0 < opened.fetched.fetched < fetched.fetched
    assert stage(filled.uri, None, cache, sparse=True).bytes_fetched == 0


@pytest.mark.parametrize("failure", [503, 429, "reset", "half"])
def test_transient_errors_are_retried(filled, cache, expected, failure):
    stage(filled.uri, None, cache, sparse=True)
    filled.proxy.rule = first(5, failure)
    with open_staged(cache) as opened:
        assert found(opened) == expected
        assert opened.fetched.retries == 5


def test_after_the_last_retry_a_request_fails_and_the_next_one_resumes(
    filled, cache, expected, monkeypatch
):
    monkeypatch.setattr(backoff, "MAX_TRIES", 2)
    stage(filled.uri, None, cache, sparse=True)
    with open_staged(cache):
        pass
    filled.proxy.rule = first(10_000, 503, of=IN_A_REQUEST)
    with open_staged(cache) as opened, pytest.raises(InputError, match=r"gs://.* 2 tries"):
        found(opened)
    filled.proxy.rule = lambda _: None
    with open_staged(cache) as opened:
        assert found(opened) == expected


def test_denied_access_is_an_error_at_once(filled, cache):
    stage(filled.uri, None, cache, sparse=True)
    filled.proxy.rule = first(10_000, 403)
    with pytest.raises(InputError, match=r"^no permission to read gs://"), open_staged(cache):
        pass


def change(bucket: Bucket, name: str, folder: Path) -> Path:
    """Overwrite a metadata file with other texts of the same length; returns it."""
    content = (bucket.objects / name).read_bytes()
    changed = folder / "changed"
    changed.write_bytes(content.replace(b"example.org", b"changed.org"))
    assert changed.read_bytes() != content
    bucket.write(name, changed.read_bytes())
    return changed


def test_an_object_overwritten_between_requests_fails_clearly_and_its_pages_are_dropped(
    filled, cache, tmp_path, expected
):
    stage(filled.uri, None, cache, sparse=True)
    with open_staged(cache) as opened:
        assert found(opened) == expected
        kept = opened.fetched.fetched
    change(filled, METADATA, tmp_path)
    with open_staged(cache) as opened:
        assert found(opened) == expected  # all of it is there, and of the version that was staged
        with pytest.raises(
            InputError, match=rf"{METADATA} is no longer .*generation \d+ is gone"
        ) as changed:
            opened.metadata.take(np.arange(0, FIRST_IN_FILE, 100))
        assert changed.value.about == "staged_index"
    with pytest.raises(NotStagedError, match="did not finish"), open_staged(cache):
        pass
    again = stage(filled.uri, None, cache, sparse=True)
    assert (again.bytes_fetched, again.fetched) == (0, 1)
    with open_staged(cache) as opened:
        ids = np.array([0, FIRST_IN_FILE - 1, FIRST_IN_FILE])
        hosts = [url.split("/")[2] for url in opened.metadata.take(ids)["url"].to_pylist()]
        assert hosts == ["changed.org", "changed.org", "example.org"]
        table = found(opened)
        assert table.drop_columns(["url", "caption"]) == expected.drop_columns(["url", "caption"])
        from_changed = np.array(table["id"]) < FIRST_IN_FILE
        assert ["changed.org" in url for url in table["url"].to_pylist()] == from_changed.tolist()
        assert opened.fetched.fetched < kept  # the lists and the other file were kept


def test_an_object_overwritten_while_it_is_read_is_never_mixed(filled, cache, tmp_path):
    stage(filled.uri, None, cache, sparse=True)
    with open_staged(cache):
        pass
    left = [20]
    once = threading.Lock()

    def overwrite(path: str) -> None:
        if IN_A_REQUEST not in path:
            return
        left[0] -= 1
        if left[0] == 0 and once.acquire(blocking=False):
            change(filled, METADATA, tmp_path)

    filled.proxy.rule = overwrite
    with open_staged(cache) as opened, pytest.raises(InputError, match="no longer what was staged"):
        found(opened, queries=40)
    filled.proxy.rule = lambda _: None
    stage(filled.uri, None, cache, sparse=True)
    with open_staged(cache) as opened:
        table = found(opened, queries=40)
    from_changed = np.array(table["id"]) < FIRST_IN_FILE
    assert ["changed.org" in url for url in table["url"].to_pylist()] == from_changed.tolist()


def test_the_same_bytes_uploaded_again_cost_nothing_but_staging_again(filled, cache, scattered, expected):
    first_time = stage(filled.uri, None, cache, sparse=True)
    with open_staged(cache) as opened:
        found(opened)
    filled.put(scattered)
    with open_staged(cache) as opened, pytest.raises(InputError, match="no longer what was staged"):
        found(opened, seed=1)
    again = stage(filled.uri, None, cache, sparse=True)
    assert again.manifest.fingerprint == first_time.manifest.fingerprint
    with open_staged(cache) as opened:
        assert found(opened) == expected
        assert opened.fetched.fetched == 0
        found(opened, seed=1)


def test_a_full_copy_and_parts_have_the_same_fingerprint(filled, cache, tmp_path):
    whole = stage(filled.uri, None, tmp_path / "whole", options=TransferOptions(chunk=1 << 20))
    assert stage(filled.uri, None, cache, sparse=True).manifest.fingerprint == whole.manifest.fingerprint


def test_a_run_on_a_bucket_whose_index_changes_says_so_and_the_next_one_works(
    bucket,
    demo: Demo,
    tmp_path,
):
    for name in ("000", "001", "002"):
        bucket.remove(f"metadata/{name}.arrow")
    bucket.put(demo.index)
    with new_project(tmp_path, Path(bucket.uri), demo.seeds, LAION_INDEX_URI=bucket.uri) as project:
        asked = {"nb_images_knn": 5, "nb_images_centroid": 20, "nprobe": 2}
        result = project.run("fruit", **asked)
        assert failures(result) == {}
        report = reported(result, "knn_urls")
        assert report["bytes fetched"] > 0
        assert report["reads of the bucket"] > 0
        assert re.match("not measured: sparse", report["recall of nprobe"])
        warm = reported(project.run("fruit", **asked), "knn_urls")
        assert (warm["bytes fetched"], warm["reads of the bucket"]) == (0, 0)
        bucket.put(demo.index)  # another generation of everything
        errors = failures(project.run("fruit", "knn_urls", nb_images_knn=300))
        assert "is no longer what was staged" in errors["knn_urls"]
        assert failures(project.run("fruit", "knn_urls", nb_images_knn=300)) == {}
