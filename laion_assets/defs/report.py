"""The metadata of a materialization: about ten rows, most important first, and the rest as one JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias

import dagster as dg
import pyarrow as pa

from laion_assets.defs.drawing.funnel import chart, funnel_table, steps, summed
from laion_assets.defs.drawing.markup import links, links_of_removed, plain, table
from laion_assets.defs.drawing.thumbnails import (
    as_markdown,
    draw,
    fetch_pictures,
    save_png,
    strip,
    strip_of_combined,
    strip_of_removed,
)
from laion_assets.defs.history import (
    CHECKSUM,
    DETAILS,
    FOR_THE_TARGET,
    NODE,
    PROVENANCE,
    ROW_COUNT,
    SETTINGS,
    YIELD,
)
from laion_assets.defs.io_manager import PICTURE
from laion_assets.defs.provenance import Provenance
from laion_assets.defs.settings import OF_SEEDS, ResolvedSettings
from laion_assets.defs.terminal import count
from laion_assets.io.arrays import Floats
from laion_assets.io.tables import DESCRIPTIONS, SUFFIX, StoredTable, Written
from laion_assets.search.combined import CombinedFunnel
from laion_assets.search.retrieval import Found, Funnel
from laion_assets.search.sizing import share_kept
from laion_assets.seeds import Seeds, SeedSet

if TYPE_CHECKING:
    Materialized: TypeAlias = dg.MaterializeResult[None]
else:  # for assets with checks, Dagster accepts only the bare class as annotation
    Materialized = dg.MaterializeResult

AROUND_SEEDS = "around each seed"
AROUND_CENTROID = "around the centroid"
NAMES_SHOWN = 100
PREVIEW_ROWS = 5
PREVIEW_COLUMNS = ("rank", "similarity", "url", "caption", "file", "row", "kind", "seeds", "norm_of_mean")
PREVIEW_TEXT = 32  # characters; a wider preview stretches the page, and hides the other rows' values
ROWS = (
    "about",
    "funnel",
    "contact sheet",
    "charts",
    SETTINGS,
    "bad images",
    "cut prompts",
    "images not embedded",
    "ignored files",
    "first rows",
    "source",
    NODE,
    "verified",
    ROW_COUNT,
    "dagster/partition_row_count",
    "dagster/uri",
    "dagster/column_schema",
)  # of a page, in order


def page(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a page: the rows that a person reads, and all other figures as one JSON.

    Dagster plots the numbers among the rows, but as one line through all seed sets, which means nothing.
    """
    rest = {
        name: value.value if isinstance(value, dg.MetadataValue) else value
        for name, value in figures.items()
        if name not in ROWS
    }
    shown = {name: figures[name] for name in ROWS if name in figures}
    return {**shown, DETAILS: dg.MetadataValue.json(_without_empty(rest))}


