"""Encode rows with a trained index: the codes that faiss produces, in less time."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import faiss
import numpy as np

from laion_assets.build.codebooks import WideCodebooks, codebooks_of
from laion_assets.build.nearest import Centres
from laion_assets.io.arrays import Bytes, Floats, Ids


class Encoder:
    """Encodes rows with a trained index, as `index.add` does.

    Matrix products with all or most centres find the list of a row. The graph over the centres is not
    used, because faiss misses some of the nearest centres with it.

    Args:
        index: trained index of a type supported by `training.train`.

    """

    def __init__(self, index: Any) -> None:
        self._rotation = _rotation(index)
        found = faiss.try_extract_index_ivf(index)
        self._ivf = None if found is None else faiss.downcast_index(found)
        self._pq: Any = None
        self._width = index.d
        if self._ivf is None:
            return
        self._width = self._ivf.d
        self._centres = Centres(self._ivf.quantizer.reconstruct_n(0, self._ivf.nlist))
        if isinstance(self._ivf, faiss.IndexIVFPQ):
            self._pq = WideCodebooks(codebooks_of(self._ivf.pq))
            self._by_residual = bool(self._ivf.by_residual)

    def encode(self, rows: Floats) -> tuple[Ids, Bytes]:
        """Return the list and the code of each row.

        Args:
            rows: (n, dimension) float32 of length 1.

        Returns:
            (n,) int64 numbers of lists, 0 for an index without lists, and (n, code size) uint8 codes.
            These are PQ codes, or the bytes of float32 vectors if the index stores vectors.

        """
        rows = np.ascontiguousarray(rows, np.float32)
        if self._rotation is not None:
            rows = rows @ self._rotation.T
        if self._ivf is None:
            return np.zeros(len(rows), np.int64), rows.view(np.uint8)
        lists = self._centres.nearest(rows)
        if self._pq is None:
            return lists, rows.view(np.uint8)
        if not self._by_residual:
            return lists, self._pq.codes(rows)
        return lists, self._pq.codes(rows, self._centres.vectors, lists)


_ENCODERS: WeakKeyDictionary[Any, Encoder] = WeakKeyDictionary()


def encode(index: Any, rows: Floats) -> tuple[Ids, Bytes]:
    """Return the list and the code of each row, see `Encoder.encode`; the encoder is cached."""
    encoder = _ENCODERS.get(index)
    if encoder is None:
        encoder = _ENCODERS[index] = Encoder(index)
    return encoder.encode(rows)


def _rotation(index: Any) -> Floats | None:
    """Return the (width, dimension) matrix applied before the lists; None if there is none."""
    if not isinstance(index, faiss.IndexPreTransform):
        return None
    transform = faiss.downcast_VectorTransform(index.chain.at(0))
    matrix: Floats = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
    return matrix
