"""Where record batches are is read from their headers once, and never believed blindly."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.metadata import write

from laion_assets.build import Build, Request
from laion_assets.build.shards import BATCH_ROWS
from laion_assets.index import arrow_layout
from laion_assets.index.arrow_layout import BatchTable
from laion_assets.index.batch_tables import BatchTables, published_tables, table_as_parquet
from laion_assets.index.metadata import Metadata
from laion_assets.io.errors import InputError
from laion_assets.staging import open_staged, stage

TABLE = pa.table({"url": [str(number) for number in range(100)]})


@pytest.fixture
def path(tmp_path):
    (path,) = write(tmp_path, [TABLE], batch=7)
    return path


def build_index(folder, rows):
    embeddings = folder.with_name("embeddings")
    embeddings.mkdir()
    vectors = np.random.default_rng(0).standard_normal((rows, 8), np.float32)
    urls = pa.array([str(number) for number in range(rows)])
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 8)
    pq.write_table(pa.table({"embedding": values, "url": urls}), embeddings / "0.parquet")
    Build(Request(str(embeddings), str(folder), index_key="IVF4,Flat")).run()


def parquet_of(columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def opened(path, content="one"):
    metadata = Metadata([path], tables=BatchTables(path.parent / "kept", {path: content}))
    assert metadata.take(np.arange(100))["url"].to_pylist() == TABLE["url"].to_pylist()


def test_headers_are_read_once(path, monkeypatch):
    opened(path)
    monkeypatch.delattr(arrow_layout, "read_headers")
    opened(path)
    with pytest.raises(AttributeError):
        opened(path, "another content")


@pytest.mark.parametrize("rows", [200, BATCH_ROWS, BATCH_ROWS + 7])
def test_headers_of_a_built_index_need_not_be_read(rows, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    build_index(folder, rows)
    stage(str(folder), None, tmp_path / "cache")
    monkeypatch.delattr(arrow_layout, "read_headers")
    with open_staged(tmp_path / "cache") as opened:
        assert len(opened.metadata) == rows
        assert opened.metadata.take(np.array([rows - 1]))["url"].to_pylist() == [str(rows - 1)]


def test_published_tables_of_other_files_are_not_believed(path, tmp_path):
    published = tmp_path / "batches.parquet"
    content = path.read_bytes()
    right = arrow_layout.read_table(len(content), lambda start, stop: content[start:stop])
    short = BatchTable(*(each[:-1] for each in vars(right).values()))
    for content, table in [("5 other", right), ("5 one", short), ("5 one", right)]:
        published.write_bytes(published_tables([table_as_parquet(content, table)]))
        tables = BatchTables(tmp_path / "kept", {path: "5 one"}, published)
        metadata = Metadata([path], tables=tables)
        assert metadata.take(np.arange(100))["url"].to_pylist() == TABLE["url"].to_pylist()


@pytest.mark.parametrize("content", [b"", b"[]", b"PAR1PAR1", parquet_of({"rows": [[1]]})])
def test_published_tables_that_cannot_be_read_are_named(content, tmp_path):
    published = tmp_path / "batches.parquet"
    published.write_bytes(content)
    with pytest.raises(InputError, match=r"batches\.parquet .*remove it from the index"):
        BatchTables(tmp_path / "kept", {}, published)


def test_a_table_of_another_file_is_not_believed(path):
    opened(path)
    write(path.parent, [TABLE], batch=8)
    opened(path, "another content")
    opened(path, "another content")


def test_a_damaged_table_is_made_again(path):
    opened(path)
    (kept,) = (path.parent / "kept").iterdir()
    right = kept.read_bytes()
    for place in [*range(8), *range(8, len(right), 61)]:
        wrong = bytearray(right)
        wrong[place] ^= 1 << place % 8
        kept.write_bytes(wrong)
        opened(path)
    for size in (0, len(right) // 2):
        kept.write_bytes(right[:size])
        opened(path)
    assert kept.read_bytes() == right
    assert len(list(kept.parent.iterdir())) == 1


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(30, "read-only")])
def test_where_nothing_can_be_kept_headers_are_read_again(path, error, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    opened(path)
    assert not (path.parent / "kept").exists()
