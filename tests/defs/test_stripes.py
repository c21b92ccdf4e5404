"""`combined_urls` in stripes: what a failed one repeats, and that the table is that of one comparison."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq
import pytest
from helpers.project import Demo, Project, contents, failures, new_project, reported

from laion_assets.defs.assets import combined_urls
from laion_assets.search import stripes
from laion_assets.search.links import Sizes

SEED_SET = "flower"
SETTINGS = {"nb_images_centroid": 300, "dedup_threshold": 0.6}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(stripes, "SIZES", Sizes(small=0, chunk=8, block=16, tile=64))


@pytest.fixture(scope="module")
def project(tmp_path_factory, demo: Demo) -> Iterator[Project]:
    with new_project(tmp_path_factory.mktemp("stripes"), demo.index, demo.seeds) as made:
        found = made.run(SEED_SET, nb_images_knn=30, **SETTINGS)
        assert found.success
        assert steps(made, found) == ["combined_urls.stripes", "combined_urls.unite"]
        yield made


def steps(project: Project, result: dg.ExecuteInProcessResult | dg.JobExecutionResult) -> list[str]:
    """The steps of the asset that succeeded."""
    records = project.instance.get_records_for_run(
        result.run_id, of_type=dg.DagsterEventType.STEP_SUCCESS
    ).records
    keys = (record.event_log_entry.dagster_event.step_key for record in records)
    return sorted(key for key in keys if key.startswith("combined_urls"))


def broken(*_: object) -> None:
    raise OSError("the node is gone")


def test_a_failed_stripe_alone_is_repeated_and_the_table_is_that_of_one_comparison(
    project, monkeypatch
) -> None:
    path = project.table("combined_urls", SEED_SET)
    whole = pq.read_table(path)
    path.unlink()
    monkeypatch.setattr(combined_urls, "stripes_for", lambda *_: 5)

    def failing(planned, threshold, stripe, uri):
        return (broken if stripe[0] == 3 else stripes.compare_stripe)(planned, threshold, stripe, uri)

    with monkeypatch.context() as patch:
        patch.setattr(combined_urls, "compare_stripe", failing)
        first = project.run(SEED_SET, "combined_urls")
    assert failures(first) == {"combined_urls": "OSError: the node is gone"}
    assert len(steps(project, first)) == 5  # one plans, four compare
    assert not path.exists()

    again = project.re_execute(first)
    assert again.success
    assert steps(project, again) == ["combined_urls.compare[0003]", "combined_urls.unite"]
    assert pq.read_table(path).equals(whole)
    assert reported(again, "combined_urls")["near duplicates"] > 0
    assert not [name for name in contents(project.output) if ".unfinished" in name]


def test_what_fails_at_the_end_is_repeated_unless_a_url_set_has_changed(project, monkeypatch) -> None:
    for number, repeated in ((1, True), (2, False)):
        monkeypatch.setattr(combined_urls, "stripes_for", lambda *_, number=number: number)
        with monkeypatch.context() as patch:
            patch.setattr(combined_urls, "combine", broken)
            first = project.run(SEED_SET, "combined_urls")
        if not repeated:
            assert project.run(SEED_SET, "centroid_urls", **SETTINGS).success
        again = project.re_execute(first)
        assert again.success == repeated
        assert steps(project, again) == (["combined_urls.unite"] if repeated else [])
    assert "materialize combined_urls again" in failures(again)["combined_urls"]


@pytest.mark.parametrize("step", ["compare_stripe", "combine"])
def test_a_comparison_that_another_version_began_is_refused(project, monkeypatch, step) -> None:
    monkeypatch.setattr(combined_urls, "stripes_for", lambda *_: 2)
    with monkeypatch.context() as patch:
        patch.setattr(combined_urls, step, broken)
        first = project.run(SEED_SET, "combined_urls")
    monkeypatch.setattr(combined_urls, "VERSION", "a later one")
    again = project.re_execute(first)
    assert steps(project, again) == []
    said = failures(again)["combined_urls"]
    assert "another version of laion_assets began this: materialize combined_urls again" in said


def damaged(stripes: list[Path]) -> None:
    stripes[1].write_bytes(stripes[1].read_bytes().replace(b'"number": 1', b'"number": 7'))


def of_another_stripe(stripes: list[Path]) -> None:
    stripes[1].write_bytes(stripes[0].read_bytes())


@pytest.mark.parametrize(
    ("change", "fact"), [(damaged, "missing or damaged"), (of_another_stripe, "not those of one plan")]
)
def test_what_stripes_hand_over_is_refused_if_damaged_or_incomplete(
    project, monkeypatch, change, fact
) -> None:
    monkeypatch.setattr(combined_urls, "stripes_for", lambda *_: 2)
    with monkeypatch.context() as patch:
        patch.setattr(combined_urls, "combine", broken)
        first = project.run(SEED_SET, "combined_urls")
    folder = project.output / "combined_urls" / f"{SEED_SET}.unfinished" / first.run_id
    change(sorted(folder.glob("compare*.json")))
    again = project.re_execute(first)
    said = failures(again)["combined_urls"]
    assert fact in said
    assert "materialize combined_urls again" in said
