"""Search and metadata read only bytes that they declared before."""

import ctypes
import mmap
import os
import shutil
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from helpers import indices
from helpers.metadata import metadata_files, write
from helpers.sparse import OnlyDeclared
from helpers.staging import write_many_lists
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laion_assets.index import faiss_index, inverted_lists
from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.io.ranges import members
from laion_assets.staging.sparse.reads import PAGE_SIZE, pages_of

numbers = count()


@pytest.fixture(scope="module")
def many_lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "index"
    write_many_lists(folder, 2000)
    return folder


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), k=st.integers(1, 300), nprobe=st.integers(1, 400))
def test_a_search_reads_no_byte_that_it_did_not_ask_for(many_lists, tmp_path, seed, k, nprobe):
    path, lists = indices.index_paths(many_lists)
    folder = tmp_path / str(next(numbers))
    folder.mkdir()
    shutil.copy(path, folder)
    disk = OnlyDeclared({folder / lists.name: lists})
    queries = indices.random_rows(np.random.default_rng(seed), 20)
    sparse, whole = Index(folder / path.name, folder / lists.name, disk), Index(path, lists)
    found, expected = (index.search(queries, k, nprobe) for index in (sparse, whole))
    for ours, theirs in zip(vars(found).values(), vars(expected).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert 0 < disk.bytes_needed <= lists.stat().st_size
    assert nprobe > 20 or disk.bytes_needed < lists.stat().st_size
    for ours, theirs in zip(sparse.sample(20, 3), whole.sample(20, 3), strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])
    shutil.rmtree(folder)


def write_compressed(path: Path, table: pa.Table, batch: int) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as out:
        out.write_table(table.combine_chunks(), max_chunksize=batch)


@settings(max_examples=60)
@given(
    tables=metadata_files(),
    batch=st.integers(1, 4),
    compressed=st.booleans(),
    small=st.sampled_from([0, 1 << 30]),
    data=st.data(),
)
def test_rows_are_taken_without_a_byte_that_was_not_asked_for(
    tmp_path_factory, tables, batch, compressed, small, data
):
    folder = tmp_path_factory.mktemp("metadata")
    right = write(folder / "right", tables, batch=batch)
    if compressed:
        for path, table in zip(right, tables, strict=True):
            write_compressed(path, table, batch)
    (folder / "sparse").mkdir()
    disk = OnlyDeclared({folder / "sparse" / path.name: path for path in right})
    whole = Metadata(right)
    with mock.patch("laion_assets.index.metadata.SMALL", small):
        metadata = Metadata([folder / "sparse" / path.name for path in right], disk=disk)
    assert (len(metadata), metadata.schema) == (len(whole), whole.schema)
    ids = st.integers(0, len(whole) - 1)
    for wanted in data.draw(st.lists(st.lists(ids, max_size=6), max_size=3)) if len(whole) else [[]]:
        some = np.array(wanted, np.int64)
        assert metadata.take(some) == whole.take(some)
        assert metadata.take(some, ["url"]) == whole.take(some, ["url"])
        assert metadata.take(some, whole.schema.names) == whole.take(some, whole.schema.names)
    shutil.rmtree(folder)


def test_views_are_read_whole_and_right(tmp_path):
    texts = ["a", None, "a text that is too long to be inline"]
    table = pa.table({"url": pa.array(texts, pa.string_view())})
    (right,) = write(tmp_path / "right", [table])
    sparse = tmp_path / right.name
    metadata = Metadata([sparse], disk=OnlyDeclared({sparse: right}))
    assert metadata.take(np.array([2, 1, 0]))["url"].to_pylist() == texts[::-1]


def test_little_is_read_of_metadata(tmp_path):
    rows = 50_000
    texts = pa.array(
        [f"https://example.org/{number}/{'x' * (number % 90)}.jpg" for number in range(rows)]
    )
    table = pa.table({"url": texts, "caption": texts, "WIDTH": np.arange(rows)})
    (right,) = write(tmp_path / "right", [table], batch=8192)
    sparse = tmp_path / right.name
    disk = OnlyDeclared({sparse: right})
    metadata = Metadata([sparse], disk=disk)
    opened = disk.bytes_needed
    assert opened < 10_000
    ids = np.random.default_rng(0).permutation(rows)[:100]
    taken = metadata.take(ids)
    assert taken["url"].to_pylist() == texts.take(pa.array(ids)).to_pylist()
    values = 2 * sum(len(text) for text in taken["url"].to_pylist())
    headers = 3 * 7 * 1000  # of all batches, again
    assert disk.bytes_needed - opened <= values + 100 * (8 + 8 + 8) + headers


def resident_pages(path: Path) -> set[int]:
    """The pages of a file that are in memory; to ask by reading would make the kernel read ahead."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        found = (ctypes.c_ubyte * -(-len(mapped) // PAGE_SIZE))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), found) == 0
        return set(np.flatnonzero(np.frombuffer(found, np.uint8) & 1).tolist())


def test_of_cold_lists_nothing_else_is_read(many_lists, tmp_path, monkeypatch):
    path, lists = indices.index_paths(shutil.copytree(many_lists, tmp_path / "cold"))
    monkeypatch.setattr(inverted_lists, "WORTH_READING_AHEAD", 0)
    monkeypatch.setattr(inverted_lists.InvertedLists, "read_ahead", lambda *_: None)  # as if it came late
    index, query = Index(path, lists), indices.random_rows(np.random.default_rng(0), 1)
    needed = index._lists.ranges(index.nearest_lists(query, 2).ravel())
    with lists.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_pages(lists):
        pytest.skip("this file system does not forget what it has in memory")
    index.search(query, 5, 2)
    assert resident_pages(lists) == set(members(pages_of(needed)))
    assert len(needed) < lists.stat().st_size // PAGE_SIZE


def test_long_lists_are_read_ahead_and_shared_between_threads_without_changing_an_answer(
    many_lists, monkeypatch
):
    index = Index(*indices.index_paths(many_lists))
    queries = indices.random_rows(np.random.default_rng(0), 50)
    every = index.search(queries, index.rows, 20)  # of ties, those with the first ids are first
    monkeypatch.setattr(inverted_lists, "WORTH_READING_AHEAD", 0)
    for few, k, rows, at_once, ahead in (
        (50, 10, 1, 1, 1 << 30),
        (50, 300, 1 << 30, 1 << 30, 1 << 30),
        (1, 10, 50, 1, 5000),
        (1, 1 << 30, 50, 1, 5000),
    ):
        monkeypatch.setattr(faiss_index, "ROWS_OF_THE_FIRST_ROUND", rows)
        monkeypatch.setattr(inverted_lists, "BYTES_AT_ONCE", at_once)
        monkeypatch.setattr(inverted_lists, "MOST_AHEAD", ahead)
        found = index.search(queries[:few], k, 20)
        ids, similarity, code = (of[:few, :k] for of in (every.ids, every.similarity, every.code))
        np.testing.assert_array_equal(found.ids, ids)
        np.testing.assert_array_equal(found.similarity, similarity)
        some = ids >= 0
        np.testing.assert_array_equal(found.codes[found.code[some]], every.codes[code[some]])
        np.testing.assert_array_equal(found.lists, every.lists[:few])
