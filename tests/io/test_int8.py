"""Products of integers of eight bits are exact."""

import numpy as np

from laion_assets.io import int8


def test_codes_are_multiplied_exactly_at_both_ends_of_their_range() -> None:
    most = int8.largest_code()
    left = np.array([[0, 255], [255, 0], [128 + most, 128 - most]], np.uint8).repeat(96, axis=1)
    right = np.array([[most, -most], [-most, -most]], np.int8).repeat(96, axis=0)
    expected = (left.astype(int) - 128) @ right.astype(int)
    np.testing.assert_array_equal(int8.products(left, right), expected)


def test_smaller_codes_are_taken_where_the_processor_adds_two_products_in_sixteen(monkeypatch) -> None:
    def saturated(left, right):
        each = left.astype(int)[:, :, None] * right
        return (each[:, ::2] + each[:, 1::2]).clip(max=32767).sum(axis=1) - 128 * right.sum(
            axis=0, dtype=int
        )

    monkeypatch.setattr(int8, "products", saturated)
    int8.largest_code.cache_clear()
    try:
        assert int8.largest_code() == 79
    finally:
        int8.largest_code.cache_clear()
