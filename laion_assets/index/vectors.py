"""Unit vectors, held in memory or decoded on demand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import numpy as np

from laion_assets.index.decoder import Decoder
from laion_assets.io.arrays import Bytes, Floats, Ids
from laion_assets.io.parallel import in_threads, slices

HELD_ROWS = 1 << 17  # more vectors than this take longer to hold than to decode on every access
MOST_REMOVED = 0.2  # of a vector's squared length; of what is left, float32 then loses little more
ORDINARY = 1e-20, 1e20  # squared lengths for which float32 is fit
ROWS_DECODED_AT_ONCE = 1024  # so that intermediate results fit into the processor's cache


class Vectors(Protocol):
    """Unit vectors by row, in memory or decoded on access."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, rows: slice | Ids, /) -> Floats:
        """Return (m, d) float32 rows of length 1, or of zeros."""

    def on_axes(self, axes: Floats) -> Callable[[slice | Ids], Floats]:
        """Return what computes the (m, w) products of rows with (d, w) axes."""

    def cosines(self, a: Ids, b: Ids) -> tuple[Floats, Floats]:
        """Return (n,) products of rows a[i] and b[i], NaN if unknown, and how far each may be off."""


class Held:
    """Unit vectors in memory, (n, d)."""

    def __init__(self, rows: Floats) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | Ids, /) -> Floats:
        return self._rows[rows]

    def on_axes(self, axes: Floats) -> Callable[[slice | Ids], Floats]:
        """Return what computes the products of rows with axes."""
        return lambda rows: self._rows[rows] @ axes

    def cosines(self, a: Ids, b: Ids) -> tuple[Floats, Floats]:
        """Return the products of rows, which are not off."""
        return np.einsum("ij,ij->i", self._rows[a], self._rows[b]), np.zeros(len(a), np.float32)


def as_vectors(vectors: Vectors | Floats) -> Vectors:
    """Return vectors as such, also if they are an array."""
    return Held(vectors) if isinstance(vectors, np.ndarray) else vectors


def held(vectors: Vectors | Floats, most: int = HELD_ROWS) -> Vectors:
    """Return vectors in memory, where each is decoded only once; more than `most` as they are."""
    if isinstance(vectors, np.ndarray | Held) or not 0 < len(vectors) <= most:
        return as_vectors(vectors)
    rows = np.empty((len(vectors), vectors[:1].shape[1]), np.float32)

    def hold(some: slice) -> None:
        rows[some] = vectors[some]

    in_threads(hold, slices(len(vectors), ROWS_DECODED_AT_ONCE))
    return Held(rows)


def squares(vectors: Floats) -> Floats:
    """Return the squared length of each vector."""
    found: Floats = np.einsum("ij,ij->i", vectors, vectors)
    return found


def unit(vectors: Floats) -> Floats:
    """Scale (n, d) rows to length 1; zero and non-finite rows become zero."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        scaled: Floats = vectors * (np.float32(1) / lengths)[:, None]
    scaled[~(np.isfinite(lengths) & (lengths > 0))] = 0
    return scaled


class Coded:
    """The unit vectors of codes, decoded on every access.

    For LAION-5B a code has 131 bytes, but a vector more than 3 KB. What OPQ's transpose removes from a
    vector is small, but takes most of the time of decoding. So once the scale of a vector and the length
    of its removed part are known, see `on_axes`, the removed parts of two vectors are not computed for
    their product: it is off by at most the product of these lengths (Cauchy-Schwarz).

    Args:
        codes: (n, code size).
        decoder: of the codes, see `Decoder.decode_to_compare`.
        scale: (n,) what makes vectors of `Decoder.decode_quickly` unit vectors; NaN if not known.
        removed: (n,) length of the removed part of such a vector, likewise.

    """

    def __init__(
        self, codes: Bytes, decoder: Decoder, scale: Floats | None = None, removed: Floats | None = None
    ) -> None:
        self._codes = codes
        self._decoder = decoder
        self._scale = np.full(len(codes), np.nan, np.float32) if scale is None else scale
        self._removed = np.full(len(codes), np.nan, np.float32) if removed is None else removed

    def __reduce__(self) -> tuple[type[Coded], tuple[Bytes, Decoder, Floats, Floats]]:
        """Pickle what decodes these codes, which is small."""
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

    def on_axes(self, axes: Floats) -> Callable[[slice | Ids], Floats]:
        """Return what computes the products of rows with axes, and remembers their scales."""
        onto = self._decoder.onto(axes)
        surplus = self._decoder.surplus(len(onto))
        factors = np.ascontiguousarray(np.hstack([surplus, onto]))

        def compute(rows: slice | Ids) -> Floats:
            vectors = self._decoder.decode_quickly(self._codes[rows])
            removed: Floats
            products: Floats
            removed, products = np.split(vectors @ factors, [surplus.shape[1]], axis=1)
            with np.errstate(invalid="ignore", over="ignore"):
                whole, part = squares(vectors), squares(removed)
                fit = (whole > ORDINARY[0]) & (whole < ORDINARY[1]) & (part <= MOST_REMOVED * whole)
            scale = 1 / np.sqrt(np.where(fit, whole - part, np.nan))
            self._scale[rows], self._removed[rows] = scale, scale * np.sqrt(part)
            products *= scale[:, None]
            if not fit.all():
                others = np.arange(len(self))[rows][~fit]
                products[~fit] = self[others] @ axes
            return products

        return compute

    def cosines(self, a: Ids, b: Ids) -> tuple[Floats, Floats]:
        """Return the products of rows whose scales are known, without their removed parts."""
        distinct, place = np.unique(np.concatenate([a, b]), return_inverse=True)
        vectors = self._decoder.decode_quickly(self._codes[distinct])
        left, right = np.split(vectors[place], 2)
        products = np.einsum("ij,ij->i", left, right) * self._scale[a] * self._scale[b]
        return products, self._removed[a] * self._removed[b]
