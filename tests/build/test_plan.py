"""Which rows a shard holds, and that no row ever changes its id."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laion_assets.build.plan import Part, Plan, extended
from laion_assets.io.errors import InputError

SIZES = st.lists(st.integers(0, 30), max_size=8)


def parts(sizes: list[int], first: int = 0) -> list[Part]:
    return [Part(f"part-{number}", rows, f"v{number}") for number, rows in enumerate(sizes, first)]


@given(batches=st.lists(SIZES, max_size=4), shard_rows=st.lists(st.integers(1, 40), min_size=4))
def test_ids_go_on_from_shard_to_shard_and_stay_when_files_are_added_before_or_between(
    batches, shard_rows
):
    plan, files = Plan(), []
    for sizes, at_most in zip(batches, shard_rows, strict=False):
        files = parts(sizes, len(files)) + files  # new files sort before the old ones
        before, plan = plan, extended(plan, files, at_most)
        assert plan.shards[: len(before.shards)] == before.shards
        for shard in plan.shards[len(before.shards) :]:
            assert shard.rows <= at_most or len([part for part in shard.parts if part.rows]) == 1
    assert [shard.number for shard in plan.shards] == list(range(len(plan.shards)))
    assert sorted(part.name for part in plan.parts()) == sorted(part.name for part in files)
    assert plan.rows == sum(part.rows for part in files)
    for one, other in zip(plan.shards, plan.shards[1:], strict=False):
        assert other.first_id == one.first_id + one.rows
        assert one.name < other.name
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert extended(plan, list(reversed(files))) == plan
    assert len({shard.fingerprint for shard in plan.shards}) == len(plan.shards)


@pytest.mark.parametrize(
    ("now", "problem"),
    [
        (parts([3, 4])[1:], "part-0 is gone"),
        ([], "part-0, part-1 are gone"),
        ([Part("renamed", 3, "v0"), *parts([3, 4])[1:]], "part-0 is gone"),
        ([Part("part-0", 3, "other"), *parts([3, 4])[1:]], "part-0 changed"),
        (parts([3, 5]), "part-1 changed after its rows"),
        (parts([4, 5]), "part-0, part-1 changed after their rows .*`cp -p` .*`touch -r`"),
    ],
)
def test_a_planned_file_that_is_gone_or_changed_is_named(now, problem):
    with pytest.raises(InputError, match=problem) as refused:
        extended(extended(Plan(), parts([3, 4])), now)
    assert refused.value.about == "embeddings_uri"
    assert "elsewhere" in str(refused.value)
