"""Sketches: short vectors whose angles are at most those of the rows; see `near_duplicates`."""

from __future__ import annotations

import numpy as np

from laion_assets.index.vectors import unit
from laion_assets.io.arrays import Floats, Ids, Mask
from laion_assets.io.parallel import in_threads, one_blas_thread, slices
from laion_assets.io.spill import spilled
from laion_assets.search.links import SLACK, Links, squares


def distinct_rows(links: Links) -> Ids:
    """Return evenly spaced rows, none of them near-duplicates of each other."""
    rows = np.unique(np.linspace(0, len(links.vectors) - 1, links.sizes.sample).astype(np.int64))
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
    with one_blas_thread():
        axes = np.linalg.eigh(fitted.T @ fitted)[1][:, ::-1]
        widths = [width for width in links.sizes.widths if width < len(axes)] or [len(axes)]
        left = np.array([share_near(links, tried, axes[:, :width]) for width in widths])
    cost = widths + len(axes) * links.sizes.single * left
    return np.ascontiguousarray(axes[:, : widths[cost.argmin()]])


def share_near(links: Links, vectors: Floats, axes: Floats) -> float:
    """Return the share of pairs of different vectors whose sketches do not rule out a link."""
    sketches = sketch(vectors, axes)
    near = np.count_nonzero(near_pairs(links, sketches, sketches)) - len(vectors)
    return near / max(1, len(vectors) * (len(vectors) - 1))


def near_pairs(links: Links, a: Floats, b: Floats) -> Mask:
    """Return (a, b), which sketches of a and b do not rule out a link."""
    near: Mask = a @ b.T > links.limit - SLACK
    return near


def sketch_all(links: Links, axes: Floats, rows: Ids | None = None) -> Floats:
    """Return (n, width + 1) the sketch of every row, or of some rows; many lie on the disk."""
    count, size = len(links.vectors) if rows is None else len(rows), links.sizes.batch
    sketches: Floats = spilled((count, axes.shape[1] + 1), np.float32)

    def sketch_batch(batch: slice) -> None:
        sketches[batch] = sketch(links.vectors[batch if rows is None else rows[batch]], axes)

    in_threads(sketch_batch, slices(count, size))
    return sketches


def sketch(vectors: Floats, axes: Floats) -> Floats:
    """Return coordinates on the axes and the length of the remainder, see facts 1 and *Rounding*."""
    seen = vectors @ axes
    rest = np.sqrt(np.maximum(squares(vectors) - squares(seen), 0) + np.float32(SLACK))
    return unit(np.column_stack([seen, rest]))
