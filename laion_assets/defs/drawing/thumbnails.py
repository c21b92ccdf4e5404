"""Draw contact sheets from the thumbnails in tables."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from laion_assets.defs.drawing.contact_sheet import Strip, contact_sheet, encode
from laion_assets.defs.drawing.markup import embedded
from laion_assets.index.metadata import THUMBNAIL_COLUMN
from laion_assets.io.storage import new_file
from laion_assets.io.tables import OUTPUT, StoredTable
from laion_assets.search.retrieval import THUMBNAILS, Removed

COLUMNS = 12
SHEET_WIDTH = 960  # the UI's dialog cuts off wider images
SHEET_BYTES = 160_000  # the event log stores it for every materialization


def strip(table: StoredTable, title: str, subtitle: str) -> Strip | None:
    """Return the thumbnails of a table, best-ranked first; None if it has none."""
    if THUMBNAIL_COLUMN not in table.schema.names:
        return None
    rows = _with_thumbnails(table, ("caption", "rank", "seed"))
    names = rows.column_names
    ranked = "rank" in names
    if ranked:
        rows = rows.sort_by([(name, "ascending") for name in ("rank", "seed") if name in names])
    rows = rows.slice(0, (2 if ranked else 1) * COLUMNS)
    captions = [caption or "" for caption in rows["caption"].to_pylist()] if "caption" in names else []
    return Strip(title, subtitle, rows[THUMBNAIL_COLUMN].to_pylist(), captions)


def strip_of_combined(
    table: StoredTable, sources: Sequence[StoredTable], title: str, subtitle: str
) -> Strip | None:
    """Return the thumbnails of a combined table's first rows, taken from its source tables."""
    thumbnails: Mapping[int, bytes] = {
        id_: thumbnail
        for source in sources
        if THUMBNAIL_COLUMN in source.schema.names
        for id_, thumbnail in _pairs(_with_thumbnails(source, ("id",)))
    }
    first = table.top(THUMBNAILS, ["id", "caption"]).to_pylist()
    shown = [row for row in first if row["id"] in thumbnails][: 2 * COLUMNS]
    if not shown:
        return None
    images = [thumbnails[row["id"]] for row in shown]
    return Strip(title, subtitle, images, [row["caption"] or "" for row in shown])


def _pairs(rows: pa.Table) -> Sequence[tuple[int, bytes]]:
    return list(zip(rows["id"].to_pylist(), rows[THUMBNAIL_COLUMN].to_pylist(), strict=True))


def strip_of_removed(removed: Removed | None) -> Strip | None:
    """Return removed near-duplicates, each beside its representative; None without any."""
    if removed is None or THUMBNAIL_COLUMN not in removed.removed.column_names or not len(removed.cosine):
        return None
    kept, gone = (
        rows[THUMBNAIL_COLUMN].to_pylist() for rows in (removed.representatives, removed.removed)
    )
    images = [image for pair in zip(kept, gone, strict=True) for image in pair][: 2 * COLUMNS]
    title, subtitle = "removed near-duplicates", "each to the right of the image that is kept"
    return Strip(title, subtitle, images, [], together=2)


def _with_thumbnails(table: StoredTable, columns: Sequence[str]) -> pa.Table:
    wanted = [name for name in (THUMBNAIL_COLUMN, *columns) if name in table.schema.names]
    batches: list[pa.RecordBatch] = []
    for batch in table.batches(wanted):
        batches.append(batch.filter(pc.is_valid(batch[THUMBNAIL_COLUMN])))
        if sum(map(len, batches)) >= THUMBNAILS:
            break
    return pa.Table.from_batches(batches, pa.schema([table.schema.field(name) for name in wanted]))


def draw(strips: Sequence[Strip | None]) -> Image.Image | None:
    """Draw the strips that have thumbnails; None if none has."""
    there = [strip for strip in strips if strip is not None and strip.images]
    return contact_sheet(there, columns=COLUMNS) if there else None


def as_markdown(image: Image.Image) -> dg.MarkdownMetadataValue:
    """Embed an image that is small enough for the event log and for the UI's dialog."""
    shown = image.copy()
    shown.thumbnail((SHEET_WIDTH, image.height))
    return dg.MetadataValue.md(embedded("contact sheet", *encode(shown, max_bytes=SHEET_BYTES)))


def save_png(image: Image.Image, uri: str) -> str:
    """Write an image beside a table and return its location."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG", optimize=True)
    with new_file(uri, OUTPUT) as sink:
        sink.write(encoded.getvalue())
    return uri
