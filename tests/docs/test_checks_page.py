"""The table of checks in the UI tour names every check of the code, and says which block."""

import re

from helpers.project import REPOSITORY

from laion_assets.defs import checks

PAGE = REPOSITORY / "docs" / "ui.md"
URL_TABLES = ("knn_urls", "centroid_urls", "combined_urls")
SPECS = (
    *checks.BUILT,
    *checks.STAGED,
    *checks.CENTROID,
    *checks.KNN_URLS,
    *checks.CENTROID_URLS,
    *checks.COMBINED,
)


def rows() -> list[tuple[str, str, bool]]:
    """Asset, check and whether it blocks; an empty first cell repeats the one above."""
    found, assets = [], []
    for cell, text, severity in re.findall(
        r"^\| (.*?) ?\| (`\w+`: .*?) \| (.*?) \|$", PAGE.read_text(), re.M
    ):
        if cell:
            assets = URL_TABLES if cell == "all three URL tables" else re.findall(r"`(\w+)`", cell)
        (name,) = re.findall(r"^`(\w+)`", text)
        found += [(asset, name, severity.endswith("blocks")) for asset in assets]
    return found


def test_the_table_names_every_check_once():
    declared = [(spec.asset_key.to_user_string(), spec.name, spec.blocking) for spec in SPECS]
    assert sorted(rows()) == sorted(declared)


def test_the_floor_of_coherence_is_that_of_the_code():
    (row,) = re.findall(r"`seeds_are_coherent`: .*", PAGE.read_text())[:1]
    assert f"at least {checks.COHERENT} " in row
