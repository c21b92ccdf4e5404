"""What a materialization of a URL set tells the UI, the most important first.

Numbers keep their names: Dagster plots them over time. What must not live here: how anything is drawn or
measured, and logging.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import dagster as dg

from laion_assets.defs.drawing.presentation import (
    as_markdown,
    chart,
    draw,
    funnel_table,
    links,
    pairs_strip,
    plain,
    save_png,
    settings_table,
    steps,
    strip,
    summed,
)
from laion_assets.defs.history import MADE_WITH, OWN_SETTINGS, YIELD
from laion_assets.defs.io_manager import StoredTable
from laion_assets.io.arrays import Floats
from laion_assets.io.tables import Provenance
from laion_assets.search.combine import CombinedFunnel
from laion_assets.search.retrieve import Retrieval
from laion_assets.search.sizing import share_kept

AROUND_SEEDS = "around each seed"
AROUND_CENTROID = "around the centroid"


def of_search(
    stored: StoredTable,
    found: Retrieval,
    provenance: Provenance,
    title: str,
    *,
    remote_pictures: bool,
) -> dict[str, Any]:
    """Report what a search found; `title` says around what."""
    counts = asdict(found.funnel)
    sheet = draw([strip(stored, title, found.funnel.sentence()), pairs_strip(found.removed)])
    rows = "rows" if title == AROUND_SEEDS else "images"  # an image found for two seeds has two rows
    return {
        "about": dg.MetadataValue.md(
            f"**{found.funnel.kept:,} {rows}** {title} of {plain(provenance.seed_set)}\n\n"
            f"{found.funnel.requested:,} requested, yield {found.funnel.yielded:.0%}\n\n"
            f"{_origin(provenance)}"
        ),
        "funnel": funnel_table({"found": counts}),
        "contact sheet": as_markdown(sheet)
        if sheet
        else links(stored, found.removed, remote_pictures=remote_pictures),
        "charts": chart(steps(counts), {title: similarities(stored)}),
        "settings": settings_table(provenance.settings),
        **_labelled(counts),
        YIELD: found.funnel.yielded,
        "recall of nprobe": _recall(found),
        **_made_from(provenance),
    }


def _recall(found: Retrieval) -> float | str:
    if math.isnan(found.recall):
        return "not measured: sparse staging reads no lists but those that are probed"
    return round(found.recall, 4)


def of_combined(
    stored: StoredTable,
    funnel: CombinedFunnel,
    provenance: Provenance,
    sources: Mapping[str, StoredTable],
    seeds: StoredTable,
    *,
    remote_pictures: bool,
) -> dict[str, Any]:
    """Report the combined table; `sources` are the URL sets it was made of, by what they are."""
    made = {title: Provenance.from_footer(t.footer, t.where) for title, t in sources.items()}
    searches = {title: each.counts for title, each in made.items()}
    total = summed(searches.values())
    united = asdict(funnel)
    yielded = share_kept(funnel.kept, total["requested"])
    target = provenance.settings.get("target_images")
    sheet = draw(
        [
            strip(seeds, provenance.seed_set, f"{len(seeds):,} seeds"),
            *(strip(sources[title], title, each.found) for title, each in made.items()),
            strip(stored, "combined", f"{funnel.kept:,} images"),
        ]
    )
    return {
        "about": dg.MetadataValue.md(
            f"**{funnel.kept:,} images** like the {len(seeds):,} seeds of {plain(provenance.seed_set)}, "
            f"a row each{_of_target(funnel.kept, target)}\n\n"
            f"{total['requested']:,} requested, yield {yielded:.0%}\n\n"
            f"{_origin(provenance)}"
        ),
        "funnel": funnel_table(
            {"per seed": searches[AROUND_SEEDS], "centroid": searches[AROUND_CENTROID]}, united
        ),
        "contact sheet": as_markdown(sheet) if sheet else links(stored, remote_pictures=remote_pictures),
        "charts": chart(steps(total, united), {title: similarities(t) for title, t in sources.items()}),
        "settings": settings_table(provenance.settings),
        "requested": total["requested"],
        "received": total["received"],
        **_labelled(united),
        YIELD: yielded,
        **({"target images": target, "target reached": round(funnel.kept / target, 4)} if target else {}),
        **_made_from(provenance),
        **({"picture": dg.MetadataValue.path(_saved(stored, sheet))} if sheet else {}),
        OWN_SETTINGS: provenance.own_settings,
    }


def similarities(table: StoredTable) -> Floats:
    """Return the similarity of every row."""
    found: Floats = table.read(["similarity"])["similarity"].to_numpy()
    return found


def _saved(stored: StoredTable, sheet: Any) -> str:
    return save_png(sheet, stored.where.removesuffix(".parquet") + ".png")


def _labelled(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts, named as all other metadata in the UI."""
    return {name.replace("_", " "): count for name, count in counts.items()}


def _of_target(kept: int, target: int | None) -> str:
    return f": {kept / target:.0%} of the {target:,} that were wanted" if target else ""


def _origin(provenance: Provenance) -> str:
    return f"made from seeds {plain(provenance.seeds)} and index {plain(provenance.index or '')}"


def _made_from(provenance: Provenance) -> dict[str, Any]:
    return {
        "index fingerprint": provenance.index,
        "seeds fingerprint": provenance.seeds,
        MADE_WITH: provenance.asked,
    }
