"""Searches that go on until enough images are kept: any index, any yield."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import indices
from hypothesis import example, given, settings
from hypothesis import strategies as st

from laion_assets.index.faiss_index import Hits, Index
from laion_assets.index.metadata import Metadata
from laion_assets.search import retrieval
from laion_assets.search.combined import combine
from laion_assets.search.filters import Filters, conditions_in
from laion_assets.search.retrieval import Request, retrieve_table
from laion_assets.search.sizing import further
from laion_assets.search.target import _InMemory, retrieve_the_rest

KEYS = ("Flat", "IVF40,Flat", "single file")


class Recording(Index):
    """An index that remembers the queries of each search, and how many rows it requested."""

    searches: list[tuple[np.ndarray, int]]

    def search(self, queries, k, *others) -> Hits:
        self.searches.append((queries, k))
        return super().search(queries, k, *others)

    @property
    def searched(self) -> list[int]:
        """The queries of each search."""
        return [len(queries) for queries, _ in self.searches]

    @property
    def requested(self) -> list[int]:
        """The rows that each search requested for a query."""
        return [k for _, k in self.searches]

    def requested_for(self, query: np.ndarray) -> list[int]:
        """The rows that each search of a query requested."""
        return [k for queries, k in self.searches if (queries == query).all(axis=1).any()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of some images there are many near-duplicates, of some there is no URL, and some are unsafe."""
    made = tmp_path_factory.mktemp("target")
    random = np.random.default_rng(5)
    rows = indices.random_rows(random, 240, alike=0.1)
    urls = [None if i % 11 == 0 else f"u{i % 200}" for i in range(240)]
    for key in KEYS:
        indices.write_index(made / key, rows, key)
        table = pa.table({"url": urls, "punsafe": random.random(240).astype(np.float32)})
        indices.write_metadata(made / key, table, files=3)
    return made


def opened(folder: Path) -> tuple[Recording, Metadata]:
    index = Recording(*indices.index_paths(folder))
    index.searches = []
    return index, Metadata(sorted((folder / "metadata").iterdir()))


def asked(keep: int, threshold: float, unsafe: float, nprobe: int | None = None) -> Request:
    filters = Filters(conditions_in(f"punsafe < {unsafe}"))
    return Request(keep, threshold, nprobe, filters, keep)


def places(rows: list[dict]) -> list[tuple[int, int, int]]:
    """Without similarities, whose last digit depends on the other queries of a batch."""
    return [(row["seed"], row["rank"], row["id"]) for row in rows]


REQUESTS = {
    "seed": st.integers(0, 1 << 30),
    "key": st.sampled_from(KEYS),
    "keep": st.sampled_from([1, 2, 7, 30, 200]),
    "threshold": st.sampled_from([0.5, 0.94, 1.0]),
    "unsafe": st.sampled_from([0.0, 0.1, 0.9, 2.0]),
}


@example(nprobe=None, rows_at_once=1, seed=105, key="Flat", keep=7, threshold=0.5, unsafe=0.9)
@settings(deadline=None, max_examples=10)
@given(nprobe=st.sampled_from([None, None, 2]), rows_at_once=st.sampled_from([1, 1 << 30]), **REQUESTS)
def test_each_query_keeps_the_first_rows_of_one_large_request_as_many_as_wanted_or_all_there_are(
    folder, seed, key, keep, threshold, unsafe, rows_at_once, nprobe
):
    index, metadata = opened(folder / key)
    queries = indices.random_rows(np.random.default_rng(seed), 3)
    request = asked(keep, threshold, unsafe, nprobe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "RESULT_BYTES", rows_at_once)
        table, found = retrieve_table(index, metadata, queries, request, per_seed=True)
    tried = [index.requested_for(query) for query in queries]

    def first_of(k: int) -> list[list[dict]]:
        plain = Request(k, threshold, nprobe, request.filters)
        rows = retrieve_table(index, metadata, queries, plain, per_seed=True)[0]
        by_query = [rows.filter(pa.compute.equal(rows["seed"], query)).to_pylist() for query in range(3)]
        return [of_query[:keep] for of_query in by_query]

    of_large = {k: first_of(k) for k in {k for of_query in tried for k in of_query}}
    everything = first_of(index.rows)
    expected, short = [], 0
    for query in range(3):
        enough = [k for k in tried[query] if len(of_large[k][query]) == keep]
        expected += of_large[enough[0]][query] if enough else everything[query]
        short += not enough
    assert places(table.to_pylist()) == places(expected)
    assert found.short == short
    assert found.funnel.kept == len(table)
    assert found.funnel.requested <= sum(of_query[-1] for of_query in tried)
    if not short:  # the search looked no further than the last row that each query keeps
        assert found.funnel.requested == sum(
            max(row["rank"] for row in expected if row["seed"] == query) for query in range(3)
        )


