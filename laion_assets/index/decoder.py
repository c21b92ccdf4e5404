"""Turn codes into vectors without the index.

A *code* is a row as the index stores it. In an (OPQ +) IVF + PQ index it is the number of the row's
inverted list followed by its PQ code (131 bytes per row for LAION-5B). In any other index it is the
vector itself.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np

from laion_assets.io.arrays import Bytes, Floats, Ids
from laion_assets.io.parallel import one_blas_thread, one_faiss_thread

ORTHONORMAL = 1e-4  # largest deviation from orthonormality of an orthonormal matrix trained by faiss


class Decoder:
    """Turns codes into vectors. A decoder restricted to a few lists is small.

    Args:
        index: an empty faiss index that decodes; None if codes are vectors.
        lists: (n,) ascending numbers of the inverted lists whose centres the index holds.
        dimension: dimension of the vectors.

    """

    def __init__(self, index: Any, lists: Ids, dimension: int) -> None:
        self._index = index
        self._lists = lists
        self._dimension = dimension

    @classmethod
    def of_index(cls, index: Any, lists: Ids) -> Decoder:
        """Return the decoder of the codes in some lists of an (OPQ +) IVF + PQ index.

        Args:
            index: the faiss index.
            lists: (n,) ascending numbers of the lists.

        """
        ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
        centres = ivf.quantizer.reconstruct_batch(lists)
        return cls(emptied(index, centres), lists, index.d)

    def decode(self, codes: Bytes) -> Floats:
        """Decode (n, code size) codes to (n, dimension) float32 vectors, not normalised."""
        if self._index is None:
            return np.ascontiguousarray(codes).view(np.float32)
        vectors: Floats = self._index.sa_decode(self._renumbered(codes))
        return vectors

    def decode_to_compare(self, codes: Bytes) -> Floats:
        """Return vectors with the same inner products as the decoded ones, for a third of the work.

        Decoding ends with the transpose of OPQ's matrix A, (m, d) with orthonormal columns if m >= d, or
        orthonormal rows otherwise. That changes inner products only by mapping m - d directions to zero
        (LAION-5B: 128 of 896). So it is enough to leave these out.

        Args:
            codes: (n, code size).

        Returns:
            (n, min(m, d)) float32, or (n, d) if the index has no such matrix.

        """
        vectors = self.decode_unprojected(codes)
        return vectors if self._reflection is None else self._reflection.rest_of(vectors)

    def decode_unprojected(self, codes: Bytes) -> Floats:
        """Return vectors that still have a part in the null space, for a sixth of the work.

        Args:
            codes: (n, code size).

        Returns:
            (n, m) float32. Without their part in `null_space`, they are the vectors to compare in another
            basis, see `lifted`. If the index has an orthonormal matrix, a row does not depend on the
            others, to the last bit.

        """
        with one_faiss_thread():
            if self._reflection is None:
                return self.decode(codes)
            vectors: Floats = faiss.extract_index_ivf(self._index).sa_decode(self._renumbered(codes))
        return vectors

    def lifted(self, axes: Floats) -> Floats:
        """Return (m, w) axes of unprojected vectors, given (d, w) axes of the vectors to compare."""
        return axes if self._reflection is None else self._reflection.lifted(axes)

    @property
    def null_space(self) -> Floats:
        """Return (m, g) orthonormal directions that the last transform maps to zero."""
        if self._reflection is None:
            return np.empty((self._dimension, 0), np.float32)
        return self._reflection.null_space

    @cached_property
    def _reflection(self) -> _Reflection | None:
        with one_blas_thread():
            return _Reflection.of_index(self._index)

    def _renumbered(self, codes: Bytes) -> Bytes:
        """Replace the list numbers in codes by the row numbers of this decoder's centres."""
        ivf = faiss.extract_index_ivf(self._index)
        width = codes.shape[1] - ivf.code_size
        rows = np.searchsorted(self._lists, list_numbers(codes, width))
        return np.hstack([list_bytes(rows, ivf.coarse_code_size()), codes[:, width:]])

    def only(self, codes: Bytes) -> Decoder:
        """Return a decoder of some (n, code size) codes: it holds the centres of their lists alone."""
        if self._index is None:
            return self
        ivf = faiss.downcast_index(faiss.extract_index_ivf(self._index))
        lists = np.unique(list_numbers(codes, codes.shape[1] - ivf.code_size))
        centres = ivf.quantizer.reconstruct_batch(np.searchsorted(self._lists, lists))
        return Decoder(emptied(self._index, centres), lists, self._dimension)

    def merged(self, other: Decoder) -> Decoder:
        """Return a decoder for the codes of both decoders, which must come from the same index."""
        if self._index is None:
            return self
        lists, first = np.unique(np.concatenate([self._lists, other._lists]), return_index=True)
        centres = np.concatenate([self._centres(), other._centres()])[first]
        return Decoder(emptied(self._index, centres), lists, self._dimension)

    def _centres(self) -> Floats:
        ivf = faiss.extract_index_ivf(self._index)
        centres: Floats = ivf.quantizer.reconstruct_n(0, len(self._lists))
        return centres

    def to_bytes(self) -> bytes:
        """Serialise: dimension and number of lists (int64), list numbers (int64), faiss index."""
        head = np.array([self._dimension, len(self._lists)], np.int64)
        written = io.BytesIO(head.tobytes() + self._lists.tobytes())
        written.seek(0, io.SEEK_END)
        if self._index is not None:
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(written.write))
        return written.getvalue()

    def __reduce__(self) -> tuple[Callable[[Bytes], Decoder], tuple[Bytes]]:
        """Pickle as an array, which processes share if it is large."""
        return Decoder.from_bytes, (self._serialised,)

    @cached_property
    def _serialised(self) -> Bytes:
        return np.frombuffer(self.to_bytes(), np.uint8)

    @classmethod
    def from_bytes(cls, data: bytes | Bytes) -> Decoder:
        """Deserialise the output of `to_bytes`."""
        dimension, count = (int(number) for number in np.frombuffer(data, np.int64, 2))
        lists = np.frombuffer(data, np.int64, count, offset=16).copy()
        body = np.frombuffer(data, np.uint8, offset=16 + lists.nbytes)
        return cls(faiss.deserialize_index(body) if body.size else None, lists, dimension)


