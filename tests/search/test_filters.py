"""Filters: what they can express and exclude, and that every dropped row is counted."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import indices
from hypothesis import example, given, settings
from hypothesis import strategies as st

from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.io.errors import InputError
from laion_assets.search.block_list_file import read_block_list
from laion_assets.search.filters import (
    COMPARE,
    Condition,
    Filters,
    conditions_in,
)
from laion_assets.search.retrieval import Found, Request, retrieve_table

# --- conditions -----------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_characters="'\"", exclude_categories=["Cs"]), max_size=8)
CONDITIONS = st.builds(
    Condition,
    st.from_regex(r"[A-Za-z_]\w{0,8}", fullmatch=True).filter(str.isascii),
    st.sampled_from(sorted(COMPARE)),
    st.one_of(
        st.booleans(),
        st.integers(-(10**17), 10**17),
        st.floats(allow_nan=False, allow_infinity=False),
        WORDS,
    ),
)


@settings(deadline=None)
@given(st.lists(CONDITIONS, min_size=1, max_size=4), st.sampled_from(["", " ", "\n\t"]), st.booleans())
def test_what_is_written_is_read(conditions, space, single):
    quote = "'" if single else '"'

    def written(condition: Condition) -> str:
        value = condition.value
        shown = f"{quote}{value}{quote}" if isinstance(value, str) else repr(value)
        shown = shown.lower() if isinstance(value, bool) else shown
        return space.join([condition.column, condition.comparison, shown])

    text = " and ".join(map(written, conditions))
    assert list(conditions_in(f"{space}{text}{space}")) == conditions


NUMBER, WORD = r"-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?(?!\w)", r"""'[^']*'|"[^"]*\"|(?-i:true|false)(?!\w)"""
ONE = rf" *[a-z_]\w* *(<=|>=|==|!=|<|>) *({NUMBER}|{WORD}) *"
PIECES = ["punsafe", "and", "_x", "<", "<=", "==", "!=", "0.5", "5", ".", "-", "e5", "'", '"', "(", ";"]
SENTENCES = st.lists(st.sampled_from(["punsafe < 0.5", "_x=='e5'", " and ", " ", *PIECES]), max_size=7)


@settings(deadline=None)
@given(SENTENCES.map("".join))
@example("punsafe < 0.5 and _x=='e5'")
@example("punsafe < 0.5and _x=='e5'")
@example("punsafe < 0.5 and")
def test_conditions_joined_by_and_are_read_and_any_other_text_is_refused(text):
    if text.strip() and not re.fullmatch(rf"{ONE}(and\b{ONE})*", text):
        with pytest.raises(InputError, match=r"punsafe < 0\.5"):
            conditions_in(text)
    else:
        assert bool(conditions_in(text)) == bool(text.strip())


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("punsafe", "punsafe"),
        ("punsafe < 0.5 or width > 5", "or width > 5"),
        ("punsafe < 0.5 width > 5", "width > 5"),
        ("width > 5px", "width > 5px"),
        ("NSFW == UNLIKELY", "NSFW == UNLIKELY"),
        ("__import__('os').system('true')", "__import__('os').system('true')"),
    ],
)
def test_the_text_that_cannot_be_parsed_is_quoted_with_an_example(text, rest):
    with pytest.raises(InputError) as refused:
        conditions_in(text)
    message = str(refused.value)
    facts = [f"cannot read {rest!r}", "punsafe < 0.5 and NSFW == 'UNLIKELY'", *COMPARE]
    assert [fact for fact in facts if fact not in message] == []
    is_after_a_condition = not text.startswith(rest)
    assert ("only `and` joins conditions" in message) == is_after_a_condition


def test_a_missing_condition_at_the_end_is_named():
    with pytest.raises(InputError, match=r"last condition .*punsafe < 0\.5"):
        conditions_in("punsafe < 0.5 and")


@settings(deadline=None)
@given(
    values=st.lists(st.one_of(st.none(), st.floats(width=32), st.integers(-9, 9)), max_size=12),
    comparison=st.sampled_from(sorted(COMPARE)),
    limit=st.one_of(st.integers(-9, 9), st.floats(-9, 9), st.just(10**400)),
)
def test_a_condition_holds_as_in_python_and_never_for_what_is_missing(values, comparison, limit):
    rows = pa.table({"score": pa.array(values, pa.float32())})
    stored = rows["score"].to_pylist()
    expected = [
        v is not None and v == v and eval(f"v {comparison} limit", {"v": v, "limit": limit})
        for v in stored
    ]
    assert Condition("score", comparison, limit).holds(rows).tolist() == expected


