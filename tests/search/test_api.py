"""One call searches an index folder around vectors and returns a table."""

import numpy as np
import pytest
from helpers import indices

from laion_assets.index.vectors import unit
from laion_assets.io.errors import InputError
from laion_assets.search import search
from laion_assets.search.retrieval import Request


@pytest.mark.parametrize(
    ("about", "wrong"),
    [
        *(("k", {"k": k}) for k in (0, -1)),
        *(("nprobe", {"nprobe": nprobe}) for nprobe in (0, -3)),
        *(("dedup_threshold", {"dedup_threshold": t}) for t in (0, -0.5, 1.01, float("nan"))),
    ],
)
def test_a_number_out_of_its_bounds_is_named(demo, about, wrong) -> None:
    with pytest.raises(InputError, match=f"^{about} is ") as refused:
        search(demo.index, np.ones(256), **({"k": 5} | wrong))
    assert refused.value.about == about


def test_the_bounds_themselves_are_allowed(demo) -> None:
    query = indices.reconstructed(demo.index)[0] * 7  # of any length
    table = search(demo.index, query, 1, nprobe=1, dedup_threshold=1)
    assert table["rank"].to_pylist() == [1]
    assert Request(1, 1e-9).nprobe is None


@pytest.mark.parametrize("wrong", [0.0, np.nan, np.inf])
def test_a_vector_without_a_direction_is_named_by_its_number(demo, wrong) -> None:
    vectors = unit(indices.reconstructed(demo.index)[:3])
    vectors[1] = wrong
    with pytest.raises(InputError, match="vector 1 is zero or not finite"):
        search(demo.index, vectors, 5)
