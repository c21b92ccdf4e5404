"""Compares two answers to the same request, and defines the differences that are allowed.

Two programs that add up the same numbers in another order may disagree in the last bits. Therefore,
and for no other reason:

- rows whose scores differ by less than `ROUNDING` may swap places;
- of near-duplicates whose scores differ by less than that any one may stay; likewise, of rows tied for
  the last place of what is received, any may be received;
- a pair whose cosine is that near to the threshold may count as linked or not.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

ROUNDING = 1e-6


@dataclass(frozen=True)
class Rows:
    """Ids and their scores, best first."""

    ids: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def differences(
    theirs: Rows, ours: Rows, received: Rows, vectors: np.ndarray, threshold: float
) -> list[str]:
    """What differs beyond the exceptions, a sentence each.

    Args:
        theirs: what the reference keeps.
        ours: what is compared with it.
        received: what the reference chose from.
        vectors: unit vector of every id of the index.
        threshold: cosine above which two rows are linked.

    """
    return [
        *_not_to_be_expected(ours, received),
        *_out_of_order(ours, received),
        *_chosen_otherwise(theirs, ours, received, vectors, threshold),
    ]


def _scores_by_id(*sides: Rows) -> dict[int, float]:
    return {
        int(row): float(score) for side in sides for row, score in zip(side.ids, side.scores, strict=True)
    }


def _not_to_be_expected(ours: Rows, received: Rows) -> Iterator[str]:
    """Rows that come twice, that the reference never saw, or that have another score with it."""
    expected = _scores_by_id(received)
    worst = min(expected.values(), default=np.inf)
    if len(np.unique(ours.ids)) < len(ours):
        yield "an id comes twice"
    for row, score in _scores_by_id(ours).items():
        if row not in expected and abs(score - worst) >= ROUNDING:
            yield f"row {row} was not received by the reference"
        if row in expected and abs(score - expected[row]) >= ROUNDING:
            yield f"row {row} has the score {score}, and {expected[row]} with the reference"


def _out_of_order(ours: Rows, received: Rows) -> Iterator[str]:
    """Rows that come after one that the reference finds worse."""
    known = _scores_by_id(ours, received)
    scores = np.array([known[int(row)] for row in ours.ids])
    for place in np.flatnonzero(scores - np.minimum.accumulate(scores) >= ROUNDING):
        yield f"row {ours.ids[place]} comes after a row that is worse"


def _chosen_otherwise(
    theirs: Rows, ours: Rows, received: Rows, vectors: np.ndarray, threshold: float
) -> Iterator[str]:
    """Groups of near-duplicates of which another row stays, though neither score nor cosine is a tie."""
    only_one = np.setxor1d(theirs.ids, ours.ids)
    if not len(only_one):
        return
    known = _scores_by_id(theirs, ours, received)
    ids = np.fromiter(known, int)
    scores = np.fromiter(known.values(), float)
    surely, perhaps = (
        brute_force_components(vectors[ids], limit)
        for limit in (threshold + ROUNDING, threshold - ROUNDING)
    )
    exchanged = not np.isin(ids, received.ids).all()  # a row for another that is tied for the last place
    for group in np.unique(perhaps[np.isin(ids, only_one)]):
        members = perhaps == group
        if exchanged and (scores[members] < scores.min() + ROUNDING).all():
            continue
        for name, side in (("the reference", theirs), ("the other", ours)):
            kept = members & np.isin(ids, side.ids)
            if _is_a_choice(kept, members, surely, scores):
                continue
            yield f"of the near-duplicates {ids[members].tolist()} {name} keeps {ids[kept].tolist()}"


def _is_a_choice(kept: np.ndarray, members: np.ndarray, surely: np.ndarray, scores: np.ndarray) -> bool:
    """Whether the best of a group stay: one of all, and at most one of those that surely are linked."""
    parts = surely[kept]
    best_of_part = np.array([scores[members & (surely == part)].max() for part in parts])
    one_a_part = len(np.unique(parts)) == len(parts)
    best = one_a_part and bool((best_of_part - scores[kept] < ROUNDING).all())
    return best and scores[kept].max(initial=-np.inf) > scores[members].max() - ROUNDING


def brute_force_components(vectors: np.ndarray, limit: float) -> np.ndarray:
    """A number for the component of each row, where a link is a cosine above the limit."""
    rows, columns = [], []
    exact = vectors.astype(np.float64)
    for start in range(0, len(exact), 1024):
        row, column = np.nonzero(exact[start : start + 1024] @ exact.T > limit)
        rows.append(row + start)
        columns.append(column)
    pairs = (np.concatenate(rows), np.concatenate(columns))
    graph = coo_array((np.ones(len(pairs[0]), np.bool_), pairs), shape=(len(exact), len(exact)))
    return connected_components(graph, directed=False)[1]
