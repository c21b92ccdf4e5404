"""Seeds are read in every supported form, and one error names all bad ones."""

import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.limits import limited
from helpers.seed_files import FORMS, VECTORS, npy, parquet, write
from hypothesis import given
from hypothesis.extra.numpy import arrays

from laion_assets.io.errors import InputError
from laion_assets.seeds import Seeds, centroid, embeddings_of, find_seed_set, list_folder, read_seeds


def read(root: Path, name: str = "set") -> Seeds:
    return read_seeds(str(root), find_seed_set(str(root), name))


def refusal(root: Path, name: str = "set") -> str:
    with pytest.raises(InputError) as refused:
        read(root, name)
    return str(refused.value)


def unit(vectors: np.ndarray) -> np.ndarray:
    exact = vectors.astype(np.float64)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True)


def constant_parquet(rows: int, dimension: int, **columns: Any) -> bytes:
    """Very many equal rows, in very few bytes."""
    zeros = pa.array(np.zeros(rows, np.int32))
    repeated = {name: pa.DictionaryArray.from_arrays(zeros, [value]) for name, value in columns.items()}
    vectors = pa.FixedSizeListArray.from_arrays(np.ones(rows * dimension, np.float32), dimension)
    buffer = io.BytesIO()
    table = pa.table({"embedding": vectors, **repeated})
    pq.write_table(table, buffer, compression="zstd", store_schema=False)
    return buffer.getvalue()


# --- what is read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_seeds_of_every_form_are_the_same_unit_vectors_in_order_of_file_and_row(tmp_path, form):
    write(tmp_path, FORMS[form])
    seeds = read(tmp_path)
    assert seeds.embeddings.dtype == np.float32
    np.testing.assert_allclose(seeds.embeddings, unit(VECTORS), atol=1e-6)
    places = list(zip(*seeds.columns.select(["file", "row"]).to_pydict().values(), strict=True))
    assert places == sorted(places)
    for (file, row), vector in zip(places, seeds.embeddings, strict=True):
        alone = read_alone(tmp_path, file)[row]
        np.testing.assert_allclose(vector, unit(alone[None])[0], atol=1e-3)


def read_alone(root: Path, file: str) -> np.ndarray:
    path = root / "set" / file
    if path.suffix == ".npy":
        return np.atleast_2d(np.load(path)).astype(np.float32)
    return np.array(pq.read_table(path)["embedding"].to_pylist(), np.float32)


def test_what_parquet_seeds_carry_stays_with_its_row_and_is_null_where_a_file_has_none(tmp_path):
    write(
        tmp_path,
        {
            "set/a.npy": npy(VECTORS[0]),
            "set/b.parquet": parquet(
                thumbnail=pa.array([b"1", None], pa.large_binary()),
                caption=pa.array(["one", "two"]).dictionary_encode(),
                ignored=[1, 2],
                image_embedding=VECTORS[1:].tolist(),
            ),
        },
    )
    table = read(tmp_path).to_table()
    assert table.drop_columns(["embedding", "kind"]).to_pylist() == [
        {"file": "a.npy", "row": 0, "caption": None, "thumbnail": None},
        {"file": "b.parquet", "row": 0, "caption": "one", "thumbnail": b"1"},
        {"file": "b.parquet", "row": 1, "caption": "two", "thumbnail": None},
    ]
    np.testing.assert_allclose(embeddings_of(table), unit(VECTORS), atol=1e-6)


@given(
    arrays(np.float64, (3, 4), elements=st.floats(-1, 1)),
    st.integers(-30, 30),
)
def test_a_seed_becomes_its_direction_or_is_refused_whatever_its_length(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, exponent: int
):
    root = tmp_path_factory.mktemp("seeds")
    stored = (values * 10.0**exponent).astype(np.float32)
    write(root, {"set/all.npy": npy(stored)})
    lengths = np.linalg.norm(stored.astype(np.float64), axis=1, keepdims=True)
    if not lengths.all():
        with pytest.raises(InputError, match=r"row \d+ .*zero"):
            read(root)
        return
    np.testing.assert_allclose(read(root).embeddings, stored / lengths, atol=1e-6)


def test_the_centroid_is_the_unit_mean_and_opposite_seeds_have_none():
    direction, length = centroid(np.array([[1, 0], [0, 1]], np.float32))
    np.testing.assert_allclose(direction, [0.5**0.5, 0.5**0.5], atol=1e-7)
    assert length == pytest.approx(0.5**0.5)
    with pytest.raises(InputError, match="cancel"):
        centroid(np.array([[1, 0], [-1, 0]], np.float32))


def test_what_is_only_carried_is_left_out_with_a_note_if_it_is_no_text(tmp_path):
    raw = pa.array([b"caf\xe9", b"ok", None], pa.binary())
    latin = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    vectors = VECTORS.tolist()
    write(
        tmp_path,
        {
            "set/a.parquet": parquet(embedding=vectors, caption=latin, url=[1, 2, 3]),
            "set/b.parquet": parquet(embedding=vectors, caption=[["x"]] * 3),
        },
    )
    found = read(tmp_path)
    assert found.columns["caption"].to_pylist() == [
        "caf\N{REPLACEMENT CHARACTER}",
        "ok",
        None,
        *[None] * 3,
    ]
    assert found.notes == (
        "set/a.parquet column url left out: it holds int64, not string",
        "set/a.parquet 1 value of caption not UTF-8, of which bytes were replaced",
        "set/b.parquet column caption left out: it holds list<element: string>, not string",
    )


