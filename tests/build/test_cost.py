"""The cost of a build is estimated before it starts."""

import pytest

from laion_assets.build import cost_of, measured
from laion_assets.build.cost import Rates
from laion_assets.io.errors import InputError

KEY = "OPQ128_896,IVF65536_HNSW32,PQ128x8"


def test_what_encoding_takes_grows_with_the_rows_and_training_does_not():
    rates = Rates(2e-4, 1e-4)
    one, hundred = (cost_of(n * 12_800_000, 768, KEY, rates, shard_rows=2_000_000) for n in (1, 100))
    assert (one.shards, hundred.shards) == (7, 640)
    assert one.lists == 12_800_000 * 136
    for amount in ("vectors", "metadata", "lists", "encoding", "disk"):
        assert getattr(hundred, amount) == pytest.approx(100 * getattr(one, amount))
    assert hundred.training == one.training
    assert one.encoding == pytest.approx(12_800_000 * 3e-4 / 3600)


def test_each_kind_of_index_is_measured():
    flat, lists = measured("IVF1,Flat", 64), measured("IVF256,Flat", 64)
    codes = measured("OPQ16_64,IVF256_HNSW32,PQ16x8", 64)
    assert (flat.assigning, flat.coding, lists.coding) == (0, 0, 0)
    assert min(lists.assigning, codes.assigning, codes.coding) > 0
    with pytest.raises(InputError, match="nonsense"):
        measured("nonsense", 64)
