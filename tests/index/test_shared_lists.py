"""Lists that many queries share: what is found is what faiss finds, whatever is ruled out before."""

import faiss
import numpy as np
import pytest
from helpers import indices
from hypothesis import given, settings
from hypothesis import strategies as st

from laion_assets.index import codebook, faiss_index, inverted_lists, shared_lists
from laion_assets.index.codebook import Codebook
from laion_assets.index.faiss_index import Index
from laion_assets.io import int8
from laion_assets.io.int8 import ZERO

QUERIES = 60
MANY = 1 << 40


@pytest.fixture(params=[127, 79], ids=["VNNI", "no VNNI"])
def largest_code(request, monkeypatch) -> int:
    """The largest code of processors that this one is not, too."""
    monkeypatch.setattr(codebook, "largest_code", lambda: request.param)
    return request.param


class Searched(Index):
    """An index that counts the queries that are searched alone."""

    alone = 0

    def _search_alone(self, transformed, *others):
        self.alone += len(transformed)
        return super()._search_alone(transformed, *others)


def written(
    folder, key: str, rows: np.ndarray, *, by_residual: bool = True, empty: object = None
) -> Searched:
    """An index of rows with lists on the disk; trained on these rows unless an empty one is given."""
    index = empty or indices.train(key, rows)
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    ivf.by_residual = by_residual
    indices.write_merged(folder, index, rows)
    return Searched(*indices.index_paths(folder))


def found_by_faiss(index: Searched, queries: np.ndarray, k: int, nprobe: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faiss_index, "WORTH_SHARING", MANY)
        return index.search(queries, k, nprobe)


def assert_same(found, expected) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.similarity, expected.similarity)
    some = expected.ids >= 0
    np.testing.assert_array_equal(found.codes[found.code[some]], expected.codes[expected.code[some]])
    np.testing.assert_array_equal(found.lists, expected.lists)


@pytest.fixture(autouse=True)
def all_lists_are_long(monkeypatch):
    monkeypatch.setattr(inverted_lists, "WORTH_READING_AHEAD", 0)
    monkeypatch.setattr(faiss_index, "WORTH_SHARING", 0)


@pytest.mark.parametrize(
    "key",
    [
        "OPQ8_16,IVF8_HNSW8,PQ8x8",
        "OPQ4_20,IVF8,PQ4x8",
        "IVF8,PQ16x8",
        "IVF8,PQ1x8",
        "IVF1,PQ4x8",
        "IVF40,PQ8x8",
    ],
)
@pytest.mark.parametrize("by_residual", [True, False])
@pytest.mark.usefixtures("largest_code")
def test_the_rows_and_scores_are_those_of_faiss_bit_for_bit(tmp_path, key, by_residual) -> None:
    random = np.random.default_rng(1)
    rows = indices.random_rows(random, 1500)  # many are equal: of those, the first are wanted
    index = written(tmp_path, key, rows, by_residual=by_residual)
    queries = indices.random_rows(random, QUERIES)
    queries[:3] = rows[:3]
    queries[3] = 0
    for k, nprobe in ((1, 1), (10, 4), (100, 8), (len(rows), 8)):
        expected = found_by_faiss(index, queries, k, nprobe)
        index.alone, told = 0, []
        assert_same(index.search(queries, k, nprobe, told.append), expected)
        assert index.alone == 0
        assert sum(told) == QUERIES


def test_how_the_work_is_divided_changes_nothing(tmp_path, monkeypatch) -> None:
    random = np.random.default_rng(2)
    rows = indices.random_rows(random, 3000, alike=0.02)
    index = written(tmp_path, "IVF8,PQ8x8", rows)
    queries = indices.random_rows(random, QUERIES)
    expected = found_by_faiss(index, queries, 20, 6)
    for rows_of_a_job, pairs, more_left, rows_of_a_tile in (
        (7, 1, 0, 3),
        (100, 5000, 100, 1),
        (1, MANY, 0, 64),
    ):
        monkeypatch.setattr(shared_lists, "PAIRS_OF_A_JOB", 1)
        monkeypatch.setattr(shared_lists, "ROWS_OF_A_JOB", rows_of_a_job)
        monkeypatch.setattr(shared_lists, "PAIRS_AT_ONCE", pairs)
        monkeypatch.setattr(shared_lists, "MORE_LEFT", more_left)
        monkeypatch.setattr(int8, "ROWS_OF_A_TILE", rows_of_a_tile)
        index.alone = 0
        assert_same(index.search(queries, 20, 6), expected)
        assert index.alone == 0


def test_a_query_with_too_many_rows_nearly_as_similar_is_searched_alone(tmp_path, monkeypatch) -> None:
    random = np.random.default_rng(3)
    rows = indices.random_rows(random, 3000)
    rows[500:2500] = rows[500]
    index = written(tmp_path, "IVF8,PQ8x8", rows)
    queries = indices.random_rows(random, QUERIES)
    queries[::2] = rows[500]
    monkeypatch.setattr(shared_lists, "MOST_LEFT", 0)
    for pairs in (1, 1 << 20):  # too many in all, or in one job
        monkeypatch.setattr(shared_lists, "PAIRS_OF_A_JOB", pairs)
        expected = found_by_faiss(index, queries, 30, 8)
        index.alone = 0
        assert_same(index.search(queries, 30, 8), expected)
        assert QUERIES // 2 <= index.alone < QUERIES


def test_queries_that_are_all_searched_alone_are_found(tmp_path) -> None:
    rows = indices.random_rows(np.random.default_rng(5), 6000)
    rows[:5500] = rows[0]
    index = written(tmp_path, "IVF4,PQ8x8", rows)
    queries = np.repeat(rows[:1], 40, axis=0)
    expected = found_by_faiss(index, queries, 10, 4)
    index.alone = 0
    assert_same(index.search(queries, 10, 4), expected)
    assert index.alone == 40


