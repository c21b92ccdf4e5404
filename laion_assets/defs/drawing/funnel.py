"""The funnel from requested to kept images, as a table and as charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import dagster as dg

from laion_assets.defs.drawing import charts
from laion_assets.defs.drawing.charts import Step
from laion_assets.defs.drawing.markup import embedded, table
from laion_assets.io.arrays import Floats

MINUS = "\N{MINUS SIGN}"
STAGES = ("requested", "received", "kept", "knn", "centroid")  # all other counts are losses


def steps(search: Mapping[str, int], united: Mapping[str, int] | None = None) -> list[Step]:
    """Return the steps in order, with the number of images that remain or are lost.

    Args:
        search: counts by name; all except `requested`, `received` and `kept` are losses between them.
        united: counts of combining by name; all except `kept` and the two sets are losses.

    """
    found = [Step("requested", search["requested"])]
    if missing := search["requested"] - search["received"]:
        found.append(Step("not in the lists probed", missing, lost=True))
    found.append(Step("received", search["received"]))
    found += [
        Step(_words(name), images, lost=True)
        for name, images in search.items()
        if name not in STAGES and images
    ]
    if united is None:
        return [*found, Step("kept", search["kept"])]
    found.append(Step("kept by the searches", search["kept"]))
    found += [
        Step(_words(name) + (" across" if name == "near_duplicates" else ""), images, lost=True)
        for name, images in united.items()
        if name not in STAGES and images
    ]
    return [*found, Step("in the table", united["kept"])]


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
    """Show the steps from requested to kept, with a column for each search and one for both together."""
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


def chart(funnel: list[Step], similarities: Mapping[str, Floats]) -> dg.MarkdownMetadataValue:
    """Draw the steps from requested to kept, and the distribution of the similarities."""
    drawings = {
        "from requested to kept": charts.funnel(funnel),
        "similarities": charts.histogram(similarities),
    }
    return dg.MetadataValue.md(
        "\n\n".join(
            embedded(name, drawing.encode(), "image/svg+xml") for name, drawing in drawings.items()
        )
    )


def _words(name: str) -> str:
    special = {
        "repeated_urls": "repeated URLs",
        "without_url": "without a URL",
        "near_duplicates": "near-duplicates",
        "beyond_target": "beyond the target",
    }
    return special.get(name, name.replace("_", " "))
