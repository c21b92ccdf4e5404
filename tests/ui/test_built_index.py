"""The UI of an index that is built into a bucket: its page, what nobody asked for, and remote pictures.

The commands run before the server starts, in this process, where the host of the pictures is public.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.browser import SIZE, browser_page, keep, told
from helpers.picture_host import PictureHost, picture_host
from helpers.webserver import Dev, Webserver, wait_for
from playwright.sync_api import Page, expect

from laion_assets import cli
from laion_assets.io import remote_images
from laion_assets.io.storage import open_storage

ROWS, DIMENSION, TOPICS = 12_000, 64, 300
LINKS, PICTURES, NEW = "links", "pictures", "new"  # seed sets
SENSOR = "/locations/laion_assets/sensors/seed_sets_sensor"


@dataclass(frozen=True)
class Built:
    """A folder in which an index was built and two seed sets were run, and the server there."""

    seeds: Path
    host: PictureHost
    fetched: dict[str, int]  # pictures, by seed set
    dev: Dev

    @property
    def ui(self) -> Webserver:
        return self.dev.webserver


@pytest.fixture(scope="module")
def built(gcs: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:  # noqa: ARG001
    folder = tmp_path_factory.mktemp("built")
    fs, bucket = open_storage("gs://built", "")
    fs.mkdir(bucket)
    variables = {
        "LAION_EMBEDDINGS_URI": str(folder / "embeddings"),
        "LAION_BUILD_URI": str(folder / "build"),
        "LAION_INDEX_URI": f"gs://{bucket}/index",
        "LAION_INDEX_KEY": "IVF128,Flat",
        "LAION_MIN_RECALL": "0.5",
        "LAION_SEEDS_URI": str(folder / "seeds"),
        "LAION_MAX_IMAGES": "1000",
    }
    fetched: dict[str, int] = {}
    with picture_host() as host, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(remote_images, "is_public", lambda _: True)
        for name, value in variables.items():
            patch.setenv(name, value)
        _publish(folder / "embeddings", host.url)
        assert cli.main(["build"]) == 0
        for seed_set, allowed in ((LINKS, "false"), (PICTURES, "true")):
            _write_seeds(folder / "seeds" / seed_set)
            patch.setenv("LAION_SHOW_REMOTE_PICTURES", allowed)
            assert cli.main(["materialize", seed_set, "--nb-images-centroid", "100"]) == 0
            fetched[seed_set] = [command for command, _ in host.asked].count("GET")
        _write_seeds(folder / "seeds" / NEW)
        dev = Dev(folder, [sys.executable, "-m", "laion_assets.cli", "dev", "--port", Dev.PORT])
        try:
            dev.start()
            yield Built(folder / "seeds", host, fetched, dev)
        finally:
            dev.press_ctrl_c()


def _vectors(rows: int) -> np.ndarray:
    random = np.random.default_rng(0)
    topics = random.standard_normal((TOPICS, DIMENSION), np.float32)
    noise = random.standard_normal((rows, DIMENSION), np.float32)
    return topics[random.integers(TOPICS, size=rows)] + noise


def _publish(folder: Path, host: str) -> None:
    """Write embeddings as Parquet, with URLs on a host."""
    folder.mkdir()
    flat = pa.array(_vectors(ROWS).ravel())
    rows = {
        "url": [f"{host}/{row}" for row in range(ROWS)],
        "caption": [f"picture {row}" for row in range(ROWS)],
        "embedding": pa.FixedSizeListArray.from_arrays(flat, DIMENSION),
    }
    pq.write_table(pa.table(rows), folder / "part-0.parquet")


def _write_seeds(folder: Path) -> None:
    folder.mkdir(parents=True)
    np.save(folder / "seeds.npy", _vectors(5))


@pytest.fixture(scope="module")
def page(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(built.ui.url, tmp_path_factory.mktemp("page") / "page.png") as opened:
        yield opened


def test_the_page_of_a_built_index_shows_its_recall(page: Page) -> None:
    page.set_viewport_size({"width": 1440, "height": 1200})
    page.goto("/assets/laion_index?view=overview")
    page.get_by_role("row", name="about").get_by_text("12,000 rows").wait_for()
    keep(page, "build")
    page.set_viewport_size(SIZE)


def test_nothing_is_run_until_the_sensor_is_turned_on(built: Built, page: Page) -> None:
    page.goto(SENSOR)
    switch = page.get_by_role("row", name="Running").get_by_role("checkbox")
    expect(switch).not_to_be_checked()
    assert built.ui.ticks() == []
    assert built.ui.runs_of(NEW) == []
    switch.locator("xpath=..").click()  # the checkbox itself is hidden
    expect(switch).to_be_checked()
    wait_for("a tick", lambda: [tick for tick in built.ui.ticks() if tick["status"] == "SKIPPED"])


def test_a_run_that_requests_too_many_images_is_refused_with_the_number(built: Built, page: Page) -> None:
    run = built.ui.launch(LINKS, nb_images_knn=300, nb_images_centroid=100)
    assert built.ui.finished(run).status == "FAILURE"
    page.goto(f"/runs/{run}")
    refused = page.get_by_text("this run requests 1,600 images, but LAION_MAX_IMAGES allows 1,000")
    expect(refused.first).to_be_visible()


def test_remote_pictures_are_a_contact_sheet_only_where_they_are_allowed(
    built: Built, page: Page
) -> None:
    assert built.fetched[LINKS] == 0
    assert 0 < built.fetched[PICTURES] <= 3 * 48
    for asset in ("knn_urls", "combined_urls"):
        page.goto(f"/assets/{asset}?view=partitions&partition={PICTURES}")
        told(page, "contact sheet").get_by_text("Show Markdown").click()
        dialog = page.get_by_role("dialog")
        sheet = dialog.get_by_role("img", name="contact sheet")
        sheet.wait_for()
        assert sheet.evaluate("picture => picture.naturalWidth > 100")
        expect(dialog.get_by_text("pictures were not fetched")).to_be_visible()

        page.goto(f"/assets/{asset}?view=partitions&partition={LINKS}")
        told(page, "contact sheet").get_by_text("Show Markdown").click()
        expect(dialog.get_by_role("link", name=built.host.url)).to_have_count(20)
        expect(dialog.get_by_text("LAION_SHOW_REMOTE_PICTURES=true")).to_be_visible()
        expect(dialog.get_by_role("img", name="contact sheet")).to_have_count(0)
    fetched = [command for command, _ in built.host.asked].count("GET")
    assert fetched == built.fetched[PICTURES]  # the browser asks the host for nothing
