"""Find the best rows for some queries, part by part, and measure recall against them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from laion_assets.io.arrays import Floats, Ids
from laion_assets.io.storage import Sink

NO_ROW = -1


@dataclass(frozen=True)
class Answers:
    """The best rows for each query, best first, with ties ordered by id.

    Attributes:
        ids: (q, k) int64; `NO_ROW` after the last row found.
        scores: (q, k) float32; minus infinity after the last row found.

    """

    ids: Ids
    scores: Floats

    @classmethod
    def none(cls, queries: int) -> Answers:
        """Return answers without any rows."""
        return cls(np.empty((queries, 0), np.int64), np.empty((queries, 0), np.float32))

    def best(self, count: int) -> Answers:
        """Return only the best `count` rows of each query."""
        scores = np.where(self.ids == NO_ROW, -np.inf, self.scores).astype(np.float32)
        order = np.lexsort((self.ids, -scores), axis=1)[:, :count]
        return Answers(np.take_along_axis(self.ids, order, 1), np.take_along_axis(scores, order, 1))

    def without(self, ids: Ids) -> Answers:
        """Remove one row from each query's answers, such as the query itself; `ids` has shape (q,)."""
        return Answers(np.where(self.ids == ids[:, None], NO_ROW, self.ids), self.scores).best(
            self.ids.shape[1]
        )


def merged(parts: Iterable[Answers], count: int) -> Answers:
    """Return the best rows of all parts; at least one part is needed."""

    def better(one: Answers, other: Answers) -> Answers:
        both = Answers(np.hstack([one.ids, other.ids]), np.hstack([one.scores, other.scores]))
        return both.best(count)

    return reduce(better, parts).best(count)


def recall(found: Answers, exact: Answers, at: Iterable[int]) -> Mapping[int, float]:
    """Return the share of the exact best R rows that is among the best R rows found.

    Args:
        found: answers of a search.
        exact: answers of a comparison with all raw vectors.
        at: the values of R.

    Returns:
        The share, 0 to 1, by R. Values of R above the number of rows are left out.

    """
    shares = {}
    for count in at:
        wanted = exact.ids[:, :count]
        if wanted.shape[1] < count or (wanted == NO_ROW).any():
            continue
        hit = [np.isin(a, b).mean() for a, b in zip(wanted, found.ids[:, :count], strict=True)]
        shares[count] = float(np.mean(hit))
    return shares


def write_answers(sink: Sink, answers: Mapping[str, Answers]) -> None:
    """Write the answers of several searches, by name, as .npz."""
    arrays: dict[str, Any] = {f"{name} ids": each.ids for name, each in answers.items()}
    arrays |= {f"{name} scores": each.scores for name, each in answers.items()}
    np.savez(sink, allow_pickle=False, **arrays)


def read_answers(content: bytes) -> Mapping[str, Answers]:
    """Read the output of `write_answers`.

    Raises:
        ValueError: the content is damaged.

    """
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        names = [name.removesuffix(" ids") for name in arrays.files if name.endswith(" ids")]
        return {name: Answers(arrays[f"{name} ids"], arrays[f"{name} scores"]) for name in names}
