"""Checksums and fingerprints of files.

Google Cloud Storage keeps the crc32c of every object. It can be computed from the checksums of an
object's parts.
"""

import base64
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import google_crc32c

POLYNOMIAL = 0x82F63B78  # the Castagnoli polynomial, with x^0 in the highest of 32 bits
X_TO_THE_0 = 1 << 31
READ_AT_ONCE = 1 << 20  # bytes


def fingerprint(files: Iterable[tuple[str, int, str]]) -> str:
    """Return 16 hex digits that change only with the name, size or content of a file.

    Args:
        files: (name, bytes, checksum) of each file, in any order.

    """
    lines = sorted(f"{name}\t{size}\t{checksum}" for name, size, checksum in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def crc32c(data: bytes, before: int = 0) -> int:
    """Extend the checksum `before` of the preceding bytes by `data`."""
    checksum: int = google_crc32c.extend(before, data)
    return checksum


class PartChecksums:
    """Computes the crc32c of each part of some bytes, from pieces of any length.

    Args:
        size: bytes of a part; the last one may be shorter.

    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._found: list[int] = []
        self._begun = b""

    def add(self, piece: bytes) -> None:
        """Add the next bytes."""
        data = self._begun + bytes(piece) if self._begun else bytes(piece)
        whole = len(data) - len(data) % self._size
        self._found += [crc32c(data[at : at + self._size]) for at in range(0, whole, self._size)]
        self._begun = data[whole:]

    def finish(self) -> list[int]:
        """Return the checksums of all parts."""
        return [*self._found, crc32c(self._begun)] if self._begun else self._found


def checksum_text(checksum: google_crc32c.Checksum | int) -> str:
    """Format a checksum as Google Cloud Storage does: base64 of its big-endian bytes."""
    digest = checksum.to_bytes(4, "big") if isinstance(checksum, int) else checksum.digest()
    return base64.b64encode(digest).decode("ascii")


def file_crc32c(path: str | Path) -> str:
    """Return the checksum of a local file, formatted by `checksum_text`."""
    with Path(path).open("rb") as file:
        return crc32c_of(file)


def crc32c_of(file: BinaryIO) -> str:
    """Return the checksum of the rest of an open file, formatted by `checksum_text`."""
    checksum = 0
    while piece := file.read(READ_AT_ONCE):
        checksum = crc32c(piece, checksum)
    return checksum_text(checksum)


def crc32c_of_parts(parts: Iterable[tuple[int, int]]) -> int:
    """Compute the checksum of a file from the checksums of its parts.

    A part of n bytes shifts everything before it by 8n bits, which multiplies the checksum by x^8n modulo
    the polynomial. This is zlib's `crc32_combine` (Mark Adler) with crc32c's polynomial.

    Args:
        parts: (checksum, bytes) of each part, in order.

    """
    whole = 0
    for checksum, size in parts:
        whole = _times(_x_to_the_bits_of(size), whole) ^ checksum
    return whole


def _times(a: int, b: int) -> int:
    """Multiply two polynomials modulo crc32c's polynomial."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=64)  # most parts have the same size
def _x_to_the_bits_of(size: int) -> int:
    """Return x^(8 * size) modulo the polynomial, by squaring."""
    power, square = X_TO_THE_0, X_TO_THE_0 >> 8  # x^0, x^8
    while size:
        if size & 1:
            power = _times(square, power)
        square = _times(square, square)
        size >>= 1
    return power
