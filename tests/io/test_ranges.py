"""Ranges behave as the sets of numbers that they stand for."""

from collections.abc import Sequence

import numpy as np
from helpers.sparse import as_ranges
from hypothesis import given
from hypothesis import strategies as st

from laion_assets.io import ranges

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12)


def as_set(some: Sequence[tuple[int, int]]) -> set[int]:
    return {number for start, length in some for number in range(start, start + length)}


@given(one=spans, other=spans, gap=st.integers(0, 5), size=st.integers(1, 9))
def test_ranges_are_sets_of_numbers(one, other, gap, size):
    there = as_set(one)
    made = as_ranges(one)
    assert set(ranges.members(made)) == there
    assert ranges.total(made) == len(there)
    assert (made[:, 0] < made[:, 1]).all()
    assert (made[1:, 0] > made[:-1, 1]).all()
    assert set(ranges.members(ranges.union(made, as_ranges(other)))) == there | as_set(other)
    np.testing.assert_array_equal(ranges.runs(np.array(sorted(there), np.int64)), made)
    every = np.arange(100)
    assert set(every[ranges.outside(every, made)]) == set(every) - there
    joined = as_ranges(one, gap)
    assert (joined[1:, 0] > joined[:-1, 1] + gap).all()
    between = set(ranges.members(joined)) - there
    assert all({*range(n - gap, n)} & there and {*range(n + 1, n + gap + 1)} & there for n in between)
    cut = ranges.split(made, size)
    assert [n for part in cut for n in range(*part)] == sorted(there)
    assert ((cut[:, 1] - cut[:, 0]) <= size).all()
    batches = list(ranges.batched(made, size))
    assert [n for some in batches for n in ranges.members(some)] == sorted(there)
    assert all(ranges.total(some) < 2 * size for some in batches)