def test_tensors_are_vectors(tmp_path):
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(VECTORS.copy())
    write(tmp_path, {"set/a.parquet": parquet(embedding=tensors)})
    np.testing.assert_allclose(read(tmp_path).embeddings, unit(VECTORS), atol=1e-6)


# --- what is refused --------------------------------------------------------------------------------

# The problems of each set, as patterns of what must be said of one file.
BAD: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "an empty file": ({"a.npy": b""}, [r"a\.npy .*complete \.npy"]),
    "a text file": ({"a.npy": b"hello"}, [r"a\.npy .*complete \.npy"]),
    "a truncated file": ({"a.npy": npy(VECTORS)[:-1]}, [r"a\.npy .*complete \.npy"]),
    "a file that claims a petabyte": (
        {"a.npy": npy(VECTORS).replace(b"(3, 4), }           ", b"(1000000000000000,)}")},
        [r"a\.npy .*complete \.npy"],
    ),
    "several arrays": ({"a.npy": b"PK\x03\x04"}, [r"a\.npy .*complete \.npy"]),
    "a 3-d array": ({"a.npy": npy(np.ones((2, 2, 2), np.float32))}, [r"a\.npy .*\(2, 2, 2\)"]),
    "a number": ({"a.npy": npy(np.float32(1))}, [r"a\.npy .*\(\)"]),
    "no rows": ({"a.npy": npy(np.ones((0, 4), np.float32))}, [r"a\.npy .*empty"]),
    "NaN": (
        {"a.npy": npy(np.array([[1, 2], [np.nan, 1], [3, 4], [1, np.inf]], np.float32))},
        [r"a\.npy row 1 .*NaN", r"a\.npy row 3 .*NaN"],
    ),
    "a value beyond float32": (
        {"a.npy": npy(np.array([[1e300, 1]]))},
        [r"a\.npy row 0 .*infinite"],
    ),
    "a zero vector": (
        {"a.npy": npy(np.eye(3)[:, :2])},
        [r"a\.npy row 2 .*zero"],
    ),
    "integers": ({"a.npy": npy(np.ones((2, 2), np.int64))}, [r"a\.npy .*int64"]),
    "complex numbers": ({"a.npy": npy(np.ones((2, 2), complex))}, [r"a\.npy .*complex128"]),
    "text": ({"a.npy": npy(np.array(["1.0", "2.0"]))}, [r"a\.npy .*<U3"]),
    "Parquet that is none": ({"a.parquet": b"PAR1PAR1"}, [r"a\.parquet .*complete Parquet"]),
    "Parquet without embeddings": (
        {"a.parquet": parquet(url=["a"], emb=[1.0])},
        [r"a\.parquet .*no embedding column .*image_embedding.*url, emb\b"],
    ),
    "Parquet without rows": (
        {"a.parquet": parquet(embedding=pa.array([], pa.list_(pa.float32())))},
        [r"a\.parquet .*empty"],
    ),
    "Parquet of scalars": (
        {"a.parquet": parquet(embedding=[1.0])},
        [r"a\.parquet .*double"],
    ),
    "Parquet of integers": (
        {"a.parquet": parquet(embedding=[[1, 2]])},
        [r"a\.parquet .*int64"],
    ),
    "Parquet with missing and ragged rows": (
        {
            "a.parquet": parquet(embedding=[[1.0, 2.0], None]),
            "b.parquet": parquet(embedding=[[1.0, 2.0], [1.0], [1.0, None]]),
            "c.parquet": parquet(embedding=pa.array([np.float16([1])[:1], None], pa.list_(pa.float16()))),
            "d.parquet": parquet(embedding=pa.array([[1.0, None]], pa.list_(pa.float32(), 2))),
        },
        [
            r"a\.parquet row 1 .*no embedding",
            r"b\.parquet row 1 .*1 dimensions, row 0 has 2",
            r"c\.parquet row 1 .*no embedding",
            r"d\.parquet row 0 .*NaN",
        ],
    ),
    "two arrays in a file": (
        {"a.npy": npy(VECTORS) + npy(VECTORS)},
        [r"a\.npy .*176 bytes after its array of shape \(3, 4\)"],
    ),
    "all of a set's problems at once": (
        {
            "a.npy": npy(np.zeros(4, np.float32)),
            "b.npy": npy(VECTORS),
            "c.npy": npy(VECTORS[:, :3]),
            "d.npy": b"",
        },
        [
            r"a\.npy row 0 .*zero",
            r"c\.npy .*3 dimensions, set/b\.npy has 4",
            r"d\.npy .*complete",
        ],
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_seeds_are_refused_with_their_file_and_row_and_the_remedy(tmp_path, bad):
    files, problems = BAD[bad]
    write(tmp_path / "set", files)
    summary, _, found = refusal(tmp_path).partition(": ")
    assert "'set'" in summary
    assert "correct or remove" in summary
    for problem, sentence in zip(problems, sorted(re.split("; (?=set/)", found)), strict=True):
        assert re.match(f"set/{problem}", sentence)


def test_parquet_that_unpacks_to_far_more_is_refused(tmp_path):
    write(tmp_path, {"set/a.parquet": constant_parquet(5_000_000, 8)})
    assert re.search(r"set/a\.parquet .* unpacks to [\d,]+: remove", refusal(tmp_path))


def test_of_very_many_problems_twenty_are_named_and_the_others_counted(tmp_path):
    write(tmp_path, {"set/a.npy": npy(np.zeros((50, 4), np.float32))})
    message = refusal(tmp_path)
    assert message.count("row ") == 20
    assert message.endswith("and 30 more")


class LeavesTrace:
    """Unpickling it makes a folder."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.trace,)


def test_pickled_objects_are_refused_and_never_unpickled(tmp_path):
    trace = tmp_path / "trace"
    evil = LeavesTrace(str(trace))
    objects = np.empty(2, object)
    objects[:] = [evil, evil]
    with_field = np.zeros(1, [("vector", "f4", 4), ("other", object)])
    with_field["other"] = evil
    files = {
        "set/a.npy": npy(objects, allow_pickle=True),
        "set/b.npy": npy(with_field, allow_pickle=True),
        "set/c.npy": pickle.dumps(evil),
    }
    write(tmp_path, files)
    assert re.search(r"set/a\.npy [^;]*pickled.*set/b\.npy [^;]*pickled.*set/c\.npy ", refusal(tmp_path))
    assert not trace.exists()
    np.load(tmp_path / "set" / "a.npy", allow_pickle=True)  # unpickled, it does leave a trace
    assert trace.exists()


@given(st.data())
def test_a_damaged_file_is_refused_or_read_but_never_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    root = tmp_path_factory.mktemp("seeds")
    name, content = data.draw(
        st.sampled_from(
            [("a.npy", npy(VECTORS)), ("a.parquet", parquet(embedding=VECTORS.tolist(), url=list("abc")))]
        )
    )
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    write(root, {f"set/{name}": bytes(damaged[: data.draw(st.integers(0, len(damaged)))])})
    try:
        seeds = read(root)
    except InputError as refused:
        assert f"set/{name}" in str(refused)  # noqa: PT017  # either outcome is right
    else:
        assert np.isfinite(seeds.embeddings).all()


MEBIBYTE = 1 << 20
SMALL_MEMORY = {
    "npy": ("a.npy", lambda: npy(np.ones((16 * MEBIBYTE // 256, 256), np.float32)), 256, "(65536, 256)"),
    "wide caption": (
        "a.parquet",
        lambda: constant_parquet(60_000, 4, caption="a" * 60_000),
        128,
        "column caption left out: it has 3,600,000,000 bytes",
    ),
    "unused column": (
        "a.parquet",
        lambda: constant_parquet(60_000, 4, image="a" * 60_000),
        128,
        "(60000, 4) float32 ()",
    ),
    "null rows": (
        "a.parquet",
        lambda: parquet(embedding=pa.nulls(10_000_000, pa.list_(pa.float32()))),
        256,
        "set/a.parquet row 19 has no embedding; and ",
    ),
    "zero rows": (
        "a.npy",
        lambda: npy(np.zeros((4 * MEBIBYTE, 2), np.float16)),
        256,
        "and 4,194,284 more",
    ),
}


@pytest.mark.faults
@pytest.mark.parametrize("form", SMALL_MEMORY)
def test_a_seed_file_takes_little_more_memory_than_its_vectors(tmp_path, form):
    name, content, megabytes, expected = SMALL_MEMORY[form]
    write(tmp_path, {f"set/{name}": content()})
    told = limited(
        "from laion_assets.seeds import find_seed_set, read_seeds",
        "seeds = read_seeds(sys.argv[1], find_seed_set(sys.argv[1], 'set'));"
        "print(seeds.embeddings.shape, seeds.embeddings.dtype, seeds.notes)",
        str(tmp_path),
        memory=megabytes * MEBIBYTE,
    )
    assert expected in told


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, {"set/a.npy": npy(VECTORS), "set/c.npy": npy(VECTORS)})
    (tmp_path / "set" / "b.npy").symlink_to(tmp_path / "gone.npy")
    listed = find_seed_set(str(tmp_path), "set")
    (tmp_path / "set" / "c.npy").unlink()
    with pytest.raises(InputError, match=r"set/b\.npy .*; set/c\.npy .*gone"):
        read_seeds(str(tmp_path), listed)


def test_one_unreadable_file_holds_up_no_other_set(tmp_path):
    write(tmp_path, {"good/a.npy": npy(VECTORS)})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.npy").symlink_to(tmp_path / "gone.npy")
    assert sorted(list_folder(str(tmp_path)).sets) == ["bad", "good"]
    np.testing.assert_allclose(read(tmp_path, "good").embeddings, unit(VECTORS), atol=1e-6)
