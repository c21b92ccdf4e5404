"""Filters: what they can express and exclude, and that every dropped row is counted."""

import gzip
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import indices
from hypothesis import example, given, settings
from hypothesis import strategies as st

from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage
from laion_assets.search.filters import (
    COMPARE,
    BlockList,
    Condition,
    Filters,
    conditions_in,
    read_block_list,
)
from laion_assets.search.retrieval import Found, Request, retrieve_table

# --- conditions -----------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_characters="'\"", exclude_categories=["Cs"]), max_size=8)
CONDITIONS = st.builds(
    Condition,
    st.from_regex(r"[A-Za-z_]\w{0,8}", fullmatch=True).filter(str.isascii),
    st.sampled_from(sorted(COMPARE)),
    st.one_of(st.integers(-(10**17), 10**17), st.floats(allow_nan=False, allow_infinity=False), WORDS),
)


@settings(deadline=None)
@given(st.lists(CONDITIONS, min_size=1, max_size=4), st.sampled_from(["", " ", "\n\t"]), st.booleans())
def test_what_is_written_is_read(conditions, space, single):
    quote = "'" if single else '"'

    def written(condition: Condition) -> str:
        value = condition.value
        shown = f"{quote}{value}{quote}" if isinstance(value, str) else repr(value)
        return space.join([condition.column, condition.comparison, shown])

    text = " and ".join(map(written, conditions))
    assert list(conditions_in(f"{space}{text}{space}")) == conditions


NUMBER, WORD = r"-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?(?!\w)", r"""'[^']*'|"[^"]*\""""
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
    limit=st.one_of(st.integers(-9, 9), st.floats(-9, 9)),
)
def test_a_condition_holds_as_in_python_and_never_for_what_is_missing(values, comparison, limit):
    rows = pa.table({"score": pa.array(values, pa.float32())})
    stored = rows["score"].to_pylist()
    expected = [
        v is not None and v == v and eval(f"v {comparison} limit", {"v": v, "limit": limit})
        for v in stored
    ]
    assert Condition("score", comparison, limit).holds(rows).tolist() == expected


SCHEMA = pa.schema(
    {
        "url": pa.string(),
        "NSFW": pa.string(),
        "punsafe": pa.float64(),
        "WIDTH": pa.int32(),
        "nothing": pa.null(),
    }
)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("width > 5", ["'width'", "url, NSFW, punsafe, WIDTH, nothing", "mean WIDTH"]),
        ("weather == 'fine'", ["'weather'", "url, NSFW, punsafe, WIDTH, nothing", "remove"]),
        ("NSFW < 0.5", ["NSFW", "0.5", "string", "quoted word"]),
        ("punsafe < '0.5'", ["punsafe", "'0.5'", "double", "number"]),
    ],
)
def test_a_filter_that_could_do_nothing_is_refused(text, facts):
    with pytest.raises(InputError) as refused:
        Filters(conditions_in(text)).check(SCHEMA)
    assert [fact for fact in facts if fact not in str(refused.value)] == []
    Filters(conditions_in("NSFW != 'NSFW' and punsafe<.5 and WIDTH >= 5 and nothing < 1")).check(SCHEMA)


# --- the block list -------------------------------------------------------------------------------


def blocked(found: BlockList, *rows: tuple[int, str]) -> list[bool]:
    ids, urls = zip(*rows, strict=True)
    return found.holds(np.array(ids), pa.chunked_array([urls])).tolist()


ROWS = [(1, "https://a/1.jpg"), (2, "https://a/2.jpg"), (3, "https://a/3.jpg"), (4, "https://a/4.jpg?é")]
LINES = "\ufeff2\r\n\r\nhttps://a/4.jpg?é\nhttps://a/9.jpg\n77"