def _without_empty(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what says nothing, at any depth: null, and empty objects, lists and texts."""
    kept = {
        name: _without_empty(value) if isinstance(value, Mapping) else value
        for name, value in figures.items()
    }
    return {name: value for name, value in kept.items() if value not in (None, "", [], {})}


def describe_seeds(
    stored: StoredTable, seed_set: SeedSet, found: Seeds, provenance: Provenance, written: Written
) -> dict[str, Any]:
    """Report the seeds of a set."""
    sheet = draw([strip(stored, provenance.seed_set, count(len(stored), "seed"))])
    dimension = stored.schema.field("embedding").type.list_size
    lists = {
        "bad images": [str(image) for image in found.bad_images],
        "cut prompts": [str(prompt) for prompt in found.cut_prompts],
        "images not embedded": list(seed_set.not_embedded),
        "ignored files": list(seed_set.ignored),
        "notes": list(found.notes),
    }
    return {
        **({"contact sheet": as_markdown(sheet)} if sheet else {}),
        "about": dg.MetadataValue.md(
            f"**{count(len(stored), 'seed')}** of {dimension} dimensions from {seed_set.contents()}"
        ),
        "seeds": len(stored),
        "dimension": dimension,
        "images embedded before": found.reused,
        **{name: names[:NAMES_SHOWN] for name, names in lists.items() if names},
        "files": [file.name for file in seed_set.files[:NAMES_SHOWN]],
        SETTINGS: table([row for row in provenance.settings.rows() if row["setting"] in OF_SEEDS]),
        **describe_table(stored, written),
        PROVENANCE: _record(provenance),
    }


def describe_centroid(stored: StoredTable, written: Written) -> dict[str, Any]:
    """Report the centroid of a set."""
    (row,) = stored.read(["seeds", "norm_of_mean"]).to_pylist()
    about = f"the mean of **{count(row['seeds'], 'seed')}**, of length {row['norm_of_mean']:.3f}"
    return {
        "about": dg.MetadataValue.md(about),
        **describe_table(stored, written),
    }


def describe_search(
    stored: StoredTable,
    found: Found,
    provenance: Provenance,
    title: str,
    written: Written,
    *,
    remote_pictures: bool,
) -> dict[str, Any]:
    """Report the result of a search; `title` names its query."""
    counts = asdict(found.funnel)
    fetched = fetch_pictures([stored], allowed=remote_pictures)
    in_index = strip_of_removed(found.removed)
    sheet = draw([strip(stored, title, found.funnel.sentence(), fetched), in_index])
    row = "row" if title == AROUND_SEEDS else "image"  # an image found around two seeds has two rows
    return {
        "about": dg.MetadataValue.md(
            f"**{count(found.funnel.kept, row)}** {title} of {plain(provenance.seed_set)}\n\n"
            f"{found.funnel.requested:,} requested, yield {found.funnel.yielded:.0%}\n\n"
            f"{_made_from(provenance)}"
        ),
        "funnel": funnel_table({"found": counts}),
        "contact sheet": as_markdown(
            sheet, fetched.note, "" if in_index else links_of_removed(found.removed)
        )
        if sheet
        else links(stored, found.removed, fetched.note),
        "charts": chart(steps(counts), {title: similarities(stored)}),
        SETTINGS: table(provenance.settings.rows()),
        **_labelled(counts),
        YIELD: found.funnel.yielded,
        **({"block list": str(found.block_list)} if found.block_list else {}),
        **({"not UTF-8": str(found.not_utf8)} if str(found.not_utf8) else {}),
        "recall of nprobe": _recall(found),
        **describe_table(stored, written),
        PROVENANCE: _record(provenance),
    }


def describe_combined(
    stored: StoredTable,
    funnel: CombinedFunnel,
    provenance: Provenance,
    sources: Mapping[str, StoredTable],
    seeds: StoredTable,
    written: Written,
    *,
    remote_pictures: bool,
) -> dict[str, Any]:
    """Report the combined table; `sources` are its URL sets, by title."""
    searches = {title: Provenance.of(source).counts for title, source in sources.items()}
    total, united = summed(searches.values()), asdict(funnel)
    yielded = share_kept(funnel.kept, total["requested"])
    fetched = fetch_pictures([*sources.values()], allowed=remote_pictures)
    sheet = draw(
        [
            strip(seeds, provenance.seed_set, count(len(seeds), "seed")),
            *(
                strip(source, title, Funnel(**searches[title]).sentence(), fetched)
                for title, source in sources.items()
            ),
            strip_of_combined(
                stored, [*sources.values()], "combined", count(funnel.kept, "image"), fetched
            ),
        ]
    )
    return {
        "about": dg.MetadataValue.md(
            f"**{count(funnel.kept, 'image')}** like the {count(len(seeds), 'seed')} of "
            f"{plain(provenance.seed_set)}, a row each{_of_target(funnel.kept, provenance.settings)}\n\n"
            f"{total['requested']:,} requested, yield {yielded:.0%}\n\n"
            f"{_made_from(provenance)}"
        ),
        "funnel": funnel_table(
            {"per seed": searches[AROUND_SEEDS], "centroid": searches[AROUND_CENTROID]}, united
        ),
        "contact sheet": as_markdown(sheet, fetched.note) if sheet else links(stored, note=fetched.note),
        "charts": chart(steps(total, united), {title: similarities(t) for title, t in sources.items()}),
        SETTINGS: table(provenance.settings.rows()),
        "requested": total["requested"],
        "received": total["received"],
        **_labelled(united),
        YIELD: yielded,
        **_target(provenance.settings),
        **({"picture": dg.MetadataValue.path(_saved(stored, sheet))} if sheet else {}),
        **describe_table(stored, written),
        PROVENANCE: _record(provenance),
    }


def describe_table(stored: StoredTable, written: Written) -> dict[str, Any]:
    """Report a table's file: duration, size, checksum, rows, location, columns, first rows."""
    return {
        "seconds": written.seconds,
        "bytes": stored.size,
        CHECKSUM: written.checksum,
        "dagster/partition_row_count": len(stored),
        "dagster/uri": stored.where,
        "dagster/column_schema": _column_schema(stored.schema),
        "first rows": _preview(stored),
    }


def _record(provenance: Provenance) -> dict[str, Any]:
    """Return what a table was made from, without what the other figures say: settings and counts."""
    shown = {SETTINGS, "counts", "block_list_matches"}
    return {name: value for name, value in provenance.to_json().items() if name not in shown}


def similarities(stored: StoredTable) -> Floats:
    """Return the similarity of every row."""
    found: Floats = stored.read(["similarity"])["similarity"].to_numpy()
    return found


def _recall(found: Found) -> float | str:
    if math.isnan(found.recall):
        return "not measured: sparse staging reads only the probed lists"
    return round(found.recall, 4)


def _saved(stored: StoredTable, sheet: Any) -> str:
    return save_png(sheet, stored.where.removesuffix(SUFFIX) + PICTURE)


def _labelled(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the counts under their names in the UI."""
    return {name.replace("_", " "): count for name, count in counts.items()}


def _target(settings: ResolvedSettings) -> dict[str, int]:
    if settings.images is None:
        return {}
    return {"target images": settings.values.target_images or 0, FOR_THE_TARGET: settings.images}


def _of_target(kept: int, settings: ResolvedSettings) -> str:
    if settings.images is None:
        return ""
    needed = (
        f"{settings.images:,} that the target of {settings.values.target_images:,} needs, if "
        f"{settings.values.expect_alive:.0%} of the URLs work"
    )
    return f": the {needed}" if kept >= settings.images else f": all there is of the {needed}"


def _made_from(provenance: Provenance) -> str:
    return f"made from seeds {plain(provenance.seeds_version)} and index {plain(provenance.index or '')}"


def _column_schema(schema: pa.Schema) -> dg.TableSchema:
    return dg.TableSchema(
        columns=[
            dg.TableColumn(field.name, str(field.type), description=DESCRIPTIONS.get(field.name))
            for field in schema
        ]
    )


def _preview(stored: StoredTable) -> dg.TableMetadataValue:
    """Show the first rows, with texts cut short and without bytes and vectors."""
    shown = [name for name in PREVIEW_COLUMNS if name in stored.schema.names]
    rows = stored.top(PREVIEW_ROWS, shown).slice(0, PREVIEW_ROWS).to_pylist()
    columns = [dg.TableColumn(name) for name in shown]
    records = [dg.TableRecord({name: _cell(row[name]) for name in shown}) for row in rows]
    return dg.MetadataValue.table(records=records, schema=dg.TableSchema(columns=columns))


def _cell(value: str | float | None) -> str | float | None:
    if isinstance(value, str) and len(value) > PREVIEW_TEXT:
        return value[: PREVIEW_TEXT - 1] + "…"
    return round(value, 3) if isinstance(value, float) else value
