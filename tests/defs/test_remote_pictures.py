"""Runs on an index without thumbnails, where hosts may be asked for pictures and for working URLs."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest
from helpers import indices
from helpers.picture_host import PictureHost, picture_host
from helpers.project import failures, new_project, reported
from PIL import Image

from laion_assets.defs.history import expected_alive
from laion_assets.io import remote_images

ROWS = 400


@pytest.fixture
def host() -> Iterator[PictureHost]:
    with picture_host() as running:
        yield running


@pytest.fixture
def index(tmp_path: Path, host: PictureHost) -> Path:
    """An index of which each third row is marked as unsafe."""
    rows = np.random.default_rng(5).standard_normal((ROWS, indices.DIMENSION)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    folder = tmp_path / "bare"
    indices.write_index(folder, rows, "Flat")
    metadata = pa.table(
        {
            "url": [f"{host.url}/{row}" for row in range(ROWS)],
            "caption": [f"picture {row}" for row in range(ROWS)],
            "punsafe": [0.9 if row % 3 == 0 else 0.1 for row in range(ROWS)],
        }
    )
    indices.write_metadata(folder, metadata)
    (tmp_path / "given" / "mine").mkdir(parents=True)
    np.save(tmp_path / "given" / "mine" / "a.npy", rows[:5])
    return folder


def check(result: dg.ExecuteInProcessResult) -> dg.AssetCheckEvaluation:
    (found,) = (each for each in result.get_asset_check_evaluations() if each.check_name == "urls_alive")
    return found


def test_pictures_and_working_urls_are_asked_for_only_where_allowed(tmp_path, host, index, monkeypatch):
    monkeypatch.setattr(remote_images, "is_public", lambda _: True)  # the host is this machine
    with new_project(tmp_path, index, tmp_path / "given") as project:
        result = project.run("mine", nb_images_knn=9, nb_images_centroid=9)
        assert failures(result) == {}
        assert host.asked == []
        for name in ("knn_urls", "centroid_urls", "combined_urls"):
            shown = reported(result, name)["contact sheet"]
            assert "LAION_SHOW_REMOTE_PICTURES=true" in shown
            assert "data:image" not in shown
        assert check(result).passed
        assert "not checked: LAION_SHOW_REMOTE_PICTURES=true" in (check(result).description or "")

        allowed = project.with_environment(LAION_SHOW_REMOTE_PICTURES="true")
        result = allowed.run("mine", nb_images_knn=100, nb_images_centroid=300)
        assert failures(result) == {}
        fetched = [row for command, row in host.asked if command == "GET"]
        assert len(fetched) <= 3 * 48
        assert [row for row in fetched if row % 3 == 0] == []  # unsafe
        for name in ("knn_urls", "centroid_urls", "combined_urls"):
            shown = reported(result, name)["contact sheet"]
            assert shown.startswith("![contact sheet](data:image")
            assert "pictures were not fetched" in shown
            assert "returned status 404" in shown
        assert red_pixels(project.output / "combined_urls" / "mine.png") > 10_000

        heads = [row for command, row in host.asked if command == "HEAD"]
        assert len(heads) == len(set(heads)) == 200
        working = sum(row % 4 != 0 for row in heads)
        told = check(result)
        assert told.passed
        assert f"{working / 200:.0%} of 200 URLs work (95 % confidence interval" in (
            told.description or ""
        )
        assert reported(result, "combined_urls")["URLs that work"] == working / 200

        # The next run for a target expects the share that was measured.
        third = allowed.run("mine", target_images=90)
        wanted = -(-90 * 200 // working)
        assert reported(third, "combined_urls")["kept"] == wanted
        used = reported(third, "combined_urls")["settings"]["expect_alive"]
        assert used == f"{working / 200} (measured by run {result.run_id[:8]})"


def test_where_no_host_answers_there_are_links_and_the_reason(tmp_path, index):
    """The host is at an address that is not public."""
    with new_project(tmp_path, index, tmp_path / "given", LAION_SHOW_REMOTE_PICTURES="true") as project:
        result = project.run("mine", nb_images_knn=9, nb_images_centroid=9)
        assert failures(result) == {}
        shown = reported(result, "knn_urls")["contact sheet"]
        assert "pictures were not fetched: ` " in shown
        assert "is at an address that is not public" in shown
        assert "1. [" in shown
        assert (check(result).passed, check(result).severity) == (False, dg.AssetCheckSeverity.WARN)
        found = [expected_alive(project.instance, name) for name in ("mine", "other", None)]
        assert found == 3 * [(0.75, "default")]  # a share of 0 rather means that the network failed


def red_pixels(path: Path) -> int:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    return int(((pixels[:, 0] > 230) & (pixels[:, 1:].max(axis=1) < 40)).sum())
