"""`laion-assets plan`: images to request, time, disk space, and the basis of the estimate."""

import itertools
import re
import shutil
from dataclasses import replace
from typing import Any

import dagster as dg
import numpy as np
import pytest
import yaml

from laion_assets.cli import instance, main
from laion_assets.defs.estimate import Machine, as_comments, share_read
from laion_assets.defs.history import PastMaterialization, materializations
from laion_assets.defs.request_plan import TABLES, History, as_yaml, plan_request
from laion_assets.index.metadata_file import BatchLayout
from laion_assets.search.cost import Pairwise, Rates, Shape, Step
from laion_assets.search.sizing import EXPECT_ALIVE, USUAL, Yield, expected_counts, images_wanted
from laion_assets.staging import stage

# --- the plan, a pure function --------------------------------------------------------------------


def measured(run: str = "0123456789", requested: int = 300, **figures: Any) -> PastMaterialization:
    return PastMaterialization(run, {"requested": requested, "seconds": 6.0, "bytes": 3000} | figures)


def test_time_and_disk_are_those_of_the_last_run_scaled_by_what_is_requested():
    last = {
        "knn_urls": measured(requested=100, seconds=2.0, bytes=1000),
        "centroid_urls": measured(requested=200, seconds=1.0, bytes=500),
        "combined_urls": measured(requested=300, seconds=4.0, bytes=900),
    }
    plan = plan_request(3000, 10, History(Yield(0.5, "measured"), last), 1.0)
    assert plan.requested == {"knn_urls": 3000, "centroid_urls": 3000, "combined_urls": 6000}
    combined = plan.seconds["combined_urls"]
    assert plan.seconds == {"knn_urls": 60.0, "centroid_urls": 15.0, "combined_urls": combined}
    assert 80 < combined < 400  # for 20 times the images, between linear and quadratic
    assert plan.sizes == {"knn_urls": 30_000, "centroid_urls": 7_500, "combined_urls": 18_000}
    told = "\n".join(as_yaml(plan, 10))
    assert re.search(r"# time: knn_urls .*, centroid_urls .*, combined_urls ", told)
    for fact in ("scaled from run 01234567,", "requested 300", "knn_urls 30 kB", "combined_urls 18 kB"):
        assert fact in told


def test_a_plan_says_the_hours_memory_and_disk_of_combining():
    told = "\n".join(as_yaml(plan_request(9_000_000, 100_000, History(), 0.75), 100_000))
    assert "12,000,000 different images takes about 29 core-hours, 1.83 GB of memory and 8.1 GB" in told
    assert "in 4 stripes: 3 h 16 min on one node of 16 cores, 49 min on 4 such nodes" in told


@pytest.mark.parametrize("rows", [None, 10**9, 500])
def test_a_plan_says_when_the_index_bounds_it(rows):
    plan = plan_request(3000, 10, History(index_rows=rows, index_size=5 * 10**9), 0.75)
    bounded = rows == 500
    assert (plan.counts == expected_counts(4000, 10, USUAL.share)) != bounded
    told = "\n".join(as_yaml(plan, 10))
    assert ("500 rows, fewer than the target needs" in told) == bounded
    assert f"combining {500 if bounded else 4000:,} different images" in told
    assert "index 5 GB" in told


def test_a_plan_says_that_a_run_for_a_target_has_found_all_that_there_is():
    last = {
        "knn_urls": measured(requested=900),
        "centroid_urls": measured(requested=900),
        "combined_urls": measured(requested=1800, kept=550, **{"images for the target": 600}),
    }
    for target, beyond in ((540, False), (560, True), (2000, True)):
        plan = plan_request(target, 10, History(Yield(0.5, "measured"), last, 900), 1.0)
        told = "\n".join(as_yaml(plan, 10))
        assert ("run 01234567 had a target and kept only 550 images" in told) == (beyond and target < 900)


@pytest.mark.parametrize(
    ("received", "duplicates", "share"), [(300, 100, 2 / 3), (150, 150, 0.0), (None, None, 0.3)]
)
def test_metadata_is_read_of_all_but_near_duplicates(received, duplicates, share):
    counts = {} if received is None else {"received": received, "near duplicates": duplicates}
    assert share_read(measured(**counts), 0.3) == pytest.approx(share)
    assert share_read(None, 0.3) == 0.3


