"""The demo data looks like a user's own index and seeds, and building it leaves theirs unchanged."""

import io
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from PIL import Image

from laion_assets.defs.drawing.contact_sheet import Strip, contact_sheet, encode
from laion_assets.demo import DEMO_SETS, build, build_demo
from laion_assets.io.errors import InputError


def opened(index: Path) -> Any:
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
    return faiss.read_index(str(index / "image.index" / "populated.index"), flags)


def metadata(index: Path) -> pa.Table:
    files = sorted((index / "metadata").glob("*.arrow"))
    return pa.concat_tables(pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files)


def source() -> pa.Table:
    return pyarrow.parquet.read_table(build._CLIP_ART)


def raw_vectors(urls: list[str]) -> np.ndarray:
    """The source's embedding of each URL, (n, 256)."""
    row_of = {url: row for row, url in enumerate(source()["url"].to_pylist())}
    return build._unit_vectors(source())[[row_of[url] for url in urls]]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def times(*folders: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


def test_plain_faiss_reads_the_index_after_the_folder_was_moved(demo, tmp_path):
    first = shutil.copytree(demo.index, tmp_path / "first")
    moved = first.rename(tmp_path / "moved")
    index = opened(moved)
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    assert isinstance(faiss.downcast_InvertedLists(ivf.invlists), faiss.OnDiskInvertedLists)
    assert faiss.downcast_InvertedLists(ivf.invlists).filename == str(
        moved / "image.index" / "merged_index.ivfdata"
    )
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT
    assert ivf.by_residual
    assert index.ntotal == len(metadata(moved)) == demo.report.rows


def test_an_id_names_the_same_picture_in_the_index_and_in_the_metadata(demo):
    raw = raw_vectors(metadata(demo.index)["url"].to_pylist())
    index = opened(demo.index)
    cosines = index.reconstruct_n(0, index.ntotal) @ raw.T
    # Copies of a picture have the same vector, so ask for the best score, not for the row.
    right = cosines.diagonal() >= cosines.max(axis=1) - 1e-5
    assert right.mean() > 0.98


def test_metadata_is_in_several_files(demo):
    files = sorted(path.name for path in (demo.index / "metadata").iterdir())
    assert files == ["000000.arrow", "000001.arrow"]
    for name in files:
        reader = pa.ipc.open_file(str(demo.index / "metadata" / name))
        assert reader.schema.names == ["url", "caption", "category", "thumbnail"]


def test_compression_keeps_neighbours_and_near_duplicates(demo):
    report = demo.report
    assert report.recall_all_lists > 0.9
    assert report.recall_small_request > 0.8
    assert report.duplicate_pairs_both > 0.98 * report.duplicate_pairs_raw
    assert report.duplicate_pairs_both > 0.98 * report.duplicate_pairs_reconstructed


def test_neither_a_seed_nor_a_copy_of_it_is_in_the_index(demo):
    indexed = metadata(demo.index)["url"].to_pylist()
    url_of = {PurePosixPath(url).stem: url for url in source()["url"].to_pylist()}
    for name in DEMO_SETS:
        images = sorted((demo.images / name).iterdir())
        assert len(images) == demo.report.seeds[name] >= 10
        urls = [url_of[path.stem] for path in images]
        assert not set(urls) & set(indexed)
        assert (raw_vectors(urls) @ raw_vectors(indexed).T).max() < 0.94
        assert all(Image.open(path).format == "WEBP" for path in images)


def test_a_second_build_does_nothing_and_reports_the_same(demo):
    before = times(demo.index, demo.images)
    again = build_demo(demo.index, demo.images)
    assert times(demo.index, demo.images) == before
    assert again.seconds == 0
    assert {**vars(again), "seconds": demo.report.seconds} == vars(demo.report)


def test_another_build_gives_the_same_bytes_in_silence(demo, tmp_path):
    script = (
        "import sys, pathlib; from laion_assets.demo import build_demo; "
        "build_demo(*map(pathlib.Path, sys.argv[1:]))"
    )
    index, seeds = tmp_path / "index", tmp_path / "seeds"
    done = subprocess.run(
        [sys.executable, "-c", script, str(index), str(seeds)],
        capture_output=True,
        check=True,
        timeout=300,
    )
    assert done.stdout == done.stderr == b""
    assert contents(index) == contents(demo.index)
    assert contents(seeds) == contents(demo.images)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"index", "seeds", ".index.lock"}


