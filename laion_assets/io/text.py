"""Texts from outside: names of files, and JSON."""

from __future__ import annotations

import json
from typing import Any


def printable(text: str) -> str:
    """Return a text with every control character, line break and byte that is not UTF-8 escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def json_object(content: bytes) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ValueError: it is not JSON, not an object, or nested too deep.

    """
    try:
        read = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(read, dict):
        raise ValueError("it is not an object")
    return read
