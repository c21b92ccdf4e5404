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
