"""The row counts of record batches are read from their headers once, and never believed blindly."""

import numpy as np
import pyarrow as pa
import pytest
from helpers.metadata import write

from laion_assets.index import arrow_layout
from laion_assets.index.batch_tables import BatchTables
from laion_assets.index.metadata import Metadata

TABLE = pa.table({"url": [str(number) for number in range(100)]})


@pytest.fixture
def path(tmp_path):
    (path,) = write(tmp_path, [TABLE], batch=7)
    return path


def opened(path, content="one"):
    metadata = Metadata([path], tables=BatchTables(path.parent / "kept", {path: content}))
    assert metadata.take(np.arange(100))["url"].to_pylist() == TABLE["url"].to_pylist()


def test_headers_are_read_once(path, monkeypatch):
    opened(path)
    monkeypatch.delattr(arrow_layout, "rows_and_compression")
    opened(path)
    with pytest.raises(AttributeError):
        opened(path, "another content")


def test_a_table_of_another_file_is_not_believed(path):
    opened(path)
    write(path.parent, [TABLE], batch=8)
    opened(path, "another content")
    opened(path, "another content")


def test_a_damaged_table_is_made_again(path):
    opened(path)
    (kept,) = (path.parent / "kept").iterdir()
    right = kept.read_bytes()
    for place in range(len(right)):
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
