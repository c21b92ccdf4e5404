"""Published embeddings in every layout are read as written, or an error says why not."""

import os
import pickle
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import gcsfs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.faults import Proxy, first, proxy_before
from hypothesis import given, settings
from hypothesis import strategies as st

from laion_assets.build import input_files, matrices, parquet
from laion_assets.build.embeddings import EmbeddingReader, list_embeddings, metadata_schema
from laion_assets.io.errors import InputError
from laion_assets.staging.transfer import backoff

D = 5
NPY_LAYOUTS = ("clip-retrieval", "laion")
LAYOUTS = (*NPY_LAYOUTS, "datacomp", "compressed", "parquet")
FLOATS = (np.float16, np.float32, np.float64)
folders = count()

# --- files as others publish them -----------------------------------------------------------------


def vectors_of(rows: int, dimension: int = D, seed: int = 0) -> Any:
    """Numbers that every dtype holds exactly."""
    return np.random.default_rng(seed).integers(-99, 99, (rows, dimension)).astype(np.float32)


def columns_of(rows: int, start: int = 0) -> pa.Table:
    numbers = range(start, start + rows)
    return pa.table({"url": [f"https://example.org/{n}.jpg" for n in numbers], "key": list(numbers)})


def lists_of(matrix: Any, fixed: bool = True) -> pa.Array:
    flat = pa.array(matrix.ravel())
    if fixed:
        return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])
    return pa.ListArray.from_arrays(np.arange(len(matrix) + 1, dtype=np.int32) * matrix.shape[1], flat)


def names_of(layout: str, number: int) -> tuple[str, str]:
    """The files of one part in a layout."""
    if layout == "clip-retrieval":
        return f"img_emb/img_emb_{number}.npy", f"metadata/metadata_{number}.parquet"
    if layout == "laion":
        return f"img_emb/img_emb_{number:04d}.npy", f"laion2B-en-metadata/metadata_{number:04d}.parquet"
    if layout == "parquet":
        return f"part-{number}.parquet", f"part-{number}.parquet"
    return f"a0f{number}.npz", f"a0f{number}.parquet"


def write_part(
    folder: Path, layout: str, number: int, matrix: Any, columns: pa.Table, group: int = 1000
) -> None:
    vectors, metadata = (folder / name for name in names_of(layout, number))
    for path in (vectors, metadata):
        path.parent.mkdir(parents=True, exist_ok=True)
    if layout == "parquet":
        columns = columns.append_column("embedding", lists_of(matrix, fixed=number % 2 == 0))
    elif layout in NPY_LAYOUTS:
        np.save(vectors, matrix)
    else:
        save = np.savez if layout == "datacomp" else np.savez_compressed
        save(vectors, l14_txt=matrix + 1, l14_img=matrix, b32_img=matrix[:, :2])
    pq.write_table(columns, metadata, row_group_size=group)


def write(folder: Path, layout: str, sizes: Sequence[int] = (7, 0, 12), **more: Any) -> Any:
    """Write parts of some sizes; returns the rows of all of them."""
    rows = vectors_of(sum(sizes))
    for number, (start, size) in enumerate(zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True)):
        write_part(
            folder, layout, number, rows[start : start + size], columns_of(size, int(start)), **more
        )
    return rows


def read_all(uri: str | Path, block: int = 4, **options: Any) -> tuple[Any, pa.Table]:
    listed = list_embeddings(str(uri), **options)
    reader = EmbeddingReader(listed)
    blocks = [block_ for file in listed.files for block_ in reader.blocks(file, block)]
    batches = [batch for file in listed.files for batch in reader.metadata(file)]
    return np.concatenate(blocks), pa.Table.from_batches(batches, metadata_schema(listed))


