"""The rates of a machine: measured on any staged index, kept beside it, and not used for another."""

import json
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from helpers import indices

from laion_assets.io.errors import InputError
from laion_assets.search import probe
from laion_assets.search.cost import Pairwise, Rates, search_of, search_steps, total
from laion_assets.search.probe import bytes_read, keep_rates, kept_rates, measured_rates, shape_of
from laion_assets.search.retrieval import Request, retrieve_table
from laion_assets.staging import open_staged, stage

ROWS = 600
RATES = Rates(2, 1.5, *np.arange(1.0, 6), Pairwise(6, 7), Pairwise(8, 9), *np.arange(10.0, 20))


@pytest.fixture
def index(tmp_path):
    """Write an index of a form, with metadata of a kind."""

    def write(
        form: str = indices.MERGED, suffix: str = indices.ARROW, rows: int = ROWS, url: str = "url"
    ):
        folder = tmp_path / "index"
        indices.write_index(folder, indices.random_rows(np.random.default_rng(1), rows), form)
        table = pa.table({url: [f"https://example.org/{row}" for row in range(rows)]})
        indices.write_files(folder / "metadata", [np.arange(rows)], table, 50, suffix)
        return folder

    return write


@pytest.mark.parametrize(
    ("form", "suffix"), [(form, indices.ARROW) for form in indices.FORMS] + [("Flat", indices.PARQUET)]
)
def test_every_form_of_index_is_measured(index, tmp_path, form, suffix):
    cache = tmp_path / "cache"
    stage(str(index(form, suffix)), None, cache)
    with open_staged(cache) as opened:
        shape = shape_of(opened, cache)
        assert (shape.rows, shape.batches, shape.sparse) == (ROWS, ROWS // 50, False)
        assert shape.lists == max(opened.index.nlist, 1)
        _, found = retrieve_table(
            opened.index, opened.metadata, opened_queries(opened), Request(20, 0.94), per_seed=True
        )
    rates = measured_rates(partial(open_staged, cache), cache)
    of_laws = [each for law in (rates.short, rates.long) for each in asdict(law).values()]
    numbers = [each for each in asdict(rates).values() if not isinstance(each, dict)]
    assert min(numbers + of_laws) >= 0
    assert min(rates.opening, rates.page, rates.byte, rates.taken, rates.written) > 0
    assert (rates.compared > 0) == ("PQ" in indices.FORMS[form])
    search = search_of(shape, 3, 20, 1.0)
    assert search.nprobe == (found.nprobe or 1)
    whole = total(search_steps(shape, rates, search))
    assert whole.cold >= whole.warm > 0
    files = sum(path.stat().st_size for path in (tmp_path / "index").rglob("*") if path.is_file())
    assert 0 < whole.size < files + 3 * 4096 * ROWS


def opened_queries(opened):
    rows = np.random.default_rng(2).standard_normal((3, opened.index.dimension), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_sparse_index_is_measured_at_its_source(index, tmp_path):
    cache = tmp_path / "cache"
    stage(str(index()), None, cache, sparse=True)
    with open_staged(cache) as opened:
        shape = shape_of(opened, cache)
    rates = measured_rates(partial(open_staged, cache), cache)
    assert shape.sparse
    assert min(rates.request, rates.fetched) > 0
    assert (rates.page, rates.byte) == (0, 0)


def test_metadata_with_unusual_columns_is_measured(index, tmp_path):
    cache = tmp_path / "cache"
    stage(str(index("Flat", url="link")), None, cache)
    assert measured_rates(partial(open_staged, cache, {"url": "link"}), cache).taken > 0


def test_an_empty_index_is_refused(index, tmp_path):
    cache = tmp_path / "cache"
    stage(str(index("Flat", rows=0)), None, cache)
    with pytest.raises(InputError, match="empty"):
        measured_rates(partial(open_staged, cache), cache)


# --- kept rates -----------------------------------------------------------------------------------


def test_rates_are_kept_for_the_index_and_the_cores_they_were_measured_with(tmp_path, monkeypatch):
    assert kept_rates(tmp_path, "one") is None
    keep_rates(tmp_path, "one", RATES)
    assert kept_rates(tmp_path, "one") == RATES
    assert kept_rates(tmp_path, "another") is None
    monkeypatch.setattr(probe, "thread_count", lambda: 1000)
    assert kept_rates(tmp_path, "one") is None
    keep_rates(tmp_path, "one", replace(RATES, cores=1000))
    assert kept_rates(tmp_path, "one") == replace(RATES, cores=1000)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"measured": {}}'])
def test_damaged_rates_are_measured_again(tmp_path, content):
    keep_rates(tmp_path, "one", RATES)
    (tmp_path / probe.KEPT).write_bytes(content)
    assert kept_rates(tmp_path, "one") is None


def test_rates_of_another_release_are_measured_again(tmp_path):
    keep_rates(tmp_path, "one", RATES)
    kept = json.loads((tmp_path / probe.KEPT).read_text())
    del kept["rates"]["page"]
    (tmp_path / probe.KEPT).write_text(json.dumps(kept))
    assert kept_rates(tmp_path, "one") is None


def test_a_folder_that_cannot_be_written_does_without(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(probe.Path, "write_bytes", refuse)
    keep_rates(tmp_path, "one", RATES)
    assert list(tmp_path.iterdir()) == []


def test_bytes_read_never_fall(tmp_path):
    before = bytes_read()
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    assert before is None or (bytes_read() or 0) >= before
