"""Unit vectors of codes: products without their removed parts are as near as they say."""

import pickle

import faiss
import numpy as np
import pytest
from helpers import indices

from laion_assets.index.decoder import Decoder
from laion_assets.index.vectors import MOST_REMOVED, Coded, held, squares, unit
from laion_assets.search.links import SLACK, Sizes
from laion_assets.search.near_duplicates import components

KEYS = {
    "no rotation": "IVF8,PQ8x8",
    "nothing removed": "OPQ8_16,IVF8,PQ8x8",
    "fewer dimensions": "OPQ4_8,IVF8,PQ4x8",
    "a part removed": "OPQ4_20,IVF8,PQ4x8",
    "much removed": "OPQ8_32,IVF8,PQ8x8",
}
LIMIT = 0.9
LARGE = Sizes(small=0, sample=64, widths=(3, 6), chunk=20, block=8, tile=16, batch=50)


@pytest.fixture(scope="module", params=KEYS)
def stored(request) -> Coded:
    """600 codes, a third of them of near-duplicates of others."""
    random = np.random.default_rng(3)
    rows = indices.random_rows(random, 600)
    rows[400:] = rows[:200] + 0.05 * random.standard_normal((200, rows.shape[1])).astype(np.float32)
    index = indices.train(KEYS[request.param], rows)
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


def test_products_of_vectors_are_off_by_no_more_than_they_say(stored) -> None:
    a, b = np.random.default_rng(2).integers(0, len(stored), (2, 4000))
    before, _ = Coded(stored._codes, stored._decoder).cosines(a, b, 0.9)
    assert np.isnan(before).all()  # nothing is known yet
    found, off = with_scales(stored).cosines(a, b, LIMIT)
    exact = np.einsum("ij,ij->i", *(stored[each].astype(np.float64) for each in (a, b)))
    decoder, codes = stored._decoder, stored._codes
    whole, rest = decoder.decode_unprojected(codes), decoder.decode_to_compare(codes)
    little_removed = squares(rest) >= (1 - MOST_REMOVED) * squares(whole)
    known = ~np.isnan(found)
    np.testing.assert_array_equal(known, little_removed[a] & little_removed[b])
    assert (np.abs(found - exact)[known] <= off[known] + SLACK / 10).all()
    assert not off[known & (np.abs(exact - LIMIT) < off)].any()  # near the limit, they are not off


def test_near_duplicates_are_those_of_the_vectors_themselves(stored) -> None:
    rows = stored[:]
    for threshold in (0.8, 0.94, 0.97):
        expected = components(rows, threshold)
        assert 20 < len(np.unique(expected)) < 590
        np.testing.assert_array_equal(components(stored, threshold), expected)
        np.testing.assert_array_equal(components(stored, threshold, LARGE), expected)


def test_what_is_known_of_vectors_travels_to_other_processes(stored) -> None:
    a, b = np.arange(300), np.arange(300, 600)
    expected = with_scales(stored).cosines(a, b, LIMIT)
    np.testing.assert_allclose(
        pickle.loads(pickle.dumps(stored)).cosines(a, b, LIMIT), expected, atol=1e-6
    )


@pytest.mark.parametrize("length", [0, 1e-30, 1e-12, 1e12, 1e25, np.inf, np.nan])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_vectors_of_odd_lengths_are_compared_themselves(length) -> None:
    rows = np.random.default_rng(4).standard_normal((8, 6)).astype(np.float32)
    rows[3] *= np.float32(length)
    vectors = Coded(rows.view(np.uint8), Decoder(None, np.empty(0, np.int64), 6))
    axes = np.eye(6, 2, dtype=np.float32)
    np.testing.assert_allclose(vectors.projection(axes)(slice(0, 8)), unit(rows) @ axes, atol=1e-6)


def test_what_decides_between_two_rows_does_not_depend_on_the_others(stored) -> None:
    a, b = np.random.default_rng(5).integers(0, len(stored), (2, 500))
    together = stored.exact_cosines(a, b)
    expected = np.einsum("ij,ij->i", stored[a].astype(np.float64), stored[b].astype(np.float64))
    np.testing.assert_allclose(together, expected, atol=1e-6)
    for vectors in (stored, held(stored)):
        alone = [vectors.exact_cosines(a[[n]], b[[n]])[0] for n in range(len(a))]
        np.testing.assert_allclose(alone, together, atol=1e-14)
