"""OPQ: the rotation, and the codebooks with it, that lose least of some rows."""

from __future__ import annotations

import numpy as np

from laion_assets.build.codebooks import WideCodebooks, decoded, drawn, moved
from laion_assets.io.arrays import Floats


def rotation_of(
    rows: Floats, parts: int, width: int, rounds: int, random: np.random.Generator
) -> tuple[Floats, Floats]:
    """Fit a rotation and codebooks in turn, one step of each a round.

    Args:
        rows: (n, d) float32, d at most `width`.
        parts: subspaces.
        width: dimension after the rotation.
        rounds: steps of each.
        random: draws the first codebooks.

    Returns:
        The rotation, (width, d) with orthonormal columns, and codebooks (parts, 256, width / parts).

    """
    rotation = _random_rotation(rows.shape[1], width, random)
    codebooks = drawn(rows @ rotation.T, parts, random)
    for _ in range(rounds):
        rotated = rows @ rotation.T
        codes = WideCodebooks(codebooks).codes(rotated)
        codebooks = moved(codebooks, rotated, codes, random)
        left, _, right = np.linalg.svd(decoded(codebooks, codes).T @ rows, full_matrices=False)
        rotation = np.ascontiguousarray(left @ right, np.float32)
    return rotation, codebooks


def _random_rotation(dimension: int, width: int, random: np.random.Generator) -> Floats:
    """Return a (width, dimension) matrix with orthonormal columns."""
    square = np.linalg.qr(random.standard_normal((width, width)))[0]
    return np.ascontiguousarray(square[:, :dimension], np.float32)


def main_directions(rows: Floats, count: int) -> Floats:
    """Return the (count, d) orthonormal directions that rows extend in most."""
    _, directions = np.linalg.eigh((rows.T @ rows).astype(np.float64))
    return np.ascontiguousarray(directions[:, ::-1][:, :count].T, np.float32)