def refused(uri: str | Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        list_embeddings(str(uri), **options)
    message = str(caught.value)
    assert str(uri) in message
    assert ":" in message  # what is wrong, and the remedy
    return message


# --- what was written is what is read -------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised_and_read_in_natural_order(tmp_path, layout):
    sizes = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]  # the last is number 10
    rows = write(tmp_path, layout, sizes)
    listed = list_embeddings(f"{tmp_path}/")
    assert listed.layout == {"compressed": "datacomp"}.get(layout, layout)
    assert [file.name for file in listed.files] == [names_of(layout, n)[0] for n in range(len(sizes))]
    assert [file.rows for file in listed.files] == sizes
    assert (listed.rows, listed.dimension) == (sum(sizes), D)
    assert listed.starts.tolist() == [0, *np.cumsum(sizes)]
    read, metadata = read_all(tmp_path, layout=listed.layout, key=listed.key)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, rows)
    assert metadata.equals(columns_of(sum(sizes)))
    assert pickle.loads(pickle.dumps(listed)) == listed


@given(data=st.data())
@settings(max_examples=15)
def test_any_split_into_files_row_groups_and_dtypes_gives_the_same_rows(data):
    layout = data.draw(st.sampled_from(LAYOUTS))
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any))
    rows = vectors_of(sum(sizes))
    with tempfile.TemporaryDirectory() as made, pytest.MonkeyPatch.context() as patch:
        # Every read of the files comes in several pieces, whose ends are not those of rows.
        patch.setattr(input_files, "PART", data.draw(st.integers(7, 300)))
        patch.setattr(matrices, "STREAM_WINDOW", data.draw(st.integers(1, 300)))
        patch.setattr(input_files, "STREAM_WINDOW", data.draw(st.integers(9, 300)))
        patch.setattr(matrices, "UNPACKED_PIECE", data.draw(st.integers(9, 300)))
        patch.setattr(parquet, "PIECE_NUMBERS", data.draw(st.integers(1, 300)))
        patch.setattr(parquet, "METADATA_ROWS", data.draw(st.integers(1, 30)))
        at = 0
        for number, size in enumerate(sizes):
            dtype = np.dtype(data.draw(st.sampled_from(FLOATS)))
            if layout != "parquet" and data.draw(st.booleans()):
                dtype = dtype.newbyteorder(">")
            part, group = rows[at : at + size].astype(dtype), data.draw(st.integers(1, 50))
            write_part(Path(made), layout, number, part, columns_of(size, at), group)
            at += size
        read, metadata = read_all(made, data.draw(st.integers(1, 50)))
        np.testing.assert_array_equal(read, rows)
        assert metadata.equals(columns_of(len(rows)))
        listed = list_embeddings(made)
        reader = EmbeddingReader(listed)
        for file, first_row in zip(listed.files, listed.starts.tolist(), strict=False):
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, file.rows)] * 2)))
            np.testing.assert_array_equal(
                reader.vectors(file, start, stop), rows[first_row + start : first_row + stop]
            )
        wanted = data.draw(st.integers(0, len(rows) + 3))
        vectors, numbers = reader.sample(wanted, np.random.default_rng(wanted))
        assert len(numbers) == min(wanted, len(rows))
        assert (np.diff(numbers) > 0).all()
        np.testing.assert_array_equal(vectors, rows[numbers])


def test_laions_files_are_paired_by_number_wherever_they_are(tmp_path):
    rows = vectors_of(6)
    pairs = [
        ("img_emb_0000.npy", "metadata_0000.parquet"),
        ("a/b/img_emb_1.npy", "metadata/metadata_0001.parquet"),
    ]
    for number, (vectors, metadata) in enumerate(pairs):
        for name in (vectors, metadata):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / vectors, rows[number * 3 : number * 3 + 3])
        pq.write_table(columns_of(3, number * 3), tmp_path / metadata)
    (tmp_path / "text_emb").mkdir()
    np.save(tmp_path / "text_emb" / "text_emb_0.npy", rows)
    (tmp_path / "_temporary.parquet").write_bytes(b"half")
    read, metadata = read_all(tmp_path)
    np.testing.assert_array_equal(read, rows)
    assert metadata.equals(columns_of(6))