@settings(deadline=None, max_examples=10)
@given(**REQUESTS)
def test_both_searches_together_reach_any_target_or_find_all_there_is(
    folder, seed, key, keep, threshold, unsafe
):
    index, metadata = opened(folder / key)
    queries = indices.random_rows(np.random.default_rng(seed), 3)
    request, images = asked(keep, threshold, unsafe), 2 * keep
    around_seeds, one = retrieve_table(
        index, metadata, queries, asked(-(-keep // 3), threshold, unsafe), per_seed=True
    )
    batches: list[pa.RecordBatch] = []
    other = retrieve_the_rest(
        index,
        metadata,
        queries[:1],
        request,
        images,
        knn := _InMemory(around_seeds, one.decoder),
        batches.append,
    )
    schema = retrieval.columns_found(index, metadata, per_seed=False)
    centroid = _InMemory(pa.Table.from_batches(batches, schema), other.decoder)
    whole = combine(knn, centroid, threshold).funnel.kept
    cut = combine(knn, centroid, threshold, images)
    table = pa.Table.from_batches(cut.batches, cut.schema)
    assert len(table) == cut.funnel.kept == min(images, whole)
    assert cut.funnel.beyond_target == whole - len(table)
    if whole < images:
        assert other.short
        assert index.requested[-1] == index.rows  # nothing is left to find
        found = set(centroid.table["id"].to_pylist())
        everything = retrieve_table(
            index,
            metadata,
            queries[:1],
            Request(index.rows, threshold, None, request.filters),
            per_seed=False,
        )[0]
        assert found == set(everything["id"].to_pylist())


def test_queries_that_have_enough_are_not_searched_again(folder):
    index, metadata = opened(folder / "Flat")
    queries = indices.reconstructed(folder / "Flat")[:40]
    retrieve_table(index, metadata, queries, asked(5, 0.94, 2.0), per_seed=True)
    assert index.searched[0] == 40
    assert sorted(index.searched, reverse=True) == index.searched
    assert 0 < index.searched[-1] < 20


def test_metadata_is_read_only_once_enough_different_images_are_found(folder, monkeypatch):
    index, metadata = opened(folder / "Flat")
    taken: list[int] = []
    take = Metadata.take
    monkeypatch.setattr(
        Metadata, "take", lambda self, ids, *args: taken.append(len(ids)) or take(self, ids, *args)
    )
    query = indices.random_rows(np.random.default_rng(1), 1)
    retrieve_table(index, metadata, query, asked(30, 0.94, 2.0), per_seed=True)
    before_last = len(index.requested) - 1
    assert before_last >= 1
    assert taken[:before_last] == [0] * before_last


def test_a_search_that_keeps_next_to_nothing_ends(folder, monkeypatch):
    monkeypatch.setattr(retrieval, "ALWAYS_REQUESTED", 0)
    monkeypatch.setattr(retrieval, "MOST_REQUESTED", 20)
    index, metadata = opened(folder / "Flat")
    query = indices.random_rows(np.random.default_rng(1), 1)
    table, found = retrieve_table(index, metadata, query, asked(3, 0.94, 0.0), per_seed=True)
    assert (len(table), found.short, max(index.requested)) == (0, 1, 60)


@given(k=st.integers(1, 10**9), kept=st.floats(0, 10**6), keep=st.integers(1, 10**7))
def test_each_further_request_is_larger_but_not_many_times(k, kept, keep):
    assert 1.5 * k <= further(k, kept, keep) <= 8 * k + 1
