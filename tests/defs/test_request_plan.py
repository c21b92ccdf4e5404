"""`laion-assets plan`: what to ask for, how long it takes, how much disk, and on what that rests."""

import re
import shutil

import dagster as dg
import pytest
import yaml
from helpers.project import REPOSITORY

from laion_assets.cli import instance, main
from laion_assets.defs.history import materializations
from laion_assets.search.sizing import (
    CENTROID_SECONDS,
    COMBINED_A_SECOND,
    KNN_A_SECOND,
    as_measured,
    counts_for,
)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_what_is_said_to_be_measured_is_what_the_benchmark_measured():
    results = (REPOSITORY / "benchmarks" / "results.md").read_text()
    grows = results.partition("## How the cost grows")[2].partition("## ")[0]
    rows = re.findall(r"^\| ([\d,]+) \| [\d,]+ \| ([\d.]+) \|", grows, re.MULTILINE)
    assert {number(k): number(seconds) for k, seconds in rows} == CENTROID_SECONDS
    many = results.partition("## Many seeds")[2]
    rate = dict(re.findall(r"^\| (\w+) \|.*\| ([\d,]+) \| [\d.]+ GB \|$", many, re.MULTILINE))
    assert (number(rate["knn"]), number(rate["combined"])) == (KNN_A_SECOND, COMBINED_A_SECOND)


def test_times_go_through_what_was_measured_and_grow_without_end():
    for k, seconds in CENTROID_SECONDS.items():
        assert as_measured(75_176, k)[:2] == pytest.approx((1.0, seconds))
    assert as_measured(1, 10)[1] < 0.28
    assert as_measured(1, 10**7)[1] > 10 * 88.86


def test_a_plan_without_a_set_rests_on_the_usual_yield(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--target", "500000", "--seeds", "1000"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == {"nb_images_knn": 834, "nb_images_centroid": 833_334}
    assert (
        "a yield of 0.3 (usual for LAION; no run of this set with these filters, block list and "
        "threshold has measured it)"
    ) in printed
    assert "by benchmarks/results.md (2 cores" in printed
    assert "of the tables not known before a first run of the set; index not staged yet" in printed


def test_a_plan_for_a_set_rests_on_its_last_run(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAION_INDEX_URI", str(demo.index))
    shutil.copytree(demo.seeds, tmp_path / "data" / "seeds")
    assert main(["materialize", "flower", "--nb-images-knn", "20", "--nb-images-centroid", "400"]) == 0
    capsys.readouterr()
    target = 100
    assert main(["plan", "--target", str(target), "--seed-set", "flower"]) == 0
    printed = capsys.readouterr().out
    found = re.search(r"from (\d+) seeds, at a yield of ([\d.]+) \(measured by run (\w+)\)", printed)
    assert found
    seeds, share, run = int(found[1]), float(found[2]), found[3]
    assert f"by run {run}, which requested {20 * seeds + 400}, scaled" in printed
    assert "no more than that" not in printed
    expected = counts_for(target, seeds, share)
    planned = yaml.safe_load(printed)  # from the yield that was measured; four digits of it are printed
    assert planned["nb_images_knn"] == pytest.approx(expected.nb_images_knn, abs=1)
    assert planned["nb_images_centroid"] == pytest.approx(expected.nb_images_centroid, abs=1)
    size = (tmp_path / "data/output/knn_urls/flower.parquet").stat().st_size
    told = re.search(r"disk: knn_urls (\d+) kB", printed)
    assert told
    assert int(told[1]) == pytest.approx(size * planned["nb_images_knn"] / 20 / 1000, abs=1)
    assert re.search(r"index [\d.]+ MB$", printed, re.MULTILINE)

    # What lies there now may be of another run, and the disk may have lost the index since.
    (tmp_path / "data/output/knn_urls/flower.parquet").unlink()
    with instance() as kept:
        rows = staged_again(kept)
    assert main(["plan", "--target", str(10**9), "--seed-set", "flower"]) == 0
    bounded = capsys.readouterr().out
    assert "disk: knn_urls " in bounded
    assert yaml.safe_load(bounded) == {"nb_images_knn": rows, "nb_images_centroid": rows}
    assert f"# the index has {rows:,} rows: no more than that can be found" in bounded

    (tmp_path / "data/seeds/flower/settings.yaml").write_text(printed)  # ready to paste
    assert main(["materialize", "flower"]) == 0
    assert f"looking for {planned['nb_images_knn']:,} images around each" in capsys.readouterr().out


def staged_again(kept: dg.DagsterInstance) -> int:
    """Report what a step reports that had to stage the index again; return the rows of the index."""
    staged = next(materializations(kept, "staged_laion_index")).figures
    again = {name: staged[name] for name in ("fingerprint", "bytes")}
    kept.report_runless_asset_event(dg.AssetMaterialization("staged_laion_index", metadata=again))
    kept.report_runless_asset_event(dg.AssetMaterialization("staged_laion_index"))  # by hand, in the UI
    return int(staged["dagster/row_count"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--target", "0", "--seeds", "5"], "error: --target is 0: give 1 or more"),
        (["--target", "5", "--seeds", "-1"], "error: --seeds is -1: give 1 or more"),
        (["--target", "5", "--seed-set", "flowr"], "error: there is no seed set 'flowr'"),
    ],
)
def test_what_cannot_be_planned_is_told_in_a_sentence(
    demo, tmp_path, monkeypatch, capsys, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAION_SEEDS_URI", str(demo.seeds))
    assert main(["plan", *arguments]) == 1
    assert sentence in capsys.readouterr().err
