"""Pages of the UI: text from the web stays text, counts add up, images stay small."""

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from laion_assets.defs.drawing.charts import Step, recall_curves
from laion_assets.defs.drawing.contact_sheet import contact_sheet
from laion_assets.defs.drawing.funnel import chart, funnel_table, steps, summed
from laion_assets.defs.drawing.markup import SHOWN_TEXT, link, links, plain
from laion_assets.defs.drawing.thumbnails import draw, strip, strip_of_combined
from laion_assets.index.decoder import Decoder
from laion_assets.io.tables import StoredTable, fixed_size_binary, new_table
from laion_assets.search.combined import DECODER, CombinedFunnel
from laion_assets.search.retrieval import Funnel

# --- text off the web -----------------------------------------------------------------------------

# More than the UI takes: HTML as well. What becomes of bare addresses is for a real browser to say.
RENDERING = MarkdownIt("gfm-like", {"html": True, "linkify": False})
RENDERING.validateLink = lambda _: True  # let the page decide, not the renderer
HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "](javascript:alert(1)) [x](javascript:alert(2))",
    "![](https://tracker.example/pixel.png)",
    "` ``` ` <b>out</b>",
    "a | b\n| - | - |\n\n# heading\n- list",
    "\\` <i>",
    "https://evil.example www.evil.example me@evil.example",
    "&lt;b&gt; &#x3c;b>",
    "\u202egnp.exe \x00 \u2028",
)
texts = st.sampled_from(HOSTILE) | st.text(max_size=60) | st.text("`\\[]()<>!|#*_~&:\n ", max_size=30)


