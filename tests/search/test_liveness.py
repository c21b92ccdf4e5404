"""The share of URLs that work, estimated from a sample."""

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from laion_assets.search.liveness import SAMPLE, Liveness, sampled


@settings(max_examples=20)
@given(rows=st.integers(0, 2000), at_once=st.integers(1, 500))
def test_a_sample_holds_different_rows_the_same_each_time_from_the_whole_table(rows, at_once):
    batches = pa.table({"url": pa.array([f"u{i}" for i in range(rows)], pa.string())}).to_batches(at_once)
    found = sampled(batches, rows)
    assert len(set(found)) == len(found) == min(rows, SAMPLE)
    assert found == sampled(batches, rows)
    if rows >= 10 * SAMPLE:
        assert {int((url or "")[1:]) * 4 // rows for url in found} == {0, 1, 2, 3}


def test_the_interval_is_wilsons():
    """As in Wilson (1927); the limits of 0 and of all are not 0 and 1 alone."""
    low, high = Liveness(150, 200, "").interval
    assert (round(low, 4), round(high, 4)) == (0.6857, 0.8049)
    assert Liveness(0, 200, "").interval[0] == 0
    assert 0.98 < Liveness(200, 200, "").interval[0] < 1 == Liveness(200, 200, "").interval[1]
    assert Liveness(0, 0, "").interval == (0, 1)
