"""Merging the best rows of parts, in any order, gives the best rows of all."""

import io
from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from laion_assets.build.answers import NO_ROW, Answers, merged, read_answers, recall, write_answers
from laion_assets.io.storage import Sink

QUERIES = 3


@st.composite
def answers(draw: st.DrawFn, parts: int) -> list[Answers]:
    """Answers from distinct rows, some with equal scores; some queries have fewer rows than others."""
    ids = iter(draw(st.permutations(range(60))))
    made = []
    for _ in range(parts):
        rows = draw(st.integers(0, 6))
        found = np.array([[next(ids) for _ in range(rows)]] * QUERIES, np.int64).reshape(QUERIES, rows)
        scores = np.array(
            draw(st.lists(st.sampled_from([-1, 0, 0.5, 1]), min_size=found.size, max_size=found.size))
        )
        absent = np.array(draw(st.lists(st.booleans(), min_size=found.size, max_size=found.size)), bool)
        found[absent.reshape(found.shape)] = NO_ROW
        made.append(Answers(found, scores.reshape(found.shape).astype(np.float32)))
    return made


def as_lists(found: Answers) -> list[list[tuple[float, int]]]:
    return [
        [(float(score), int(row)) for row, score in zip(rows, scores, strict=True) if row != NO_ROW]
        for rows, scores in zip(found.ids, found.scores, strict=True)
    ]


@given(data=st.data(), count=st.integers(1, 12))
def test_merging_in_any_order_and_grouping_keeps_the_best_rows_ties_by_id(data, count):
    parts = data.draw(answers(data.draw(st.integers(1, 5))))
    pairs = [[*chain(*(as_lists(part)[query] for part in parts))] for query in range(QUERIES)]
    expected = [sorted(rows, key=lambda pair: (-pair[0], pair[1]))[:count] for rows in pairs]
    waiting = data.draw(st.permutations(parts))
    while len(waiting) > 1:
        at = data.draw(st.integers(0, len(waiting) - 2))
        waiting[at : at + 2] = [merged(waiting[at : at + 2], count)]
    assert as_lists(merged([Answers.none(QUERIES), *waiting], count)) == expected
    without = np.array([rows[0][1] if rows else NO_ROW for rows in expected])
    assert as_lists(merged(parts, count).without(without)) == [rows[1:] for rows in expected]


@given(data=st.data())
def test_recall_is_the_share_of_the_best_rows_that_is_found_and_answers_survive_a_file(data):
    found, exact = (part.best(6) for part in data.draw(answers(2)))
    sink = io.BytesIO()
    write_answers(Sink(sink), {"exact": exact, "16": found})
    stored = read_answers(sink.getvalue())
    assert {name: as_lists(each) for name, each in stored.items()} == {
        "exact": as_lists(exact), "16": as_lists(found),
    }  # fmt: skip
    every_other = np.arange(found.ids.shape[1]) % 2
    shared = Answers(np.where(every_other, exact_ids(exact, found), found.ids), found.scores)
    shares = recall(shared, exact, (1, 3, 5))
    for count in (1, 3, 5):
        best = [{row for _, row in rows[:count]} for rows in as_lists(exact)]
        if any(len(rows) < count for rows in best):
            assert count not in shares
            continue
        hits = [len(rows & set(ids[:count].tolist())) for rows, ids in zip(best, shared.ids, strict=True)]
        assert shares[count] == np.mean(np.array(hits) / count)


def exact_ids(exact: Answers, like: Answers) -> np.ndarray:
    """The ids of the best rows, in the shape of other answers."""
    width = like.ids.shape[1]
    return np.pad(exact.ids, ((0, 0), (0, width)), constant_values=NO_ROW)[:, :width]
