"""Dot products of unit vectors in eight bits, with a bound of their error.

Processors multiply integers of eight bits many times as fast as floats. Rounding moves a vector x by its
error, a length that is known. Where p and q are the codes of x and y, and s and t the lengths of a step::

    |x . y - st p . q|  =  |(x - sp) . tq + x . (y - tq)|  <=  error(x) (1 + error(y)) + error(y)

by Cauchy-Schwarz, because tq is at most 1 + error(y) long. The product of the codes is exact. So where it
is small enough, x . y is not above a limit. The bound leaves out the rounding of float32, below 1e-6:
callers relax their limits by more.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from laion_assets.io.arrays import Bytes, Floats, Ids, Mask
from laion_assets.io.int8 import ZERO, Codes, Numbers, largest_code, largest_products, products
from laion_assets.io.parallel import slices
from laion_assets.io.spill import spilled

ROUNDED_AT_ONCE, PUT_AT_ONCE = 256, 1 << 14  # vectors; those that are rounded stay in the cache
FINER = 256  # steps of sixteen bits are one of eight


@dataclass(frozen=True)
class _Rows:
    """Rounded vectors: every field but `scale` has a row for each of them."""

    scale: float
    error: Floats

    def __len__(self) -> int:
        return len(self.error)

    def __getitem__(self, rows: slice | Ids | Mask) -> Self:
        return replace(self, **{name: array[rows] for name, array in self._arrays().items()})

    def __setitem__(self, rows: slice, others: Self) -> None:
        theirs = others._arrays()
        for name, array in self._arrays().items():
            array[rows] = theirs[name]

    def _arrays(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "scale"}


@dataclass(frozen=True)
class Rounded(_Rows):
    """Unit vectors that are rounded to eight bits.

    Attributes:
        scale: length of a step.
        error: (n,) length of the difference of a vector and what stands for it.
        codes: (n, d) row i stands for `scale * codes[i]`.

    """

    codes: Codes

    @classmethod
    def of(cls, vectors: Floats, reach: float) -> Rounded:
        """Round (n, d) vectors.

        Args:
            vectors: (n, d) float32.
            reach: the coordinate that the largest code stands for. Larger ones are cut, which adds to the
                error.

        """
        rows, width = vectors.shape
        made = cls.empty(rows, width, scale_of(reach))
        for batch in slices(rows, ROUNDED_AT_ONCE):
            made.codes[batch], made.error[batch] = _rounded(vectors[batch], made.scale, largest_code())
        return made

    @classmethod
    def empty(cls, rows: int, width: int, scale: float) -> Rounded:
        """Return codes of arbitrary content, to be filled; many lie on the disk."""
        return cls(scale, np.empty(rows, np.float32), spilled((rows, width), np.int8))

    @cached_property
    def left(self) -> Bytes:
        """The codes as the left factor of a product, (n, d)."""
        return self.codes.view(np.uint8) ^ np.uint8(ZERO)

    @cached_property
    def right(self) -> Codes:
        """The codes as the right factor of a product, (d, n)."""
        return np.ascontiguousarray(self.codes.T)

    @cached_property
    def largest_error(self) -> float:
        """The largest of the errors; 0 without vectors."""
        return float(self.error.max(initial=0))


@dataclass(frozen=True)
class RoundedTwice(_Rows):
    """Unit vectors that are rounded to sixteen bits, of which eight can be taken alone.

    Attributes:
        scale: length of a step of the first eight bits.
        error: (n,) length of the difference of a vector and what the first eight bits stand for.
        fine: (n, d) row i stands for `scale / FINER * fine[i]`.
        fine_error: (n,) length of the difference of a vector and what all bits stand for.

    """

    fine: NDArray[np.int16]
    fine_error: Floats

    @classmethod
    def of(cls, vectors: Floats, reach: float) -> RoundedTwice:
        """Round (n, d) vectors, see `Rounded.of`."""
        rows, width = vectors.shape
        made = cls.empty(rows, width, scale_of(reach))
        most = largest_code() * FINER + FINER // 2 - 1  # half a step more fits sixteen bits too
        for batch in slices(rows, ROUNDED_AT_ONCE):
            some = vectors[batch]
            made.fine[batch], made.fine_error[batch] = _rounded(some, made.scale / FINER, most)
            made.error[batch] = _lengths(some - np.float32(made.scale) * _first_bits(made.fine[batch]))
        return made

    @classmethod
    def empty(cls, rows: int, width: int, scale: float) -> RoundedTwice:
        """Return codes of arbitrary content, to be filled; many lie on the disk."""
        error, fine_error = np.empty((2, rows), np.float32)
        return cls(scale, error, spilled((rows, width), np.int16), fine_error)

    def in_order(self, rows: Ids) -> RoundedTwice:
        """Return all vectors in another order; many lie on the disk."""
        ordered = self.empty(len(rows), self.fine.shape[1], self.scale)
        for batch in slices(len(rows), PUT_AT_ONCE):
            ordered[batch] = self[rows[batch]]
        return ordered

    def coarse(self) -> Rounded:
        """Return the first eight bits."""
        codes = np.empty(self.fine.shape, np.int8)
        for batch in slices(len(codes), ROUNDED_AT_ONCE):
            codes[batch] = _first_bits(self.fine[batch])
        return Rounded(self.scale, self.error, codes)

    def floats(self) -> Floats:
        """Return (n, d) what the codes stand for."""
        return self.fine * np.float32(self.scale / FINER)


@dataclass(frozen=True)
class Tiles:
    """Rounded vectors as the right factors of products.

    Attributes:
        codes: (t, d, width) the codes of `width` vectors after the other; the last are filled with zeros.
        count: number of vectors.
        largest_error: see `Rounded`.
        scale: see `Rounded`.

    """

    codes: Codes
    count: int
    largest_error: float
    scale: float

    @classmethod
    def of(cls, vectors: RoundedTwice, width: int) -> Tiles:
        """Cut vectors in tiles of their first eight bits."""
        every = slices(len(vectors), width)
        codes = np.zeros((len(every), vectors.fine.shape[1], width), np.int8)
        for tile, some in zip(codes, every, strict=True):
            tile[:, : some.stop - some.start] = _first_bits(vectors.fine[some]).T
        return cls(codes, len(vectors), float(vectors.error.max(initial=0)), vectors.scale)

    def __len__(self) -> int:
        return self.count

    def part(self, first: int, number: int) -> Tiles:
        """Return so many tiles from the first."""
        width = self.codes.shape[2]
        count = min(self.count - first * width, number * width)
        return Tiles(self.codes[first : first + number], count, self.largest_error, self.scale)


def may_exceed(a: Rounded, b: Rounded, limit: float | Floats) -> Mask:
    """Return (a, b), false only where the dot product of two vectors is at most the limit.

    Args:
        a: n vectors.
        b: m vectors.
        limit: what can be broadcast to (n, m).

    """
    found: Mask = products(a.left, b.right) > _lowest(a, b, limit)
    return found


def where_may_exceed(a: Rounded, tiles: Tiles, limit: float | Floats) -> tuple[Ids, Ids, Mask]:
    """Compare vectors with many others, where few pairs exceed the limit.

    This takes half the time of `may_exceed`: ONNX Runtime takes one tile after the other, and only the
    largest product of each vector with a tile leaves it. Those above the limit are computed again.

    Args:
        a: n vectors.
        tiles: m vectors.
        limit: one for all pairs, or (n, 1).

    Returns:
        (r,) some vectors of a; (c,) some vectors of the tiles; and (r, c) which of their pairs may exceed
        the limit. No other pair does.

    """
    lowest = _lowest(a, tiles, limit)
    largest = largest_products(a.left, tiles.codes)
    met = largest > lowest.reshape(-1)
    rows, some = np.flatnonzero(met.any(axis=0)), np.flatnonzero(met.any(axis=1))
    width = tiles.codes.shape[2]
    columns = (some[:, None] * width + np.arange(width)).reshape(-1)
    found = products(a.left[rows], tiles.codes[some]) > (lowest[rows] if lowest.ndim else lowest)
    mask = found.transpose(1, 0, 2).reshape(len(rows), len(columns))
    there = int(np.searchsorted(columns, len(tiles)))
    return rows, columns[:there], mask[:, :there]


def each_may_exceed(a: RoundedTwice, b: RoundedTwice, limit: float) -> Mask:
    """Return (n,), false only where the dot product of a[i] and b[i] is at most the limit, in 16 bits."""
    step = a.scale * b.scale / FINER**2
    product = step * np.einsum("ij,ij->i", a.fine.astype(np.float32), b.fine.astype(np.float32))
    found: Mask = product > limit - a.fine_error * (1 + b.fine_error) - b.fine_error
    return found


def _rounded(vectors: Floats, scale: float, most: int) -> tuple[Floats, Floats]:
    """Return codes of at most `most`, and the length of what is left of each vector."""
    codes = np.rint(vectors * np.float32(1 / scale))
    np.clip(codes, -most, most, out=codes)
    return codes, _lengths(vectors - np.float32(scale) * codes)


def _first_bits(fine: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return the nearest codes of eight bits."""
    return (fine + np.int16(FINER // 2)) // np.int16(FINER)


def _lengths(vectors: Floats) -> Floats:
    found: Floats = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    return found


def _lowest(a: Rounded, b: Rounded | Tiles, limit: float | Floats) -> Numbers:
    """Return the largest product of codes that rules out a dot product above the limit."""
    off = a.largest_error * (1 + b.largest_error) + b.largest_error
    lowest: Numbers = np.floor((np.asarray(limit) - off) / (a.scale * b.scale)).astype(np.int32)
    return lowest


def scale_of(reach: float) -> float:
    """Return the length of a step, where the largest code stands for `reach`."""
    return reach / largest_code()
