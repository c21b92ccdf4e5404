"""The faiss index: what is opened or refused, how far a search looks, and samples of its rows."""

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from helpers import indices

from laion_assets.index.faiss_file import HEADER
from laion_assets.index.faiss_index import Index
from laion_assets.index.in_place import open_folder
from laion_assets.index.vectors import unit
from laion_assets.io.errors import InputError


@pytest.mark.parametrize(
    "key",
    [
        "IDMap,Flat",
        "IVF4,PQ8x4fs",
        "IVF4,Flat,RFlat",
        "OPQ8,IDMap,IVF4,PQ8x4",
        "IVF4,FlatDedup",
        "IVF4,RaBitQ",
        "IVF4,FlatPanorama4",
        "NSG8",
        "PQ8x4",
        "IVF4,RQ4x4",
    ],
)
def test_a_kind_of_index_that_would_give_other_rows_is_refused(tmp_path, key) -> None:
    rows = indices.random_rows(np.random.default_rng(8), 400)
    index = faiss.index_factory(rows.shape[1], key, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    faiss.write_index(index, str(tmp_path / "image.index"))
    with pytest.raises(InputError, match=r"image.index is (a faiss Index|of a kind).*build it as"):
        Index(tmp_path / "image.index")


@pytest.mark.parametrize("key", ["SQ8", "HNSW8_SQ8", "IVF4,SQ8", "IVF4,SQfp16"])
def test_the_vectors_of_a_row_have_the_score_that_the_search_returns(tmp_path, key) -> None:
    rows = indices.random_rows(np.random.default_rng(8), 400)
    indices.write_one_file(tmp_path, indices.train(key, rows), rows)
    index = Index(tmp_path / "image.index")
    hits = index.search(rows[:5], 30, 4)
    vectors = index.decoder().decode(hits.codes)[hits.code]
    np.testing.assert_allclose(np.einsum("qkd,qd->qk", vectors, rows[:5]), hits.similarity, atol=1e-3)


@pytest.mark.parametrize("key", ["Flat", "HNSW4", "HNSW32"])
def test_the_recall_of_an_index_without_lists_is_that_of_its_search(tmp_path, key) -> None:
    rows = indices.random_rows(np.random.default_rng(8), 3000)
    index = faiss.index_factory(rows.shape[1], key, faiss.METRIC_INNER_PRODUCT)
    indices.write_one_file(tmp_path, index, rows)
    index = Index(tmp_path / "image.index")
    hits = index.search(rows[:40], 20, None)
    last_of_best = np.sort(rows[:40] @ rows.T, axis=1)[:, -20:-19]
    expected = float((hits.similarity >= last_of_best - 1e-5).mean())
    assert (expected < 0.97) == (key == "HNSW4")
    assert index.recall(rows[:40], hits, None) == pytest.approx(expected, abs=0.03)


def test_the_lists_are_found_whatever_name_the_index_states(tmp_path) -> None:
    """An index that was built on Windows states a path with backslashes."""
    rows = indices.random_rows(np.random.default_rng(3), 400)
    indices.write_index(tmp_path, rows, indices.MERGED)
    path, lists = indices.index_paths(tmp_path)
    expected = Index(path, lists).search(rows[:5], 10, 4)
    content = path.read_bytes()
    for other in (b"C:\\data\\merged_index.ivfdata", b"x"):
        at = content.rindex(b".ivfdata") + len(b".ivfdata")
        size = int.from_bytes(content[at : at + 8], "little")
        assert size == lists.stat().st_size
        name = at - int.from_bytes(content[: content.rindex(b"merged")][-8:], "little")
        head = content[: min(name, content.rindex(b"merged")) - 8]
        path.write_bytes(head + len(other).to_bytes(8, "little") + other + content[at:])
        found = Index(path, lists).search(rows[:5], 10, 4)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.similarity, expected.similarity)


@pytest.mark.parametrize("form", [indices.MERGED, "single file", "Flat"])
def test_a_truncated_index_is_an_error_and_not_the_end_of_the_process(tmp_path, form) -> None:
    indices.write_index(tmp_path, indices.random_rows(np.random.default_rng(2), 400), form)
    path, lists = indices.index_paths(tmp_path)
    cut = lists or path
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    program = (
        "import numpy as np, sys; from pathlib import Path\n"
        "from laion_assets.index.faiss_index import Index\n"
        "index = Index(*(Path(p) for p in sys.argv[1:]))\n"
        "index.search(np.ones((1, 16), np.float32), 400, 4)\n"
    )
    paths = [str(part) for part in (path, lists) if part]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-500:]
    last = done.stderr.strip().splitlines()[-1]
    assert "InputError" in last
    assert str(cut) in last


@pytest.mark.parametrize("bit", range(28, 40))
def test_a_size_far_beyond_the_file_is_refused_before_memory_is_filled(tmp_path, bit) -> None:
    indices.write_one_file(
        tmp_path, faiss.IndexFlatIP(16), indices.random_rows(np.random.default_rng(8), 40)
    )
    path = tmp_path / "image.index"
    content = bytearray(path.read_bytes())
    size = HEADER.size  # where the number of four bytes of its vectors is
    content[size + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(InputError, match="an array in it would be larger than the file"):
        Index(path)


def test_opening_an_index_prints_nothing(demo, capfd) -> None:
    open_folder(demo.index)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("form", indices.FORMS)
def test_a_sample_holds_rows_of_the_index_as_it_stores_them(tmp_path: Path, form: str) -> None:
    indices.write_index(tmp_path, indices.random_rows(np.random.default_rng(7), 50), form)
    index = Index(*indices.index_paths(tmp_path))
    ids, vectors = (np.concatenate(part) for part in zip(*index.sample(64, 50), strict=True))
    assert sorted(ids) == list(range(50))
    stored = unit(indices.reconstructed(tmp_path))[ids]
    np.testing.assert_allclose(vectors @ vectors.T, stored @ stored.T, atol=1e-4)
    few = [part_ids for part_ids, _ in index.sample(2, 3)]
    assert 0 < len(np.concatenate(few)) <= 6
    np.testing.assert_array_equal(np.concatenate(few), np.concatenate([i for i, _ in index.sample(2, 3)]))
