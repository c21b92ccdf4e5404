"""Rows scaled to length 1, and which rows have a direction."""

import numpy as np
import pytest

from laion_assets.io.arrays import unit_rows


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f8"])
@pytest.mark.filterwarnings("error")
def test_rows_become_unit_rows_and_those_without_a_direction_are_marked(kind):
    rows = np.array([[3, 4], [0, 0], [-2, 0], [np.nan, 1], [np.inf, 0], [1, -np.inf]], kind)
    vectors, usable = unit_rows(rows)
    assert usable.tolist() == [True, False, True, False, False, False]
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[usable], [[0.6, 0.8], [-1, 0]], rtol=1e-7)


def test_the_squares_of_small_and_large_numbers_do_not_matter():
    vectors, usable = unit_rows(np.array([[1e-38, 1e-38], [3e38, -3e38]], np.float32))
    assert usable.all()
    np.testing.assert_allclose(np.abs(vectors), np.sqrt(0.5), rtol=1e-6)
