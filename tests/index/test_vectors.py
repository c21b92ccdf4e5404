"""Unit vectors of codes: products near a limit are right, and others on the right side of it."""

import pickle
from typing import Any

import faiss
import numpy as np
import pytest
from helpers import indices

from laion_assets.index.decoder import Decoder
from laion_assets.index.vectors import MOST_REMOVED, NEAR, Coded, held, squares, unit
from laion_assets.search.links import SLACK, Sizes
from laion_assets.search.near_duplicates import (
    components,
    components_of_lists,
    components_of_short_lists,
)

KEYS = {
    "no rotation": "IVF8,PQ8x8",
    "nothing removed": "OPQ8_16,IVF8,PQ8x8",
    "fewer dimensions": "OPQ4_8,IVF8,PQ4x8",
    "a part removed": "OPQ4_20,IVF8,PQ4x8",
    "much removed": "OPQ8_32,IVF8,PQ8x8",
}
LIMIT = 0.9
LARGE = Sizes(small=0, sample=64, widths=(3, 6), chunk=20, block=8, tile=16, batch=50)
SHORT_LISTS = Sizes(small=100, sample=64, widths=(3, 6), batch=50, pairs=70)


@pytest.mark.parametrize("power", range(-42, 37, 4))
def test_rows_of_any_length_that_float32_can_hold_become_unit_rows(power):
    random = np.random.default_rng(0)
    rows = (random.standard_normal((50, 24)) * 10.0**power).astype(np.float32)
    rows[::7], rows[1::7, 3], rows[2::7, 5] = 0, np.nan, np.inf
    wide = rows.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    usable = np.isfinite(lengths) & (lengths > 0)
    expected = np.where(usable[:, None], wide / np.where(usable, lengths, 1)[:, None], 0)
    np.testing.assert_allclose(unit(rows), expected, atol=1e-6)


def trained_by_faiss(key: str, rows: np.ndarray) -> Any:
    """An index whose transpose removes a part of most vectors; those of `build` remove nothing."""
    index = faiss.index_factory(rows.shape[1], key, faiss.METRIC_INNER_PRODUCT)
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    ivf.do_polysemous_training = False
    if isinstance(index, faiss.IndexPreTransform):
        faiss.downcast_VectorTransform(index.chain.at(0)).niter = 5
    index.train(rows)
    return index


@pytest.fixture(scope="module", params=KEYS)
def stored(request) -> Coded:
    """600 codes, a third of them of near-duplicates of others."""
    random = np.random.default_rng(3)
    rows = indices.random_rows(random, 600)
    rows[400:] = rows[:200] + 0.05 * random.standard_normal((200, rows.shape[1])).astype(np.float32)
    index = trained_by_faiss(KEYS[request.param], rows)
    codes = index.sa_encode(rows)
    if request.param == "much removed":
        codes[:300, 1:] = random.integers(0, 256, (300, codes.shape[1] - 1))
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    return Coded(codes, Decoder.of_index(index, np.arange(ivf.nlist)))


def with_scales(vectors: Coded) -> Coded:
    vectors.projection(np.eye(vectors[:1].shape[1], 2, dtype=np.float32))(slice(0, len(vectors)))
    return vectors


def test_products_with_axes_are_those_of_the_vectors(stored) -> None:
    rows = stored[:]
    axes = np.linalg.qr(np.random.default_rng(1).standard_normal((rows.shape[1], 5)))[0].astype(
        np.float32
    )
    some = np.array([5, 3, 3, 599])
    projection = stored.projection(axes)
    np.testing.assert_allclose(projection(slice(100, 200)), rows[100:200] @ axes, atol=1e-5)
    np.testing.assert_allclose(projection(some), rows[some] @ axes, atol=1e-5)


