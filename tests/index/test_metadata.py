"""Rows of the metadata by id: whatever the files, batches and types, each row is the right one."""

import json
import shutil
import subprocess
import sys

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import indices
from helpers.metadata import metadata_files, write
from helpers.project import failures, new_project, reported
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laion_assets.index.metadata import Metadata
from laion_assets.io.errors import InputError

SUFFIXES = [indices.ARROW, indices.PARQUET]


# --- every row is the right one -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(tables=metadata_files(), batch=st.integers(1, 4), data=st.data())
def test_rows_taken_by_id_are_the_rows_of_all_files_in_a_line(
    tmp_path_factory, suffix, tables, batch, data
):
    folder = tmp_path_factory.mktemp("metadata")
    metadata = Metadata(write(folder, tables, suffix, batch))
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(metadata) == len(rows)
    ids = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20) if rows else st.just([]))
    ids = np.array(ids, np.int64)
    taken = metadata.take(ids, metadata.schema.names)
    assert taken.schema == metadata.schema
    for name in metadata.schema.names:
        expected = [rows[i].get(name) for i in ids]
        assert taken[name].to_pylist() == expected, name
    assert metadata.take(ids, ["caption"]) == taken.select(["caption"])
    assert metadata.take(ids).column_names == [n for n in taken.column_names if n != "thumbnail"]
    shutil.rmtree(folder)


def test_text_and_binary_views_as_newer_writers_leave_them_are_read(tmp_path):
    urls, pictures = (
        ["a", None, "an url that is too long to be inline"],
        [b"1", None, b"a long picture" * 3],
    )
    columns = [pa.array(urls, pa.string_view()), pa.array(pictures, pa.binary_view())]
    table = pa.table(columns, names=["url", "thumbnail"])
    metadata = Metadata(write(tmp_path, [table, pa.table({"url": ["b"], "thumbnail": [b"2"]})], batch=2))
    taken = metadata.take(np.array([3, 2, 1, 2]), ["thumbnail", "url"])
    assert taken["url"].to_pylist() == ["b", urls[2], None, urls[2]]
    assert taken["thumbnail"].to_pylist() == [b"2", pictures[2], None, pictures[2]]


def test_ids_without_a_row_are_told_apart_and_never_given_another(tmp_path):
    metadata = Metadata(write(tmp_path, [pa.table({"url": ["a", "b"]}), pa.table({"url": ["c"]})]))
    ids = np.array([-1, 0, 2, 3, 1 << 40])
    assert metadata.covers(ids).tolist() == [False, True, True, False, False]
    for wrong in (-1, 3, 1 << 40):
        with pytest.raises(IndexError, match="without a metadata row"):
            metadata.take(np.array([0, wrong]))


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["url", "URL", "image_url", "image_path"])
@pytest.mark.parametrize("caption", ["caption", "TEXT", "text", "alt", None])
def test_the_usual_names_are_known(tmp_path, url, caption):
    named = {"key": ["k"], url: ["u"]} | ({caption: ["c"]} if caption else {})
    metadata = Metadata(write(tmp_path, [pa.table(named)]))
    assert metadata.take(np.array([0])).to_pylist() == [{"url": "u", "caption": "c" if caption else None}]


def test_unusual_names_are_mapped_and_the_mapping_comes_first(tmp_path):
    paths = write(
        tmp_path, [pa.table({"link": ["u"], "url": ["page"], "alt text": ["c"], "TEXT": ["t"]})]
    )
    metadata = Metadata(paths, {"url": "link", "caption": "alt text"})
    assert metadata.take(np.array([0])).to_pylist() == [{"url": "u", "caption": "c"}]
    with pytest.raises(InputError, match=r"000\.arrow has no column 'lnik'.*METADATA_COLUMNS.*link"):
        Metadata(paths, {"url": "lnik"})


