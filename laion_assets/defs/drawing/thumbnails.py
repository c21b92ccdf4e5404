"""Draw contact sheets from the thumbnails in tables, or from pictures that were fetched for them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from laion_assets.defs.drawing.contact_sheet import Strip, contact_sheet, encode
from laion_assets.defs.drawing.markup import embedded, plain
from laion_assets.defs.drawing.remote_thumbnails import FETCHED, reasons, remote_thumbnails
from laion_assets.index.decoder import Decoder
from laion_assets.index.metadata import THUMBNAIL_COLUMN
from laion_assets.index.vectors import Coded
from laion_assets.io.storage import new_file
from laion_assets.io.tables import OUTPUT, StoredTable, code_bytes
from laion_assets.search.combined import DECODER
from laion_assets.search.near_duplicates import DEDUP_THRESHOLD, components
from laion_assets.search.retrieval import THUMBNAILS, Removed
from laion_assets.search.safety import SAFETY_COLUMNS

COLUMNS = 12
FIRST_ROWS = 1 << 16  # of a table without thumbnails, among which the best are looked for
HOW_TO_HAVE_PICTURES = (
    "The index has no thumbnails. With `LAION_SHOW_REMOTE_PICTURES=true` each step fetches the pictures "
    f"of the first {FETCHED} results from their hosts."
)
SHEET_WIDTH = 960  # the UI's dialog cuts off wider images
SHEET_HEIGHT = 680  # of a window of 900 pixels, the dialog and its buttons take the rest
SHEET_BYTES = 160_000  # the event log stores it for every materialization


@dataclass(frozen=True)
class Fetched:
    """Thumbnails made of pictures from their hosts, for tables without thumbnails.

    Attributes:
        thumbnails: WebP images, by id of the row.
        note: Markdown that says which are missing, or how to have them; empty if none is.

    """

    thumbnails: Mapping[int, bytes] = field(default_factory=dict)
    note: str = ""


NONE_FETCHED = Fetched()


def fetch_pictures(tables: Sequence[StoredTable], *, allowed: bool) -> Fetched:
    """Fetch the pictures of the best rows of tables without thumbnails, within strict limits.

    Args:
        tables: URL sets, which share the number of pictures that are fetched.
        allowed: whether the user has allowed it; nothing is fetched otherwise.

    """
    bare = [
        table for table in tables if {"id", "url"} <= {*table.schema.names} and not _has_thumbnails(table)
    ]
    if not bare:
        return NONE_FETCHED
    if not allowed:
        return Fetched(note=HOW_TO_HAVE_PICTURES)
    columns = ["id", "url", *SAFETY_COLUMNS]
    rows = [_best_rows(table, columns, FETCHED // len(bare)) for table in bare]
    wanted = pa.concat_tables(
        [each.select([name for name in columns if name in each.column_names]) for each in rows]
    )
    found = remote_thumbnails(wanted)
    ids = wanted["id"].to_pylist()
    thumbnails = {id_: image for id_, image in zip(ids, found, strict=True) if isinstance(image, bytes)}
    missing = sum(not isinstance(image, bytes) for image in found)
    note = (
        f"{missing} of {len(found)} pictures were not fetched: {plain(reasons(found))}" if missing else ""
    )
    return Fetched(thumbnails, note)


def strip(table: StoredTable, title: str, subtitle: str, fetched: Fetched = NONE_FETCHED) -> Strip | None:
    """Return the thumbnails of a table's different images, best-ranked first; None if it has none."""
    ranked = "rank" in table.schema.names
    if _has_thumbnails(table):
        rows = _best_rows(table, [THUMBNAIL_COLUMN, "caption"], THUMBNAILS)
        thumbnails = rows[THUMBNAIL_COLUMN].to_pylist()
    elif fetched.thumbnails and "id" in table.schema.names:
        rows = _best_rows(table, ["id", "caption"], FETCHED)
        rows = rows.filter(pc.is_in(rows["id"], pa.array(fetched.thumbnails, pa.int64())))
        thumbnails = [fetched.thumbnails[id_] for id_ in rows["id"].to_pylist()]
    else:
        return None
    captions = rows["caption"].to_pylist() if "caption" in rows.column_names else []
    shown = (2 if ranked else 1) * COLUMNS
    return Strip(title, subtitle, thumbnails[:shown], [caption or "" for caption in captions[:shown]])


def strip_of_combined(
    table: StoredTable,
    sources: Sequence[StoredTable],
    title: str,
    subtitle: str,
    fetched: Fetched = NONE_FETCHED,
) -> Strip | None:
    """Return the thumbnails of a combined table's first rows, taken from its source tables."""
    thumbnails: dict[int, bytes] = {
        id_: thumbnail
        for source in sources
        if _has_thumbnails(source)
        for id_, thumbnail in _pairs(_with_thumbnails(source, ("id",)))
    }
    thumbnails |= fetched.thumbnails
    first = table.top(THUMBNAILS, ["id", "caption"]).to_pylist()
    shown = [row for row in first if row["id"] in thumbnails][: 2 * COLUMNS]
    if not shown:
        return None
    images = [thumbnails[row["id"]] for row in shown]
    return Strip(title, subtitle, images, [row["caption"] or "" for row in shown])


def _has_thumbnails(table: StoredTable) -> bool:
    return THUMBNAIL_COLUMN in table.schema.names


def _best_rows(table: StoredTable, columns: Sequence[str], most: int) -> pa.Table:
    """Return rows to show of a table, best-ranked first: one of each image that several seeds found."""
    wanted = dict.fromkeys([*columns, "id", "rank", "seed", "code"])
    names = [name for name in wanted if name in table.schema.names]
    rows = _with_thumbnails(table, names) if _has_thumbnails(table) else table.top(FIRST_ROWS, names)
    order = [(name, "ascending") for name in ("rank", "seed") if name in names]
    rows = rows.sort_by(order) if "rank" in names else rows
    if {"seed", "code"} <= {*names}:
        rows = _different(rows.slice(0, 2 * most), table)
    return rows.slice(0, most)


def _different(rows: pa.Table, table: StoredTable) -> pa.Table:
    """Leave out near-duplicates of rows before them, which other seeds have found."""
    decoder = Decoder.from_bytes(table.attachment(DECODER))
    labels = components(Coded(code_bytes(rows["code"]), decoder), DEDUP_THRESHOLD)
    return rows.filter(pa.array(labels == np.arange(len(labels))))


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
    wanted = [n for n in dict.fromkeys((THUMBNAIL_COLUMN, *columns)) if n in table.schema.names]
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


def as_markdown(image: Image.Image, *below: str) -> dg.MarkdownMetadataValue:
    """Embed an image that is small enough for the event log and for the UI's dialog.

    Args:
        image: the image.
        below: Markdown that follows it; empty parts are left out.

    """
    shown = image.copy()
    shown.thumbnail((SHEET_WIDTH, SHEET_HEIGHT))
    sheet = embedded("contact sheet", *encode(shown, max_bytes=SHEET_BYTES))
    return dg.MetadataValue.md("\n\n".join([sheet, *filter(None, below)]))


def save_png(image: Image.Image, uri: str) -> str:
    """Write an image beside a table and return its location."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    with new_file(uri, OUTPUT) as sink:
        sink.write(encoded.getvalue())
    return uri
