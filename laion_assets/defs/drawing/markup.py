"""Markdown and tables for the UI.

URLs and captions come from the open web. They are shown as text, never as markup, and nothing is fetched.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import dagster as dg

from laion_assets.io.tables import StoredTable
from laion_assets.search.audit import is_web
from laion_assets.search.retrieval import Removed

LINKS = 20
SHOWN_TEXT = 120  # characters of a caption or URL
MAX_ADDRESS = 2000  # characters of a URL shown as a link: the event log keeps it forever


def table(records: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Return rows as a table of text that the UI shows inline."""
    names = list(records[0]) if records else []
    return dg.MetadataValue.table(
        [dg.TableRecord(dict(record)) for record in records],
        dg.TableSchema([dg.TableColumn(name) for name in names]),
    )


def embedded(name: str, data: bytes, mime: str) -> str:
    """Return an image as Markdown with its bytes embedded."""
    return f"![{name}](data:{mime};base64,{base64.b64encode(data).decode('ascii')})"


def links(table: StoredTable, removed: Removed | None = None, note: str = "") -> dg.MarkdownMetadataValue:
    """List the first rows as links, and removed near-duplicates with their representatives.

    Args:
        table: table with url and caption.
        removed: examples of removed near-duplicates.
        note: Markdown that comes first, about pictures.

    """
    if "url" not in table.schema.names:
        return dg.MetadataValue.md("these rows have neither thumbnails nor URLs")
    rows = table.top(LINKS, ["url", "caption"]).to_pylist()
    lines = "\n".join(f"{number}. {link(**row)}" for number, row in enumerate(rows, 1))
    return dg.MetadataValue.md("\n\n".join(filter(None, [note, lines, links_of_removed(removed)])))


def links_of_removed(removed: Removed | None) -> str:
    """List removed near-duplicates as links, with their representatives; empty without any."""
    if removed is None or not len(removed.cosine):
        return ""
    pairs = zip(
        removed.removed.select(["url", "caption"]).to_pylist(),
        removed.representatives.select(["url", "caption"]).to_pylist(),
        removed.cosine.tolist(),
        strict=True,
    )
    lines = [
        f"- {link(**gone)} is like {link(**kept)} (cosine {cosine:.3f})" for gone, kept, cosine in pairs
    ]
    return "\n".join(["Removed near-duplicates, and the images kept instead:", "", *lines])


def link(url: str | None, caption: str | None) -> str:
    """Return a row as one line of Markdown: its URL, as a link if possible, and its plain caption."""
    text = plain(url or "")
    address = quote(url or "", safe=":/?&=%#+,;@~!$")
    if is_web(url) and len(address) <= MAX_ADDRESS:
        text = f"[{text}](<{address}>)"
    return f"{text} {plain(caption)}" if caption and caption.strip() else text


def plain(text: str) -> str:
    """Return any text as one line of Markdown code, which shows it unchanged.

    Nothing within code is markup. Escapes would not prevent a bare address from becoming a link. The code
    is enclosed in more backticks than the text contains in a row.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line[:SHOWN_TEXT] + ("…" if len(line) > SHOWN_TEXT else "")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if line else ""
