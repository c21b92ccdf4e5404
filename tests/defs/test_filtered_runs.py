"""Filters and the block list in runs: no table holds what they exclude, and every row is counted."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import indices
from helpers.project import failures, new_project, reported


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """An index of 300 rows of which every row has a URL, a score and a width, and a set of two seeds."""
    root = tmp_path_factory.mktemp("scored")
    rows = indices.random_rows(np.random.default_rng(3), 300)
    indices.write_index(root / "index", rows, "Flat")
    numbers = np.arange(300)
    table = pa.table(
        {
            "url": [f"https://a/{i}.jpg" for i in numbers],
            "punsafe": pa.array((numbers % 10) / 10, pa.float32()),
            "width": pa.array(numbers % 7 * 100, pa.int32()),
        }
    )
    indices.write_metadata(root / "index", table)
    (root / "list.txt").write_text("\n".join(f"https://a/{i}.jpg" for i in range(0, 300, 5)) + "\n3\n")
    environment = {"LAION_STAGING": "in-place", "LAION_BLOCK_LIST": str(root / "list.txt")}
    with new_project(root, root / "index", **environment) as project:
        (project.seeds / "mine").mkdir()
        np.save(project.seeds / "mine" / "a.npy", rows[:2])
        yield project


def test_nothing_that_is_filtered_out_gets_into_any_table_and_the_funnel_has_no_gap(scored):
    filters = "punsafe < 0.5 and width >= 200"
    (scored.seeds / "mine" / "settings.yaml").write_text(f"filters: {filters}\nnb_images_knn: 100\n")
    result = scored.run("mine", nb_images_centroid=200, dedup_threshold=0.99)
    assert failures(result) == {}
    for name in ("knn_urls", "centroid_urls", "combined_urls"):
        stored = pq.read_table(scored.table(name, "mine"))
        assert len(stored) > 0
        for row in stored.to_pylist():
            assert (row["id"] % 10) / 10 < 0.5
            assert row["id"] % 7 * 100 >= 200
            assert row["id"] % 5 != 0
            assert row["id"] != 3
    for name in ("knn_urls", "centroid_urls"):
        report = reported(result, name)
        assert min(report["blocked"], report["filtered"]) > 0
        lost = sum(report[reason] for reason in ("without url", "blocked", "filtered", "near duplicates"))
        assert report["received"] - lost == report["kept"]
        assert report["settings"]["filters"] == f"{filters} (mine/settings.yaml)"
        assert "list.txt, 1 id, 60 URLs, " in report["settings"]["block_list"]
        assert report["settings"]["block_list"].endswith("(LAION_BLOCK_LIST)")
    footer = pq.read_metadata(scored.table("combined_urls", "mine")).metadata[b"laion_assets"]
    recorded = json.loads(footer)["settings"]
    assert recorded["values"]["filters"] == filters


def test_sets_with_different_filters_are_not_combined(scored):
    assert scored.run("mine", filters="").success
    result = scored.run("mine", "knn_urls", filters="punsafe < 0.9")
    assert "punsafe < 0.9 (Launchpad" in reported(result, "knn_urls")["settings"]["filters"]
    message = failures(scored.run("mine", "combined_urls"))["combined_urls"]
    facts = ["'mine'", "filters", "punsafe < 0.9 and none", "materialize centroid_urls"]
    assert [fact for fact in facts if fact not in message] == []
    assert scored.run("mine", "centroid_urls", filters="punsafe < 0.9").success
    assert scored.run("mine", "combined_urls").success


def test_a_filter_on_a_column_that_is_not_there_fails_with_those_that_are(scored):
    message = failures(scored.run("mine", "knn_urls", filters="NSFW == 'UNLIKELY'"))["knn_urls"]
    assert "'NSFW'" in message
    assert "url, caption, punsafe, width" in message


def test_a_search_reports_how_many_entries_of_the_block_list_match(scored):
    listed = scored.root / "some.txt"
    listed.write_text("3\n299\n300\nhttps://a/5.jpg\nhttps://a/5.jpeg\n")
    project = scored.with_environment(LAION_BLOCK_LIST=str(listed))
    result = project.run("mine", "knn_urls", nb_images_knn=300)
    assert reported(result, "knn_urls")["block list"] == (
        "2 of 3 listed ids in the index, 1 of 2 listed URLs found"
    )
    footer = pq.read_metadata(project.table("knn_urls", "mine")).metadata[b"laion_assets"]
    assert json.loads(footer)["block_list_matches"] == {
        "ids": 3,
        "ids_in_the_index": 2,
        "urls": 2,
        "urls_found": 1,
        "hosts": 0,
        "hosts_found": 0,
    }


@pytest.mark.parametrize(
    ("listed", "passed", "described"),
    [
        ("300\n4000\n", False, "0 of 2 listed ids in the index"),
        ("https://a/300.jpg\n", False, "0 of 1 listed URL found"),
        ("300\nhost:b\nhost:a\n", True, "0 of 1 listed id in the index, 1 of 2 listed hosts found"),
    ],
)
def test_a_block_list_of_which_no_entry_matches_fails_a_check(scored, listed, passed, described):
    (scored.root / "none.txt").write_text(listed)
    project = scored.with_environment(LAION_BLOCK_LIST=str(scored.root / "none.txt"))
    result = project.run("mine", "knn_urls")
    (check,) = [
        found
        for found in result.get_asset_check_evaluations()
        if found.check_name == "block_list_matches"
    ]
    assert (check.passed, check.description) == (passed, described)
