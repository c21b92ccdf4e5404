"""Print untrusted text, such as captions and URLs from the web, in columns on a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from laion_assets.io.text import count as count  # re-exported
from laion_assets.io.text import list_shortly

NAMES_SHOWN = 10  # of a list in a sentence
MAX_TEXT = 500  # characters of a text that are read
MARKS = 2  # combining marks kept per letter
CUT = "…"


def one_line(text: str, longest: int = MAX_TEXT) -> str:
    """Return a text on one line without anything that a terminal would interpret.

    Control characters, escapes, direction marks and other unprintable characters become spaces.
    """
    printable = "".join(letter if letter.isprintable() else " " for letter in text[:longest])
    return "".join(_with_few_marks(" ".join(printable.split())))


def some(names: Sequence[str]) -> str:
    """List the first names and the number of others."""
    return list_shortly(names, limit=NAMES_SHOWN)


def cut(text: str, width: int) -> str:
    """Cut a line to at most `width` columns; a cut line ends in "…"."""
    if columns(text) <= width:
        return text
    room, kept = width - columns(CUT), ""
    for letter in text:
        room -= columns(letter)
        if room < 0:
            break
        kept += letter
    return kept.rstrip() + CUT


def columns(text: str) -> int:
    """Return the width of a line in columns: East Asian letters take two, combining marks none."""
    return sum(
        0 if _is_mark(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool], widths: Sequence[int]) -> list[str]:
    """Return rows as lines of aligned columns.

    Args:
        rows: rows of cells with any text.
        right: whether each column is right-aligned.
        widths: most terminal columns that each column may take.

    """
    cells = [
        [
            cut(one_line(cell, max(MAX_TEXT, width)), width)
            for cell, width in zip(row, widths, strict=True)
        ]
        for row in rows
    ]
    used = [max(map(columns, column)) for column in zip(*cells, strict=True)]

    def padded(cell: str, number: int) -> str:
        room = " " * (used[number] - columns(cell))
        return room + cell if right[number] else cell + room

    return ["  ".join(padded(cell, number) for number, cell in enumerate(row)).rstrip() for row in cells]


def _is_mark(letter: str) -> bool:
    return unicodedata.category(letter) in ("Mn", "Me")


def _with_few_marks(text: str) -> Iterator[str]:
    marks = 0
    for letter in text:
        marks = marks + 1 if _is_mark(letter) else 0
        if marks <= MARKS:
            yield letter
