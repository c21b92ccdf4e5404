"""Find the nearest of many centres for each row, by inner product, on all cores."""

from __future__ import annotations

import numpy as np

from laion_assets.io.arrays import Floats, Ids
from laion_assets.io.parallel import in_threads

EXACT_CENTRES = 2_048  # up to this number, every row is compared with all centres
SCORES_AT_ONCE = 1 << 20  # scores that a thread holds, in float32
GROUP_CENTRES = 32  # average number of centres in a group
CANDIDATES = 2_048  # number of centres compared with the rows of a group
GROUP_ROUNDS = 6


def nearest(rows: Floats, centres: Floats) -> Ids:
    """Return the centre with the largest inner product for each row; ties go to the first.

    Args:
        rows: (n, d) float32.
        centres: (c, d) float32.

    """
    step = max(SCORES_AT_ONCE // max(len(centres), 1), 64)
    found = np.empty(len(rows), np.int64)

    def compare(start: int) -> None:
        block = slice(start, start + step)
        np.argmax(rows[block] @ centres.T, axis=1, out=found[block])

    in_threads(compare, range(0, len(rows), step))
    return found


class Centres:
    """Centres that rows are assigned to.

    If there are many centres, a row is not compared with all of them. The centres form groups, each with
    a head. A row is compared with all heads, and then with the `CANDIDATES` centres nearest to its
    nearest head. Rows that share a head are compared in one matrix product.

    Args:
        centres: (c, d) float32.

    Attributes:
        vectors: the centres.

    """

    def __init__(self, centres: Floats) -> None:
        self.vectors = centres
        self._heads: Floats | None = None
        if len(centres) <= EXACT_CENTRES:
            return
        heads = self._heads = mean_directions(
            centres, len(centres) // GROUP_CENTRES, GROUP_ROUNDS, np.random.default_rng(0)
        )
        self._candidates = np.empty((len(self._heads), CANDIDATES), np.int64)

        def choose(head: int) -> None:
            similarity = centres @ heads[head]
            chosen = np.argpartition(-similarity, CANDIDATES - 1)[:CANDIDATES]
            self._candidates[head] = np.sort(chosen)

        in_threads(choose, range(len(self._heads)))

    def nearest(self, rows: Floats) -> Ids:
        """Return the number of the centre of each of (n, d) rows."""
        if self._heads is None:
            return nearest(rows, self.vectors)
        group = nearest(rows, self._heads)
        order = np.argsort(group, kind="stable")
        edges = np.searchsorted(group[order], np.arange(len(self._heads) + 1))
        found = np.empty(len(rows), np.int64)

        def compare(head: int) -> None:
            members = order[edges[head] : edges[head + 1]]
            if not len(members):
                return
            candidates = self._candidates[head]
            best = self.vectors[candidates]
            for start in range(0, len(members), SCORES_AT_ONCE // CANDIDATES):
                some = members[start : start + SCORES_AT_ONCE // CANDIDATES]
                found[some] = candidates[np.argmax(rows[some] @ best.T, axis=1)]

        in_threads(compare, range(len(self._heads)))
        return found


def sums(rows: Floats, numbers: Ids, count: int) -> Floats:
    """Return (count, d) sums of the rows with the same number."""
    order = np.argsort(numbers, kind="stable")
    edges = np.searchsorted(numbers[order], np.arange(count + 1))
    total = np.zeros((count, rows.shape[1]), np.float32)
    step = -(-count // 64)

    def add(start: int) -> None:
        for number in range(start, min(start + step, count)):
            members = order[edges[number] : edges[number + 1]]
            if len(members):
                total[number] = rows[members].sum(axis=0)

    in_threads(add, range(0, count, step))
    return total


def unit_or_zero(rows: Floats) -> Floats:
    """Scale (n, d) rows to length 1; zero rows stay zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: Floats = rows / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled


def mean_directions(rows: Floats, count: int, rounds: int, random: np.random.Generator) -> Floats:
    """Return (count, d) unit centres of rows by spherical k-means that always compares all centres."""
    centres = unit_or_zero(rows[np.sort(random.permutation(len(rows))[:count])])
    for _ in range(rounds):
        centres = updated_centres(rows, nearest(rows, centres), centres, random)
    return centres


def updated_centres(rows: Floats, numbers: Ids, centres: Floats, random: np.random.Generator) -> Floats:
    """Return the unit means of the rows of each centre. A centre without rows takes a random row."""
    means = unit_or_zero(sums(rows, numbers, len(centres)))
    empty = np.flatnonzero(np.bincount(numbers, minlength=len(centres)) == 0)
    if len(empty):
        means[empty] = unit_or_zero(rows[random.integers(len(rows), size=len(empty))])
    return means