def test_a_key_chooses_the_vectors_and_datacomps_name_their_model(tmp_path):
    large, small = vectors_of(4, 768), vectors_of(4, 512)
    np.savez(tmp_path / "0a.npz", l14_img=large, b32_img=small, other=small)
    pq.write_table(columns_of(4), tmp_path / "0a.parquet")
    listed = list_embeddings(str(tmp_path))
    assert (listed.key, listed.model.name) == ("l14_img", "openai/clip-vit-large-patch14")
    b32 = list_embeddings(str(tmp_path), key="b32_img")
    assert (b32.dimension, b32.model.name) == (512, "openai/clip-vit-base-patch32")
    assert list_embeddings(str(tmp_path), key="other").model.name is None
    np.testing.assert_array_equal(EmbeddingReader(b32).vectors(b32.files[0], 1, 3), small[1:3])
    message = refused(tmp_path, key="h14_img")
    assert all(name in message for name in ("0a.npz", "h14_img", "l14_img", "b32_img", "other"))


@pytest.mark.parametrize("fixed", [True, False])
def test_a_null_vector_is_a_row_of_nan_and_a_vector_of_another_length_is_named(tmp_path, fixed):
    kind = pa.list_(pa.float16(), 2 if fixed else -1)
    values = [None, [1.0, 2.0], None, [3.0, None]]
    table = columns_of(4).append_column("embedding", pa.array(values, kind))
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=2)
    expected = [[np.nan, np.nan], [1, 2], [np.nan, np.nan], [3, np.nan]]
    np.testing.assert_array_equal(read_all(tmp_path)[0], expected)
    pq.write_table(table.slice(0, 1), tmp_path / "1.parquet")  # nulls alone
    np.testing.assert_array_equal(read_all(tmp_path)[0], [*expected, expected[0]])
    if not fixed:
        odd = columns_of(3).append_column("embedding", pa.array([[1.0, 2.0], [3.0], [4.0, 5.0]]))
        pq.write_table(odd, tmp_path / "1.parquet")
        with pytest.raises(InputError, match=r"row 1 of .*1\.parquet"):
            read_all(tmp_path)


def test_metadata_of_all_files_fits_one_schema_without_vectors_and_nested_columns(tmp_path):
    kinds = (pa.int32(), pa.large_string()), (pa.int64(), pa.null()), (pa.int32(), pa.string_view())
    for number, (key, text) in enumerate(kinds):
        table = pa.table(
            {
                "uid": pa.array([f"{number}"] * 2).dictionary_encode(),
                "key": pa.array([1, 2], key),
                "text": pa.nulls(2) if text == pa.null() else pa.array(["a", None], text),
                "face_bboxes": [[[0.5]], None],
                "embedding": [[1.0], [2.0]],
                **({"sha256": ["x", "y"]} if number == 1 else {}),
                "__index_level_0__": [0, 1],
            }
        )
        pq.write_table(table, tmp_path / f"{number}.parquet")
    listed = list_embeddings(str(tmp_path))
    text = pa.string()
    expected = {"uid": text, "key": pa.int64(), "text": text, "sha256": text}
    assert metadata_schema(listed) == pa.schema(expected)
    read = read_all(tmp_path)[1]
    assert read["uid"].to_pylist() == ["0", "0", "1", "1", "2", "2"]
    assert read["text"].to_pylist() == ["a", None, None, None, "a", None]
    assert read["sha256"].to_pylist() == [None, None, "x", "y", None, None]
    reader = EmbeddingReader(listed)
    some = metadata_schema(listed, ["sha256", "face_bboxes", "key"])
    chosen = next(reader.metadata(listed.files[0], some))
    assert chosen.to_pydict() == {"sha256": [None] * 2, "face_bboxes": [[[0.5]], None], "key": [1, 2]}
    one = metadata_schema(listed, ["sha256"])
    assert next(reader.metadata(listed.files[0], one)).to_pydict() == {"sha256": [None] * 2}
    for column in ("embedding", "size"):
        with pytest.raises(InputError, match=rf"{column}.*uid"):
            metadata_schema(listed, [column])
    pq.write_table(pa.table({"key": ["text"], "embedding": [[1.0]]}), tmp_path / "2.parquet")
    with pytest.raises(InputError, match=r"2\.parquet.*key"):
        metadata_schema(list_embeddings(str(tmp_path)))


