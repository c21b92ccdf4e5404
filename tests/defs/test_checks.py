"""All asset checks pass on the demo, and each fails on the problem that it detects."""

import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import indices
from helpers.project import Demo, Project, failures, new_project
from hypothesis import given
from hypothesis import strategies as st

from laion_assets.defs import checks
from laion_assets.defs.assets import build_assets
from laion_assets.defs.kubernetes.placement import Placement
from laion_assets.index.faiss_index import Index
from laion_assets.io.tables import StoredTable
from laion_assets.search import audit
from laion_assets.staging import OpenIndex, open_staged, stage

WARN, ERROR = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR
SPECS = [spec for asset in build_assets(Placement.from_environment({}, 0)) for spec in asset.check_specs]
BLOCKING = {"staged_index_is_intact", "similarity_falls_with_rank", "one_row_per_image"}


@pytest.fixture(scope="module")
def done(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, Any]]:
    """A read-only project in which everything is materialized for one seed set."""
    with new_project(tmp_path_factory.mktemp("done"), demo.index, demo.seeds) as project:
        yield project, project.run("fruit")


def evaluated(result: dg.ExecuteInProcessResult) -> dict[tuple[str, str], dg.AssetCheckEvaluation]:
    return {
        (found.asset_key.to_user_string(), found.check_name): found
        for found in result.get_asset_check_evaluations()
    }


def named(results: Any) -> dict[str | None, dg.AssetCheckResult]:
    return {result.check_name: result for result in results}


def test_every_check_says_how_bad_it_is_and_what_to_do():
    for spec in SPECS:
        text = spec.description or ""
        assert "Remedy: " in text
        assert (" blocks" in text.partition("Remedy")[0]) == (spec.blocking or "blocks nothing" in text)
        assert "error" in text.lower() or "warning" in text.lower()
        assert spec.blocking == (spec.name in BLOCKING)


def test_all_checks_run_and_pass_on_the_demo(done):
    project, result = done
    assert failures(result) == {}
    found = evaluated(result)
    assert set(found) == {(spec.asset_key.to_user_string(), spec.name) for spec in SPECS}
    assert {key for key, check in found.items() if not check.passed} == set()
    of_seed_sets = {key: check for key, check in found.items() if key[0] != "staged_laion_index"}
    assert {check.partition for check in of_seed_sets.values()} == {"fruit"}
    rows = pq.read_table(project.table("combined_urls", "fruit"), columns=["id", "url"])
    assert len(set(rows["id"].to_pylist())) == len(set(rows["url"].to_pylist())) == len(rows)


# --- tables ---------------------------------------------------------------------------------------

Change = Callable[[pa.Table], pa.Table]