def test_what_users_keep_in_the_seed_folder_survives(demo, tmp_path):
    seeds = tmp_path / "seeds"
    (seeds / "mine").mkdir(parents=True)
    (seeds / "mine" / "a.npy").write_bytes(b"mine")
    (seeds / "flower").mkdir()
    (seeds / "flower" / "b.npy").write_bytes(b"my own flowers")
    build_demo(demo.index, seeds)
    assert (seeds / "mine" / "a.npy").read_bytes() == b"mine"
    assert contents(seeds / "flower") == {"b.npy": b"my own flowers"}
    assert contents(seeds / "house") == contents(demo.images / "house")


def test_an_index_of_the_users_own_is_refused_and_not_deleted(demo, tmp_path):
    index = shutil.copytree(demo.index, tmp_path / "index")
    (index / "image.index" / "populated.index").write_bytes(b"my own index")
    before = contents(index)
    with pytest.raises(InputError, match="not part of the demo index"):
        build_demo(index, tmp_path / "seeds")
    assert contents(index) == before


def test_an_index_of_an_earlier_version_is_replaced_whole(demo, tmp_path, monkeypatch):
    index, seeds = shutil.copytree(demo.index, tmp_path / "index"), tmp_path / "seeds"
    monkeypatch.setattr(build, "BUILD_VERSION", build.BUILD_VERSION + 1)
    monkeypatch.setattr(build, "INDEX_KEY", "OPQ2_256,IVF4_HNSW4,PQ2x8")
    (seeds / "fruit").mkdir(parents=True)
    (seeds / "fruit" / "seeds.parquet").write_bytes(b"vectors of an earlier model")
    (seeds / "house").mkdir()
    (seeds / "house" / "mine.npy").write_bytes(b"mine")
    report = build_demo(index, seeds)
    assert report.seconds > 0
    assert contents(seeds / "fruit") == contents(demo.images / "fruit")
    assert contents(seeds / "house") == {"mine.npy": b"mine"}
    assert faiss.extract_index_ivf(opened(index)).nlist == 4
    assert build_demo(index, seeds).seconds == 0
    assert {path.name for path in tmp_path.iterdir()} == {"index", "seeds", ".index.lock"}


@pytest.mark.faults
def test_an_index_that_lost_a_file_is_built_again(demo, tmp_path, monkeypatch):
    index, seeds = shutil.copytree(demo.index, tmp_path / "index"), tmp_path / "seeds"
    (index / "metadata" / "000001.arrow").unlink()
    monkeypatch.setattr(build, "INDEX_KEY", "OPQ2_256,IVF4_HNSW4,PQ2x8")
    assert build_demo(index, seeds).seconds > 0
    assert len(metadata(index)) == demo.report.rows


def encoded(size: tuple[int, int], colour: str = "red", kind: str = "WEBP") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, kind)
    return buffer.getvalue()


def test_a_contact_sheet_survives_broken_and_oversized_pictures():
    good = encoded((80, 40))
    bomb = encoded((4000, 4000), kind="PNG")
    pictures = [good, None, b"", b"no picture", good[:30], bomb, good]
    sheet = contact_sheet([Strip("seeds", "7", pictures, [])], columns=7, cell=88)
    middles = [sheet.getpixel((28 + 96 * column + 44, 28 + 34 + 44)) for column in range(7)]
    red = [pixel[0] > 200 and pixel[1] < 60 for pixel in middles]
    assert red == [True, False, False, False, False, False, True]
    assert len(set(middles[1:6])) == 1


def test_transparent_pictures_lie_on_white():
    clear = encoded((60, 60), "#ff000000", "PNG")
    sheet = contact_sheet([Strip("seeds", "", [clear], [])], columns=1)
    assert sheet.getpixel((28 + 44, 28 + 34 + 44)) == (255, 255, 255)


@pytest.mark.parametrize("strips", [[], [Strip("", "", [], [])], [Strip("t" * 999, "ü\n漢", [], [])]])
def test_a_contact_sheet_of_little_or_odd_text_is_still_a_picture(strips):
    assert contact_sheet(strips, show_captions=True).size[0] > 1000


def test_an_encoded_sheet_keeps_to_its_limit(demo):
    thumbnails = metadata(demo.index)["thumbnail"][:120].to_pylist()
    sheet = contact_sheet([Strip("all", "120", thumbnails, [])])
    full, mime = encode(sheet, max_bytes=10_000_000)
    assert mime == "image/webp"
    assert Image.open(io.BytesIO(full)).size == sheet.size
    small, _ = encode(sheet, max_bytes=len(full) // 5)
    assert len(small) <= len(full) // 5
    assert max(Image.open(io.BytesIO(small)).size) < max(sheet.size)
    with pytest.raises(ValueError, match="does not fit"):
        encode(sheet, max_bytes=10)
