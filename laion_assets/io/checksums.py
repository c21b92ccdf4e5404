"""crc32c, the checksum that buckets keep of every object, of the whole or put together from parts.

What must not live here: anything but the checksum.
"""

import base64
from collections.abc import Iterable
from functools import lru_cache

import google_crc32c

POLYNOMIAL = 0x82F63B78  # Castagnoli's, with x^0 in the highest of 32 bits
ONE = 1 << 31


def crc32c(data: bytes, before: int = 0) -> int:
    """Return the checksum of what has the checksum `before`, followed by `data`."""
    checksum: int = google_crc32c.extend(before, data)
    return checksum


def checksum_text(checksum: google_crc32c.Checksum | int) -> str:
    """Return a checksum the way Google Cloud Storage writes it: base64 of the big-endian bytes."""
    digest = checksum.to_bytes(4, "big") if isinstance(checksum, int) else checksum.digest()
    return base64.b64encode(digest).decode("ascii")


def crc32c_of_parts(parts: Iterable[tuple[int, int]]) -> int:
    """Return the checksum of a whole from those of its parts.

    A part of n bytes moves all before it up by 8n bits: their checksum is multiplied by x^8n modulo the
    polynomial. This is zlib's `crc32_combine` (Mark Adler), with crc32c's polynomial.

    Args:
        parts: (checksum, bytes) of each part, in order.

    """
    whole = 0
    for checksum, size in parts:
        whole = _times(_x_to_the_bits_of(size), whole) ^ checksum
    return whole


def _times(a: int, b: int) -> int:
    """Multiply two polynomials modulo the checksum's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=64)  # most parts have the same size
def _x_to_the_bits_of(size: int) -> int:
    """Return x^(8 * size) modulo the polynomial, by squaring."""
    power, square = ONE, ONE >> 8  # x^8
    while size:
        if size & 1:
            power = _times(square, power)
        square = _times(square, square)
        size >>= 1
    return power
