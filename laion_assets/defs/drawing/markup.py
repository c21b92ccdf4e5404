"""Markdown and tables for the UI.

URLs and captions come from the open web: they are shown as text, never as markup, and nothing is fetched.
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
MAX_ADDRESS = 2000  # characters of a URL that is a link: the event log holds it for ever


def table(records: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Return rows that the UI shows in place, as text."""
    names = list(records[0]) if records else []
    return dg.MetadataValue.table(
        [dg.TableRecord(dict(record)) for record in records],
        dg.TableSchema([dg.TableColumn(name) for name in names]),
    )


def embedded(name: str, data: bytes, mime: str) -> str:
    """Return an image as Markdown that carries its own bytes."""
    return f"![{name}](data:{mime};base64,{base64.b64encode(data).decode('ascii')})"


def links(
    table: StoredTable, removed: Removed | None = None, *, remote_pictures: bool = False
) -> dg.MarkdownMetadataValue:
    """List the first rows as links, and removed near-duplicates with their representatives.

    Args:
        table: with url and caption.
        removed: examples of near-duplicates.
        remote_pictures: whether the browser loads the images from their hosts.

    """
    if "url" not in table.schema.names:
        return dg.MetadataValue.md("these rows have neither thumbnails nor URLs")
    rows = table.top(LINKS, ["url", "caption"]).to_pylist()
    lines = [f"{number}. {link(**row, picture=remote_pictures)}" for number, row in enumerate(rows, 1)]
    if removed is not None and len(removed.cosine):
        pairs = zip(
            removed.removed.select(["url", "caption"]).to_pylist(),
            removed.representatives.select(["url", "caption"]).to_pylist(),
            removed.cosine.tolist(),
            strict=True,
        )
        lines += ["", "Near-duplicates that were removed, and what is kept:", ""]
        lines += [
            f"- {link(**gone)} is like {link(**kept)} (cosine {cosine:.3f})"
            for gone, kept, cosine in pairs
        ]
    return dg.MetadataValue.md("\n".join(lines))


def link(url: str | None, caption: str | None, *, picture: bool = False) -> str:
    """Return a row as Markdown on one line: a link where it is one, and its caption as plain text."""
    text = plain(url or "")
    address = quote(url or "", safe=":/?&=%#+,;@~!$")
    if is_web(url) and len(address) <= MAX_ADDRESS:
        text = f"[{text}](<{address}>)" + (f" ![](<{address}>)" if picture else "")
    return f"{text} {plain(caption)}" if caption and caption.strip() else text


def plain(text: str) -> str:
    """Return any text as Markdown that shows it as it is, on one line: as code.

    Nothing within code is markup, not even a bare address, which escapes would not keep from becoming a
    link. It ends at as many backticks as it began with, so it begins with more than there are inside.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line[:SHOWN_TEXT] + ("…" if len(line) > SHOWN_TEXT else "")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if line else ""
