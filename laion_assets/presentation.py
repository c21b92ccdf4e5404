"""What the UI shows of a table besides numbers: contact sheets, or links where there are no pictures.

URLs and captions come from the open web: they are shown as text, never as markup.
What must not live here: how rows are found or stored.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from urllib.parse import quote

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from laion_assets.io_managers import OUTPUT_SETTING, StoredTable
from laion_assets.retrieval.contact_sheet import Strip, contact_sheet, encode
from laion_assets.retrieval.retrieve import PICTURES
from laion_assets.retrieval.storage import new_file

COLUMNS = 12
SHEET_WIDTH = 960  # the UI shows it in a dialog that cuts off what is wider
SHEET_BYTES = 160_000  # it sits in the event log, once for every materialization
LINKS = 20


def strip(table: StoredTable, title: str, subtitle: str) -> Strip | None:
    """Return the pictures that travel with a table; None where it has none."""
    if "thumbnail" not in table.schema.names:
        return None
    rows = _with_pictures(table)
    order = "rank" if "rank" in rows.column_names else "row"
    by = [(name, "ascending") for name in (order, "seed") if name in rows.column_names]
    rows = rows.sort_by(by) if "rank" in rows.column_names else rows
    rows = rows.slice(0, 2 * COLUMNS if order == "rank" else COLUMNS)
    captions = [caption or "" for caption in rows["caption"].to_pylist()]
    return Strip(title, subtitle, rows["thumbnail"].to_pylist(), captions)


def _with_pictures(table: StoredTable) -> pa.Table:
    wanted = [n for n in ("thumbnail", "caption", "rank", "seed", "row") if n in table.schema.names]
    batches: list[pa.RecordBatch] = []
    for batch in table.batches(wanted):
        batches.append(batch.filter(pc.is_valid(batch["thumbnail"])))
        if sum(map(len, batches)) >= PICTURES:
            break
    return pa.Table.from_batches(batches, pa.schema([table.schema.field(name) for name in wanted]))


def draw(strips: Sequence[Strip | None]) -> Image.Image | None:
    """Draw the strips that have pictures; None where none has."""
    there = [strip for strip in strips if strip is not None and strip.pictures]
    return contact_sheet(there, columns=COLUMNS) if there else None


def as_markdown(image: Image.Image) -> dg.MarkdownMetadataValue:
    """Embed a picture, small enough for the event log and for the dialog that shows it."""
    shown = image.copy()
    shown.thumbnail((SHEET_WIDTH, image.height))
    data, mime = encode(shown, max_bytes=SHEET_BYTES)
    text = base64.b64encode(data).decode("ascii")
    return dg.MetadataValue.md(f"![contact sheet](data:{mime};base64,{text})")


def save_png(image: Image.Image, uri: str) -> str:
    """Write a picture beside a table and return where it is."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG", optimize=True)
    with new_file(uri, OUTPUT_SETTING) as sink:
        sink.write(encoded.getvalue())
    return uri


def links(table: StoredTable) -> dg.MarkdownMetadataValue:
    """List the first rows as links, where there are no pictures to show."""
    if "url" not in table.schema.names:
        return dg.MetadataValue.md("no pictures and no URLs travel with these rows")
    rows = table.top(LINKS, ["url", "caption"]).to_pylist()
    lines = [f"| {_link(row['url'])} | {_text(row['caption'] or '')} |" for row in rows]
    return dg.MetadataValue.md("\n".join(["| url | caption |", "|---|---|", *lines]))


def _link(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        return _text(url)
    return f"[{_text(url[:80])}](<{quote(url, safe=':/?&=%#+,;@~!$*')}>)"


def _text(text: str) -> str:
    """Return text that Markdown and HTML show as it is."""
    escaped = html.escape(" ".join(text.split())[:120])
    return "".join(f"\\{sign}" if sign in r"\`*_{}[]()#+!|~-" else sign for sign in escaped)
