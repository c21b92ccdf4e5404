"""The examples and the Python blocks of the documentation run unchanged on the demo's data."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.project import REPOSITORY, Demo, new_project
from PIL import Image

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(page for page in (REPOSITORY / "docs").glob("*.md") if BLOCK.search(page.read_text()))


@pytest.fixture(scope="module")
def folder(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `make demo` ran: its seeds are images."""
    root = tmp_path_factory.mktemp("checkout")
    index = shutil.copytree(demo.index, root / "data" / "index")
    with new_project(root / "data", index, demo.images) as project:
        assert project.run("fruit").success
        assert {path.suffix for path in project.seeds.rglob("*.*")} == {".webp"}
    return root


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(REPOSITORY / "examples" / name), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_blocks_of_a_page_run(page):
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), names)


def test_search_prints_the_nearest_images_of_each_vector(monkeypatch, capsys):
    run_example("search.py", monkeypatch)
    first, *rows = capsys.readouterr().out.splitlines()
    vectors = int(re.findall(r"around (\d+) vectors", first)[0])
    assert vectors < len(rows) <= 2 * vectors
    assert all("https://openclipart.example/" in row for row in rows)


def test_rows_are_selected_for_img2dataset(monkeypatch, capsys):
    run_example("to_img2dataset.py", monkeypatch)
    command = capsys.readouterr().out
    (path,) = re.findall(r"--url_list (\S+)", command)
    assert len(pq.read_table(path)) == 100
    options = set(re.findall(r"--\w+", command))
    assert set(re.findall(r"--\w+_col\b|--\w+_list\b", (REPOSITORY / "README.md").read_text())) <= options


def test_an_index_is_built_from_embeddings(tmp_path, monkeypatch, capsys):
    vectors = np.random.default_rng(0).standard_normal((200, 16), np.float32)
    np.save(tmp_path / "embeddings.npy", vectors)
    urls = [f"https://host.example/{number}.jpg" for number in range(len(vectors))]
    pq.write_table(pa.table({"url": urls, "caption": urls}), tmp_path / "metadata.parquet")
    made = [str(tmp_path / name) for name in ("embeddings.npy", "metadata.parquet", "index")]
    run_example("own_index.py", monkeypatch, *made)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5
    assert rows[0].split() == ["0", "1.000", urls[0]]


def test_every_example_is_tested():
    tested = set(re.findall(r'run_example\("(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in (REPOSITORY / "examples").glob("*.py")}


def test_the_readme_shows_what_the_demo_makes(folder: Path) -> None:
    told = (REPOSITORY / "README.md").read_text()
    for name in ("knn_urls", "centroid_urls", "combined_urls"):
        file = f"data/output/{name}/fruit.parquet"
        (counts,) = re.findall(rf"^{name} +(.*?) +{file}$", told, re.MULTILINE)
        kept = pq.read_metadata(folder / file).num_rows
        assert int(counts.split()[-1]) == pytest.approx(kept, rel=0.02)  # processors round differently
    made = folder / "data" / "output" / "combined_urls" / "fruit.png"
    shown = REPOSITORY / "docs" / "contact-sheet.png"
    assert Image.open(shown).size == Image.open(made).size, f"{shown}: copy the demo's contact sheet"