def with_values(column: str, change: Callable[[list[Any]], list[Any]]) -> Change:
    """A change of one column."""

    def changed(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(column)
        field = table.schema.field(column)
        return table.set_column(place, field, pa.array(change(table[column].to_pylist()), field.type))

    return changed


@pytest.fixture
def spoilt(done: tuple[Project, Any], tmp_path: Path) -> Callable[..., StoredTable]:
    """Rewrite a table of the demo with one error."""

    def write(asset: str, change: Change = lambda table: table) -> StoredTable:
        original = done[0].table(asset, "fruit")
        path = tmp_path / asset / original.name
        path.parent.mkdir(exist_ok=True)
        for attachment in original.parent.glob("*.decoder"):
            shutil.copy(attachment, path.parent)
        table = pq.read_table(original)
        changed = change(table)
        with pq.ParquetWriter(path, changed.schema) as writer:
            writer.write_table(changed)
            stored = pq.read_metadata(original).metadata
            writer.add_key_value_metadata(
                {k.decode(): v.decode() for k, v in stored.items() if k != b"ARROW:schema"}
            )
        return StoredTable(str(path))

    return write


def swapped(values: list[Any]) -> list[Any]:
    return [values[1], values[0], *values[2:]]


@pytest.mark.parametrize("asset", ["knn_urls", "centroid_urls"])
@pytest.mark.parametrize(
    ("wrong", "change", "severity"),
    [
        (None, lambda table: table, None),
        ("similarity_falls_with_rank", with_values("rank", swapped), ERROR),
        ("similarity_falls_with_rank", with_values("similarity", swapped), ERROR),
        ("similarity_is_in_range", with_values("similarity", lambda v: [1.2, *v[1:]]), WARN),
        ("no_near_duplicates_left", with_values("code", lambda v: [v[1], *v[1:]]), ERROR),
    ],
)
def test_what_is_wrong_with_a_search_is_told(spoilt, asset, wrong, change, severity):
    found = named(checks.of_search(spoilt(asset, change), 0.94))
    assert {name for name, result in found.items() if not result.passed} == ({wrong} if wrong else set())
    if wrong:
        assert found[wrong].severity is severity


def test_a_similarity_that_is_no_number_is_out_of_order_and_out_of_range(spoilt):
    change = with_values("similarity", lambda values: [values[0], math.nan, *values[2:]])
    found = named(checks.of_search(spoilt("centroid_urls", change), 0.94))
    assert not found["similarity_is_in_range"].passed
    assert not found["similarity_falls_with_rank"].passed


def test_rows_of_different_queries_may_be_near_duplicates():
    twice = np.tile(np.eye(3, dtype=np.float32), (2, 1))
    assert audit.near_duplicates_left(twice, np.repeat([0, 1], 3), 0.94) == 0
    assert audit.near_duplicates_left(twice, np.zeros(6), 0.94) == 6


def duplicated(values: list[Any]) -> list[Any]:
    return [values[1], *values[1:]]


@pytest.mark.parametrize(
    ("wrong", "change", "severity"),
    [
        (set(), lambda table: table, None),
        ({"one_row_per_image"}, with_values("url", duplicated), ERROR),
        ({"one_row_per_image"}, with_values("id", duplicated), ERROR),
        ({"urls_well_formed"}, with_values("url", lambda v: ["ftp://example.org/a", *v[1:]]), WARN),
        ({"urls_well_formed"}, with_values("url", lambda v: ["https:///a.jpg", *v[1:]]), WARN),
        ({"urls_well_formed"}, with_values("url", lambda v: ["https://a.org/a b", *v[1:]]), WARN),
        ({"urls_well_formed"}, with_values("url", lambda v: [None, *v[1:]]), WARN),
    ],
)
def test_what_is_wrong_with_the_combined_table_is_told(spoilt, wrong, change, severity):
    table = spoilt("combined_urls", change)
    found = named(checks.of_combined(table, spoilt("knn_urls"), spoilt("centroid_urls"), 0.94))
    assert {name for name, result in found.items() if not result.passed} == wrong
    for name in wrong:
        assert found[name].severity is severity


@given(
    st.lists(
        st.none()
        | st.text(max_size=20)
        | st.text("aZ0.-/:?#@[]\n\x7f \u00e9", max_size=12).map("https://{}".format)
    )
)
def test_the_fast_look_at_urls_says_what_the_slow_one_says(urls):
    count, examples = audit.not_web(pa.chunked_array([pa.array(urls, pa.string())]))
    assert count == sum(not audit.is_web(url) for url in urls)
    assert len(examples) == min(count, audit.EXAMPLES)


def test_urls_are_looked_at_batch_by_batch():
    seen: list[weakref.ref[pa.RecordBatch]] = []  # a large table's are never in memory together

    def batches() -> Iterator[pa.RecordBatch]:
        for number in [*range(22), 0]:
            assert sum(batch() is not None for batch in seen) <= 1
            batch = pa.record_batch({"id": pa.array([number]), "url": pa.array([f"{number} a"])})
            seen.append(weakref.ref(batch))
            yield batch
            del batch

    found = audit.images(batches())
    assert (len(found.urls), found.not_web, len(found.examples)) == (23, 23, audit.EXAMPLES)
    assert audit.repeated(found.urls) == audit.repeated(found.ids) == 1


def test_near_duplicates_that_combining_left_are_told(done, spoilt):
    ids = pq.read_table(done[0].table("combined_urls", "fruit"), columns=["id"])["id"].to_pylist()[:40]
    code = pq.read_table(done[0].table("knn_urls", "fruit"), columns=["code"])["code"][0].as_py()

    def same_code(table: pa.Table) -> pa.Table:
        rows = table["id"].to_pylist()
        change = with_values(
            "code", lambda v: [code if i in ids else c for i, c in zip(rows, v, strict=True)]
        )
        return change(table)

    found = named(
        checks.of_combined(
            spoilt("combined_urls"),
            spoilt("knn_urls", same_code),
            spoilt("centroid_urls", same_code),
            0.94,
        )
    )
    assert not found["no_near_duplicates_left"].passed


def test_a_table_without_rows_passes(spoilt):
    empty = [
        spoilt(name, lambda t: t.slice(0, 0)) for name in ("combined_urls", "knn_urls", "centroid_urls")
    ]
    assert all(result.passed for result in checks.of_search(empty[1], 0.94))
    assert all(result.passed for result in checks.of_combined(*empty, 0.94))


def test_seeds_that_point_everywhere_have_nothing_in_common(project):
    (spec,) = [spec for spec in SPECS if spec.name == "seeds_are_coherent"]
    assert "a floor, not a measure of style" in (spec.description or "")  # those in one cone pass
    for name, vectors in (
        ("random", np.random.default_rng(0).standard_normal((50, 256))),
        ("alike", 1 + np.random.default_rng(0).standard_normal((50, 256))),
    ):
        (project.seeds / name).mkdir()
        np.save(project.seeds / name / "a.npy", vectors.astype(np.float32))
        result = project.run(name, "seed_embeddings", "centroid_vector")
        assert result.success  # a warning stops nothing
        check = evaluated(result)["centroid_vector", "seeds_are_coherent"]
        assert (check.passed, check.severity) == (name == "alike", WARN)
        assert "at least 0.1 is expected" in (check.description or "")


# --- the staged index -----------------------------------------------------------------------------


@pytest.fixture
def staged(demo: Demo, tmp_path: Path) -> Iterator[tuple[OpenIndex, Path]]:
    cache = tmp_path / "cache"
    stage(str(demo.index), None, cache)
    with open_staged(cache) as opened:
        yield opened, cache


class Moved:
    """Metadata of the demo that is shifted against the index from some row on."""

    def __init__(self, metadata: Any, by: int, after: int) -> None:
        self._metadata, self._by, self._after = metadata, by, after

    def __len__(self) -> int:
        return len(self._metadata)

    def covers(self, ids: np.ndarray) -> np.ndarray:
        return self._metadata.covers(ids)

    def take(self, ids: np.ndarray, columns: list[str]) -> pa.Table:
        moved = np.where(ids >= self._after, (ids + self._by) % len(self), ids)
        return self._metadata.take(moved, columns)


@pytest.mark.parametrize("by", [1, 2, 100, -1])
@pytest.mark.parametrize("after", [0, 2000])
def test_metadata_that_is_out_of_line_is_told_wherever_it_begins(staged, by, after):
    opened, cache = staged
    moved = replace(opened, metadata=Moved(opened.metadata, by, after))
    found = named(checks.of_staged_index(moved, cache))
    assert {name for name, result in found.items() if not result.passed} == {
        "metadata_belongs_to_the_index"
    }
    assert found["metadata_belongs_to_the_index"].severity is WARN
    assert audit.agreement(opened.index, opened.metadata).is_aligned


def test_rows_of_lists_longer_than_what_is_sampled_come_from_every_quarter(tmp_path):
    rows = 8000
    indices.write_index(tmp_path, indices.random_rows(np.random.default_rng(1), rows), indices.MANY_LISTS)
    seen = [ids for ids, _ in Index(*indices.index_paths(tmp_path)).sample(64, 4)]
    of_quarters = np.bincount(np.concatenate(seen) * audit.PARTS // rows)
    assert (of_quarters > len(np.concatenate(seen)) / 10).all()
    assert len(of_quarters) == audit.PARTS


@pytest.mark.parametrize("form", ["Flat", "HNSW8"])
def test_metadata_that_is_out_of_line_is_told_of_an_index_without_lists_too(staged, tmp_path, form):
    opened, _ = staged
    parts = zip(*opened.index.sample(opened.index.nlist, opened.index.rows), strict=True)
    ids, vectors = map(np.concatenate, parts)
    plain = faiss.index_factory(vectors.shape[1], form, faiss.METRIC_INNER_PRODUCT)
    plain.add(vectors[np.argsort(ids)])
    faiss.write_index(plain, str(tmp_path / "plain.index"))
    listless = Index(tmp_path / "plain.index")
    assert listless.nlist == 0
    aligned = audit.agreement(listless, opened.metadata)
    assert (aligned.is_decidable, aligned.is_aligned, aligned.silent) == (True, True, 0)
    assert not audit.agreement(listless, Moved(opened.metadata, 100, 2000)).is_aligned


def test_quarters_of_the_rows_without_captions_are_counted(staged):
    opened, cache = staged
    half = opened.index.rows // 2

    class HalfSilent(Moved):
        def take(self, ids: np.ndarray, _: list[str]) -> pa.Table:
            captions = super().take(ids, ["caption"])["caption"].to_pylist()
            told = [c if row < half else None for row, c in zip(ids, captions, strict=True)]
            return pa.table({"caption": pa.array(told, pa.string())})

    partly = replace(opened, metadata=HalfSilent(opened.metadata, 0, 0))
    found = named(checks.of_staged_index(partly, cache))["metadata_belongs_to_the_index"]
    assert found.passed
    assert "2 of 4 quarters of the rows have too few captions" in (found.description or "")


def test_without_captions_alignment_cannot_be_told_and_is_not(staged):
    opened, cache = staged

    class Silent(Moved):
        def take(self, ids: np.ndarray, _: list[str]) -> pa.Table:
            return pa.table({"caption": pa.nulls(len(ids), pa.string())})

    silent = replace(opened, metadata=Silent(opened.metadata, 0, 0))
    found = named(checks.of_staged_index(silent, cache))["metadata_belongs_to_the_index"]
    assert found.passed
    assert "only 0 pairs" in (found.description or "")


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_byte_that_flips_on_the_disk_is_mended_by_the_next_run(project):
    assert project.run("fruit", "staged_laion_index").success
    path = project.cache / "image.index" / "merged_index.ivfdata"
    before = path.read_bytes()
    for assets in (("staged_laion_index",), ("seed_embeddings", "knn_urls")):
        flip(path)
        assert project.run("fruit", *assets).success
        assert path.read_bytes() == before


def test_a_byte_that_flips_while_the_index_is_open_fails_the_check_and_names_the_file(project):
    assert project.run("fruit", "staged_laion_index").success
    path = project.cache / "image.index" / "merged_index.ivfdata"
    with open_staged(project.cache) as opened:
        flip(path)
        check = named(checks.of_staged_index(opened, project.cache))["staged_index_is_intact"]
    assert (check.passed, check.severity) == (False, ERROR)
    assert str(path) in (check.description or "")


class Odd:
    """The index of the demo, with a change to the sampled rows of each list."""

    def __init__(self, index: Index, change: Callable[[np.ndarray, np.ndarray], Any]) -> None:
        self._index, self._change = index, change
        self.rows, self.nlist = index.rows, index.nlist

    def sample(self, lists: int, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids, vectors in self._index.sample(lists, rows):
            yield self._change(ids, vectors)


@pytest.mark.parametrize("number", [-1, 5000])
def test_rows_with_impossible_numbers_are_told(staged, number):
    opened, _ = staged
    odd = Odd(opened.index, lambda ids, v: (np.where(np.arange(len(ids)) == 1, number, ids), v))
    (wrong,) = audit.soundness(odd).wrong
    assert wrong.endswith(f"such as {number}")


def test_ids_that_repeat_are_told_with_their_cause(staged):
    opened, _ = staged
    (wrong,) = audit.soundness(Odd(opened.index, lambda ids, v: (ids % 3, v))).wrong
    assert "merged without shifting their ids" in wrong


@pytest.mark.parametrize(("without", "sound"), [(1, True), (16, False)])
def test_rows_without_a_vector_are_counted_and_block_only_where_there_are_no_others(
    staged, without, sound
):
    opened, cache = staged
    odd = Odd(opened.index, lambda ids, v: (ids, v * (np.arange(len(ids)) >= without)[:, None]))
    found = named(checks.of_staged_index(replace(opened, index=odd), cache))["staged_index_is_intact"]
    assert found.passed == sound
    assert found.metadata["rows without a vector"].value > 0
    assert ("of them without a vector" if sound else "none of") in (found.description or "")


def test_of_an_index_that_is_only_partly_on_the_disk_no_row_is_asked_and_it_is_told(staged):
    opened, cache = staged

    def refuse(*_: Any) -> Any:
        raise AssertionError

    files = [replace(file, sparse=file.path.endswith(".ivfdata")) for file in opened.manifest.files]
    assert [file.path for file in files if file.sparse]
    manifest = replace(opened.manifest, files=files)
    part = replace(opened, index=Odd(opened.index, refuse), manifest=manifest)
    found = named(checks.of_staged_index(part, cache))
    staged_specs = [spec for spec in SPECS if spec.asset_key == dg.AssetKey("staged_laion_index")]
    assert set(found) == {spec.name for spec in staged_specs}
    told = {name for name, result in found.items() if checks.ONLY_A_PART in (result.description or "")}
    assert told == {"metadata_belongs_to_the_index", "staged_index_is_intact"}


def test_a_search_that_is_out_of_order_is_not_combined(project, monkeypatch):
    assert project.run("fruit").success
    before = project.table("combined_urls", "fruit").read_bytes()
    real = audit.ranking
    monkeypatch.setattr(audit, "ranking", lambda rows: replace(real(rows), out_of_order=1))
    result = project.run("fruit", "knn_urls", "combined_urls")
    assert not result.success
    assert project.table("combined_urls", "fruit").read_bytes() == before