def test_any_storage_of_fsspec_and_links_are_read_and_one_file_may_be_named(tmp_path):
    rows = write(tmp_path / "real", "parquet", [4])
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "part-0.parquet").symlink_to(tmp_path / "real" / "part-0.parquet")
    memory = fsspec.filesystem("memory")
    folder = f"/embeddings-{next(folders)}"
    memory.pipe_file(f"{folder}/part-0.parquet", (tmp_path / "real" / "part-0.parquet").read_bytes())
    for uri in (tmp_path / "link", f"memory:/{folder}", tmp_path / "real" / "part-0.parquet"):
        np.testing.assert_array_equal(read_all(uri)[0], rows)


# --- samples --------------------------------------------------------------------------------------


def test_a_sample_takes_each_row_as_often_as_any_other_and_reads_little(tmp_path):
    sizes = (3000, 500, 6500)
    rows = write(tmp_path, "laion", sizes)
    listed = list_embeddings(str(tmp_path))
    reader = EmbeddingReader(listed)
    times = np.zeros(len(rows))
    before = reader._files.stats.fetched
    for seed in range(400):
        vectors, numbers = reader.sample(1000, np.random.default_rng(seed))
        times[numbers] += 1
        of_files = np.diff(np.searchsorted(numbers, listed.starts))
        assert np.abs(of_files - np.array(sizes) / 10).max() <= 1
    np.testing.assert_array_equal(vectors, rows[numbers])
    assert reader._files.stats.fetched - before == 400 * 1000 * D * 4
    # 40 expected; of a fair draw of runs, no region of 100 rows differs much in the mean
    assert np.abs(times.reshape(-1, 100).mean(1) - 40).max() < 15
    again = reader.sample(1000, np.random.default_rng(399))
    np.testing.assert_array_equal(again[1], numbers)


