"""Every relative link, image and anchor in the Markdown files leads somewhere."""

import re
from pathlib import Path

import pytest
from helpers.project import REPOSITORY

DOCS = REPOSITORY / "docs"
FOLDERS = ("", "docs", "docs/reference", "k8s", "benchmarks", "laion_assets/demo")
PAGES = sorted(page for folder in FOLDERS for page in (REPOSITORY / folder).glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def links() -> list[tuple[Path, str]]:
    found = {
        (page, target)
        for page in PAGES
        for target in LINK.findall(CODE.sub("", page.read_text()))
        if not target.startswith(("http://", "https://"))
    }
    return sorted(found)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def name(value: object) -> str:
    return str(value.relative_to(REPOSITORY)) if isinstance(value, Path) else str(value)


@pytest.mark.parametrize(("page", "target"), links(), ids=name)
def test_what_a_page_links_to_exists(page, target):
    path, _, anchor = target.partition("#")
    linked = page.parent / path if path else page
    assert linked.exists()
    assert not anchor or anchor in anchors(linked)


def test_every_image_of_the_documentation_is_shown():
    shown = {(page.parent / target).resolve() for page, target in links() if target.endswith(".png")}
    assert {*DOCS.glob("*.png"), *DOCS.glob("ui/*.png")} <= shown


def test_every_page_is_in_the_table_of_contents():
    toctrees = re.findall(r"```{toctree}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    listed = {line for toctree in toctrees for line in toctree.splitlines() if line and line[0] != ":"}
    assert listed == {page.stem for page in DOCS.glob("*.md")} - {"index"} | {"reference/index"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_in_the_package_exist(page):
    named = re.findall(r"`((?:laion_assets|tests|examples|k8s)/[\w/.]*)`", page.read_text())
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
