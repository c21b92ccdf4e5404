"""An index folder is opened in place, from strings; errors name the missing part and its parameter."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import indices

from laion_assets.index import open_folder, unit
from laion_assets.index.layout import metadata_files
from laion_assets.io.errors import InputError

ROWS = indices.random_rows(np.random.default_rng(3), 60)
URLS = pa.table({"link": [f"u/{number}" for number in range(60)]})


def write(folder: Path, form: str) -> None:
    indices.write_index(folder, ROWS, form)
    indices.write_metadata(folder, URLS, files=3)


@pytest.mark.parametrize("form", [indices.MERGED, "single file", "Flat"])
def test_every_row_is_found_with_its_own_metadata(tmp_path, form):
    write(tmp_path, form)
    index, metadata = open_folder(str(tmp_path), {"url": "link"})
    hits = index.search(unit(indices.reconstructed(tmp_path)), 60, index.nlist)
    for ids in hits.ids:
        assert metadata.take(ids)["url"].to_pylist() == [f"u/{number}" for number in ids]
        assert sorted(ids) == list(range(60))


def test_metadata_may_be_in_another_folder_and_paths_may_begin_at_home(tmp_path, monkeypatch):
    write(tmp_path / "index", "Flat")
    shutil.move(tmp_path / "index" / "metadata", tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    index, metadata = open_folder("~/index", {"url": "link"}, metadata="~/elsewhere")
    assert len(metadata) == index.rows == 60


@pytest.mark.parametrize(
    ("missing", "about", "facts"),
    [
        ("", "index_uri", ["no folder"]),
        ("image.index", "index_uri", ["no index", "populated.index"]),
        ("metadata", "metadata_uri", ["no folder", "metadata"]),
        ("metadata/*", "metadata_uri", [".arrow", ".parquet", "found nothing"]),
    ],
)
def test_what_is_missing_is_named_with_the_parameter_to_correct(tmp_path, missing, about, facts):
    root = tmp_path / "index"
    write(root, "Flat")
    for path in root.glob(missing) if missing else [root]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError) as refused:
        open_folder(str(root))
    assert [fact for fact in [str(root), *facts] if fact not in str(refused.value)] == []
    assert refused.value.about == about


def test_an_index_without_its_lists_is_refused(tmp_path):
    write(tmp_path, indices.MERGED)
    (tmp_path / "image.index" / "merged_index.ivfdata").unlink()
    with pytest.raises(InputError, match=r"merged_index\.ivfdata"):
        open_folder(str(tmp_path))
    (tmp_path / "image.index" / "laion.ivfdata").touch()
    with pytest.raises(InputError, match=r"rename image\.index/laion\.ivfdata to that"):
        open_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "facts"),
    [
        ([f"metadata_{i}.arrow" for i in range(20)], ["metadata_10.arrow comes before metadata_2.arrow"]),
        (["a1b9.parquet", "a1b10.parquet"], ["a1b10.parquet comes before a1b9.parquet", "digits"]),
        (["0.arrow", "0.parquet"], ["two formats", "0.arrow and 0.parquet"]),
        (["a\nb.arrow"], [r"a\nb.arrow", "without control characters"]),
        ([f"{'x' * 230}.arrow"], ["at most 200 bytes"]),
    ],
)
def test_metadata_whose_order_or_name_is_unclear_is_refused(names, facts):
    """Or rows would get the URLs of others."""
    with pytest.raises(InputError) as refused:
        metadata_files(names, "folder")
    assert [fact for fact in ["folder", *facts] if fact not in str(refused.value)] == []
    assert refused.value.about == "metadata_uri"


def test_names_with_as_many_digits_are_in_order():
    names = [f"part-{part:05}-of-00012_{i:03}.arrow" for part in range(2) for i in range(11)]
    assert metadata_files(reversed([*names, "_SUCCESS", ".hidden.parquet"]), "folder") == tuple(names)
