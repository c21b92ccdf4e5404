"""Seed sets are read in every form people keep them in; bad ones are named, all at once."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from laion_assets.io.errors import InputError
from laion_assets.seeds import (
    Seeds,
    centroid,
    check_name,
    embeddings_of,
    find_seed_set,
    list_folder,
    list_seed_sets,
    read_seeds,
)

VECTORS = np.arange(1, 13, dtype=np.float32).reshape(3, 4)


def npy(values: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read(root: Path, name: str = "set") -> Seeds:
    return read_seeds(str(root), find_seed_set(str(root), name))


def refusal(root: Path, name: str = "set") -> str:
    with pytest.raises(InputError) as refused:
        read(root, name)
    return str(refused.value)


def unit(vectors: np.ndarray) -> np.ndarray:
    exact = vectors.astype(np.float64)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True)


# --- what is read -----------------------------------------------------------------------------------

LISTS: dict[str, pa.DataType] = {
    "list": pa.list_(pa.float32()),
    "large list": pa.large_list(pa.float64()),
    "fixed size list": pa.list_(pa.float32(), 4),
    "float16 list": pa.list_(pa.float16()),
    "float16 fixed size list": pa.list_(pa.float16(), 4),
}
FORMS: dict[str, dict[str, bytes]] = {
    "a vector per file": {f"set/{i}.npy": npy(row) for i, row in enumerate(VECTORS)},
    "in folders": {f"set/{i}/deep/seed.npy": npy(row) for i, row in enumerate(VECTORS)},
    "a matrix": {"set/all.npy": npy(VECTORS)},
    "a matrix in Fortran order": {"set/all.npy": npy(np.asfortranarray(VECTORS))},
    "float16": {"set/all.npy": npy(VECTORS.astype(np.float16))},
    "big-endian float64": {"set/all.npy": npy(VECTORS.astype(">f8"))},
    "npy and Parquet": {
        "set/a.npy": npy(VECTORS[:2]),
        "set/b.parquet": parquet(embedding=VECTORS[2:].tolist()),
    },
    "an output folder of clip-retrieval": {
        "set/img_emb/img_emb_0.npy": npy(VECTORS[:2].astype(np.float16)),
        "set/img_emb/img_emb_1.npy": npy(VECTORS[2:].astype(np.float16)),
        "set/text_emb/text_emb_0.npy": npy(-VECTORS),
        "set/metadata/metadata_0.parquet": parquet(url=["a", "b", "c"]),
    },
    "beside files that are no seeds": {
        "set/all.npy": npy(VECTORS),
        "set/README.txt": b"no seeds",
        "set/.hidden.npy": b"half a copy",
        "set/_temporary/part.npy": b"half a copy",
    },
    **{
        f"Parquet, {name}": {
            "set/all.parquet": parquet(embedding=pa.array(list(VECTORS.astype(np.float16)), kind))
            if "float16" in name
            else parquet(embedding=pa.array(VECTORS.tolist(), kind))
        }
        for name, kind in LISTS.items()
    },
}


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
    assert table.drop_columns("embedding").to_pylist() == [
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
        with pytest.raises(InputError, match="is all zeros"):
            read(root)
        return
    np.testing.assert_allclose(read(root).embeddings, stored / lengths, atol=1e-6)


def test_the_centroid_is_the_unit_mean_and_opposite_seeds_have_none():
    direction, length = centroid(np.array([[1, 0], [0, 1]], np.float32))
    np.testing.assert_allclose(direction, [0.5**0.5, 0.5**0.5], atol=1e-7)
    assert length == pytest.approx(0.5**0.5)
    with pytest.raises(InputError, match="cancel"):
        centroid(np.array([[1, 0], [-1, 0]], np.float32))


# --- what is refused --------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "an empty file": ({"a.npy": b""}, ["set/a.npy is not a whole .npy file"]),
    "a text file": ({"a.npy": b"hello"}, ["set/a.npy is not a whole .npy file"]),
    "a truncated file": ({"a.npy": npy(VECTORS)[:-1]}, ["set/a.npy is not a whole .npy file"]),
    "a file that claims a petabyte": (
        {"a.npy": npy(VECTORS).replace(b"(3, 4), }           ", b"(1000000000000000,)}")},
        ["set/a.npy is not a whole .npy file"],
    ),
    "several arrays": ({"a.npy": b"PK\x03\x04"}, ["set/a.npy is not a whole .npy file"]),
    "a 3-d array": ({"a.npy": npy(np.ones((2, 2, 2), np.float32))}, ["set/a.npy has shape (2, 2, 2)"]),
    "a number": ({"a.npy": npy(np.float32(1))}, ["set/a.npy has shape ()"]),
    "no rows": ({"a.npy": npy(np.ones((0, 4), np.float32))}, ["set/a.npy is empty"]),
    "NaN": (
        {"a.npy": npy(np.array([[1, 2], [np.nan, 1], [3, 4], [1, np.inf]], np.float32))},
        ["set/a.npy row 1 holds NaN or infinite", "set/a.npy row 3 holds NaN or infinite"],
    ),
    "a value beyond float32": (
        {"a.npy": npy(np.array([[1e300, 1]]))},
        ["set/a.npy row 0 holds NaN"],
    ),
    "a zero vector": (
        {"a.npy": npy(np.eye(3)[:, :2])},
        ["set/a.npy row 2 is all zeros"],
    ),
    "integers": ({"a.npy": npy(np.ones((2, 2), np.int64))}, ["set/a.npy has dtype int64"]),
    "complex numbers": ({"a.npy": npy(np.ones((2, 2), complex))}, ["set/a.npy has dtype complex128"]),
    "text": ({"a.npy": npy(np.array(["1.0", "2.0"]))}, ["set/a.npy has dtype <U3"]),
    "Parquet that is none": ({"a.parquet": b"PAR1PAR1"}, ["set/a.parquet is not a whole Parquet file"]),
    "Parquet without embeddings": (
        {"a.parquet": parquet(url=["a"], emb=[1.0])},
        ["set/a.parquet has no embedding column (looked for embedding", "found url, emb)"],
    ),
    "Parquet without rows": (
        {"a.parquet": parquet(embedding=pa.array([], pa.list_(pa.float32())))},
        ["set/a.parquet is empty"],
    ),
    "Parquet of scalars": (
        {"a.parquet": parquet(embedding=[1.0])},
        ["set/a.parquet has embeddings"],
    ),
    "Parquet of integers": (
        {"a.parquet": parquet(embedding=[[1, 2]])},
        ["set/a.parquet has embeddings"],
    ),
    "Parquet with missing and ragged rows": (
        {
            "a.parquet": parquet(embedding=[[1.0, 2.0], None]),
            "b.parquet": parquet(embedding=[[1.0, 2.0], [1.0], [1.0, None]]),
            "c.parquet": parquet(embedding=pa.array([np.float16([1])[:1], None], pa.list_(pa.float16()))),
            "d.parquet": parquet(embedding=pa.array([[1.0, None]], pa.list_(pa.float32(), 2))),
        },
        [
            "set/a.parquet row 1 has no embedding",
            "set/b.parquet row 1 has 1 dimensions, row 0 has 2",
            "set/c.parquet row 1 has no embedding",
            "set/d.parquet row 0 holds NaN",
        ],
    ),
    "a caption that is no text": (
        {"a.parquet": parquet(embedding=[[1.0]], caption=[["a", "b"]])},
        ["set/a.parquet has a column 'caption' of type list"],
    ),
    "all of a set's problems at once": (
        {
            "a.npy": npy(np.zeros(4, np.float32)),
            "b.npy": npy(VECTORS),
            "c.npy": npy(VECTORS[:, :3]),
            "d.npy": b"",
        },
        [
            "set/a.npy row 0 is all zeros",
            "set/c.npy has 3 dimensions, set/b.npy has 4",
            "set/d.npy is not a whole",
        ],
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_seeds_are_refused_with_their_file_and_row_and_the_remedy(tmp_path, bad):
    files, problems = BAD[bad]
    write(tmp_path / "set", files)
    message = refusal(tmp_path)
    assert message.startswith("seed set 'set' cannot be used; mend or remove: ")
    assert [problem for problem in problems if problem not in message] == []


def test_of_very_many_problems_twenty_are_named_and_the_others_counted(tmp_path):
    write(tmp_path, {"set/a.npy": npy(np.zeros((50, 4), np.float32))})
    message = refusal(tmp_path)
    assert message.count("is all zeros") == 20
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
    message = refusal(tmp_path)
    assert "set/a.npy holds pickled objects" in message
    assert "set/b.npy holds pickled objects" in message
    assert "set/c.npy is not a whole .npy file" in message
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


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, {"set/a.npy": npy(VECTORS), "set/c.npy": npy(VECTORS)})
    (tmp_path / "set" / "b.npy").symlink_to(tmp_path / "gone.npy")
    listed = find_seed_set(str(tmp_path), "set")
    (tmp_path / "set" / "c.npy").unlink()
    with pytest.raises(InputError, match=r"set/b\.npy cannot be read .*; set/c\.npy cannot be read"):
        read_seeds(str(tmp_path), listed)


def test_an_empty_set_is_refused_and_says_where_to_put_files(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path, {"notes/README.txt": b"none here"})
    for name in ("set", "notes"):
        assert f"seed set {name!r} is empty: put .npy or .parquet files into" in refusal(tmp_path, name)
    assert list_seed_sets(str(tmp_path)) == {}


def test_files_that_nobody_reads_are_named_and_those_that_are_no_mistake_are_not(tmp_path):
    write(tmp_path, FORMS["an output folder of clip-retrieval"])
    write(
        tmp_path,
        dict.fromkeys(
            [
                "a.npy",
                "photos/1.jpg",
                "set/more.npy",
                "set/stats/0.json",
                "set/metadata/notes.txt",
                "set/img_emb/notes.txt",
                "set/settings.yaml",
                "set/.DS_Store",
                "set/_SUCCESS",
                ".git/config",
                "other/a.npy",
                "other/labels.json",
                "other/metadata/labels.csv",
            ],
            npy(VECTORS),
        ),
    )
    assert list_folder(str(tmp_path)).ignored == (
        "a.npy",
        "other/labels.json",
        "other/metadata/labels.csv",
        "photos/1.jpg",
        "set/img_emb/notes.txt",
        "set/more.npy",
    )
    assert find_seed_set(str(tmp_path), "other").ignored == ("labels.json", "metadata/labels.csv")


def test_a_set_that_does_not_exist_is_answered_with_the_nearest_or_all_there_are(tmp_path):
    write(tmp_path, {"flower/a.npy": npy(VECTORS), "house/a.npy": npy(VECTORS)})
    assert refusal(tmp_path, "flowers").endswith("did you mean 'flower'?")
    assert refusal(tmp_path, "zebra").endswith("there are: flower, house")
    with pytest.raises(InputError, match="LAION_SEEDS_URI"):
        list_seed_sets(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "a/../b", "/etc", "a..b", ".hidden", "a\nb", "a\\b", "x" * 101]
)
def test_names_that_could_leave_the_folder_are_refused(tmp_path, name):
    write(tmp_path / "seeds", {"a/b/c.npy": npy(VECTORS)})
    write(tmp_path, {"a/c.npy": npy(VECTORS)})
    with pytest.raises(InputError, match="cannot name a seed set"):
        find_seed_set(str(tmp_path / "seeds"), name)


# --- fingerprints -----------------------------------------------------------------------------------


def fingerprints(root: Path) -> dict[str, str]:
    return {name: found.fingerprint for name, found in list_seed_sets(str(root)).items()}


def test_the_fingerprint_follows_names_and_contents_and_nothing_else(tmp_path):
    write(tmp_path, {"one/a.npy": npy(VECTORS), "two/a.npy": npy(VECTORS)})
    first = fingerprints(tmp_path)
    assert first["one"] == first["two"]  # neither the name of the set nor the time of writing count

    file = tmp_path / "one" / "a.npy"
    os.utime(file, (1, 1))
    write(tmp_path, {"one/README.txt": b"not a seed"})
    assert fingerprints(tmp_path) == first

    file.write_bytes(npy(VECTORS[::-1]))  # as many bytes
    changed = fingerprints(tmp_path)
    assert changed["one"] != first["one"]
    assert changed["two"] == first["two"]

    file.write_bytes(npy(VECTORS))
    assert fingerprints(tmp_path) == first

    file.rename(file.with_name("b.npy"))
    assert fingerprints(tmp_path)["one"] not in (first["one"], changed["one"])


def test_of_clip_retrievals_folder_only_image_embeddings_change_the_fingerprint(tmp_path):
    write(tmp_path, FORMS["an output folder of clip-retrieval"])
    first = fingerprints(tmp_path)
    write(tmp_path, {"set/text_emb/text_emb_0.npy": npy(VECTORS)})
    assert fingerprints(tmp_path) == first
    write(tmp_path, {"set/img_emb/img_emb_1.npy": npy(VECTORS[:1])})
    assert fingerprints(tmp_path) != first


def test_a_set_found_by_name_is_the_same_as_in_the_list(tmp_path):
    for number, form in enumerate(FORMS.values()):
        write(tmp_path, {name.replace("set/", f"set {number}/"): data for name, data in form.items()})
    listed = list_seed_sets(str(tmp_path))
    assert len(listed) == len(FORMS)
    for name, found in listed.items():
        check_name(name)
        assert find_seed_set(str(tmp_path), name) == found


def test_one_unreadable_file_holds_up_no_other_set(tmp_path):
    write(tmp_path, {"good/a.npy": npy(VECTORS)})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.npy").symlink_to(tmp_path / "gone.npy")
    assert sorted(list_seed_sets(str(tmp_path))) == ["bad", "good"]
    np.testing.assert_allclose(read(tmp_path, "good").embeddings, unit(VECTORS), atol=1e-6)
