"""Unit vectors, held in memory or decoded on demand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import faiss
import numpy as np

from laion_assets.index.decoder import Decoder
from laion_assets.io.arrays import Bytes, Doubles, Floats, Ids, Mask, unit_rows
from laion_assets.io.parallel import in_threads, one_faiss_thread, slices

HELD_ROWS = 1 << 17  # more vectors than this are decoded on every access
MOST_REMOVED = 0.2  # of a vector's squared length: up to there, float32 is precise enough
NEAR = 1e-3  # products this close to a limit, plus the bound of the removed parts, lose these parts
ORDINARY = 1e-20, 1e20  # squared lengths for which float32 is fit
ROWS_DECODED_AT_ONCE = 1024  # so that intermediate results fit into the processor's cache


class Vectors(Protocol):
    """Unit vectors by row, in memory or decoded on access."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, rows: slice | Ids, /) -> Floats:
        """Return (m, d) float32 rows of length 1, or of zeros."""

    def projection(self, axes: Floats) -> Callable[[slice | Ids], Floats]:
        """Return what computes the (m, w) products of rows with (d, w) axes."""

    def cosines(self, a: Ids, b: Ids, limit: float) -> Floats:
        """Return (n,) products of rows a[i] and b[i]; NaN if unknown.

        Those within `NEAR` of the limit are right to float32's precision. The others are on the right
        side of the limit.
        """

    def exact_cosines(self, a: Ids, b: Ids) -> Doubles:
        """Return (n,) products of rows a[i] and b[i] in float64."""


class Held:
    """Unit vectors in memory.

    Args:
        rows: (n, d) float32.
        origin: what they were decoded from, which decides exactly; None if they were not.

    """

    def __init__(self, rows: Floats, origin: Vectors | None = None) -> None:
        self._rows, self._origin = rows, origin

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | Ids, /) -> Floats:
        return self._rows[rows]

    def projection(self, axes: Floats) -> Callable[[slice | Ids], Floats]:
        """Return what computes the products of rows with axes."""
        return lambda rows: self._rows[rows] @ axes

    def cosines(self, a: Ids, b: Ids, _: float) -> Floats:
        """Return the products of rows."""
        return pair_products(self._rows, a, b)

    def exact_cosines(self, a: Ids, b: Ids) -> Doubles:
        """Return the products of rows in float64."""
        if self._origin is not None:
            return self._origin.exact_cosines(a, b)
        found: Doubles = np.einsum("ij,ij->i", self._rows[a], self._rows[b], dtype=np.float64)
        return found


def as_vectors(vectors: Vectors | Floats) -> Vectors:
    """Wrap vectors that are an array."""
    if isinstance(vectors, np.ndarray):
        return Held(np.ascontiguousarray(vectors, np.float32))
    return vectors


def held(vectors: Vectors | Floats, most: int = HELD_ROWS) -> Vectors:
    """Decode vectors into memory, where each is decoded only once; more than `most` stay as they are."""
    vectors = as_vectors(vectors)
    if isinstance(vectors, Held) or not 0 < len(vectors) <= most:
        return vectors
    rows = np.empty((len(vectors), vectors[:1].shape[1]), np.float32)

    def hold(some: slice) -> None:
        rows[some] = vectors[some]

    in_threads(hold, slices(len(vectors), ROWS_DECODED_AT_ONCE))
    return Held(rows, vectors)


def pair_products(vectors: Floats, a: Ids, b: Ids) -> Floats:
    """Return the (n,) products of rows a[i] and b[i] of contiguous (m, d) vectors, without copies."""
    products = np.empty(len(a), np.float32)
    rows, first, second, found = map(faiss.swig_ptr, (vectors, a, b, products))
    with one_faiss_thread():
        faiss.pairwise_indexed_inner_product(vectors.shape[1], len(a), rows, first, rows, second, found)
    return products


def squares(vectors: Floats) -> Floats:
    """Return the squared length of each vector."""
    found: Floats = np.einsum("ij,ij->i", vectors, vectors)
    return found


