"""Handle untrusted text, file names and JSON, and count things in words."""

from __future__ import annotations

import json
from typing import Any


def count(number: int, noun: str) -> str:
    """Return a number and its noun: "1 image", "2,000 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


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
