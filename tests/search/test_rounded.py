"""Products in eight and sixteen bits miss no pair above a limit, and leave few below it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laion_assets.index.vectors import unit
from laion_assets.search import rounded
from laion_assets.search.rounded import (
    Rounded,
    RoundedTwice,
    Tiles,
    each_may_exceed,
    may_exceed,
    where_may_exceed,
)

SLACK = 1e-6  # float32's, which callers allow for


@pytest.fixture(params=[127, 79], ids=["VNNI", "no VNNI"])
def largest_code(request, monkeypatch) -> int:
    """The largest code of processors that this one is not, too."""
    monkeypatch.setattr(rounded, "largest_code", lambda: request.param)
    return request.param


def vectors(random: np.random.Generator, n: int, dimension: int) -> np.ndarray:
    """Unit rows: some random, some almost equal, some along an axis, some zero."""
    rows = random.standard_normal((n, dimension))
    rows[1::4] = rows[0] + 0.05 * rows[1::4]
    rows[2::4, 1:] *= random.choice([0, 0.01], size=(len(rows[2::4]), 1))
    rows[3::16] = 0
    return unit(rows.astype(np.float32))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1 << 30),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dimension=st.integers(1, 100),
    reach=st.sampled_from([0.2, 0.5, 1.0]),
    limit=st.floats(-1, 1),
    width=st.integers(1, 16),
)
def test_no_pair_above_the_limit_is_missed_however_coarse_the_codes(
    seed, sizes, dimension, reach, limit, width
) -> None:
    random = np.random.default_rng(seed)
    x, y = (vectors(random, n, dimension) for n in sizes)
    a, b = RoundedTwice.of(x, reach), RoundedTwice.of(y, reach)
    cosines = x.astype(np.float64) @ y.T
    near = may_exceed(a.coarse(), b.coarse(), limit - SLACK)
    assert near[cosines > limit].all()

    rows, columns, some = where_may_exceed(a.coarse(), Tiles.of(b, width), limit - SLACK)
    found = np.zeros_like(near)
    found[np.ix_(rows, columns)] = some
    assert found[cosines > limit].all()
    assert not (found & ~near).any()

    i, j = np.indices(cosines.shape).reshape(2, -1)
    assert each_may_exceed(a[i], b[j], limit - SLACK)[cosines.ravel() > limit].all()


def test_each_vector_may_have_a_limit_of_its_own() -> None:
    x = vectors(np.random.default_rng(0), 30, 64)
    twice = RoundedTwice.of(x, 0.7)
    a = twice.coarse()
    limits = np.linspace(-0.5, 1, len(x))[:, None]
    each = np.concatenate(
        [may_exceed(a[[row]], a, float(limit)) for row, limit in enumerate(limits.ravel())]
    )
    together = may_exceed(a, a, limits)
    assert (together >= each).all()  # the largest error of several is no smaller
    rows, columns, some = where_may_exceed(a, Tiles.of(twice, 7), limits)
    found = np.zeros_like(together)
    found[np.ix_(rows, columns)] = some
    np.testing.assert_array_equal(found, together)


def test_few_pairs_below_the_limit_are_left(largest_code) -> None:
    random = np.random.default_rng(0)
    x = unit(random.standard_normal((1000, 128)).astype(np.float32))
    a = RoundedTwice.of(x, 5.5 / np.sqrt(128))
    assert a.coarse().largest_error < 0.015 * 127 / largest_code
    assert a.fine_error.max() < 1e-4 * 127 / largest_code
    near = may_exceed(a.coarse(), a.coarse(), 0.3)
    assert near.sum() < 3 * (x @ x.T > 0.3).sum()
    i, j = np.nonzero(near)
    assert each_may_exceed(a[i], a[j], 0.3).sum() < 1.02 * (x @ x.T > 0.3).sum()


def test_tiles_in_which_nothing_is_near_are_empty() -> None:
    rows = unit(np.eye(6, dtype=np.float32))
    vectors = Rounded.of(rows[:3], 1.0)
    found, columns, near = where_may_exceed(vectors, Tiles.of(RoundedTwice.of(rows[3:], 1.0), 2), 0.9)
    assert (len(found), len(columns), near.shape) == (0, 0, (0, 0))