def test_products_of_vectors_are_right_near_the_limit_and_else_on_the_right_side(stored) -> None:
    a, b = np.random.default_rng(2).integers(0, len(stored), (2, 4000))
    exact = np.einsum("ij,ij->i", *(stored[each].astype(np.float64) for each in (a, b)))
    limit = float(np.median(exact))
    before = Coded(stored._codes, stored._decoder).cosines(a, b, limit)
    assert np.isnan(before).all()  # nothing is known yet
    found = with_scales(stored).cosines(a, b, limit)
    decoder, codes = stored._decoder, stored._codes
    whole, rest = decoder.decode_unprojected(codes), decoder.decode_to_compare(codes)
    little_removed = squares(rest) >= (1 - MOST_REMOVED) * squares(whole)
    known = ~np.isnan(found)
    np.testing.assert_array_equal(known, little_removed[a] & little_removed[b])
    right, near = np.abs(found - exact) < SLACK / 10, np.abs(found - limit) <= NEAR
    assert near.any()
    assert right[near].all()
    assert ((found > limit) == (exact > limit))[known & ~near].all()
    removes = decoder.null_space.shape[1] > 0
    assert right[known].all() == (not removes), "what is removed is skipped, where anything is"


def test_near_duplicates_are_those_of_the_vectors_themselves(stored) -> None:
    rows = stored[:]
    for threshold in (0.8, 0.94, 0.97):
        expected = components(rows, threshold)
        assert 20 < len(np.unique(expected)) < 590
        np.testing.assert_array_equal(components(stored, threshold), expected)
        np.testing.assert_array_equal(components(stored, threshold, LARGE), expected)


def test_near_duplicates_within_short_lists_are_those_of_the_vectors_themselves(stored) -> None:
    random = np.random.default_rng(6)
    members = np.concatenate([random.choice(600, 90, replace=False) for _ in range(20)])
    lists, rows = np.repeat(np.arange(20), 90), stored[:]
    for threshold in (0.8, 0.94, 0.97):
        expected = components_of_lists(rows, members, lists, threshold)
        assert 20 * 5 < len(np.unique(expected)) < len(members) - 20
        found = components_of_lists(stored, members, lists, threshold, SHORT_LISTS)
        np.testing.assert_array_equal(found, expected)


def test_what_is_known_of_vectors_travels_to_other_processes(stored) -> None:
    a, b = np.arange(300), np.arange(300, 600)
    expected = with_scales(stored).cosines(a, b, LIMIT)
    np.testing.assert_allclose(
        pickle.loads(pickle.dumps(stored)).cosines(a, b, LIMIT), expected, atol=1e-6
    )


@pytest.mark.parametrize("length", [0, 1e-30, 3e-22, 1e-12, 1e12, 1e25, np.inf, np.nan])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_vectors_of_odd_lengths_are_compared_themselves(length) -> None:
    random = np.random.default_rng(4)
    rows = random.standard_normal((60, 6)).astype(np.float32)
    rows[30:] = rows[:30] + 0.1 * random.standard_normal((30, 6)).astype(np.float32)
    rows[::2] *= np.float32(length)
    vectors = Coded(rows.view(np.uint8), Decoder(None, np.empty(0, np.int64), 6))
    axes = np.eye(6, 2, dtype=np.float32)
    np.testing.assert_allclose(vectors.projection(axes)(slice(0, 60)), unit(rows) @ axes, atol=1e-6)
    a, b = np.arange(30), np.arange(30, 60)
    found, exact = vectors.cosines(a, b, 0.9), np.einsum("ij,ij->i", unit(rows[a]), unit(rows[b]))
    np.testing.assert_allclose(np.where(np.isnan(found), exact, found), exact, atol=1e-6)
    np.testing.assert_allclose(vectors.exact_cosines(a, b), exact, atol=1e-6)
    expected = components(unit(rows), 0.9)
    np.testing.assert_array_equal(components(vectors, 0.9, LARGE), expected)
    one_list, sizes = np.zeros(60, np.int64), Sizes(small=59, sample=30, widths=(2,), batch=4)
    found = components_of_short_lists(vectors, np.arange(60), one_list, 0.9, sizes)
    np.testing.assert_array_equal(found, expected)


def test_what_decides_between_two_rows_does_not_depend_on_the_others(stored) -> None:
    a, b = np.random.default_rng(5).integers(0, len(stored), (2, 500))
    together = stored.exact_cosines(a, b)
    expected = np.einsum("ij,ij->i", stored[a].astype(np.float64), stored[b].astype(np.float64))
    np.testing.assert_allclose(together, expected, atol=1e-6)
    for vectors in (stored, held(stored)):
        alone = [vectors.exact_cosines(a[[n]], b[[n]])[0] for n in range(len(a))]
        np.testing.assert_allclose(alone, together, atol=1e-14)
