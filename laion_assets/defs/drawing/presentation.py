"""What the UI shows of a table besides numbers: tables, charts, contact sheets, or links.

URLs and captions come from the open web: they are shown as text, never as markup, and nothing is fetched.
What must not live here: how rows are found or stored, what a report consists of.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from laion_assets.defs.drawing import charts
from laion_assets.defs.drawing.charts import Step
from laion_assets.defs.drawing.contact_sheet import Strip, contact_sheet, encode
from laion_assets.defs.io_manager import OUTPUT, StoredTable
from laion_assets.io.arrays import Floats
from laion_assets.io.storage import new_file
from laion_assets.search.audit import is_web
from laion_assets.search.retrieve import PICTURES, Removed

COLUMNS = 12
SHEET_WIDTH = 960  # the UI shows it in a dialog that cuts off what is wider
SHEET_BYTES = 160_000  # it sits in the event log, once for every materialization
LINKS = 20
MINUS = "\N{MINUS SIGN}"
TEXT = 120  # characters of a caption or URL that are shown
ADDRESS = 2000  # characters of a URL that is a link: the event log holds it for ever
STAGES = ("requested", "received", "kept", "knn", "centroid")  # all other counts are losses

# --- from requested to kept -----------------------------------------------------------------------


def steps(search: Mapping[str, int], united: Mapping[str, int] | None = None) -> list[Step]:
    """Name what happened to the images in order, how many they were, and whether these were lost.

    Args:
        search: counts by name, `requested` and `received` and `kept`; all others are losses between.
        united: those of combining, where all but `kept` and the sets themselves are losses.

    """
    told = [Step("requested", search["requested"])]
    if missing := search["requested"] - search["received"]:
        told.append(Step("not in the lists probed", missing, lost=True))
    told.append(Step("received", search["received"]))
    told += [
        Step(_words(name), images, lost=True)
        for name, images in search.items()
        if name not in STAGES and images
    ]
    if united is None:
        return [*told, Step("kept", search["kept"])]
    told.append(Step("kept by the searches", search["kept"]))
    told += [
        Step(_words(name) + (" across" if name == "near_duplicates" else ""), images, lost=True)
        for name, images in united.items()
        if name not in STAGES and images
    ]
    return [*told, Step("in the table", united["kept"])]


def summed(searches: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add up the counts of several searches."""
    total: dict[str, int] = {}
    for counts in searches:
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total


def funnel_table(
    searches: Mapping[str, Mapping[str, int]], united: Mapping[str, int] | None = None
) -> dg.TableMetadataValue:
    """Show the steps from requested to kept, a column for each search and one for both together."""
    whole = steps(summed(searches.values()), united)
    columns = {title: {step.name: step.images for step in steps(of)} for title, of in searches.items()}
    records = []
    for name, images, lost in whole:
        sign = f"{MINUS} " if lost else ""
        in_search = "kept" if name == "kept by the searches" else name
        cells = {
            title: f"{sign}{column[in_search]:,}" if in_search in column else ""
            for title, column in columns.items()
        }
        both = {"both": f"{sign}{images:,}"} if len(columns) > 1 else {}
        share = f"{images / max(whole[0].images, 1):.1%}"
        records.append({"images": f"{sign}{name}", **cells, **both, "share": share})
    return table(records)


def _words(name: str) -> str:
    return {"repeated_urls": "repeated URLs", "without_url": "without a URL"}.get(
        name, name.replace("_", " ").replace("near duplicates", "near-duplicates")
    )


def settings_table(used: Mapping[str, Any]) -> dg.TableMetadataValue:
    """Show every setting, its value, and where that came from."""
    origins: Mapping[str, str] = used["origins"]
    return table(
        [{"setting": name, "value": str(used[name]), "from": origin} for name, origin in origins.items()]
    )


