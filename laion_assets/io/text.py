"""Handle untrusted text, file names and JSON, and count things in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def count(number: int, noun: str) -> str:
    """Return a number and its noun: "1 image", "2,000 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def as_bytes(size: float) -> str:
    """Return a size with its unit: "8.1 GB"."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{max(1, round(size / 1000))} kB" if size else "0 bytes"


def list_shortly(items: Sequence[str], separator: str = ", ", limit: int = 5) -> str:
    """Join the first few texts and add the number of others; "nothing" if there are none."""
    more = len(items) - limit
    return separator.join(items[:limit]) + (f" and {more:,} more" if more > 0 else "") or "nothing"


def printable(text: str) -> str:
    """Escape every control character, line break and byte that is not UTF-8."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def json_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: the content is not JSON, not an object, or too deeply nested.

    """
    try:
        read = json.loads(content)
    except RecursionError:
        raise ValueError("it is too deeply nested") from None
    if not isinstance(read, dict):
        raise ValueError("it is not an object")
    return read


REPLACED = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are not UTF-8


def decoded(texts: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return texts as UTF-8, and which of them were not.

    Arrow does not validate the files that it reads, so a column of strings may hold any bytes.

    Args:
        texts: (n,) strings or bytes.

    Returns:
        (n,) large strings in which bytes that are not UTF-8 are replaced; (n,) whether any were.

    """
    raw = texts.cast(pa.large_binary())
    try:
        return raw.cast(pa.large_string()), pa.repeat(False, len(raw))
    except pa.ArrowInvalid:
        values = [None if value is None else value.decode(errors="replace") for value in raw.to_pylist()]
    text = pa.array(values, pa.large_string())
    return text, pc.fill_null(pc.not_equal(text.cast(pa.large_binary()), raw), False)


def readable(rows: pa.Table) -> pa.Table:
    """Return a table in which bytes that are not UTF-8 are replaced by U+FFFD, in all columns of text."""
    for place, field in enumerate(rows.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            chunks = [decoded(chunk)[0].cast(field.type) for chunk in rows[place].chunks]
            rows = rows.set_column(place, field, pa.chunked_array(chunks, field.type))
    return rows