def test_safety_columns_travel_along_and_others_do_not(tmp_path):
    table = pa.table({"url": ["u"], "punsafe": [0.5], "NSFW": ["UNLIKELY"], "exif": ["{}"]})
    metadata = Metadata(write(tmp_path, [table]))
    assert metadata.take(np.array([0])).to_pylist() == [
        {"url": "u", "caption": None, "NSFW": "UNLIKELY", "punsafe": 0.5}
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_a_url_column_those_found_are_named(tmp_path, suffix):
    paths = write(tmp_path, [pa.table({"link": ["u"], "text": ["c"]})], suffix)
    with pytest.raises(InputError, match=f"000{suffix} has no URL column .*link, text.*url=<column>"):
        Metadata(paths)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_with_different_columns_are_told_of(tmp_path, suffix):
    whole, part = pa.table({"url": ["u"], "TEXT": ["c"]}), pa.table({"url": ["u"], "caption": ["c"]})
    with pytest.raises(InputError, match=f"001{suffix} has no column 'TEXT', which 000{suffix} has"):
        Metadata(write(tmp_path, [whole, part], suffix))


def test_columns_of_types_that_do_not_go_together_are_told_of(tmp_path):
    tables = [pa.table({"url": ["u"], "NSFW": kind}) for kind in (["yes"], [True])]
    with pytest.raises(InputError, match=r"001\.arrow has other types.*000\.arrow.*NSFW.*string vs bool"):
        Metadata(write(tmp_path, tables))


@pytest.mark.parametrize("column", ["url", "caption"])
def test_a_url_or_caption_that_is_not_text_is_told_of(tmp_path, column):
    table = pa.table({"url": ["u"], "caption": ["c"]} | {column: [7]})
    with pytest.raises(InputError, match=f"'{column}' of .*000.arrow holds int64.*{column}=<column>"):
        Metadata(write(tmp_path, [table]))


def test_thumbnails_that_are_not_pictures_do_not_travel(tmp_path):
    metadata = Metadata(
        write(tmp_path, [pa.table({"url": ["u"], "thumbnail": ["https://example.org/t"]})])
    )
    assert metadata.schema.names == ["url", "caption"]


# --- damaged files --------------------------------------------------------------------------------

OPEN_EVERY_LENGTH = """
import json, sys
from pathlib import Path
from laion_assets.io.errors import InputError
from laion_assets.index.metadata import Metadata

path = Path(sys.argv[1])
whole, cut = path.read_bytes(), path.with_name("cut" + path.suffix)
told = {}
for length in range(len(whole) + 1):
    cut.unlink(missing_ok=True)
    cut.write_bytes(whole[:length])
    try:
        Metadata([cut])
        told[length] = "opened"
    except InputError as error:
        told[length] = str(error)
    except Exception as error:
        told[length] = repr(error)
print(json.dumps(told))
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_off_anywhere_is_named_and_nothing_crashes(tmp_path, suffix):
    table = pa.table({"url": [f"u{i}" for i in range(12)], "caption": ["c"] * 12})
    (path,) = write(tmp_path, [table], suffix, batch=5)
    # In a process of its own: reading beyond the end of a mapped file would end it.
    done = subprocess.run(
        [sys.executable, "-c", OPEN_EVERY_LENGTH, str(path)], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    assert told.pop(str(path.stat().st_size)) == "opened"
    assert len(told) > 500
    kind = "Arrow IPC" if suffix == indices.ARROW else "Parquet"
    strange = {
        length: told[length]
        for length in told
        if not (f"cut{suffix} is not a whole {kind} file" in told[length] and "again" in told[length])
    }
    assert strange == {}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_another_format_is_named(tmp_path, suffix):
    path = tmp_path / f"0{suffix}"
    path.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(InputError, match=f"0{suffix} is not a whole"):
        Metadata([path])


# --- through the graph ----------------------------------------------------------------------------

ROWS = 60


@pytest.mark.parametrize("rows", [45, 75])
def test_metadata_shorter_or_longer_than_the_index_is_reported_and_no_row_is_wrong(tmp_path, rows):
    root = tmp_path / "index"
    vectors = np.random.default_rng(5).standard_normal((ROWS, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(16)
    index.add(vectors)
    root.mkdir()
    faiss.write_index(index, str(root / "image.index"))
    urls = pa.table({"url": [f"https://example.org/{i}.jpg" for i in range(rows)]})
    indices.write_metadata(root, urls, files=4)
    with new_project(tmp_path, root) as project:
        (project.seeds / "mine").mkdir()
        np.save(project.seeds / "mine" / "seeds.npy", vectors[:3])
        result = project.run("mine", nb_images_knn=ROWS, nb_images_centroid=ROWS, dedup_threshold=1.0)
        assert failures(result) == {}
        (check,) = [
            check
            for check in result.get_asset_check_evaluations()
            if check.check_name == "metadata_covers_the_index"
        ]
        assert not check.passed
        assert f"{abs(rows - ROWS)} " in (check.description or "")
        told = reported(result, "staged_laion_index")
        assert (told["dagster/row_count"], told["metadata rows"]) == (ROWS, rows)
        covered = min(rows, ROWS)
        for asset, queries in (("knn_urls", 3), ("centroid_urls", 1)):
            told = reported(result, asset)
            assert told["received"] == queries * ROWS
            assert told["without url"] == queries * (ROWS - covered)
            assert told["kept"] == queries * covered
        for asset in ("knn_urls", "centroid_urls", "combined_urls"):
            table = pq.read_table(project.table(asset, "mine"), columns=["id", "url"]).to_pylist()
            assert {row["id"] for row in table} == set(range(covered))
            assert all(row["url"] == f"https://example.org/{row['id']}.jpg" for row in table)
