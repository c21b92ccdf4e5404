"""Matrix products of integers of eight bits, exact, many times as fast as those of floats."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from laion_assets.io import onnx_models
from laion_assets.io.arrays import Bytes
from laion_assets.io.onnx_models import INT8, INT32, UINT8, graph, node, value

Codes: TypeAlias = NDArray[np.int8]
Numbers: TypeAlias = NDArray[np.int32]

ZERO = 128  # is added to the left codes, which the product takes without a sign
CODES_OF_A_PART = 256
ROWS_OF_A_TILE = 512  # whose products stay in the processor's cache


def products(left: Bytes, right: Codes) -> Numbers:
    """Multiply (n, d) left codes, less ZERO each, with (d, m) right ones, or with tiles of them."""
    if not (left.size and right.size):  # ONNX Runtime up to 1.30 refuses empty arrays
        nothing: Numbers = np.matmul(left.astype(np.int32), right.astype(np.int32))
        return nothing
    found: Numbers = _session("products").run(None, {"a": left, "b": right})[0]
    return found


def largest_products(left: Bytes, tiles: Codes) -> Numbers:
    """Return (t, n), the largest product of each of (n, d) left codes with each of (t, d, m) tiles."""
    found: Numbers = _session("largest").run(None, {"a": left, "b": tiles})[0]
    return found


def largest_excess(
    codes: Bytes, words: Bytes, high: Codes, low: Codes, finer: int, limits: Numbers
) -> Numbers:
    """Decode rows, multiply them, and return how far the products are above their limits.

    All this is one call without Python's lock, which many threads would wait for.

    Args:
        codes: (n, p) for each part of a row the number of a word.
        words: (p * 256, w) what the codes of each part stand for in turn, plus ZERO.
        high: (p * w, m).
        low: (p * w, m); the products are ``rows @ (finer * high + low)``.
        finer: how many steps of `low` are one of `high`.
        limits: (m,); neither they nor the products exceed 2^30.

    Returns:
        (n,) of the product of each row that is farthest above its limit; negative if none reaches it.

    """
    given = {"words": words, "high": high, "low": low, "limits": limits}
    given["finer"] = np.array(finer, np.int32)
    given["first"] = np.arange(0, len(words), CODES_OF_A_PART, dtype=np.int32)
    whole = len(codes) // ROWS_OF_A_TILE * ROWS_OF_A_TILE
    tiles = codes[:whole].reshape(-1, ROWS_OF_A_TILE, codes.shape[1]), codes[None, whole:]
    found = [_session("excess").run(None, {"tiles": some, **given})[0] for some in tiles if some.size]
    return np.concatenate([np.empty(0, np.int32), *(each.reshape(-1) for each in found)])


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
    """Return three graphs, which have no intermediate result larger than of one tile.

    `products` are those of a - ZERO and b, `largest` is the largest of each row and tile of b, and
    `excess` is how far those of each row of a tile are above limits.
    """
    zero = {"zero": np.array(ZERO, np.uint8)}
    inputs = [value("a", UINT8), value("b", INT8)]
    of_b = node("MatMulInteger", ["a", "b", "zero"], "products")
    of_tile = node("MatMulInteger", ["a", "tile", "zero"], "products")
    largest = node("ReduceMax", ["products"], "of row", axes=[1], keepdims=0)
    by_row = [value("of row", INT32, ["rows"])]
    largest_of_tile = graph([of_tile, largest], [value("tile", INT8)], by_row)
    excess = [
        node("Cast", ["tile"], "numbers", to=INT32),
        node("Add", ["numbers", "first"], "places"),
        node("Gather", ["words", "places"], "parts", axis=0),
        node("Flatten", ["parts"], "decoded", axis=1),
        node("MatMulInteger", ["decoded", "high", "zero"], "of high"),
        node("MatMulInteger", ["decoded", "low", "zero"], "of low"),
        node("Mul", ["of high", "finer"], "of finer"),
        node("Add", ["of finer", "of low"], "sums"),
        node("Sub", ["sums", "limits"], "products"),
        largest,
    ]
    excess_of_tile = graph(excess, [value("tile", UINT8)], by_row)
    kinds = {"tiles": UINT8, "words": UINT8, "first": INT32, "high": INT8, "low": INT8, "finer": INT32}
    given = [value(name, kind) for name, kind in (kinds | {"limits": INT32}).items()]

    def tile_by_tile(tiles: str, body: bytes) -> list[bytes]:
        return [node("Scan", [tiles], "found", body=body, num_scan_inputs=1)]

    found = [value("found", INT32)]
    return {
        "products": graph([of_b], inputs, [value("products", INT32)], zero),
        "largest": graph(tile_by_tile("b", largest_of_tile), inputs, found, zero),
        "excess": graph(tile_by_tile("tiles", excess_of_tile), given, found, zero),
    }
