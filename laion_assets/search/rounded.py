"""Dot products of unit vectors in eight bits, with a bound of their error.

Processors multiply integers of eight bits many times as fast as floats. Rounding moves a vector x by its
error, a length that is known. Where p and q are the codes of x and y, and s and t the lengths of a step::

    |x . y - st p . q|  =  |(x - sp) . tq + x . (y - tq)|  <=  error(x) (1 + error(y)) + error(y)

by Cauchy-Schwarz, because tq is at most 1 + error(y) long. The product of the codes is exact. So where it
is small enough, x . y is not above a limit. The bound leaves out the rounding of float32, below 1e-6:
callers relax their limits by more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Self, TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from laion_assets.io import onnx_models
from laion_assets.io.arrays import Bytes, Floats, Ids, Mask
from laion_assets.io.onnx_models import INT8, INT32, UINT8, graph, node, value
from laion_assets.io.parallel import slices
from laion_assets.io.spill import spilled

Codes: TypeAlias = NDArray[np.int8]
Numbers: TypeAlias = NDArray[np.int32]

ROUNDED_AT_ONCE, PUT_AT_ONCE = 256, 1 << 14  # vectors; those that are rounded stay in the cache
FINER = 254  # times as small are the steps of the rests: half a step of codes is 127 of them
ZERO = 128  # is added to the left codes, which the product takes without a sign


@dataclass(frozen=True)
class Rounded:
    """Unit vectors that are rounded to eight bits.

    Attributes:
        codes: (n, d) row i stands for `scale * codes[i]`.
        error: (n,) length of the difference of a vector and what stands for it.
        scale: length of a step.

    """

    codes: Codes
    error: Floats
    scale: float

    @classmethod
    def of(cls, vectors: Floats, reach: float) -> Self:
        """Round (n, d) vectors.

        Args:
            vectors: (n, d) float32.
            reach: the coordinate that the largest code stands for. Larger ones are cut, which adds to the
                error.

        """
        rows, width = vectors.shape
        made = cls.empty(rows, width, scale_of(reach))
        for batch in slices(rows, ROUNDED_AT_ONCE):
            made._round(batch, vectors[batch])
        return made

    @classmethod
    def empty(cls, rows: int, width: int, scale: float) -> Self:
        """Return codes of arbitrary content, to be filled; many lie on the disk."""
        return cls(spilled((rows, width), np.int8), np.empty(rows, np.float32), scale)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | Ids | Mask) -> Self:
        return replace(self, codes=self.codes[rows], error=self.error[rows])

    def __setitem__(self, rows: slice, others: Self) -> None:
        self.codes[rows], self.error[rows] = others.codes, others.error

    def in_order(self, rows: Ids) -> Self:
        """Return all vectors in another order; many lie on the disk."""
        ordered = self.empty(len(rows), self.codes.shape[1], self.scale)
        for batch in slices(len(rows), PUT_AT_ONCE):
            ordered[batch] = self[rows[batch]]
        return ordered

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

    def _round(self, rows: slice, vectors: Floats) -> Floats:
        """Fill some rows, and return the differences."""
        codes, rest = _rounded(vectors, self.scale, largest_code())
        self.codes[rows], self.error[rows] = codes, _lengths(rest)
        return rest


@dataclass(frozen=True)
class RoundedTwice(Rounded):
    """Unit vectors that are rounded to eight bits, and to sixteen.

    Attributes:
        rests: (n, d) the differences, in steps that are `FINER` times as small.
        rest_error: (n,) length of what is left of them.

    """

    rests: Codes
    rest_error: Floats

    @classmethod
    def empty(cls, rows: int, width: int, scale: float) -> Self:
        """Return codes of arbitrary content, to be filled; many lie on the disk."""
        codes, rests = (spilled((rows, width), np.int8) for _ in range(2))
        return cls(codes, np.empty(rows, np.float32), scale, rests, np.empty(rows, np.float32))

    def __getitem__(self, rows: slice | Ids | Mask) -> Self:
        some = super().__getitem__(rows)
        return replace(some, rests=self.rests[rows], rest_error=self.rest_error[rows])

    def __setitem__(self, rows: slice, others: Self) -> None:
        super().__setitem__(rows, others)
        self.rests[rows], self.rest_error[rows] = others.rests, others.rest_error

    def floats(self) -> Floats:
        """Return (n, d) what codes and rests stand for."""
        found: Floats = self.rests.astype(np.float32)
        found *= np.float32(1 / FINER)
        found += self.codes
        found *= np.float32(self.scale)
        return found

    def _round(self, rows: slice, vectors: Floats) -> Floats:
        rest = super()._round(rows, vectors)
        rests, least = _rounded(rest, self.scale / FINER, FINER // 2)
        self.rests[rows], self.rest_error[rows] = rests, _lengths(least)
        return least


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
    def of(cls, vectors: Rounded, width: int) -> Tiles:
        """Cut vectors in tiles."""
        number, dimension = -(-len(vectors) // width), vectors.codes.shape[1]
        filled = np.zeros((number, width, dimension), np.int8)
        filled.reshape(-1, dimension)[: len(vectors)] = vectors.codes
        codes = np.ascontiguousarray(filled.transpose(0, 2, 1))
        return cls(codes, len(vectors), vectors.largest_error, vectors.scale)

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
    largest = _session("largest").run(None, {"a": a.left, "b": tiles.codes})[0]
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
    product = np.einsum("ij,ij->i", a.floats(), b.floats())
    found: Mask = product > limit - a.rest_error * (1 + b.rest_error) - b.rest_error
    return found


def _rounded(vectors: Floats, scale: float, most: int) -> tuple[Codes, Floats]:
    """Return codes of at most `most`, and what is left of the vectors."""
    codes = np.rint(vectors * np.float32(1 / scale))
    np.clip(codes, -most, most, out=codes)
    return codes.astype(np.int8), vectors - np.float32(scale) * codes


def _lengths(vectors: Floats) -> Floats:
    found: Floats = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    return found


def _lowest(a: Rounded, b: Rounded | Tiles, limit: float | Floats) -> Numbers:
    """Return the largest product of codes that rules out a dot product above the limit."""
    off = a.largest_error * (1 + b.largest_error) + b.largest_error
    lowest: Numbers = np.floor((np.asarray(limit) - off) / (a.scale * b.scale)).astype(np.int32)
    return lowest


def products(left: Bytes, right: Codes) -> Numbers:
    """Multiply (n, d) left codes, less ZERO each, with (d, m) right ones, or with tiles of them."""
    found: Numbers = _session("products").run(None, {"a": left, "b": right})[0]
    return found


def scale_of(reach: float) -> float:
    """Return the length of a step, where the largest code stands for `reach`."""
    return reach / largest_code()


@cache
def largest_code() -> int:
    """Return the largest code whose products this processor adds exactly.

    Processors without VNNI instructions add two products in 16 bits and cut what is too large: 255 * 127
    and as much again. They take smaller codes: twice (79 + 128) * 79 fits.
    """
    left, right = np.full((64, 64), 255, np.uint8), np.full((64, 64), 127, np.int8)
    exact = (255 - ZERO) * 127 * 64
    return 127 if (products(left, right) == exact).all() else 79


@cache
def _session(result: str) -> Any:
    """Return a model of ONNX Runtime that multiplies in the calling thread, see `_graphs`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = onnx_models.model(_graphs()[result])
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _graphs() -> dict[str, bytes]:
    """Return two graphs: `products` of a - ZERO and b, and the `largest` of each row and tile of b."""
    zero = {"zero": np.array(ZERO, np.uint8)}
    inputs = [value("a", UINT8), value("b", INT8)]
    of_b = node("MatMulInteger", ["a", "b", "zero"], "products")
    of_tile = node("MatMulInteger", ["a", "tile", "zero"], "products")
    of_row = node("ReduceMax", ["products"], "of row", axes=[1], keepdims=0)
    body = graph([of_tile, of_row], [value("tile", INT8)], [value("of row", INT32, ["rows"])])
    tile_by_tile = node("Scan", ["b"], "largest", body=body, num_scan_inputs=1)
    return {
        "products": graph([of_b], inputs, [value("products", INT32)], zero),
        "largest": graph([tile_by_tile], inputs, [value("largest", INT32)], zero),
    }
