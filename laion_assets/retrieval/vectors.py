"""Unit vectors: made from any, or decoded from codes when they are looked at.

What must not live here: what vectors mean.
"""

from collections.abc import Callable

import numpy as np

from laion_assets.retrieval.arrays import Bytes, Floats, Ids


def unit(vectors: Floats) -> Floats:
    """Scale (n, d) rows to length 1; zero and non-finite rows become zero, which is like nothing."""
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        good = np.isfinite(norms) & (norms > 0)
        scaled: Floats = np.where(good, vectors / np.where(good, norms, 1), 0).astype(np.float32)
    return scaled


class Coded:
    """The unit vectors of some codes: 128 bytes a row instead of 3 KB, decoded block by block.

    Args:
        codes: (n, code size).
        decode: turns (m, code size) codes into (m, d) vectors.
    """

    def __init__(self, codes: Bytes, decode: Callable[[Bytes], Floats]) -> None:
        self._codes = codes
        self._decode = decode

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, rows: slice | Ids) -> Floats:
        return unit(self._decode(self._codes[rows]))