@pytest.mark.parametrize("layout", ["parquet", "compressed"])
def test_a_sample_of_units_reads_some_of_them_from_many_files(tmp_path, layout):
    rows = write(tmp_path, layout, [400] * 20, group=40)
    listed = list_embeddings(str(tmp_path))
    reader = EmbeddingReader(listed)
    vectors, numbers = reader.sample(100, np.random.default_rng(0))
    np.testing.assert_array_equal(vectors, rows[numbers])
    size = sum(file.vectors.size for file in listed.files)
    assert len(numbers) == 100
    if layout == "compressed":
        assert len(np.unique(numbers // 400)) <= 2
        assert reader._files.stats.fetched < size / 5
    else:
        assert len(np.unique(numbers // 400)) >= 9
        assert len(np.unique(numbers // 40)) <= 11


# --- what cannot be used --------------------------------------------------------------------------


def test_a_folder_without_embeddings_says_what_it_holds_and_what_is_known(tmp_path):
    assert "no folder" in refused(tmp_path / "nowhere")
    (tmp_path / "embeddings.npy").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    message = refused(tmp_path)
    for part in ("embeddings.npy", "notes.txt", "img_emb/img_emb_0.npy", ".npz", "parquet"):
        assert part in message
    with pytest.raises(InputError, match=r"autofaiss.*datacomp"):
        list_embeddings(str(tmp_path), layout="autofaiss")
    assert "metadata_0.parquet" in refused(tmp_path, layout="clip-retrieval")


@pytest.mark.parametrize("layout", ["clip-retrieval", "laion", "datacomp"])
def test_files_without_partner_are_named_the_first_few_of_them(tmp_path, layout):
    write(tmp_path, layout, [2] * 12)
    for number in range(1, 11):
        (tmp_path / names_of(layout, number)[1]).unlink()
    (tmp_path / names_of(layout, 11)[0]).unlink()
    message = refused(tmp_path)
    assert names_of(layout, 1)[0] in message
    assert "more" in message
    assert names_of(layout, 9)[0] not in message
    (tmp_path / names_of(layout, 11)[1]).rename(tmp_path / names_of(layout, 1)[1])
    assert names_of(layout, 2)[0] in refused(tmp_path)


@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize("layout", ["clip-retrieval", "laion", "datacomp"])
def test_the_missing_partner_is_named_as_it_must_be_called(tmp_path, layout, gone):
    write(tmp_path, layout, [2, 2, 2])
    files = names_of(layout, 1)
    (tmp_path / files[gone]).unlink()
    assert f"has {files[1 - gone]} without {files[gone]}: add" in refused(tmp_path)


def test_the_missing_partner_is_named_though_no_file_has_one(tmp_path):
    write(tmp_path, "clip-retrieval", [2])
    (tmp_path / "metadata" / "metadata_0.parquet").unlink()
    assert "img_emb_0.npy without metadata/metadata_0.parquet:" in refused(tmp_path)


def test_files_that_share_a_number_are_refused_and_so_are_mixed_layouts(tmp_path):
    rows = write(tmp_path, "clip-retrieval", [2, 3])
    np.savez(tmp_path / "a.npz", l14_img=rows)
    pq.write_table(columns_of(5), tmp_path / "a.parquet")
    message = refused(tmp_path)
    assert all(part in message for part in ("img_emb_0.npy", "a.npz", "clip-retrieval", "datacomp"))
    np.testing.assert_array_equal(read_all(tmp_path, layout="clip-retrieval")[0], rows)
    (tmp_path / "a.npz").unlink()
    assert "a.parquet" in refused(tmp_path)
    (tmp_path / "a.parquet").unlink()
    np.save(tmp_path / "img_emb_01.npy", rows)
    message = refused(tmp_path)
    assert "img_emb/img_emb_1.npy" in message
    assert "img_emb_01.npy" in message


def save_pickled(path: Path) -> None:
    np.save(path, np.array([[{}] * D] * 3, dtype=object), allow_pickle=True)


BAD_ARRAYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one dimension": (lambda path: np.save(path, np.zeros(3, np.float32)), r"\(3,\)"),
    "three dimensions": (lambda path: np.save(path, np.zeros((3, D, 1), np.float32)), r"\(3, 5, 1\)"),
    "whole numbers": (lambda path: np.save(path, np.zeros((3, D), np.int64)), "int64"),
    "objects": (save_pickled, "objects"),
    "columns first": (lambda path: np.save(path, np.asfortranarray(np.zeros((3, D), "f4"))), "Fortran"),
    "no numbers": (lambda path: np.save(path, np.zeros((3, 0), "f4")), r"\(3, 0\)"),
    "other dimension": (lambda path: np.save(path, np.zeros((3, D + 1), "f4")), "6"),
    "more rows": (lambda path: np.save(path, np.zeros((4, D), "f4")), r"4 rows.*3"),
    "nothing": (lambda path: path.write_bytes(b""), "complete"),
    "text": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "complete"),
}


@pytest.mark.parametrize("member", [False, True], ids=["npy", "npz"])
@pytest.mark.parametrize("bad", BAD_ARRAYS)
def test_an_array_that_is_not_vectors_is_named_with_what_it_is(tmp_path, bad, member):
    layout = "datacomp" if member else "laion"
    write(tmp_path, layout, [3, 3, 3])
    make, expected = BAD_ARRAYS[bad]
    path = tmp_path / names_of(layout, 1)[0]
    made = tmp_path / "made.npy"
    make(made)
    if member:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(made, "l14_img.npy")
        made.unlink()
    else:
        made.rename(path)
    with pytest.raises(InputError, match=rf"(?s){path.name}.*{expected}"):
        list_embeddings(str(tmp_path))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_is_cut_anywhere_is_refused_before_any_row_is_read(tmp_path, layout):
    write(tmp_path, layout, [30, 30])
    for name in set(names_of(layout, 1)):
        path = tmp_path / name
        whole = path.read_bytes()
        for size in {0, 1, 50, 128, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:size])
            with pytest.raises(InputError, match=path.name):
                list_embeddings(str(tmp_path))
        path.write_bytes(whole)
    list_embeddings(str(tmp_path))


def test_an_npz_file_that_is_none_is_named_in_plain_words(tmp_path):
    write(tmp_path, "datacomp", [2])
    path = tmp_path / names_of("datacomp", 0)[0]
    path.write_bytes(path.read_bytes()[:-30])
    assert f"{path.name} is truncated or not an .npz file: " in refused(tmp_path)


def test_of_many_bad_files_the_first_are_named_and_all_are_counted(tmp_path):
    write(tmp_path, "laion", [2] * 12)
    for number in range(2, 12):
        pq.write_table(columns_of(number), tmp_path / names_of("laion", number)[1])
    message = refused(tmp_path)  # part 2 has two rows
    assert message.startswith("9 files")
    assert "img_emb_0003.npy" in message
    assert "2 rows" in message
    assert "img_emb_0011.npy" not in message


def test_vectors_of_different_dimensions_and_folders_without_rows_are_refused(tmp_path):
    write(tmp_path, "laion", [0, 0])
    assert "no rows" in refused(tmp_path)
    for number, dimension in enumerate((4, 4, 3, 4)):
        write_part(tmp_path, "laion", number, vectors_of(2, dimension), columns_of(2))
    message = refused(tmp_path)
    assert "img_emb_0002.npy has 3" in message
    assert "img_emb_0000.npy has 4" in message


def test_a_column_of_vectors_is_chosen_or_has_to_be_named(tmp_path):
    path = tmp_path / "0.parquet"
    floats, whole = pa.array([[1.0]]), pa.array([[1]])
    pq.write_table(pa.table({"a": floats, "b": floats, "ids": whole, "url": ["x"]}), path)
    message = refused(tmp_path)
    assert "several" in message
    assert "a, b" in message
    assert list_embeddings(str(tmp_path), key="b").key == "b"
    assert "int64" in refused(tmp_path, key="ids")
    assert "a, b, ids, url" in refused(tmp_path, key="c")
    pq.write_table(pa.table({"url": ["x"], "ids": whole}), path)
    assert "url, ids" in refused(tmp_path)
    pq.write_table(pa.table({"text_embedding": floats, "embedding": floats}), path)
    assert "text_embedding, embedding" in refused(tmp_path)
    assert list_embeddings(str(tmp_path), key="embedding").key == "embedding"
    pq.write_table(pa.table({"a": floats}), tmp_path / "1.parquet")
    assert "1.parquet" in refused(tmp_path, key="embedding")


@pytest.mark.parametrize("layout", ["compressed", "parquet"])
def test_damage_inside_a_file_is_found_when_it_is_read(tmp_path, layout):
    rows = np.random.default_rng(0).random((5000, D)).astype(np.float32)
    write_part(tmp_path, layout, 0, rows, columns_of(5000))
    path = tmp_path / names_of(layout, 0)[0]
    listed = list_embeddings(str(tmp_path))
    content = bytearray(path.read_bytes())
    if layout == "compressed":
        middle = (listed.files[0].stored.start + listed.files[0].stored.stop) // 2
        content[middle : middle + 8] = bytes(8)
    else:
        middle = len(content) // 3
        content[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(content)
    reader = EmbeddingReader(list_embeddings(str(tmp_path)))
    with pytest.raises(InputError, match=path.name):
        list(reader.blocks(reader.embeddings.files[0], 100))


# --- files that change ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_changes_or_goes_while_it_is_read_is_named(tmp_path, layout):
    write(tmp_path, layout, [300])
    vectors, metadata = (tmp_path / name for name in names_of(layout, 0))
    reads: dict[Path, list[Callable[[EmbeddingReader, Any], object]]] = {
        vectors: [
            lambda reader, file: reader.vectors(file, 3, 5),
            lambda reader, file: list(reader.blocks(file, 7)),
            lambda reader, _: reader.sample(9, np.random.default_rng(0)),
        ],
        metadata: [lambda reader, file: list(reader.metadata(file))],
    }
    for path, calls in reads.items():
        for call in calls:
            listed = list_embeddings(str(tmp_path))
            reader = EmbeddingReader(listed)
            call(reader, listed.files[0])
            content = path.read_bytes()
            path.write_bytes(content)
            os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))
            with pytest.raises(InputError, match=rf"{path.name} changed"):
                call(reader, listed.files[0])
            path.unlink()
            with pytest.raises(InputError, match=rf"{path.name} changed"):
                call(reader, listed.files[0])
            path.write_bytes(content)


def test_blocks_that_are_left_early_leave_no_thread(tmp_path):
    rows = write(tmp_path, "laion", [300])
    listed = list_embeddings(str(tmp_path))
    blocks = EmbeddingReader(listed).blocks(listed.files[0], 100)
    np.testing.assert_array_equal(next(blocks), rows[:100])
    assert any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    blocks.close()
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


# --- a bucket -------------------------------------------------------------------------------------


@pytest.fixture
def proxy(gcs: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Before the tests' server; pauses between retries are short."""
    monkeypatch.setattr(backoff, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(backoff, "LONGEST_PAUSE", 0.05)
    with proxy_before(gcs) as made:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", made.url)
        yield made


@pytest.fixture
def writer(gcs: str) -> Any:
    """A file system that writes to the server without the proxy, which only reads."""
    return gcsfs.GCSFileSystem(endpoint_url=gcs, token="anon", skip_instance_cache=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bucket_is_read_through_failures_and_never_in_two_versions(
    tmp_path, new_bucket, proxy, writer, layout, monkeypatch
):
    monkeypatch.setattr(input_files, "PART", 1 << 12)
    rows = write(tmp_path, layout, [600, 700], group=300)
    fs, bucket = writer, new_bucket.removeprefix("gs://")
    fs.put(f"{tmp_path}/", f"{bucket}/laion/", recursive=True)
    uri = f"{new_bucket}/laion"
    failing = first(6, "reset")
    half = first(3, "half")
    proxy.rule = lambda path: failing(path) or half(path)
    lines: list[str] = []
    listed = list_embeddings(uri, log=lines.append)
    read, metadata = read_all(uri, 256)
    np.testing.assert_array_equal(read, rows)
    assert metadata.equals(columns_of(len(rows)))
    assert any("trying again" in line for line in lines)
    reader = EmbeddingReader(listed)
    np.testing.assert_array_equal(reader.sample(50, np.random.default_rng(1))[0].shape, (50, D))
    for name in set(names_of(layout, 0)):
        content = fs.cat_file(f"{bucket}/laion/{name}")
        fs.pipe_file(f"{bucket}/laion/{name}", content)  # the same bytes, another generation
    file = listed.files[0]
    with pytest.raises(InputError, match=rf"{file.name}.*changed.*generation"):
        reader.vectors(file, 0, 3)
    with pytest.raises(InputError, match=rf"{file.metadata.name}.*changed.*generation"):
        list(reader.metadata(file))
    assert len(reader.vectors(listed.files[1], 0, 3)) == 3
    assert list_embeddings(uri).version == listed.version  # a checksum tells that nothing is different
    assert "no folder" in refused(f"{new_bucket}/nowhere")


def test_few_bytes_are_read_to_list_large_files(tmp_path, new_bucket, proxy, writer):
    rows = np.random.default_rng(0).random((40_000, D)).astype(np.float32)
    for number, layout in enumerate(("datacomp", "compressed")):
        write_part(tmp_path, layout, number, rows, columns_of(len(rows)))
    fs, bucket = writer, new_bucket.removeprefix("gs://")
    fs.put(f"{tmp_path}/", f"{bucket}/", recursive=True)
    before = proxy.bytes_read
    listed = list_embeddings(new_bucket)
    assert listed.rows == 80_000
    sizes = sum(file.vectors.size for file in listed.files)
    assert proxy.bytes_read - before < 2 * (64 + 32 + 2 * 64) << 10 < sizes