def table(records: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Return rows that the UI shows in place, as text."""
    names = list(records[0]) if records else []
    return dg.MetadataValue.table(
        [dg.TableRecord(dict(record)) for record in records],
        dg.TableSchema([dg.TableColumn(name) for name in names]),
    )


def chart(told: Sequence[Step], similarities: Mapping[str, Floats]) -> dg.MarkdownMetadataValue:
    """Draw the steps from requested to kept, and how the similarities are spread."""
    drawings = {
        "from requested to kept": charts.funnel(told),
        "similarities": charts.histogram(similarities),
    }
    return dg.MetadataValue.md(
        "\n\n".join(
            _picture(name, drawing.encode(), "image/svg+xml") for name, drawing in drawings.items()
        )
    )


# --- pictures -------------------------------------------------------------------------------------


def strip(table: StoredTable, title: str, subtitle: str) -> Strip | None:
    """Return the pictures that travel with a table; None where it has none."""
    if "thumbnail" not in table.schema.names:
        return None
    rows = _with_pictures(table)
    names = rows.column_names
    if ranked := "rank" in names:
        rows = rows.sort_by([(name, "ascending") for name in ("rank", "seed") if name in names])
    rows = rows.slice(0, (2 if ranked else 1) * COLUMNS)
    captions = [caption or "" for caption in rows["caption"].to_pylist()] if "caption" in names else []
    return Strip(title, subtitle, rows["thumbnail"].to_pylist(), captions)


def pairs_strip(removed: Removed | None) -> Strip | None:
    """Return near-duplicates that were removed, each beside what stays; None where there are none."""
    if removed is None or "thumbnail" not in removed.stays.column_names or not len(removed.cosine):
        return None
    pairs = zip(
        *(each["thumbnail"].to_pylist() for each in (removed.stays, removed.removed)), strict=True
    )
    pictures = [picture for pair in pairs for picture in pair][: 2 * COLUMNS]
    title, subtitle = "near-duplicates that were removed", "each to the right of the image that stays"
    return Strip(title, subtitle, pictures, [], together=2)


def _with_pictures(table: StoredTable) -> pa.Table:
    wanted = [n for n in ("thumbnail", "caption", "rank", "seed") if n in table.schema.names]
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
    return dg.MetadataValue.md(_picture("contact sheet", *encode(shown, max_bytes=SHEET_BYTES)))


def _picture(name: str, data: bytes, mime: str) -> str:
    return f"![{name}](data:{mime};base64,{base64.b64encode(data).decode('ascii')})"


def save_png(image: Image.Image, uri: str) -> str:
    """Write a picture beside a table and return where it is."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG", optimize=True)
    with new_file(uri, OUTPUT) as sink:
        sink.write(encoded.getvalue())
    return uri


# --- where there are no pictures: links -----------------------------------------------------------


def links(
    table: StoredTable, removed: Removed | None = None, *, remote_pictures: bool = False
) -> dg.MarkdownMetadataValue:
    """List the first rows as links, and near-duplicates that were removed with what stays.

    Args:
        table: with url and caption.
        removed: near-duplicates that were.
        remote_pictures: whether the browser is to get the pictures from their hosts.

    """
    if "url" not in table.schema.names:
        return dg.MetadataValue.md("no pictures and no URLs travel with these rows")
    rows = table.top(LINKS, ["url", "caption"]).to_pylist()
    lines = [f"{number}. {link(**row, picture=remote_pictures)}" for number, row in enumerate(rows, 1)]
    if removed is not None and len(removed.cosine):
        pairs = zip(
            removed.removed.select(["url", "caption"]).to_pylist(),
            removed.stays.select(["url", "caption"]).to_pylist(),
            removed.cosine.tolist(),
            strict=True,
        )
        lines += ["", "Near-duplicates that were removed, and what stays:", ""]
        lines += [
            f"- {link(**gone)} is like {link(**stays)} (cosine {cosine:.3f})"
            for gone, stays, cosine in pairs
        ]
    return dg.MetadataValue.md("\n".join(lines))


def link(url: str | None, caption: str | None, *, picture: bool = False) -> str:
    """Return a row as Markdown on one line: a link where it is one, and its caption as plain text."""
    text = plain(url or "")
    address = quote(url or "", safe=":/?&=%#+,;@~!$")
    if is_web(url) and len(address) <= ADDRESS:
        text = f"[{text}](<{address}>)" + (f" ![](<{address}>)" if picture else "")
    return f"{text} {plain(caption)}" if caption and caption.strip() else text


def plain(text: str) -> str:
    """Return any text as Markdown that shows it as it is, on one line: as code.

    Nothing within code is markup, not even a bare address, which escapes would not keep from becoming a
    link. It ends at as many backticks as it began with, so it begins with more than there are inside.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line[:TEXT] + ("…" if len(line) > TEXT else "")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if line else ""