@pytest.mark.parametrize("name", ["list.txt", "list", "list.txt.gz", "list.parquet"])
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_ids_and_urls_are_blocked_whatever_form_the_list_has(tmp_path, request, name, place):
    file = tmp_path / name
    if name.endswith(".parquet"):
        table = {
            "url": ["https://a/4.jpg?é", None, "https://a/9.jpg"],
            "id": [2, 77, None],
            "more": [1, 2, 3],
        }
        pq.write_table(pa.table(table), file)
    else:
        content = LINES.encode()
        file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    uri = str(file)
    if place == "bucket":
        bucket = request.getfixturevalue("new_bucket")
        fs, root = open_storage(bucket, "")
        fs.pipe(f"{root}/{name}", file.read_bytes())
        uri = f"{bucket}/{name}"
    found = read_block_list(uri)
    assert blocked(found, *ROWS) == [False, True, False, True]
    fingerprint = str(found).rpartition(", ")[2]
    assert str(found) == f"{uri}, 2 ids, 2 URLs, {fingerprint}"
    same = tmp_path / "same.txt"
    same.write_text("\n".join(reversed(LINES.strip("\ufeff").splitlines())) + "\n2")
    assert str(read_block_list(str(same))).endswith(fingerprint)
    same.write_text("2")
    assert not str(read_block_list(str(same))).endswith(fingerprint)


@settings(deadline=None)
@given(st.sets(st.integers(0, 2**63 - 1), max_size=30), st.sets(st.integers(0, 2**63 - 1), max_size=30))
def test_exactly_the_ids_on_the_list_are_blocked(listed, asked):
    found = BlockList("", np.array(sorted(listed), np.int64), np.empty(0, np.int64))
    ids = np.array(sorted(listed | asked), np.int64)
    assert found.holds(ids, pa.chunked_array([], pa.string())).tolist() == [
        i in listed for i in ids.tolist()
    ]


def test_a_list_of_ones_own_table_blocks_its_images(tmp_path):
    pq.write_table(
        pa.table({"id": pa.array([3], pa.int64()), "url": ["https://a/1.jpg"]}), tmp_path / "t.parquet"
    )
    assert blocked(read_block_list(str(tmp_path / "t.parquet")), *ROWS) == [True, False, True, False]


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("none.txt", None, ["missing"]),
        ("list.txt", b"", ["empty"]),
        ("list.txt.gz", b"1\n2\n", ["cannot be read", "gzip"]),
        ("list.parquet", b"1\n2\n", ["cannot be read", "Parquet"]),
    ],
)
def test_a_list_that_is_missing_empty_or_damaged_is_refused(tmp_path, name, content, facts):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_block_list(str(tmp_path / name))
    facts = [str(tmp_path / name), *facts]
    assert [fact for fact in facts if fact not in str(refused.value)] == []
    assert refused.value.about == "block_list"


@pytest.mark.parametrize(
    ("content", "line", "quoted"),
    [(b"1\n2\nurl\n", 3, "'url'"), (b"1\nhttp://\xff\n", 2, "'http://"), (b"9" * 30, 1, repr("9" * 30))],
)
def test_a_line_that_is_neither_id_nor_url_is_named(tmp_path, content, line, quoted):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_block_list(str(path))
    facts = [str(path), f"line {line} ", quoted, "one id or URL per line"]
    assert [fact for fact in facts if fact not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("columns", "found"), [({"key": [1]}, "key (int64)"), ({"id": ["1"]}, "id (string)")]
)
def test_a_table_without_ids_or_urls_is_no_list(tmp_path, columns, found):
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    with pytest.raises(InputError) as refused:
        read_block_list(str(tmp_path / "list.parquet"))
    facts = ["list.parquet", found, "column id or url"]
    assert [fact for fact in facts if fact not in str(refused.value)] == []


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
    urls = [data.draw(st.sampled_from([f"u/{i}", None, ""])) for i in range(n)]
    scores = [data.draw(st.sampled_from([0.1, 0.9, None])) for _ in range(n)]
    indices.write_index(folder, rows, "Flat")
    indices.write_metadata(
        folder,
        pa.table({"url": pa.array(urls, pa.string()), "punsafe": pa.array(scores, pa.float32())}),
    )
    ids = data.draw(st.sets(st.integers(0, n - 1), max_size=3))
    names = data.draw(st.sets(st.integers(0, n - 1), max_size=3))
    listed = folder / "list.txt"
    listed.write_text("\n".join(["999", *map(str, ids), *(f"u/{i}" for i in names)]))
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
