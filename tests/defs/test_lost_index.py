"""A step needs the index on a disk that has lost it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pyarrow as pa
import pytest
from helpers.project import Demo, failures, new_project

from laion_assets.defs.assets import staged_laion_index as index
from laion_assets.defs.failures import REMEDIES
from laion_assets.defs.history import figures_of
from laion_assets.staging import Manifest, stage

pytestmark = pytest.mark.faults


def materializations(instance: dg.DagsterInstance) -> list[dg.EventLogRecord]:
    key = dg.AssetKey("staged_laion_index")
    return list(instance.fetch_materializations(key, limit=10).records)


def version(record: dg.EventLogRecord) -> str:
    return record.asset_materialization.tags["dagster/data_version"]


@pytest.fixture
def other(demo: Demo, tmp_path) -> Path:
    """The demo's index with the bytes of one file in another order, and so another fingerprint."""
    copy = tmp_path / "other"
    shutil.copytree(demo.index, copy)
    metadata = next((copy / "metadata").iterdir())
    table = pa.ipc.open_file(metadata).read_all()
    with pa.ipc.new_file(metadata, table.schema) as sink:
        sink.write_table(table, max_chunksize=100)
    return copy


@pytest.fixture
def at_once(monkeypatch) -> list[Callable[[], None]]:
    """Let a step poll without waiting; tests can add what happens in between."""
    meanwhile: list[Callable[[], None]] = []
    monkeypatch.setattr(index, "time", SimpleNamespace(sleep=lambda _: [do() for do in meanwhile]))
    return meanwhile


def test_it_is_staged_again_and_that_is_on_record(demo: Demo, tmp_path):
    with new_project(tmp_path, demo.index, demo.seeds) as project:
        assert project.run("fruit").success
        (first,) = materializations(project.instance)
        shutil.rmtree(project.cache)
        project.cache.mkdir()
        assert project.run("fruit", "knn_urls").success
        again, _ = materializations(project.instance)
        assert "staged by knn_urls" in again.asset_materialization.description
        assert figures_of(again.asset_materialization.metadata)["bytes fetched"] > 0
        assert version(again) == version(first)


def test_one_lost_file_is_all_that_is_fetched(demo: Demo, tmp_path):
    with new_project(tmp_path, demo.index, demo.seeds) as project:
        assert project.run("fruit").success
        lost = next((project.cache / "metadata").iterdir())
        size = lost.stat().st_size
        lost.unlink()
        assert project.run("fruit", "centroid_urls").success
        again, _ = materializations(project.instance)
        assert figures_of(again.asset_materialization.metadata)["bytes fetched"] == size


def test_an_index_that_dagster_does_not_know_to_be_staged_is_exchanged(demo: Demo, other: Path, tmp_path):
    with new_project(tmp_path, demo.index, demo.seeds) as project:
        assert project.run("fruit").success
        (first,) = materializations(project.instance)
        stage(str(other), None, project.cache)
        assert project.run("fruit", "knn_urls").success
        again, _ = materializations(project.instance)
        assert version(again) == version(first) == Manifest.read(project.cache).fingerprint


def test_a_newer_index_whose_record_is_missing_stays_and_is_recorded(demo: Demo, other: Path, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(demo.index, source)
    with new_project(tmp_path, source, demo.seeds) as project:
        assert project.run("fruit").success
        shutil.rmtree(source)
        shutil.copytree(other, source)
        newer = stage(str(source), None, project.cache).manifest.fingerprint
        assert project.run("fruit", "knn_urls").success
        again, first = materializations(project.instance)
        assert version(again) == newer != version(first)
        assert figures_of(again.asset_materialization.metadata)["bytes fetched"] == 0


def test_or_the_step_fails_and_names_both_if_so_set(demo: Demo, other: Path, tmp_path, at_once):
    with new_project(tmp_path, demo.index, demo.seeds, LAION_LOST_INDEX="fail") as project:
        assert project.run("fruit").success
        (first,) = materializations(project.instance)
        held = stage(str(other), None, project.cache).manifest.fingerprint
        told = failures(project.run("fruit", "knn_urls"))
        assert set(told) == {"knn_urls"}
        for fact in (str(project.cache), held, version(first), REMEDIES["staged_index"]):
            assert fact in told["knn_urls"]
        # Another run has staged it, and its record comes while this step looks again.
        record = dg.AssetMaterialization("staged_laion_index", tags={"dagster/data_version": held})
        at_once.append(lambda: project.instance.report_runless_asset_event(record))
        assert project.run("fruit", "knn_urls").success


@pytest.mark.usefixtures("at_once")
def test_or_the_step_fails_with_the_remedy_if_so_set(demo: Demo, tmp_path):
    with new_project(tmp_path, demo.index, demo.seeds, LAION_LOST_INDEX="fail") as project:
        assert project.run("fruit").success
        shutil.rmtree(project.cache)
        told = failures(project.run("fruit", "knn_urls"))
        assert set(told) == {"knn_urls"}
        for fact in (f"nothing is staged in {project.cache}", REMEDIES["staged_index"]):
            assert fact in told["knn_urls"]
        assert len(materializations(project.instance)) == 1
