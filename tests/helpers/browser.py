"""A real browser on the UI, and its pages as they are in the documentation."""

import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.project import REPOSITORY
from PIL import Image
from playwright.sync_api import Locator, Page, ViewportSize, expect, sync_playwright

# In an image of its own a browser is root and has no sandbox; it asks for nothing outside.
CHROMIUM = (
    "--no-sandbox",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
SIZE: ViewportSize = {"width": 1440, "height": 900}
COMMITTED = REPOSITORY / "docs" / "ui"
CHANGING = {
    "loading",
    *("ago", "just", "now", "second", "seconds", "minute", "minutes", "hour", "hours"),
    *("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
}


@contextmanager
def browser_page(url: str, last: Path) -> Iterator[Page]:
    """A browser on the UI; what it shows in the end is kept as a picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        opened = browser.new_page(base_url=url, viewport=SIZE)
        opened.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        yield opened
        opened.screenshot(path=last)
        browser.close()


def keep(page: Page, name: str, clip_to: int | None = None, *, same_text: bool = True) -> None:
    """Compare the page with its committed picture by size and text; with SCREENSHOTS, retake both.

    The text may differ in what changes with every run: numbers, times and the seed sets beside the one
    that is shown. So every word of the committed picture must be on the page, and the page may have more.
    """
    page.wait_for_timeout(1500)  # animations
    with Image.open(io.BytesIO(page.screenshot())) as shown:
        part = shown.convert("RGB").crop((0, 0, shown.width, clip_to or shown.height))
        part.thumbnail((SIZE["width"], shown.height))
    words = words_of(page.locator("body").inner_text())
    folder = os.environ.get("SCREENSHOTS")
    picture, text = (Path(folder or COMMITTED) / f"{name}.{ending}" for ending in ("png", "txt"))
    if folder:
        part.quantize(128).save(picture, optimize=True)  # a palette keeps it small
        if same_text:
            text.write_text("\n".join(sorted(words)) + "\n")
        return
    with Image.open(picture) as committed:
        assert committed.size == part.size, f"{picture.name}: retake it with `make screenshots`"
    if same_text:
        missing = {*text.read_text().split()} - words
        assert not missing, f"{picture.name} shows {missing}: retake it with `make screenshots`"


def words_of(text: str) -> set[str]:
    """The words of a page in lower case, without numbers, checksums, and what differs by the minute."""
    return {*re.findall(r"[a-z_]{3,}", re.sub(r"\S*(\d|==)\S*", " ", text).lower())} - CHANGING


def told(page: Page, name: str) -> Locator:
    """The value of a label in a page's table of metadata."""
    return page.locator(f"//tr[not(ancestor::td)][td[1][normalize-space()='{name}']]/td[2]")
