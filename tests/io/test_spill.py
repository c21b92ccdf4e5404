"""Intermediate results on the disk: arrays and sorted rows."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from laion_assets.io import spill
from laion_assets.io.errors import InputError


def test_a_large_array_lies_in_a_file_without_a_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(spill, "HELD_BYTES", 1 << 20)
    array = spill.spilled((3, 1 << 20), np.uint8)
    array[1] = 7
    assert array.sum() == 7 << 20
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert not list(tmp_path.iterdir())
    del array
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_an_array_that_does_not_fit_names_the_folder_and_the_remedy(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError, match=f"{tmp_path} has no room .* TMPDIR"):
        spill.spilled((1 << 62,), np.uint8)


@pytest.mark.parametrize("rows", [0, 1, 10, 1000])
def test_rows_are_sorted_by_their_place_however_they_arrive(rows, monkeypatch) -> None:
    monkeypatch.setattr(spill, "SORTED_ROWS", 64)
    places = np.random.default_rng(rows).permutation(rows)
    schema = pa.schema({"text": pa.string()})

    def batches():
        for some in np.array_split(places, 7):
            yield some, pa.RecordBatch.from_pydict({"text": [f"row {n}" for n in some]}, schema)

    found = list(spill.sorted_batches(batches(), schema, rows, 10))
    assert all(batch.schema == schema for batch in found)
    assert [len(batch) for batch in found] == [10] * (rows // 10) + [rows % 10] * (rows % 10 > 0)
    texts = [text for batch in found for text in batch["text"].to_pylist()]
    assert texts == [f"row {n}" for n in range(rows)]