def unit(vectors: Floats) -> Floats:
    """Scale (n, d) rows to length 1; zero and non-finite rows become zero."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        whole = squares(vectors)
        lengths: Floats = np.sqrt(whole)
        scaled: Floats = vectors * (np.float32(1) / lengths)[:, None]
    if len(others := np.flatnonzero(~_ordinary(whole))):
        rows, usable = unit_rows(vectors[others])
        rows[~usable] = 0
        scaled[others] = rows
    return scaled


def _ordinary(squares: Floats) -> Mask:
    """Return which squared lengths float32 is fit for."""
    return (squares > ORDINARY[0]) & (squares < ORDINARY[1])


class Coded:
    """The unit vectors of codes, decoded on every access.

    For LAION-5B a code has 131 bytes, but a vector more than 3 KB. To remove the part of a vector that is
    in the null space of OPQ's transpose takes most of the time of decoding, although the part is small.
    `projection` learns the length of each vector with and without it. Then `cosines` leaves the part in
    unless a product is near the limit: the product of two such parts is at most the product of their
    lengths (Cauchy-Schwarz).

    Args:
        codes: (n, code size).
        decoder: of the codes, see `Decoder.decode_to_compare`.
        scale: (n,) what makes unit vectors of unprojected ones; NaN if not known.
        removed: (n,) length of the part of such a vector that is removed, likewise.

    """

    def __init__(
        self, codes: Bytes, decoder: Decoder, scale: Floats | None = None, removed: Floats | None = None
    ) -> None:
        self._codes = codes
        self._decoder = decoder
        self._scale = np.full(len(codes), np.nan, np.float32) if scale is None else scale
        self._removed = np.full(len(codes), np.nan, np.float32) if removed is None else removed

    def __reduce__(self) -> tuple[type[Coded], tuple[Bytes, Decoder, Floats, Floats]]:
        """Pickle a decoder of these codes alone, which is small."""
        return Coded, (self._codes, self._decoder_of_these, self._scale, self._removed)

    @cached_property
    def _decoder_of_these(self) -> Decoder:
        return self._decoder.only(self._codes)

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, rows: slice | Ids, /) -> Floats:
        if isinstance(rows, slice):
            return unit(self._decoder.decode_to_compare(self._codes[rows]))
        distinct, place = np.unique(rows, return_inverse=True)
        vectors = unit(self._decoder.decode_to_compare(self._codes[distinct]))
        return vectors[place]

    def projection(self, axes: Floats) -> Callable[[slice | Ids], Floats]:
        """Return what computes the products of rows with axes, and learns their lengths."""
        factors = np.hstack([self._decoder.null_space, self._decoder.lifted(axes)])
        null = self._decoder.null_space.shape[1]

        def compute(rows: slice | Ids) -> Floats:
            vectors = self._decoder.decode_unprojected(self._codes[rows])
            with np.errstate(invalid="ignore", over="ignore"):
                removed: Floats
                products: Floats
                removed, products = np.split(vectors @ factors, [null], axis=1)
                whole, part = squares(vectors), squares(removed)
                fit = _ordinary(whole) & (part <= MOST_REMOVED * whole)
                scale = 1 / np.sqrt(np.where(fit, whole - part, np.nan))
                # The scale last: where it is known, other threads need the removed length too.
                self._removed[rows], self._scale[rows] = scale * np.sqrt(part), scale
                products *= scale[:, None]
            if not fit.all():
                others = self._decoder.decode_to_compare(self._codes[rows][~fit])
                products[~fit] = unit(others) @ axes
            return products

        return compute

    def cosines(self, a: Ids, b: Ids, limit: float) -> Floats:
        """Return the products of rows. The removed parts are left in unless it is near the limit."""
        vectors, (at_a, at_b) = self._unprojected(a, b)
        scale = self._scale[a] * self._scale[b]
        with np.errstate(invalid="ignore", over="ignore"):
            products = pair_products(vectors, at_a, at_b) * scale
        left_in = self._removed[a] * self._removed[b]
        near = np.flatnonzero(np.abs(products - limit) <= left_in + NEAR)
        removed = [vectors[rows[near]] @ self._decoder.null_space for rows in (at_a, at_b)]
        products[near] -= np.einsum("ij,ij->i", *removed) * scale[near]
        return products

    def exact_cosines(self, a: Ids, b: Ids) -> Doubles:
        """Return the products of rows in float64; rows are rounded to float32, as those of `Held`."""
        vectors, (at_a, at_b) = self._unprojected(a, b)
        null_space = self._decoder.null_space.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            removed = (vectors.astype(np.float64) @ null_space) @ null_space.T
            rows = unit((vectors - removed).astype(np.float32))
        found: Doubles = np.einsum("ij,ij->i", rows[at_a], rows[at_b], dtype=np.float64)
        return found

    def _unprojected(self, a: Ids, b: Ids) -> tuple[Floats, list[Ids]]:
        """Decode each row of a or b once; return their vectors, and where those of a and b are."""
        distinct, place = np.unique(np.concatenate([a, b]), return_inverse=True)
        return self._decoder.decode_unprojected(self._codes[distinct]), np.split(place, 2)