class Tags(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@given(texts)
def test_any_text_is_shown_as_it_is_and_is_nothing_but_text(text: str) -> None:
    page = Tags(RENDERING.render(f"before {plain(text)} after"))
    line = one_line(text)
    assert [tag for tag, _ in page.found] == (["p", "code"] if line else ["p"])
    shown = line if len(line) <= SHOWN_TEXT else line[:SHOWN_TEXT] + "…"
    assert one_line(page.text) == one_line(f"before {shown} after")


@given(texts | texts.map("https://example.org/{}".format), st.none() | texts)
@example("https://example.org/a>b)c](d)`e`|f", "caption")
@example("javascript:alert(1)", "caption")
@example("https://", None)
def test_a_row_is_one_link_to_where_it_says_or_none(url: str, caption: str | None) -> None:
    page = Tags(RENDERING.render(f"1. {link(url, caption)}"))
    assert {tag for tag, _ in page.found} <= {"ol", "li", "a", "code"}
    links = [attributes["href"] for tag, attributes in page.found if tag == "a"]
    assert len(links) <= 1
    for target in links:
        assert urlsplit(target or "").scheme in ("http", "https")
        assert urlsplit(target or "").hostname == urlsplit(url).hostname
    if url.startswith("javascript"):
        assert not links


def test_a_row_is_short_however_long_its_url_and_caption_are() -> None:
    assert "](<" in link("https://example.org/" + 1900 * "a", None)
    for url in (9999 * "a", 1900 * "\u00e9"):  # some letters are six in an address
        assert len(link(f"https://example.org/{url}", 9999 * "a")) < 300


# --- counts ---------------------------------------------------------------------------------------

SEARCH = Funnel(requested=600, received=590, without_url=10, near_duplicates=80, kept=500)
OTHER = Funnel(requested=400, received=400, without_url=0, near_duplicates=100, kept=300)
UNITED = CombinedFunnel(
    knn=500,
    centroid=300,
    repeated_ids=150,
    repeated_urls=20,
    near_duplicates=20,
    beyond_target=10,
    kept=600,
)


def test_what_was_lost_lies_between_what_was_there_before_and_after() -> None:
    told = steps(summed([vars(SEARCH), vars(OTHER)]), vars(UNITED))
    left = told[0].images
    for step in told[1:]:
        left -= step.images if step.lost else 0
        assert step.lost or step.images == left
    assert left == 600
    assert {step.name for step in told if step.lost} == {
        "not in the lists probed",
        "without a URL",
        "near-duplicates",
        "repeated ids",
        "repeated URLs",
        "near-duplicates across",
        "beyond the target",
    }


def test_a_loss_that_is_new_shows_by_its_name() -> None:
    told = steps({"requested": 9, "received": 9, "blocked_hosts": 2, "kept": 7})
    assert told[2] == Step("blocked hosts", 2, lost=True)


def test_the_funnel_shows_each_search_and_both_in_plain_numbers() -> None:
    rows = [r.data for r in funnel_table({"a": vars(SEARCH), "b": vars(OTHER)}, vars(UNITED)).records]
    assert rows[0] == {"images": "requested", "a": "600", "b": "400", "both": "1,000", "share": "100.0%"}
    minus = "\N{MINUS SIGN} "
    assert {"images": f"{minus}near-duplicates", "a": f"{minus}80", "b": f"{minus}100"}.items() <= (
        next(row for row in rows if row["images"] == f"{minus}near-duplicates").items()
    )
    assert rows[-1] == {"images": "in the table", "a": "", "b": "", "both": "600", "share": "60.0%"}


# --- pictures -------------------------------------------------------------------------------------


def picture(shade: int) -> bytes:
    encoded = io.BytesIO()
    Image.new("L", (8, 8), shade).save(encoded, "PNG")
    return encoded.getvalue()


@pytest.fixture
def stored(tmp_path) -> Callable[..., StoredTable]:
    """Write a table of some columns."""

    def write(name: str, **columns: Any) -> StoredTable:
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        return StoredTable(str(tmp_path / f"{name}.parquet"))

    return write


@pytest.mark.parametrize("captions", [None, ["one", None, "three"]])
def test_thumbnails_are_shown_whether_they_have_captions_or_not(stored, captions) -> None:
    columns = {"row": [0, 1, 2], "thumbnail": [picture(7)] * 3}
    shown = strip(stored("seeds", **columns, **({"caption": captions} if captions else {})), "seeds", "")
    assert shown is not None
    assert list(shown.images) == columns["thumbnail"]
    assert shown.captions == (["one", "", "three"] if captions else [])
    assert contact_sheet([shown], show_captions=True).width > 8


def test_the_thumbnails_of_a_combined_table_come_from_the_sets_it_was_made_of_in_its_order(
    stored,
) -> None:
    knn = stored("knn", id=[1, 2, 3], thumbnail=[picture(1), None, picture(3)])
    centroid = stored("centroid", id=[4, 3], thumbnail=[picture(4), picture(3)])
    combined = stored("combined", id=[4, 2, 3, 1], caption=["four", "two", None, "one"])
    shown = strip_of_combined(combined, [knn, centroid], "combined", "4 images")
    assert shown is not None
    assert list(shown.images) == [picture(4), picture(3), picture(1)]
    assert shown.captions == ["four", "", "one"]
    plain_table = stored("plain", id=[1, 2])
    assert strip_of_combined(combined, [plain_table], "combined", "") is None
    assert draw([None, strip(plain_table, "plain", "")]) is None


def test_an_image_that_several_seeds_found_is_shown_once(tmp_path) -> None:
    """The second orange is a near-duplicate of the first, and the third the same row."""
    vectors = np.array([[1, 0], [0.999, 0.04], [1, 0], [0, 1]], np.float32)
    rows = pa.table(
        {
            "id": [1, 2, 1, 3],
            "rank": pa.array([1, 1, 1, 2], pa.int32()),
            "seed": pa.array([0, 1, 2, 0], pa.int32()),
            "code": fixed_size_binary(vectors.view(np.uint8)),
            "thumbnail": [picture(number) for number in range(4)],
        }
    )
    with new_table(str(tmp_path / "knn.parquet"), rows.schema) as table:
        table.write(rows.to_batches()[0])
        table.attach(DECODER, Decoder(None, np.empty(0, np.int64), 2).to_bytes())
    shown = strip(StoredTable(str(tmp_path / "knn.parquet")), "around each seed", "")
    assert shown is not None
    assert list(shown.images) == [picture(0), picture(3)]


def test_rows_without_thumbnails_and_urls_are_said_to_have_neither(stored) -> None:
    assert "neither thumbnails nor URLs" in links(stored("seeds", row=[0])).value


# --- charts ---------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.text(max_size=30), st.integers(0, 10**10), st.booleans()), max_size=12),
    st.lists(st.floats(-1, 1, width=32), max_size=50),
    st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=20),
)
def test_charts_are_well_formed_pictures_of_a_few_kilobytes(
    told: list[tuple[str, int, bool]], similarities: list[float], title: str
) -> None:
    printable = [Step(one_line(name), images, lost) for name, images, lost in told]
    spread = {title: np.array(similarities, np.float32), "other": np.ones(3, np.float32)}
    text = chart(printable, spread).value
    assert len(text) < 40_000
    for data in re.findall(r"data:image/svg\+xml;base64,([^)]+)\)", text):
        root = ElementTree.fromstring(base64.b64decode(data))
        assert root.tag.endswith("svg")
        names = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert names <= {"svg", "rect", "text", "path"}


@pytest.mark.parametrize(
    ("shares", "points"),
    [
        ({"1": {"1": 0.5, "10": 0.4}, "16": {"1": 1.0, "10": 0.9}, "4": {"1": 0.7, "10": 0.6}}, 6),
        ({"1": {"1": 1.0}}, 1),  # a line of one point would not be seen
        ({}, 0),
    ],
)
def test_recall_is_a_curve_over_the_lists_that_are_probed_in_order(shares, points) -> None:
    picture = ElementTree.fromstring(recall_curves(shares))
    namespace = {"svg": "http://www.w3.org/2000/svg"}
    assert len(picture.findall(".//svg:circle", namespace)) == points
    texts = [text.text for text in picture.findall(".//svg:text", namespace)]
    assert [text for text in texts if text in shares] == sorted(shares, key=int)
    if points == 6:
        assert texts[-2:] == ["recall@1: 100%", "recall@10: 90%"]
        (first, _) = picture.findall(".//svg:polyline", namespace)
        heights = [float(point.split(",")[1]) for point in first.get("points", "").split()]
        assert heights == sorted(heights, reverse=True)


def test_nothing_found_is_a_chart_too() -> None:
    assert chart([Step("requested", 0)], {"a": np.empty(0, np.float32)}).value