def test_rows_that_are_left_are_counted_over_all_jobs(tmp_path, monkeypatch) -> None:
    """Or a batch of pairs of which nothing is ruled out would take gigabytes."""
    rows = indices.random_rows(np.random.default_rng(6), 3000)
    rows[:2900] = rows[0]
    index = written(tmp_path, "IVF1,PQ8x8", rows)
    monkeypatch.setattr(shared_lists, "MOST_LEFT", 0)
    monkeypatch.setattr(shared_lists, "PAIRS_OF_A_JOB", 1)
    monkeypatch.setattr(shared_lists, "ROWS_OF_A_JOB", 50)
    left, joined = [], shared_lists.Left.joined

    def counted(some: list[shared_lists.Left]) -> shared_lists.Left:
        left.append(sum(map(len, some)))
        return joined(some)

    monkeypatch.setattr(shared_lists.Left, "joined", staticmethod(counted))
    queries = np.repeat(rows[:1], 40, axis=0)
    assert_same(index.search(queries, 10, 1), found_by_faiss(index, queries, 10, 1))
    assert max(left) < 40 * (2 * 160 + 3 * 50)


@pytest.mark.parametrize("of_rows", [1e-20, 1, 1e15])
@pytest.mark.parametrize("of_queries", [1e-25, 1e-3, 1e15])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_vectors_of_any_length_are_found(tmp_path, of_rows, of_queries) -> None:
    random = np.random.default_rng(7)
    rows = indices.random_rows(random, 800) * np.float32(of_rows)
    index = written(tmp_path, "IVF8,PQ8x8", rows)
    queries = indices.random_rows(random, QUERIES) * np.float32(of_queries)
    queries[0] = 0
    for k in (5, 100):
        assert_same(index.search(queries, k, 4), found_by_faiss(index, queries, k, 4))


def test_lists_without_rows_are_searched(tmp_path) -> None:
    rows = indices.random_rows(np.random.default_rng(8), 60)
    key = "IVF200,PQ8x8"
    index = written(tmp_path, key, rows, empty=faiss.clone_index(indices.trained(key)))
    empty = np.flatnonzero(index.list_sizes() == 0)
    assert len(empty)
    queries = faiss.downcast_index(faiss.extract_index_ivf(index._index)).quantizer.reconstruct_batch(
        empty
    )
    for some in (queries, queries[:1], queries[:0]):
        for nprobe in (1, 5):
            told: list[int] = []
            found = index.search(some, 5, nprobe, told.append)
            assert_same(found, found_by_faiss(index, some, 5, nprobe))
            assert sum(told) == len(some)


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_what_has_no_bound_is_searched_alone(tmp_path, damage) -> None:
    rows = indices.random_rows(np.random.default_rng(4), 1000)
    index = written(tmp_path, "IVF8,PQ8x8", rows)
    queries = rows[:QUERIES].copy()
    queries[7, 3] = damage
    index.search(queries, 10, 4)
    assert index.alone == QUERIES
    quantizer = faiss.ProductQuantizer(16, 8, 8)
    faiss.copy_array_to_vector(np.full(quantizer.M * 256 * 2, damage, np.float32), quantizer.centroids)
    assert Codebook.of(quantizer) is None
    assert Codebook.of(faiss.ProductQuantizer(16, 8, 4)) is None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    parts=st.integers(1, 12),
    width=st.integers(1, 9),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    largest_code=st.sampled_from([127, 79]),
)
def test_products_are_off_by_no_more_than_the_bound(seed, parts, width, spread, largest_code) -> None:
    random, dimension = np.random.default_rng(seed), parts * width
    uneven = np.exp(spread * random.standard_normal(dimension)) * random.integers(0, 2, dimension)
    quantizer = faiss.ProductQuantizer(dimension, parts, 8)
    centroids = random.standard_normal((256, dimension)) * uneven
    by_part = centroids.reshape(256, parts, width).swapaxes(0, 1).astype(np.float32)
    faiss.copy_array_to_vector(by_part.ravel(), quantizer.centroids)
    queries = (random.standard_normal((8, dimension)) * uneven[::-1]).astype(np.float32)
    queries[0] = 0
    codes = random.integers(0, 256, (50, parts), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codebook, "largest_code", lambda: largest_code)
        book = Codebook.of(quantizer)
        rounded = book.rounded(queries)
    assert np.abs(rounded.codes).max() <= largest_code
    assert np.abs(book.words.astype(int) - ZERO).max() <= largest_code
    rows = np.concatenate([by_part[part, codes[:, part]] for part in range(parts)], axis=1)
    exact = rows.astype(np.float64) @ queries.T.astype(np.float64)
    no_limit = np.full(8, -(1 << 29), np.int32)
    reaching, found = rounded.reaching(np.arange(8), no_limit, book, codes)
    np.testing.assert_array_equal(reaching, np.arange(50))
    assert (np.abs(exact - rounded.step * found) <= rounded.off * (1 + 1e-5) + 1e-12).all()
    limits = found.max(axis=0)
    reaching, best = rounded.reaching(np.arange(8), limits, book, codes)
    np.testing.assert_array_equal(reaching, np.flatnonzero((found >= limits).any(axis=1)))
    np.testing.assert_array_equal(best, found[reaching])
    assert len(rounded.reaching(np.arange(8), limits + 1, book, codes)[0]) == 0
    terms = rows.reshape(50, 1, parts, width) * queries.reshape(1, 8, parts, width)
    assert (np.abs(terms.sum(axis=3)).sum(axis=2) <= rounded.of_residuals * (1 + 1e-5)).all()
