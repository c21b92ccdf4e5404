"""Codebooks of a product quantizer: encode and decode with them, and update them by k-means."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from laion_assets.io.arrays import Bytes, Floats, Ids
from laion_assets.io.parallel import in_threads, one_faiss_thread

ROWS_AT_ONCE = 4_096  # keeps the intermediate results of a thread small
SIMD_WIDTHS = (1, 2, 4, 8)  # dimensions of a subspace for which faiss's search of a codebook is fast


class WideCodebooks:
    """PQ codebooks, padded to a width for which faiss is several times faster.

    Args:
        codebooks: (m, 256, d) float32.

    """

    def __init__(self, codebooks: Floats) -> None:
        self._parts, entries, self._dimensions = codebooks.shape
        self._padded = next((w for w in SIMD_WIDTHS if w >= self._dimensions), self._dimensions)
        self._pq: Any = faiss.ProductQuantizer(self._parts * self._padded, self._parts, 8)
        wide = np.zeros((self._parts, entries, self._padded), np.float32)
        wide[..., : self._dimensions] = codebooks
        faiss.copy_array_to_vector(wide.ravel(), self._pq.centroids)

    def codes(self, rows: Floats, centres: Floats | None = None, numbers: Ids | None = None) -> Bytes:
        """Return (n, m) codes of (n, m * d) rows.

        Args:
            rows: (n, m * d) float32.
            centres: centres to subtract from the rows first; None subtracts nothing.
            numbers: (n,) the centre of each row.

        """
        codes = np.empty((len(rows), self._parts), np.uint8)

        def encode(start: int) -> None:
            block = slice(start, start + ROWS_AT_ONCE)
            some = rows[block]
            wide = np.zeros((len(some), self._parts, self._padded), np.float32)
            inner = wide[..., : self._dimensions]
            parts = some.reshape(len(some), self._parts, self._dimensions)
            if centres is None or numbers is None:
                inner[:] = parts
            else:
                taken = centres[numbers[block]].reshape(parts.shape)
                np.subtract(parts, taken, out=inner)
            with one_faiss_thread():
                codes[block] = self._pq.compute_codes(wide.reshape(len(some), -1))

        in_threads(encode, range(0, len(rows), ROWS_AT_ONCE))
        return codes


def codebooks_of(pq: Any) -> Floats:
    """Return the (m, 256, d) codebooks of a faiss product quantizer."""
    books: Floats = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
    return books


def random_codebooks(rows: Floats, parts: int, random: np.random.Generator) -> Floats:
    """Return (m, 256, d) codebooks of random rows."""
    chosen = rows[random.permutation(len(rows))[:256]]
    return np.ascontiguousarray(chosen.reshape(256, parts, -1).transpose(1, 0, 2))


def decoded(codebooks: Floats, codes: Bytes) -> Floats:
    """Return the (n, m * d) rows of (n, m) codes."""
    parts, _, width = codebooks.shape
    rows = np.empty((len(codes), parts, width), np.float32)

    def decode(part: int) -> None:
        rows[:, part] = codebooks[part][codes[:, part]]

    in_threads(decode, range(parts))
    return rows.reshape(len(codes), -1)


def updated(codebooks: Floats, rows: Floats, codes: Bytes, random: np.random.Generator) -> Floats:
    """Return codebooks whose entries are the means of their rows; empty entries take a random row."""
    parts, entries, width = codebooks.shape
    split = rows.reshape(len(rows), parts, width)
    spare = random.integers(len(rows), size=(parts, entries))
    means = np.empty_like(codebooks)

    def update(part: int) -> None:
        numbers = codes[:, part]
        counts = np.bincount(numbers, minlength=entries)
        for dimension in range(width):
            total = np.bincount(numbers, split[:, part, dimension], entries)
            means[part, :, dimension] = total / np.maximum(counts, 1)
        empty = counts == 0
        means[part, empty] = split[spare[part, empty], part]

    in_threads(update, range(parts))
    return means


def kmeans(codebooks: Floats, rows: Floats, rounds: int, random: np.random.Generator) -> Floats:
    """Return codebooks after rounds of k-means with (n, m * d) rows."""
    for _ in range(rounds):
        codebooks = updated(codebooks, rows, WideCodebooks(codebooks).codes(rows), random)
    return codebooks
