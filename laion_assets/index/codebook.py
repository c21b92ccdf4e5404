"""Codes of a product quantizer as integers of eight bits, and how far their products may be off.

A row is the centre of its list and a residual y, which is put together from one centroid for each part
of its code. In every dimension, the rounded centroid c is the nearest multiple of a step t. Let u = tq be
the query q in these steps, and let u = s(Fh + l) + e, with integers h and l of eight bits. Then::

    |q . y - s(Fh + l) . c|  =  |u . (y/t - c) + e . c|  <=  sum over the parts of |u||y/t - c|, + |e||c|

by Cauchy-Schwarz. The largest lengths of y/t - c and of c are known for each part of a code. One integer
for each number of a query would not do: what all images have in common makes few of them much larger than
the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from laion_assets.io.arrays import Bytes, Doubles, Floats, Ids
from laion_assets.io.int8 import (
    CODES_OF_A_PART,
    ZERO,
    Codes,
    Numbers,
    largest_code,
    largest_excess,
    products,
)

LARGEST_PRODUCT = 1 << 30


@dataclass(frozen=True)
class Codebook:
    """The rounded centroids of a product quantizer of m parts and d dimensions.

    Attributes:
        steps: (d,) t.
        words: (m * 256, w) the rounded centroids of each part in turn, as left factors of a product.
        off: (m,) ``|y/t - c|``: the largest of any centroid of the part, as below.
        largest: (m,) ``|c|``.
        longest: (m,) ``|y|``.

    """

    steps: Floats
    words: Bytes
    off: Doubles
    largest: Doubles
    longest: Doubles

    @classmethod
    def of(cls, quantizer: Any) -> Codebook | None:
        """Round a faiss ProductQuantizer; None unless its codes are bytes and its centroids finite."""
        parts, each, width = quantizer.M, quantizer.ksub, quantizer.dsub
        centroids = faiss.vector_to_array(quantizer.centroids).reshape(parts, each, width)
        if quantizer.ksub != CODES_OF_A_PART or not np.isfinite(centroids).all():
            return None
        largest = np.abs(centroids).max(axis=1, keepdims=True)
        usable = largest > largest_code() * np.finfo(np.float32).tiny
        steps = np.where(usable, largest, 1) / np.float32(largest_code())
        in_steps = centroids / steps
        rounded = np.rint(in_steps)
        room = 1 << (width - 1).bit_length()  # numpy copies words of such sizes fast
        words = np.full((parts * each, room), ZERO, np.uint8)
        words[:, :width] = (rounded + ZERO).reshape(-1, width)
        of_parts = (lengths(each).max(axis=1) for each in (in_steps - rounded, rounded, centroids))
        return cls(steps.astype(np.float32).reshape(-1), words, *of_parts)

    @property
    def parts(self) -> int:
        """Number of parts of a code."""
        return len(self.off)

    def decoded(self, codes: Bytes) -> Bytes:
        """Return the rounded residuals of (n, m) codes as left factors of a product."""
        first = np.arange(0, len(self.words), CODES_OF_A_PART)
        words = self.words.take(codes + first, axis=0)
        return words.reshape(len(codes), self.parts * self.words.shape[1])

    def rounded(self, queries: Floats) -> RoundedQueries:
        """Round (q, d) finite queries."""
        by_part = (len(queries), self.parts, -1)
        largest, dimension = largest_code(), queries.shape[1]
        finer = min(2 * largest, LARGEST_PRODUCT // (largest * (largest + 1) * dimension))
        in_steps = queries.astype(np.float64) * self.steps
        most = finer * largest + finer // 2 - 1
        step = np.abs(in_steps).max(axis=1, initial=0) / most
        step[step == 0] = 1
        codes = np.rint(in_steps / step[:, None])
        high = np.rint(codes / finer)
        left = lengths(in_steps - step[:, None] * codes)
        off = lengths(in_steps.reshape(by_part)) @ self.off + left * np.linalg.norm(self.largest)
        of_residuals = lengths(queries.reshape(by_part)) @ self.longest
        room = self.words.shape[1]
        padded = np.zeros((2, len(queries), self.parts, room), np.int8)
        padded[..., : dimension // self.parts] = [
            part.reshape(by_part) for part in (high, codes - finer * high)
        ]
        factors = np.ascontiguousarray(padded.reshape(2, len(queries), -1).swapaxes(1, 2))
        return RoundedQueries(factors, finer, step, off, of_residuals)


@dataclass(frozen=True)
class RoundedQueries:
    """What stands for q queries in products.

    Attributes:
        codes: (2, w, q) h and l.
        finer: F.
        step: (q,) s.
        off: (q,) the bound of the error.
        of_residuals: (q,) a bound of the sum of the absolute products with the parts of a residual.

    """

    codes: Codes
    finer: int
    step: Doubles
    off: Doubles
    of_residuals: Doubles

    def reaching(
        self, some: Ids, limits: Numbers, codebook: Codebook, codes: Bytes
    ) -> tuple[Ids, Numbers]:
        """Return the rows that reach the limit of a query, and their products with all, in steps.

        Args:
            some: (v,) numbers of queries.
            limits: (v,) of products, in steps.
            codebook: of the codes.
            codes: (n, m) of rows.

        Returns:
            (r,) places of rows, and (r, v).

        """
        high, low = self.codes.take(some, axis=2)
        excess = largest_excess(codes, codebook.words, high, low, self.finer, limits)
        rows = np.flatnonzero(excess >= 0)
        decoded = codebook.decoded(codes[rows])
        found = products(decoded, high)
        found *= np.int32(self.finer)
        found += products(decoded, low)
        return rows, found


def lengths(vectors: NDArray[Any]) -> Doubles:
    """Return the length of each vector, (..., d); in float32, the squares of tiny numbers are 0."""
    found: Doubles = np.linalg.norm(vectors.astype(np.float64), axis=-1)
    return found
