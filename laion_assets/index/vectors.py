"""Unit vectors, held in memory or decoded on demand."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import numpy as np

from laion_assets.index.decoder import Decoder
from laion_assets.io.arrays import Bytes, Floats, Ids
from laion_assets.io.parallel import in_threads, one_blas_thread

HELD_ROWS = 1 << 17  # more vectors than this are decoded on every access
ROWS_DECODED_AT_ONCE = 1024  # so that intermediate results fit into the processor's cache


class Vectors(Protocol):
    """Unit vectors by row: an array, or an object that decodes them on access."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, rows: slice | Ids, /) -> Floats:
        """Return (m, d) float32 rows of length 1, or of zeros."""


def unit(vectors: Floats) -> Floats:
    """Scale (n, d) rows to length 1; zero and non-finite rows become zero."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        scaled: Floats = vectors * (np.float32(1) / lengths)[:, None]
    scaled[~(np.isfinite(lengths) & (lengths > 0))] = 0
    return scaled


def decoded_codes(codes: Bytes, decoder: Decoder, held_rows: int | None = None) -> Vectors:
    """Return the unit vectors of codes.

    A few vectors are decoded at once and held as an array. More are decoded on every access: for LAION-5B
    a code has 131 bytes, but a vector more than 3 KB.

    Args:
        codes: (n, code size).
        decoder: of the codes, see `Decoder.decode_to_compare`.
        held_rows: vectors to hold, at most; `HELD_ROWS` if None.

    """
    coded = Coded(codes, decoder)
    if not 0 < len(codes) <= (HELD_ROWS if held_rows is None else held_rows):
        return coded
    if len(codes) <= ROWS_DECODED_AT_ONCE:
        with one_blas_thread():
            return coded[:]
    held = np.empty((len(codes), coded[:1].shape[1]), np.float32)

    def hold(start: int) -> None:
        rows = slice(start, start + ROWS_DECODED_AT_ONCE)
        held[rows] = coded[rows]

    in_threads(hold, range(0, len(codes), ROWS_DECODED_AT_ONCE))
    return held


class Coded:
    """Vectors that are decoded on every access.

    Args:
        codes: (n, code size).
        decoder: of the codes, see `Decoder.decode_to_compare`.

    """

    def __init__(self, codes: Bytes, decoder: Decoder) -> None:
        self._codes = codes
        self._decoder = decoder

    def __reduce__(self) -> tuple[type[Coded], tuple[Bytes, Decoder]]:
        """Pickle what decodes these codes, which is small."""
        return Coded, (self._codes, self._decoder_of_these)

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
