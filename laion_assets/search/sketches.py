"""Sketches: short vectors whose angles are at most those of the rows; see `near_duplicates`."""

from __future__ import annotations

import math
from functools import cache
from typing import TypeVar

import numpy as np

from laion_assets.index.vectors import squares, unit
from laion_assets.io.arrays import Floats, Ids, Mask
from laion_assets.io.parallel import SHORT_CALLS, in_threads, one_blas_thread, slices
from laion_assets.search.links import SLACK, Links
from laion_assets.search.rounded import Rounded, RoundedTwice, may_exceed, scale_of

Kind = TypeVar("Kind", Rounded, RoundedTwice)

# What a product of sketches takes was measured: so many coordinates as long as what each pair takes
# besides; and one pair in sixteen bits, or in a product at full width, as long as so many pairs.
AS_LONG_AS_THE_REST, FINE, FULL_WIDTH = 600, 300, 28


def distinct_rows(links: Links, most: int) -> Ids:
    """Return at most so many evenly spaced rows, none of them near-duplicates of each other."""
    rows = np.unique(np.linspace(0, len(links.vectors) - 1, most).astype(np.int64))
    among = Links(links.vectors[rows], links.limit, links.sizes)
    among.find(np.arange(len(rows)), np.arange(len(rows)))
    distinct: Ids = rows[among.forest.labels() == np.arange(len(rows))]
    return distinct


def choose_axes(links: Links, sample: Ids) -> Floats:
    """Return (d, width) orthonormal columns: the directions of greatest variance of half the sample.

    A wider sketch costs more in every product, a narrower one leaves more pairs to compare at full width.
    The other half of the sample shows how many: on the rows that determine the axes, it would be too few.
    """
    fitted, tried = links.vectors[sample[::2]], links.vectors[sample[1::2]]
    dimension = fitted.shape[1]
    best, least = np.empty((dimension, 0), np.float32), math.inf
    with one_blas_thread():
        covariance = fitted.T @ fitted
        for width in [width for width in links.sizes.widths if width < dimension] or [dimension]:
            axes = principal_axes(covariance, width)
            near, nearer = shares_near(links, tried, axes)
            left = FINE * near + links.sizes.single * FULL_WIDTH * nearer
            cost = 1 + width / AS_LONG_AS_THE_REST + left
            if cost > least:  # it falls until the sketches are wide enough, and rises from there
                break
            best, least = axes, cost
    return best


def principal_axes(covariance: Floats, number: int) -> Floats:
    """Return (d, number) orthonormal columns, nearly the directions of greatest variance, greatest first.

    Two rounds of subspace iteration from random directions suffice, and take half the time of computing
    all directions exactly (Halko, Martinsson and Tropp, 2011).
    """
    axes = np.random.default_rng(0).standard_normal((len(covariance), number), np.float32)
    for _ in range(2):
        axes = np.linalg.qr(covariance @ axes)[0]
    found: Floats = axes @ np.linalg.eigh(axes.T @ covariance @ axes)[1][:, ::-1]
    return found


def shares_near(links: Links, vectors: Floats, axes: Floats) -> tuple[float, float]:
    """Return the share of pairs whose sketches do not rule out a link, in 8 bits and in 16."""
    floats, pairs = sketch(vectors @ axes), len(vectors) * (len(vectors) - 1)
    sketches = Rounded.of(floats, reach_of(floats.shape[1]))
    near = np.count_nonzero(near_pairs(links, sketches, sketches)) - len(vectors)
    nearer = np.count_nonzero(floats @ floats.T > links.limit - SLACK) - len(vectors)
    return near / max(1, pairs), nearer / max(1, pairs)


def near_pairs(links: Links, a: Rounded, b: Rounded) -> Mask:
    """Return (a, b), which sketches of a and b do not rule out a link."""
    return may_exceed(a, b, links.limit - SLACK)


def sketch_all(links: Links, axes: Floats, kind: type[Kind], rows: Ids | None = None) -> Kind:
    """Return the sketch of every row, or of some rows; many lie on the disk."""
    count, width = len(links.vectors) if rows is None else len(rows), axes.shape[1] + 1
    sketches = kind.empty(count, width, scale_of(reach_of(width)))
    projected = links.vectors.projection(axes)

    def sketch_batch(batch: slice) -> None:
        sketched = sketch(projected(batch if rows is None else rows[batch]))
        sketches[batch] = kind.of(sketched, reach_of(width))

    in_threads(sketch_batch, slices(count, links.sizes.batch), SHORT_CALLS)
    return sketches


def sketch(seen: Floats) -> Floats:
    """Return (n, w + 1) sketches of rows with these products with axes, see fact 1 and *Rounding*.

    They are turned in a random direction, so that all coordinates are about equally large.
    """
    rest = np.sqrt(np.maximum(1 - squares(seen), 0) + np.float32(SLACK))
    sketches = unit(np.column_stack([seen, rest]))
    turned: Floats = sketches @ turn(sketches.shape[1])
    return turned


def reach_of(width: int) -> float:
    """Return what hardly any coordinate of a turned sketch exceeds: 5.5 standard deviations."""
    return 5.5 / math.sqrt(width)


@cache
def turn(width: int) -> Floats:
    """Return a random orthonormal matrix, always the same."""
    random = np.random.default_rng(0).standard_normal((width, width))
    return np.linalg.qr(random)[0].astype(np.float32)
