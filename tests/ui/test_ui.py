"""The UI in a real browser: launches from it, and whether it shows the right data.

What the documentation shows of it is compared with the committed pictures, see `helpers.browser.keep`.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.browser import SIZE, browser_page, keep, told
from helpers.webserver import (
    BROKEN,
    HALF_COPIED,
    IN_PROGRESS,
    OWN_IMAGES,
    RAN_BY_THE_DEMO,
    Project,
    wait_for,
)
from playwright.sync_api import Error as BrowserError
from playwright.sync_api import Locator, Page, expect

from laion_assets.defs import checks
from laion_assets.defs.drawing.markup import links
from laion_assets.defs.forget import ASSETS
from laion_assets.demo import DEMO_SETS
from laion_assets.io.tables import StoredTable

NUMBERS = {"nb_images_knn": 30, "nb_images_centroid": 200}
OF_THE_JOB = "/locations/laion_assets/jobs/seed_set_job"
GRAPH = "/asset-groups/?expanded=" + ",".join(
    f"global@global:{name}" for name in ("sources", "seeds", "index", "urls")
)
CHECKS = (*checks.CENTROID, *checks.KNN_URLS, *checks.CENTROID_URLS, *checks.COMBINED)
OF_THE_PARTITION = f"?view=partitions&partition={RAN_BY_THE_DEMO}"


@pytest.fixture(scope="module")
def project(running_project: Project) -> Project:
    return running_project


@pytest.fixture(scope="module")
def page(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(project.ui.url, tmp_path_factory.mktemp("page") / "page.png") as opened:
        yield opened


def number(page: Page, name: str) -> float:
    return float(told(page, name).inner_text())


def rows_of(table: Locator) -> list[list[str]]:
    """The text of a table in a page, row by row."""
    rows = [row.locator("th, td").all_inner_texts() for row in table.locator("tr").all()]
    return [[cell.strip() for cell in row] for row in rows]


def chosen(launchpad: Locator, partition: str) -> bool:
    """Choose a partition like a user; return False if the dialog was redrawn meanwhile."""
    box = launchpad.get_by_placeholder("Partition")
    try:
        box.fill("", timeout=5_000)
        box.press_sequentially(partition[:3], delay=100)
        launchpad.get_by_text(partition, exact=True).click(timeout=5_000)
        expect(launchpad.get_by_text(f"partition: {partition}")).to_be_visible()
    except (BrowserError, AssertionError):
        return False
    return True


@pytest.fixture(scope="module")
def launched(project: Project, page: Page) -> str:
    """A run that was started in the Launchpad with other numbers, and is done."""
    before = {run.id for run in project.ui.runs()}
    page.goto(OF_THE_JOB)
    beside = page.get_by_role("button", name="Materialize all").locator("xpath=following::button[1]")
    beside.click()
    page.get_by_text("Open launchpad").click()
    launchpad = page.get_by_role("dialog")
    expect(launchpad.get_by_text("No errors")).to_be_visible()
    wait_for("the partition", lambda: chosen(launchpad, RAN_BY_THE_DEMO), 60)
    editor = page.locator(".cm-s-config-editor")
    for current in ("nb_images_knn: 50", "nb_images_centroid: 500", "dedup_threshold: 0.94"):
        expect(editor).to_contain_text(current)
    editor.click()
    page.keyboard.press("Control+A")
    lines = [f"      {name}: {value}" for name, value in NUMBERS.items()]
    page.keyboard.insert_text("\n".join(["resources:", "  retrieval_config:", "    config:", *lines]))
    expect(launchpad.get_by_text("No errors")).to_be_visible()
    keep(page, "launchpad")
    launchpad.get_by_role("button", name="Materialize").click()
    (run,) = wait_for(
        "the run", lambda: [r for r in project.ui.runs_of(RAN_BY_THE_DEMO) if r.id not in before]
    )
    assert project.ui.finished(run.id).status == "SUCCESS"
    return run.id


@pytest.mark.parametrize("asset", ["knn_urls", "centroid_urls", "combined_urls"])
def test_the_figures_on_a_page_are_those_of_the_table(
    project: Project, page: Page, launched: str, asset: str
) -> None:
    page.goto(f"/assets/{asset}{OF_THE_PARTITION}")
    page.get_by_text(launched[:8]).first.wait_for()
    rows = pq.read_metadata(project.table(asset, RAN_BY_THE_DEMO)).num_rows
    seeds = pq.read_metadata(project.table("seed_embeddings", RAN_BY_THE_DEMO)).num_rows
    wanted = {"knn_urls": seeds * 30, "centroid_urls": 200, "combined_urls": seeds * 30 + 200}[asset]
    assert number(page, "dagster/partition_row_count") == rows > 0
    details = project.ui.materialization(asset, RAN_BY_THE_DEMO)
    assert (details["kept"], details["requested"]) == (rows, wanted)
    assert details["yield"] == pytest.approx(rows / wanted, abs=1e-4)
    # Dagster shows JSON of less than 1,000 characters in place, and longer JSON behind a link.
    expect(told(page, "details")).to_contain_text(f'"kept": {rows}')
    assert details["bytes"] == project.table(asset, RAN_BY_THE_DEMO).stat().st_size
    expect(told(page, "about")).to_contain_text(f"{rows:,} {'rows' if asset == 'knn_urls' else 'images'}")
    settings = {row[0]: row[1:] for row in rows_of(told(page, "settings"))}
    for name, value in NUMBERS.items():
        assert settings[name] == [str(value), "Launchpad or command line"]
    assert settings["dedup_threshold"] == ["0.94", "default"]
    first, *_, last = rows_of(told(page, "funnel"))[1:]
    assert (first[0], first[-2]) == ("requested", f"{wanted:,}")
    assert last[-2] == f"{rows:,}"
    if asset == "combined_urls":
        keep(page, "asset")


@pytest.mark.parametrize("asset", ["knn_urls", "centroid_urls", "combined_urls"])
def test_the_pictures_open_and_fit_into_their_dialog(page: Page, launched: str, asset: str) -> None:
    page.goto(f"/assets/{asset}{OF_THE_PARTITION}")
    page.get_by_text(launched[:8]).first.wait_for()
    shown = {"contact sheet": ["contact sheet"], "charts": ["from requested to kept", "similarities"]}
    for name, pictures in shown.items():
        told(page, name).get_by_text("Show Markdown").click()
        dialog = page.get_by_role("dialog")
        for picture in pictures:
            image = dialog.get_by_role("img", name=picture)
            image.wait_for()
            assert image.evaluate("picture => picture.naturalWidth > 100")
            within, frame = image.bounding_box(), dialog.bounding_box()
            assert within
            assert frame
            assert frame["x"] < within["x"]
            assert within["x"] + within["width"] < frame["x"] + frame["width"]
        close = dialog.get_by_role("button", name="Close", exact=True).bounding_box()
        assert close
        assert close["y"] + close["height"] < SIZE["height"]
        dialog.get_by_role("button", name="Close", exact=True).click()
        expect(dialog).to_have_count(0)


def test_own_images_run_by_themselves_and_stand_on_top_of_what_they_found(
    project: Project, page: Page
) -> None:
    (run,) = wait_for("the sensor", lambda: project.ui.runs_of(OWN_IMAGES))
    assert project.ui.finished(run.id).status == "SUCCESS"
    page.goto(f"/assets/seed_embeddings?view=partitions&partition={OWN_IMAGES}")
    page.get_by_text(run.id[:8]).first.wait_for()
    expect(told(page, "bad images")).to_contain_text(HALF_COPIED)
    page.goto(f"/assets/combined_urls?view=partitions&partition={OWN_IMAGES}")
    page.get_by_text(run.id[:8]).first.wait_for()
    told(page, "contact sheet").get_by_text("Show Markdown").click()
    image = page.get_by_role("dialog").get_by_role("img", name="contact sheet")
    image.wait_for()
    assert image.evaluate("picture => picture.naturalWidth > 100")
    keep(page, "own-images")
    seeds = StoredTable(str(project.table("seed_embeddings", OWN_IMAGES))).read(["thumbnail"])
    assert seeds["thumbnail"].null_count == 0


def test_every_check_has_passed_and_says_what_it_means(
    project: Project, page: Page, launched: str
) -> None:
    for spec in checks.COMBINED:
        assert project.ui.check("combined_urls", spec.name)[launched] == "SUCCEEDED"
        page.goto(f"/assets/combined_urls?view=checks&checkDetail={spec.name}")
        expect(page.get_by_text(spec.description or "").first).to_be_visible()
    wait_for("quiet", lambda: all(run.status not in IN_PROGRESS for run in project.ui.runs()))
    page.goto("/assets/staged_laion_index?view=checks&checkDetail=metadata_belongs_to_the_index")
    page.get_by_text("neighbours share").first.wait_for()
    keep(page, "checks", 640)


def test_the_graph_shows_where_everything_comes_from(project: Project, page: Page) -> None:
    wait_for("quiet", lambda: all(run.status not in IN_PROGRESS for run in project.ui.runs()))
    assert project.ui.finished(project.ui.launch(RAN_BY_THE_DEMO)).status == "SUCCESS"
    page.set_viewport_size({"width": 2000, "height": 1300})  # each asset in full
    page.goto(GRAPH)
    sources = ("seed_folder", "laion_index_source", "retrieval_settings")
    for asset in (*sources, "staged_laion_index", "combined_urls"):
        expect(page.locator("foreignObject", has_text=asset).first).to_be_attached()
    expect(page.locator("foreignObject", has_text="100% filled").first).to_be_visible()
    keep(page, "graph")
    page.set_viewport_size(SIZE)


def test_only_what_is_wrong_now_is_red(project: Project, page: Page) -> None:
    ui, removed = project.ui, "gone"
    if not ui.runs_of(BROKEN):
        project.drop_broken()
    project.drop_broken(removed)
    for seed_set in (BROKEN, removed):
        failed, *_ = wait_for("the sensor", lambda name=seed_set: ui.runs_of(name))
        assert ui.finished(failed.id).status == "FAILURE"
    shutil.rmtree(project.folder / "data" / "seeds" / removed)
    wait_for("the sensor", lambda: removed not in ui.partitions("seed_embeddings")["all"])
    wait_for("quiet", lambda: all(run.status not in IN_PROGRESS for run in ui.runs()))
    good = ui.partitions("combined_urls")["materialized"]
    assert {*DEMO_SETS} <= good

    page.set_viewport_size({"width": 2000, "height": 1300})
    page.goto(GRAPH)
    colours = {}
    for asset in ASSETS:
        box = page.locator("foreignObject").filter(has=page.get_by_text(asset, exact=True))
        expect(box).to_contain_text("filled")
        expect(box.get_by_text("1 failed")).to_have_count(int(asset == "seed_embeddings"))
        colours[asset] = box.get_by_text(re.compile(r"^\d+ partitions$")).evaluate(
            "text => getComputedStyle(text).color"
        )
    red = colours.pop("seed_embeddings")
    assert red not in colours.values()
    assert len({*colours.values()}) == 1
    page.set_viewport_size(SIZE)

    for asset in ("seed_embeddings", "combined_urls"):
        page.goto(f"/assets/{asset}?view=partitions")
        failed_here = int(asset == "seed_embeddings")
        for status, sets in (
            ("Failed", failed_here),
            ("Materialized", len(good)),
            ("Missing", 1 - failed_here),
        ):
            expect(page.get_by_text(f"{status} ({sets})")).to_be_visible()
        page.goto(f"/assets/{asset}?view=checks")
        expected = [spec.name for spec in CHECKS if spec.asset_key.to_user_string() == asset]
        expect(page.get_by_text("Succeeded", exact=True)).to_have_count(len(expected))
        expect(page.get_by_text("Failed", exact=True)).to_have_count(0)
        page.goto(f"/assets/{asset}?view=overview")
        page.get_by_text("Latest materialization").first.wait_for()
        expect(page.get_by_text("Failed")).to_have_count(0)


def test_the_state_of_each_seed_set_is_a_row_of_one_table(project: Project, page: Page) -> None:
    if not project.ui.runs_of(BROKEN):
        project.drop_broken()
    wait_for("the sensor", lambda: project.ui.runs_of(BROKEN))
    page.goto("/assets/seed_sets")
    broken, made = (page.get_by_role("row", name=name) for name in (f"{BROKEN} failed", RAN_BY_THE_DEMO))
    expect(broken.first).to_contain_text("seed_embeddings")
    expect(made.first).to_contain_text("done")


def test_the_sensor_says_what_it_saw(project: Project, page: Page) -> None:
    page.goto("/locations/laion_assets/sensors/seed_sets_sensor")
    page.get_by_text("Registers seed sets as partitions").first.wait_for()
    page.get_by_text("View logs").first.wait_for()
    if not project.ui.runs_of(BROKEN):
        project.drop_broken()
    wait_for("the sensor", lambda: project.ui.runs_of(BROKEN))
    (project.folder / "data" / "seeds" / BROKEN).rename(project.folder / "away")
    page.get_by_role("row", name="removed: broken").first.wait_for()
    keep(page, "sensor", same_text=False)  # the ticks differ from run to run
    assert BROKEN not in project.ui.partitions("combined_urls")["all"]


HOSTILE = (
    ("javascript:window.hacked=1", "[click](javascript:window.hacked=1)"),
    (
        "https://host-a.example/1.jpg",
        '<script>window.hacked=1</script><img src=x onerror="window.hacked=1">',
    ),
    (
        "https://host-a.example/a`b>c](javascript:window.hacked=1)",
        "![](https://tracker.example/pixel.png)",
    ),
    ("data:text/html,<script>window.hacked=1</script>", "www.evil.example or https://evil.example/x"),
    ("http://host-b.example/2.jpg?a=1|2", "mail me@evil.example\n\n# heading\n\n| a | b |\n| - | - |\n"),
)


def test_what_strangers_wrote_is_text_and_the_browser_fetches_nothing(
    project: Project, page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)  # where its dagster.yaml counts from
    urls, captions = zip(*HOSTILE, strict=True)
    pq.write_table(pa.table({"url": urls, "caption": captions}), tmp_path / "hostile.parquet")
    shown = links(StoredTable(str(tmp_path / "hostile.parquet")))
    seed_set = "hostile"
    with dg.DagsterInstance.from_config(str(project.folder)) as instance:
        instance.add_dynamic_partitions("seed_sets", [seed_set])
        instance.report_runless_asset_event(
            dg.AssetMaterialization(
                "combined_urls", metadata={"contact sheet": shown}, partition=seed_set
            )
        )
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"/assets/combined_urls?view=partitions&partition={seed_set}")
    opens = told(page, "contact sheet")
    opens.wait_for()
    if opens.get_by_text("Show Markdown").count():
        opens.get_by_text("Show Markdown").click()
        opens = page.get_by_role("dialog")
    expect(opens.locator("li")).to_have_count(len(HOSTILE))
    targets = [link.get_attribute("href") or "" for link in opens.locator("a").all()]
    assert [re.sub("(https?://[^/]*).*", r"\1", target) for target in targets] == [
        "https://host-a.example",
        "https://host-a.example",
        "http://host-b.example",
    ]
    text = " ".join(opens.inner_text().split())
    for url, caption in HOSTILE:
        assert " ".join(url.split()) in text
        assert " ".join(caption.split()) in text
    assert opens.locator("script, h1, table table, li table").count() == 0
    assert opens.locator("img").count() == 0
    assert page.evaluate("window.hacked") is None
    outside = {re.sub("https?://([^/:]*).*", r"\1", url) for url in asked if url.startswith("http")}
    assert outside <= {"127.0.0.1"}
