"""Batches of queries that are near each other: they read fewer lists, and change no row."""

import numpy as np
import pyarrow as pa
import pytest
from helpers import indices
from hypothesis import given, settings
from hypothesis import strategies as st

from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.index.vectors import unit
from laion_assets.search import retrieval
from laion_assets.search.neighbours import batches_of_neighbours
from laion_assets.search.retrieval import Request, retrieve_table

STYLES, EACH = 12, 10


def of_styles(seed: int, dimension: int = 64) -> np.ndarray:
    """Queries of several styles, in random order."""
    random = np.random.default_rng(seed)
    styles = np.repeat(random.standard_normal((STYLES, dimension)), EACH, axis=0)
    queries = styles + 0.5 * random.standard_normal(styles.shape)
    return unit(random.permutation(queries).astype(np.float32))


def near(vectors: np.ndarray, each: int) -> np.ndarray:
    """Unit rows around some vectors."""
    rows = np.repeat(vectors, each, axis=0)
    differences = np.random.default_rng(1).standard_normal(rows.shape, np.float32)
    return unit(rows + np.float32(0.1) * differences)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1 << 30), count=st.integers(0, 50), size=st.integers(1, 60))
def test_every_query_is_in_one_batch_and_the_first_in_the_first(seed, count, size):
    queries = of_styles(seed)
    if seed % 3 == 0:
        queries[:] = queries[0]
    numbers = np.sort(np.random.default_rng(seed).permutation(len(queries))[:count])
    batches = batches_of_neighbours(queries, numbers, size)
    assert np.sort(np.concatenate([numbers[:0], *batches])).tolist() == numbers.tolist()
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert all((np.diff(batch) > 0).all() for batch in batches)
    assert not count or batches[0][0] == numbers[0]


def test_batches_of_neighbours_read_fewer_lists(tmp_path):
    queries = of_styles(0)
    rows = near(queries, 40)
    indices.write_one_file(tmp_path, indices.train("IVF96,Flat", rows), rows)
    index = Index(*indices.index_paths(tmp_path))
    lists = index.nearest_lists(queries, 8)
    together = batches_of_neighbours(queries, np.arange(len(queries)), EACH)
    in_order = np.arange(len(queries)).reshape(-1, EACH)
    read, in_order_read = (
        sum(len(np.unique(lists[batch])) for batch in cut) for cut in (together, in_order)
    )
    assert read < in_order_read / 3


def test_the_order_in_which_a_processor_adds_changes_no_batch():
    random = np.random.default_rng(2)
    queries = random.choice([-1, 1], (200, 24)).astype(np.float32) / np.float32(24**0.5)  # many ties
    cut = [
        [batch.tolist() for batch in batches_of_neighbours(queries[:, axes], np.arange(200), 7)]
        for axes in (np.arange(24), random.permutation(24))
    ]
    assert cut[0] == cut[1]


def test_the_rows_of_a_query_do_not_depend_on_its_batch(tmp_path, monkeypatch):
    queries = of_styles(3, 100)
    rows = near(queries, 10)
    indices.write_one_file(tmp_path, indices.train("OPQ8_48,IVF40_HNSW8,PQ8x8", rows[::3]), rows)
    indices.write_metadata(tmp_path, pa.table({"url": [f"https://example.org/{i}" for i in range(1200)]}))
    index = Index(*indices.index_paths(tmp_path))
    metadata = Metadata(sorted((tmp_path / "metadata").iterdir()))
    request = Request(20, 0.94)
    whole, found = retrieve_table(index, metadata, queries, request, per_seed=True)
    monkeypatch.setattr(retrieval, "RESULT_BYTES", 7 * retrieval.query_bytes(index, metadata, request.k))
    in_batches, same = retrieve_table(index, metadata, queries, request, per_seed=True)
    assert in_batches.equals(whole)
    assert (same.funnel, same.sampled) == (found.funnel, found.sampled)
    assert same.recall == pytest.approx(found.recall)
