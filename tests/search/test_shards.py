"""A search in shards is one search: the same rows and the same figures, however it is cut."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pyarrow as pa
import pytest
from helpers import indices
from hypothesis import given, settings
from hypothesis import strategies as st

from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.io.text import REPLACED
from laion_assets.search import retrieval
from laion_assets.search.block_list import BlockList, hashes, listed_forms
from laion_assets.search.filters import Filters
from laion_assets.search.retrieval import (
    Found,
    Request,
    all_batches,
    columns_found,
    query_bytes,
    retrieve,
)
from laion_assets.search.shards import ALL, NOMINAL_ROW, Shard, from_json, joined, shards_for, to_json

QUERIES = 11


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Metadata]:
    """With near-duplicates, and texts that are not UTF-8."""
    folder: Path = tmp_path_factory.mktemp("index")
    rows = indices.random_rows(np.random.default_rng(5), 240, alike=0.1)
    indices.write_index(folder, rows, "IVF40,Flat")
    urls = [f"https://example.org/{i}" + REPLACED * (i % 30 == 0) for i in range(240)]
    indices.write_metadata(folder, pa.table({"url": urls}), files=3)
    files = sorted((folder / "metadata").iterdir())
    return Index(*indices.index_paths(folder)), Metadata(files)


def searched(
    opened: tuple[Index, Metadata], queries: np.ndarray, request: Request, part: Shard
) -> tuple[pa.Table, Found]:
    batches: list[pa.RecordBatch] = []
    numbers = part.share(all_batches(*opened, queries, request))
    found = retrieve(*opened, queries, request, batches.append, per_seed=True, batches=numbers)
    return pa.Table.from_batches(batches, columns_found(*opened, per_seed=True)), found


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 1 << 30),
    shards=st.integers(1, QUERIES + 2),
    at_once=st.integers(1, 4),
    keep=st.sampled_from([None, None, 3, 300]),
)
def test_the_joined_rows_and_figures_are_those_of_one_search(opened, seed, shards, at_once, keep):
    queries = indices.random_rows(np.random.default_rng(seed), QUERIES)
    urls, _ = listed_forms(pa.array([f"https://example.org/{i}" for i in range(1, 20)]))
    listed = BlockList("", np.array([5, 7, 1000]), np.sort(hashes(urls)))
    request = Request(keep or 20, 0.94, None, Filters((), listed), keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "RESULT_BYTES", at_once * query_bytes(*opened, request.k))
        whole, expected = searched(opened, queries, request, ALL)
        parts = [searched(opened, queries, request, Shard(i, shards)) for i in range(shards)]
    assert pa.concat_tables([table for table, _ in parts]).equals(whole)
    told = [json.loads(json.dumps(to_json(found))) for _, found in parts]
    together = joined([from_json(told[i], parts[i][1].decoder) for i in range(shards)], listed)
    assert together.recall == pytest.approx(expected.recall)
    for name in ("funnel", "nprobe", "sampled", "decoder", "block_list", "short"):
        assert getattr(together, name) == getattr(expected, name), name
    assert together.not_utf8.captions == expected.not_utf8.captions
    assert together.not_utf8.urls >= expected.not_utf8.urls
    np.testing.assert_equal(together.blocked_by, expected.blocked_by)
    assert (together.removed is None) == (expected.removed is None)
    if expected.removed and together.removed:
        assert together.removed.removed.equals(expected.removed.removed)


def test_most_sets_are_one_shard_and_no_shard_is_without_seeds():
    assert [shards_for(seeds, 830) for seeds in (1, 1_000, 5_000, 20_000, 100_000)] == [1, 1, 1, 4, 20]
    assert shards_for(3, 10**9) == 3


def test_a_query_takes_memory_for_its_results_their_texts_and_itself(tmp_path) -> None:
    def with_captions(length: int) -> Metadata:
        rows = pa.table({"url": ["a"] * 50, "caption": ["b" * (length - 9)] * 50})
        return Metadata(indices.write_metadata(tmp_path / str(length), rows))

    laion = cast(Index, SimpleNamespace(code_size=131, dimension=768))
    usual, long = with_captions(150), with_captions(10_000)
    taken = query_bytes(laion, usual, 830)
    assert taken == pytest.approx(830 * NOMINAL_ROW, rel=0.25)
    assert query_bytes(laion, long, 830) - taken == pytest.approx(830 * 9_850, rel=0.01)
    assert query_bytes(laion, usual, 1) > 4 * 768
    whole_vectors = cast(Index, SimpleNamespace(code_size=4 * 768, dimension=768))
    assert query_bytes(whole_vectors, usual, 830) - taken > 830 * 4 * 768