def test_a_plan_names_the_steps_that_take_long():
    shape = Shape(10**9, 1000, 10**6, 136, 1000, BatchLayout(10**6, 4096))
    rates = Rates(1, 1.0, 0.0, *[0.0] * 4, Pairwise(0, 0), Pairwise(0, 0), *[0.0] * 8)
    steps = {
        "search": Step(8.1e9, 0, 300, 100),
        "metadata": Step(0, 0, 240, 20),
        "tables": Step(0, 0, 1, 1),
    }
    assert as_comments(steps, Machine(shape, rates))[:2] == [
        "# reads: at most 8.1 GB cold",
        "# time: about 9 min (search 5 min, metadata 4 min), 2 min if the index is in memory",
    ]
    sparse = Machine(replace(shape, sparse=True), rates)
    assert as_comments({"metadata": Step(1e6, 1234, 1, 1)}, sparse)[:2] == [
        "# reads: at most 1 MB cold, in 1,234 requests to the source",
        "# time: about 1 s (metadata 1 s), 1 s if the index is on the disk",
    ]


# --- the command ----------------------------------------------------------------------------------


def test_without_a_run_a_plan_rests_on_the_usual_yield_and_guesses_no_times(
    demo, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAION_SEEDS_URI", str(demo.seeds))
    assert main(["plan", "--target-images", "500000", "--seeds", "1000"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == {"target_images": 500_000}
    assert "1,112 each" in printed
    assert "1,111,112 around their mean" in printed
    assert main(["plan", "--target", "5000", "--seed-set", "flower"]) == 0  # argparse completes it
    for told in (printed, capsys.readouterr().out):
        assert str(USUAL) in told
        assert "reads: unknown, because nothing is staged" in told
        assert "time: unknown" in told
        assert "tables unknown" in told
        assert "index not staged yet" in told
        assert " s," not in told


def test_a_plan_for_a_sparse_index_counts_requests(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAION_INDEX_URI", str(demo.index))
    stage(str(demo.index), None, tmp_path / "data" / "cache", sparse=True)
    assert main(["plan", "--target-images", "5000", "--seeds", "10"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"# reads: at most [\d.]+ MB cold, in [\d,]+ requests to the source", printed)
    assert "if the index is on the disk" in printed


def test_a_plan_for_a_set_rests_on_its_last_run_and_on_this_machine(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAION_INDEX_URI", str(demo.index))
    shutil.copytree(demo.seeds, tmp_path / "data" / "seeds")
    assert main(["materialize", "flower", "--nb-images-knn", "20", "--nb-images-centroid", "400"]) == 0
    capsys.readouterr()
    target = 100
    assert main(["plan", "--target-images", str(target), "--seed-set", "flower"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == {"target_images": target}
    found = re.search(
        r"# 134 images from (\d+) seeds, if 75% of the URLs work\n"
        r"# about [\d,]+ requested around the seeds, (\d+) each,\n"
        r"#   and (\d+) around their mean; of these, ([\d.]+)% are kept \(measured by run (\w+)\)",
        printed,
    )
    assert found
    seeds, each, mean, share, run = *map(int, found.groups()[:3]), float(found[4]) / 100, found[5]
    for fact in (f"run {run}", *(f"{name} " for name in TABLES)):
        assert fact in printed
    assert "rows" not in printed
    assert re.search(r"^# reads: at most [\d.]+ [kM]B cold$", printed, re.MULTILINE)
    assert re.search(r"^# time: about \d+ s.*, \d+ s if the index is in memory$", printed, re.MULTILINE)
    assert "unknown" not in printed
    expected = expected_counts(images_wanted(target, EXPECT_ALIVE), seeds, share)
    assert each == pytest.approx(expected.nb_images_knn, abs=1)  # four digits of the yield are printed
    assert mean == pytest.approx(expected.nb_images_centroid, abs=1)
    size = (tmp_path / "data/output/knn_urls/flower.parquet").stat().st_size
    told = re.search(r"knn_urls (\d+) kB", printed)
    assert told
    assert int(told[1]) == pytest.approx(size * each / 20 / 1000, abs=1)
    assert re.search(r"index [\d.]+ MB$", printed, re.MULTILINE)

    # The rates of this machine are kept. What lies there now may be of another run.
    monkeypatch.setattr("laion_assets.defs.estimate.measured_rates", None)
    (tmp_path / "data/output/knn_urls/flower.parquet").unlink()
    with instance({}) as kept:
        rows = staged_again(kept)
    assert main(["plan", "--target-images", str(10**9), "--seed-set", "flower"]) == 0
    bounded = capsys.readouterr().out
    assert re.search(r"tables knn_urls [\d.]+ [kMG]B", bounded)
    assert f"{rows:,} rows" in bounded
    assert "# reads: at most" in bounded

    (tmp_path / "data/seeds/flower/settings.yaml").write_text(printed)  # ready to paste
    assert main(["materialize", "flower"]) == 0
    assert "target 100: 134 kept of the 134 that it needs" in capsys.readouterr().out
    took = r"planned at most [\d.]+ [kM]B, \d+ s cold and \d+ s warm; took ([\d.]+ \w+, )?\d+ s"
    with instance({}) as kept:
        for name in TABLES[:2]:
            last, before = itertools.islice(materializations(kept, name, "flower"), 2)
            assert re.fullmatch(took, last.figures["planned and taken"])
            assert "planned and taken" not in before.figures
        combined = next(materializations(kept, "combined_urls", "flower")).figures["planned and taken"]
        assert re.fullmatch(r"planned at most \d+ s; took \d+ s", combined)

    other_model = tmp_path / "data/seeds/other_model"  # a search is planned before it begins
    other_model.mkdir()
    np.save(other_model / "a.npy", np.ones((3, 7), np.float32))
    assert main(["materialize", "other_model"]) == 1
    assert "the seeds have 7 dimensions, the index has 256" in capsys.readouterr().err

    monkeypatch.setenv("LAION_MAX_IMAGES", "50")
    assert main(["plan", "--target-images", "100", "--seed-set", "flower"]) == 0
    assert "would be refused: LAION_MAX_IMAGES allows 50" in capsys.readouterr().out
    monkeypatch.delenv("LAION_MAX_IMAGES")

    monkeypatch.setenv("LAION_INDEX_URI", "gs://other/index")
    assert main(["plan", "--target-images", str(10**9), "--seeds", "5"]) == 0
    other = capsys.readouterr().out
    assert f"data/cache holds {demo.index} and not gs://other/index" in other
    assert "index not staged yet" in other
    assert "rows" not in other
    monkeypatch.setenv("LAION_INDEX_URI", str(demo.index))

    (tmp_path / "data/cache/manifest.json").unlink()  # the disk has lost the index since
    assert main(["plan", "--target-images", "100", "--seed-set", "flower"]) == 0
    lost = capsys.readouterr().out
    assert "# reads: unknown, because nothing is staged" in lost
    for fact in ("scaled from run", *(f"{name} " for name in TABLES)):
        assert fact in lost


def staged_again(kept: dg.DagsterInstance) -> int:
    """Report like a step that had to restage the index, and return the index's number of rows."""
    staged = next(materializations(kept, "staged_laion_index")).figures
    again = {name: staged[name] for name in ("fingerprint", "bytes")}
    kept.report_runless_asset_event(dg.AssetMaterialization("staged_laion_index", metadata=again))
    kept.report_runless_asset_event(dg.AssetMaterialization("staged_laion_index"))  # by hand, in the UI
    return int(staged["dagster/row_count"])


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--target-images", "0", "--seeds", "5"], ("--target-images is 0", "1 or more")),
        (["--target-images", "5", "--seeds", "-1"], ("--seeds is -1", "1 or more")),
        (
            ["--target-images", "5", "--seed-set", "flowr"],
            ("no seed set 'flowr'", "did you mean 'flower'?"),
        ),
    ],
)
def test_what_cannot_be_planned_is_an_error_of_one_line(
    demo, tmp_path, monkeypatch, capsys, arguments, facts
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAION_SEEDS_URI", str(demo.seeds))
    assert main(["plan", *arguments]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    for fact in ("error: ", *facts):
        assert fact in told