NUMBERS = {
    "int8": st.integers(-(2**7), 2**7 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "uint64": st.integers(0, 2**64 - 1),
    "decimal128(38, 3)": st.decimals(-(10**30), 10**30, places=3),
    "decimal256(60, 3)": st.decimals(-(10**50), 10**50, places=3),
}
TYPES = {name: getattr(pa, name)() for name in ("int8", "int64", "uint64")} | {
    "decimal128(38, 3)": pa.decimal128(38, 3),
    "decimal256(60, 3)": pa.decimal256(60, 3),
}


@settings(deadline=None)
@given(st.data(), st.sampled_from(sorted(NUMBERS)), st.sampled_from(sorted(COMPARE)))
def test_whole_numbers_and_decimals_of_any_size_compare_exactly(data, kind, comparison):
    value = data.draw(NUMBERS[kind])
    near = [value, value + 1, value - 1, 5, -0.5, 2.0**53, 1e300, 10**400]
    limit = data.draw(st.sampled_from([float(value), *(int(n) for n in near[:3]), *near[3:]]))
    column = pa.array([value, None], TYPES[kind])
    rows = pa.table({"n": pa.chunked_array([column, column.slice(1)])})
    (condition,) = conditions_in(f"n {comparison} {limit!r}")
    wanted = eval(f"v {comparison} limit", {"v": value, "limit": condition.value})
    assert condition.holds(rows).tolist() == [wanted, False, False]


def test_filters_that_are_too_long_are_refused_at_once():
    for text in ("width > " + "9" * 40_000 + "x", " and ".join(["width > 5"] * 4000)):
        with pytest.raises(InputError, match=r"filters have [\d,]+ characters, at most 4,096"):
            conditions_in(text)


SCHEMA = pa.schema(
    {
        "url": pa.string(),
        "NSFW": pa.string(),
        "punsafe": pa.float64(),
        "WIDTH": pa.int32(),
        "nothing": pa.null(),
        "is_safe": pa.bool_(),
    }
)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("width > 5", ["'width'", "url, NSFW, punsafe, WIDTH, nothing, is_safe", "mean WIDTH"]),
        ("weather == 'fine'", ["'weather'", "url, NSFW, punsafe, WIDTH, nothing, is_safe", "remove"]),
        ("NSFW < 0.5", ["NSFW", "0.5", "string", "quoted word"]),
        ("punsafe < '0.5'", ["punsafe", "'0.5'", "double", "number"]),
        ("is_safe == 1", ["is_safe", "with 1", "bool", "give true or false"]),
        ("WIDTH == true", ["WIDTH", "with true", "int32", "give a number"]),
    ],
)
def test_a_filter_that_could_do_nothing_is_refused(text, facts):
    with pytest.raises(InputError) as refused:
        Filters(conditions_in(text)).check(SCHEMA)
    assert [fact for fact in facts if fact not in str(refused.value)] == []
    Filters(
        conditions_in("NSFW != 'NSFW' and punsafe<.5 and WIDTH >= 5 and nothing < 1 and is_safe==true")
    ).check(SCHEMA)


# --- in a search ----------------------------------------------------------------------------------


def search(
    folder: Path, query: np.ndarray, k: int, threshold: float, filters: Filters
) -> tuple[list[dict], Found]:
    index = Index(*indices.index_paths(folder))
    metadata = Metadata(sorted((folder / "metadata").iterdir()))
    table, found = retrieve_table(
        index, metadata, query, Request(k, threshold, None, filters), per_seed=True
    )
    return table.to_pylist(), found


@settings(deadline=None)
@given(st.data())
def test_any_filters_leave_what_the_obvious_way_leaves(tmp_path_factory, data):
    """The best row of each group that may stay does, and every other row has its reason."""
    folder = tmp_path_factory.mktemp("index")
    n = data.draw(st.integers(1, 14))
    rows = indices.random_rows(np.random.default_rng(data.draw(st.integers(0, 9))), n)
    urls = [data.draw(st.sampled_from([f"http://u/{i}", None, ""])) for i in range(n)]
    scores = [data.draw(st.sampled_from([0.1, 0.9, None])) for _ in range(n)]
    indices.write_index(folder, rows, "Flat")
    indices.write_metadata(
        folder,
        pa.table({"url": pa.array(urls, pa.string()), "punsafe": pa.array(scores, pa.float32())}),
    )
    ids = data.draw(st.sets(st.integers(0, n - 1), max_size=3))
    names = data.draw(st.sets(st.integers(0, n - 1), max_size=3))
    listed = folder / "list.txt"
    listed.write_text("\n".join(["999", *map(str, ids), *(f"http://u/{i}" for i in names)]))
    filters = Filters(conditions_in("punsafe < 0.5"), read_block_list(str(listed)))
    threshold = 0.9
    kept, found = search(folder, rows[:1], n, threshold, filters)

    order = sorted(range(n), key=lambda i: (-float(np.float32(rows[0] @ rows[i])), i))
    group = {i: i for i in range(n)}
    for a in range(n):
        for b in range(n):
            if rows[a] @ rows[b] > threshold:
                old, new = group[b], group[a]
                group = {i: new if g == old else g for i, g in group.items()}
    reason = {}
    for i in range(n):
        if not urls[i]:
            reason[i] = "without_url"
        elif i in ids or i in names:
            reason[i] = "blocked"
        elif scores[i] is None or scores[i] >= 0.5:
            reason[i] = "filtered"
    expected, counts = [], dict.fromkeys(("without_url", "blocked", "filtered", "near_duplicates"), 0)
    for name in set(group.values()):
        members = [i for i in order if group[i] == name]
        allowed = [i for i in members if i not in reason]
        expected += allowed[:1]
        if members[0] not in reason:  # then nobody looks at the others
            counts["near_duplicates"] += len(members) - 1
            continue
        counts["near_duplicates"] += max(len(allowed) - 1, 0)
        for i in members:
            if i in reason:
                counts[reason[i]] += 1
    assert sorted(r["id"] for r in kept) == sorted(expected)
    funnel = vars(found.funnel)
    assert {name: funnel[name] for name in counts} == counts
    assert funnel["received"] - sum(counts.values()) == funnel["kept"] == len(kept)
