"""The comparison with the peer reports every difference that is not a documented exception."""

import numpy as np
import pytest
from helpers.same import ROUNDING, Rows, differences

THRESHOLD = 0.94


def at(degrees: list[float]) -> np.ndarray:
    """Unit vectors in the plane."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


# Rows 0 and 1 are near-duplicates, and so are 2 and 3, which are tied; 4 and 5 are alone, and tied.
VECTORS = at([0, 5, 60, 65, 120, 180, 240])
SCORES = np.array([0.9, 0.8, 0.7, 0.7 - ROUNDING / 2, 0.6, 0.6 - ROUNDING / 2, 0.1])
RECEIVED = Rows(np.arange(6), SCORES[:6])


def answer(*ids: int, **scores: float) -> Rows:
    rows = np.array(ids, int)
    return Rows(rows, np.array([scores.get(f"row_{row}", SCORES[row]) for row in ids]))


THEIRS = answer(0, 2, 4, 5)


def told(ours: Rows, theirs: Rows = THEIRS, threshold: float = THRESHOLD) -> str:
    return "; ".join(differences(theirs, ours, RECEIVED, VECTORS, threshold))


def test_the_same_is_the_same() -> None:
    assert told(THEIRS) == ""


def test_tied_rows_may_swap_places_and_stand_in_for_their_near_duplicates() -> None:
    assert told(answer(0, 2, 5, 4)) == ""
    assert told(answer(0, 3, 4, 5)) == ""
    assert told(answer(0, 3, 5, 4)) == ""


@pytest.mark.parametrize("left_out", [0, 1, 2, 3])
def test_a_dropped_row_is_told(left_out) -> None:
    rest = np.delete(THEIRS.ids, left_out)
    assert f"[{THEIRS.ids[left_out]}" in told(answer(*rest))
    assert "the other keeps []" in told(answer(*rest))
    assert "the reference keeps []" in told(THEIRS, theirs=answer(*rest))


@pytest.mark.parametrize("extra", [1, 3])
def test_an_extra_near_duplicate_is_told(extra) -> None:
    more = answer(*sorted([*THEIRS.ids, extra]))
    assert f"the other keeps [{extra - 1}, {extra}]" in told(more)


def test_a_row_that_was_never_received_is_told() -> None:
    assert "row 6 was not received" in told(answer(0, 2, 4, 5, 6))


def test_a_row_that_comes_twice_is_told() -> None:
    assert "an id comes twice" in told(answer(0, 2, 2, 4, 5))


def test_a_worse_row_in_place_of_its_near_duplicate_is_told() -> None:
    assert "the other keeps [1]" in told(answer(1, 2, 4, 5))


def test_a_swap_of_unequal_scores_is_told_whether_the_scores_move_along_or_not() -> None:
    assert "row 2 comes after a row that is worse" in told(answer(0, 4, 2, 5))
    ids_alone = answer(0, 4, 2, 5, row_4=SCORES[2], row_2=SCORES[4])
    assert "row 2 has the score 0.6" in told(ids_alone)


def test_another_score_is_told() -> None:
    assert "row 4 has the score" in told(answer(0, 2, 4, 5, row_4=0.6 + 2 * ROUNDING))


def test_a_pair_at_the_threshold_may_count_as_linked_or_not_but_the_best_stays() -> None:
    limit = float(VECTORS[0] @ VECTORS[1])
    both, one = answer(0, 1, 2, 4, 5), answer(0, 2, 4, 5)
    for threshold in (limit - ROUNDING / 2, limit, limit + ROUNDING / 2):
        assert told(both, theirs=one, threshold=threshold) == ""
        assert told(one, theirs=both, threshold=threshold) == ""
        assert "the other keeps [1]" in told(answer(1, 2, 4, 5), theirs=one, threshold=threshold)
    assert told(both, theirs=one, threshold=limit - 3 * ROUNDING) != ""
    assert told(one, theirs=both, threshold=limit + 3 * ROUNDING) != ""


def test_another_row_may_be_received_for_the_last_place_only_if_it_is_tied() -> None:
    shorter = Rows(RECEIVED.ids[:5], RECEIVED.scores[:5])
    for other, same in ((answer(0, 2, 5), True), (answer(0, 2, 6), False), (answer(0, 2), False)):
        assert same == (differences(answer(0, 2, 4), other, shorter, VECTORS, THRESHOLD) == [])