def list_numbers(codes: Bytes, width: int) -> Ids:
    """Read the little-endian list number in the first `width` bytes of each code."""
    padded = np.zeros((len(codes), 8), np.uint8)
    padded[:, :width] = codes[:, :width]
    return padded.view("<i8").ravel().astype(np.int64)


def list_bytes(numbers: Ids, width: int) -> Bytes:
    """Write list numbers as (n, width) little-endian bytes."""
    return numbers.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width]


@dataclass(frozen=True)
class _Reflection:
    """An orthonormal matrix that maps the g directions that a transform removes onto the first g axes.

    Let the columns of D be such directions, orthonormal and chosen so that the upper g rows, D1, are
    symmetric and positive semidefinite. With the other rows, D2, the columns of::

        -D2'
        I - D2 (I + D1)^-1 D2'

    are orthonormal, and orthogonal to D (a block reflector: Schreiber and Parlett, 1988). So they keep
    the inner products of vectors without these directions, in two products of g * (m - g) numbers.

    Attributes:
        null_space: (m, g) D.
        into: (m - g, g) D2 (I + D1)^-1.
        out_of: (g, m - g) D2'.

    """

    null_space: Floats
    into: Floats
    out_of: Floats

    @classmethod
    def of_index(cls, index: Any) -> _Reflection | None:
        """Return the reflection of what the transpose of the index's transform maps to zero.

        None if the index does not have exactly one linear transform, or if it changes inner products.
        """
        if not isinstance(index, faiss.IndexPreTransform) or index.chain.size() != 1:
            return None
        transform = faiss.downcast_VectorTransform(index.chain.at(0))
        if not isinstance(transform, faiss.LinearTransform) or transform.have_bias:
            return None
        matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
        width_out, width_in = matrix.shape
        inner = matrix.T @ matrix if width_out >= width_in else matrix @ matrix.T
        if not np.allclose(inner, np.eye(len(inner)), atol=ORTHONORMAL):
            return None
        random = np.random.default_rng(0)
        directions = random.standard_normal((width_out, max(width_out - width_in, 0)), np.float32)
        for _ in range(2):  # a single projection leaves rounding errors
            directions = np.linalg.qr(directions - matrix @ (matrix.T @ directions))[0]
        return cls.of(directions)

    @classmethod
    def of(cls, directions: Floats) -> _Reflection:
        """Return the reflection of (m, g) orthonormal directions."""
        gone = directions.shape[1]
        left, _, right = np.linalg.svd(directions[:gone])
        turned = directions @ (left @ right).T
        top, rest = turned[:gone], turned[gone:]
        into = np.linalg.solve(np.eye(gone, dtype=np.float32) + top, rest.T).T
        return cls(turned, np.ascontiguousarray(into), np.ascontiguousarray(rest.T))

    def rest_of(self, vectors: Floats) -> Floats:
        """Return (n, m - g) what is left of (n, m) vectors."""
        gone = len(self.out_of)
        if not gone:
            return vectors
        first, others = vectors[:, :gone], vectors[:, gone:]
        along: Floats = others @ self.into
        along += first
        taken: Floats = along @ self.out_of
        return np.subtract(others, taken, out=taken)

    def lifted(self, axes: Floats) -> Floats:
        """Return (m, w) the directions that `rest_of` maps to (m - g, w) axes."""
        along = self.out_of @ axes
        return np.concatenate([-along, axes - self.into @ along])


def emptied(index: Any, centres: Floats) -> Any:
    """Return an index without rows, but with the codes and some lists of another, given their centres."""
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    quantizer = faiss.IndexFlatIP(ivf.d)
    quantizer.add(centres)
    empty = faiss.IndexIVFPQ(
        quantizer, ivf.d, len(centres), ivf.pq.M, ivf.pq.nbits, faiss.METRIC_INNER_PRODUCT
    )
    empty.pq = ivf.pq
    empty.by_residual = ivf.by_residual
    empty.is_trained = True
    if not isinstance(index, faiss.IndexPreTransform):
        return empty
    whole = faiss.IndexPreTransform(empty)
    for i in reversed(range(index.chain.size())):
        whole.prepend_transform(index.chain.at(i))
    whole.referenced_objects.append(index)  # which still owns the transforms
    return whole
