"""Builds give the same index whatever was killed, added or sharded, and never a wrong one."""

import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.builds import (
    DIMENSION,
    FEW_QUERIES,
    LISTS,
    POPULATED,
    CrashError,
    crashing,
    ids_in,
    index_in,
    killed_at,
    request,
    vectors_of,
    write_part,
    write_parts,
)
from helpers.project import contents, files_limited_to
from hypothesis import given, settings
from hypothesis import strategies as st

from laion_assets.build import Build, Built, Request, builder, publish
from laion_assets.build import trained as trained_index
from laion_assets.build.index_key import EXACT_ROWS
from laion_assets.index import ModelRecord, open_folder
from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage
from laion_assets.search import search
from laion_assets.staging.transfer.source import Source

SIZES = (90, 200, 60)
MEMORY = "/dev/shm"
numbers = count()


@pytest.fixture(autouse=True, scope="module")
def few_queries() -> Iterator[None]:
    """Recall is measured with few queries, which takes most of the time of a small build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_index, "QUERIES", FEW_QUERIES)
        yield


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder in memory, where durability costs nothing, with three files of embeddings."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as made:
        write_parts(Path(made) / "embeddings", SIZES)
        yield Path(made)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with an index that was trained on 400 rows."""
    made = tmp_path_factory.mktemp("trained")
    write_parts(made / "embeddings", [400])
    Build(request(made)).train()
    return made / "index.build" / "trained"


def with_trained(trained: Path, root: Path) -> None:
    shutil.copytree(trained, root / "index.build" / "trained", dirs_exist_ok=True)


def built(request: Request) -> Built:
    return Build(request).run()


def same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return one[0] == other[0] and one[1].equals(other[1])


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)


def best(queries: Any, rows: Any, ids: Any, count: int) -> Any:
    """The ids of the rows nearest to each query, by brute force."""
    return ids[np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :count]]


# --- the same index -------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=12)
def test_shards_orders_crashes_and_later_files_make_no_difference(trained, data):
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=2, max_size=5).filter(any))
    first = data.draw(st.integers(1, len(sizes)).filter(lambda n: any(sizes[:n])))
    with tempfile.TemporaryDirectory(dir=MEMORY) as made:
        once, often = Path(made) / "once", Path(made) / "often"
        write_parts(once / "embeddings", sizes)
        with_trained(trained, once)
        built(request(once))
        expected = index_in(once / "index")
        with_trained(trained, often)
        before = None
        for start, stop in ((0, first), (first, len(sizes))):
            write_parts(often / "embeddings", sizes[start:stop], start)
            asked = request(often, shard_rows=data.draw(st.integers(1, 100)))
            if stop == len(sizes):
                after = expected
            else:
                with_trained(trained, Path(made) / "part")
                write_parts(Path(made) / "part" / "embeddings", sizes[:stop])
                built(request(Path(made) / "part"))
                after = index_in(Path(made) / "part" / "index")
            for allowed in (*data.draw(st.lists(st.integers(0, 60), max_size=4)), 1000):
                try:
                    with crashing(allowed):
                        build = Build(asked)
                        for shard in data.draw(st.permutations(build.plan().shards)):
                            build.encode(shard.number)
                        build.finish()
                    break
                except CrashError:
                    now = index_in(often / "index")
                    assert same(now, before) or same(now, after)
            assert same(index_in(often / "index"), after)
            before = after
        assert not [path.name for path in often.iterdir() if path.name.endswith((".new", ".old"))]


@pytest.mark.faults
def test_a_build_that_is_killed_again_and_again_ends_with_the_same_index(root):
    expected = shutil.copytree(root, root / "expected")
    built(request(expected))
    asked, killed, random = request(root, shard_rows=100), 0, np.random.default_rng(1)
    while killed_at(int(random.integers(1, 45)), asked):
        killed += 1
        now = index_in(root / "index")
        assert now is None or same(now, index_in(expected / "index"))
    assert killed > 4
    assert same(index_in(root / "index"), index_in(expected / "index"))


@pytest.mark.faults
def test_killed_at_any_step_of_publishing_the_old_index_or_the_new_one_is_there_whole(root):
    asked = request(root, shard_rows=100)
    built(asked)
    old = index_in(root / "index")
    write_parts(root / "embeddings", [30], 3)
    build = Build(asked)
    build.encode(build.plan().shards[-1].number)
    ready = shutil.copytree(root, root / "ready", ignore=shutil.ignore_patterns("ready"))
    build.finish()
    new = index_in(root / "index")
    assert not same(old, new)
    seen = []
    for step in count():
        again = shutil.copytree(ready, root / "again")
        killed = killed_at(step, request(again, shard_rows=100), Build.finish)
        seen.append(same(index_in(again / "index"), new))
        assert seen[-1] or same(index_in(again / "index"), old)
        Build(request(again, shard_rows=100)).finish()
        assert same(index_in(again / "index"), new)
        assert {path.name for path in again.iterdir()} <= {
            "embeddings",
            "index",
            "index.build",
            ".index.lock",
        }
        shutil.rmtree(again)
        if not killed:
            break
    assert seen == sorted(seen)
    assert 0 < sum(seen) < len(seen)


def test_where_folders_cannot_be_exchanged_the_new_one_is_renamed_and_a_kill_is_mended(root, monkeypatch):
    built(request(root))
    monkeypatch.setattr(publish, "_exchanged", lambda *_: False)
    rename = Path.rename

    def only_away(path: Path, target: Path) -> None:
        if path.name == ".index.new":
            raise CrashError
        rename(path, target)

    monkeypatch.setattr(Path, "rename", only_away)
    with pytest.raises(CrashError):
        built(request(root, model=ModelRecord("another")))
    monkeypatch.setattr(Path, "rename", rename)
    built(request(root, model=ModelRecord("another")))
    assert json.loads((root / "index" / "model.json").read_text())["name"] == "another"
    built(request(root))
    assert "name" not in json.loads((root / "index" / "model.json").read_text())
    left = {path.name for path in root.iterdir()}
    assert left == {"embeddings", "index", "index.build", ".index.lock"}


def test_a_second_run_changes_nothing_and_a_new_file_costs_its_own_shard(root):
    asked = request(root, shard_rows=100)
    built(asked)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    built(asked)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == times
    write_part(root / "embeddings", -1, vectors_of(20))  # sorts before the others
    found = built(asked)
    assert (found.rows, found.stored) == (sum(SIZES) + 20,) * 2
    shards = {path: time for path, time in times.items() if "shards" in str(path)}
    assert shards
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    metadata = open_folder(root / "index")[1]
    assert metadata.take(np.array([0, sum(SIZES)]))["url"].to_pylist() == [
        "https://example.org/0/0.jpg",
        "https://example.org/-1/0.jpg",
    ]


def test_queries_are_known_by_their_ids_where_files_were_added_before_training(root):
    Build(request(root)).plan()
    write_part(root / "embeddings", -1, vectors_of(200, seed=9))  # sorts before the others
    built(request(root))
    trained = root / "index.build" / "trained"
    parts = [vectors_of(size, seed=number) for number, size in enumerate(SIZES)]
    rows = unit(np.concatenate([*parts, vectors_of(200, seed=9)]))
    own = np.load(trained / "query_ids.npy")
    np.testing.assert_allclose(np.load(trained / "queries.npy"), rows[own], atol=1e-6)


@pytest.mark.parametrize("unusable", [0, 600])
def test_the_key_that_is_chosen_can_be_trained_whatever_rows_are_usable(root, unusable):
    rows = vectors_of(EXACT_ROWS - sum(SIZES))
    rows[:unusable] = np.nan
    write_part(root / "embeddings", 3, np.concatenate([rows, vectors_of(50)]))
    found = built(request(root, index_key=None))
    assert found.index_key == ("IVF1,Flat" if unusable else "IVF256,Flat")
    assert found.recall[str(found.nprobe_of_a_search)]["100"] > 0.99


# --- rows without a vector ------------------------------------------------------------------------


def test_rows_without_a_usable_vector_keep_their_id_and_are_in_no_list(root):
    vectors = vectors_of(50, seed=7)
    vectors[[3, 9]] = 0
    vectors[[4, 11]] = np.nan
    vectors[5, 2] = np.inf
    write_part(root / "embeddings", 3, vectors, null=(0, 49))
    write_part(root / "embeddings", 4, np.full((6, DIMENSION), np.nan, np.float32))
    write_part(root / "embeddings", 5, vectors_of(4), null=range(4))
    write_part(root / "embeddings", 6, vectors_of(0))
    for shard_rows in (1000, 1):  # then some shards have no usable row, or no row
        shutil.rmtree(root / "index.build", ignore_errors=True)
        found = built(request(root, shard_rows=shard_rows))
        first = sum(SIZES)
        lost = {first + row for row in (0, 3, 4, 5, 9, 11, 49)} | {*range(first + 50, first + 60)}
        assert (found.rows, found.unusable) == (first + 60, len(lost))
        assert found.stored == found.rows - len(lost)
        ids = ids_in(root / "index")
        assert all((np.diff(of_list) > 0).all() for of_list in ids)
        assert sorted(np.concatenate(ids).tolist()) == sorted(set(range(found.rows)) - lost)
        urls = open_folder(root / "index")[1].take(np.arange(found.rows))["url"].to_pylist()
        sizes = (*SIZES, 50, 6, 4)
        assert urls == [f"https://example.org/{n}/{r}.jpg" for n, s in enumerate(sizes) for r in range(s)]


def test_a_file_without_rows_or_vectors_that_is_added_later_is_encoded_too(root):
    built(request(root))
    write_part(root / "embeddings", 3, vectors_of(0))
    assert built(request(root)).rows == sum(SIZES)
    write_part(root / "embeddings", 4, vectors_of(3), null=range(3))
    found = built(request(root))
    assert (found.rows, found.unusable) == (sum(SIZES) + 3, 3)


def test_input_without_any_usable_row_is_refused(root):
    for number, size in enumerate(SIZES):
        write_part(root / "embeddings", number, np.zeros((size, DIMENSION), np.float32))
    with pytest.raises(InputError, match="no row of the 350 rows"):
        built(request(root))


@pytest.mark.parametrize("key", ["Flat", "HNSW8"])
def test_an_index_without_lists_finds_every_row_and_has_no_place_for_unusable_ones(root, key):
    found = built(request(root, index_key=key, shard_rows=100))
    assert (found.lists, found.recall, found.stored) == (0, {}, sum(SIZES))
    rows = np.concatenate([vectors_of(size, seed=number) for number, size in enumerate(SIZES)])
    hits = search(root / "index", rows, 1, dedup_threshold=1)
    assert hits["id"].to_pylist() == list(range(len(rows)))
    assert faiss.read_index(str(root / "index" / "image.index")).ntotal == len(rows)
    write_part(root / "embeddings", 3, np.zeros((2, DIMENSION), np.float32))
    with pytest.raises(InputError, match=f"2 rows without a usable vector, but {key}.*IVF1,Flat"):
        built(request(root, index_key=key))
    assert hits.equals(search(root / "index", rows, 1, dedup_threshold=1))


# --- read by others -------------------------------------------------------------------------------


def test_search_and_faiss_find_what_brute_force_finds_and_recall_is_what_it_says(root):
    shutil.rmtree(root / "embeddings")
    write_parts(root / "embeddings", [5000, 1500, 4500])
    asked = request(root, index_key="OPQ4_8,IVF16_HNSW8,PQ4x8", shard_rows=4000)
    found = built(asked)
    rows = unit(np.concatenate([vectors_of(s, n) for n, s in enumerate([5000, 1500, 4500])]))
    trained = root / "index.build" / "trained"
    queries, own = np.load(trained / "queries.npy"), np.load(trained / "query_ids.npy")
    np.testing.assert_allclose(queries, rows[own], atol=1e-6)
    exact = best(queries, rows, np.arange(len(rows)), 1001)
    index = faiss.read_index(str(root / "index" / POPULATED), faiss.IO_FLAG_ONDISK_SAME_DIR)
    ivf = faiss.extract_index_ivf(index)
    assert {int(n) for n in found.recall} == {1, 4, 16, found.nprobe_of_a_search}
    for nprobe, shares in found.recall.items():
        ivf.nprobe = int(nprobe)
        faiss.downcast_index(ivf.quantizer).hnsw.efSearch = 2 * int(nprobe)
        hits = index.search(queries, 1001)[1]
        for at, share in ((int(at), share) for at, share in shares.items()):
            pairs = [
                ([n for n in e if n != i][:at], [n for n in h if n != i][:at])
                for e, h, i in zip(exact.tolist(), hits.tolist(), own.tolist(), strict=True)
            ]
            shared = np.mean([len({*e} & {*h}) / at for e, h in pairs])
            assert abs(share - shared) < 0.002  # codes are equal for some rows
    assert found.recall["16"]["100"] > 0.5
    table = search(root / "index", queries[:5], 20, dedup_threshold=1, nprobe=16)
    sizes = np.cumsum([0, 5000, 1500, 4500])
    for row, url in zip(table["id"].to_pylist(), table["url"].to_pylist(), strict=True):
        part = int(np.searchsorted(sizes, row, side="right")) - 1
        assert url == f"https://example.org/{part}/{row - sizes[part]}.jpg"


# --- in a bucket ----------------------------------------------------------------------------------


def upload(root: Path, bucket: str) -> Any:
    fs, name = open_storage(bucket)
    for path in (root / "embeddings").iterdir():
        fs.put_file(str(path), f"{name}/embeddings/{path.name}")
    return fs


def download(bucket: str, into: Path) -> Path:
    fs, name = open_storage(bucket)
    shutil.rmtree(into, ignore_errors=True)
    for path in fs.find(f"{name}/index") if fs.exists(f"{name}/index") else ():
        target = into / path.removeprefix(f"{name}/index/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(fs.cat_file(path))
    return into


def test_in_a_bucket_the_index_is_the_same_and_no_reader_sees_half_of_one(root, new_bucket, monkeypatch):
    fs, name = upload(root, new_bucket), new_bucket.removeprefix("gs://")
    asked = request(new_bucket, shard_rows=100)
    built(asked)
    built(request(root, shard_rows=100))
    assert same(index_in(download(new_bucket, root / "copy")), index_in(root / "index"))
    write_parts(root / "embeddings", [30], 3)
    upload(root, new_bucket)  # the old objects are overwritten with the same bytes
    copy, listed = fs.copy, []

    def reading_meanwhile(source: str, target: str) -> None:
        if "/.index.new/" in source:
            with pytest.raises(InputError, match="is being replaced by a newer index") as refused:
                Source(asked.index_uri, None).list()
            listed.append(refused)
            if len(listed) in (2, 5):
                raise CrashError
        copy(source, target)

    monkeypatch.setattr(fs, "copy", reading_meanwhile)
    for _ in range(2):
        with pytest.raises(CrashError):
            built(asked)
        with pytest.raises(InputError, match="is being replaced by a newer index"):
            Source(asked.index_uri, None).list()
    found = built(asked)
    assert found.rows == sum(SIZES) + 30
    assert Source(asked.index_uri, None).list()
    built(request(root, shard_rows=100))
    assert same(index_in(download(new_bucket, root / "copy")), index_in(root / "index"))
    assert not fs.exists(f"{name}/.index.new")


def test_an_object_that_was_overwritten_meanwhile_is_refused(root, new_bucket):
    fs, name = upload(root, new_bucket), new_bucket.removeprefix("gs://")
    build = Build(request(new_bucket, shard_rows=100))
    build.plan()
    build.train()
    fs.pipe_file(f"{name}/embeddings/part-1.parquet", (root / "embeddings/part-0.parquet").read_bytes())
    build.encode(0)
    with pytest.raises(InputError, match=r"part-1\.parquet changed"):
        build.encode(1)
    upload(root, new_bucket)
    fs.rm(f"{name}/index.build", recursive=True)
    again = Build(request(new_bucket))
    again.plan()
    again.train()
    again.encode(0)
    for damaged in ("codes.bin", "metadata.arrow"):
        path = f"{name}/index.build/shards/000000/{damaged}"
        content = fs.cat_file(path)
        fs.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{damaged} differs from what was written"):
            again.finish()
        fs.pipe_file(path, content)
    assert again.finish().rows == sum(SIZES)


# --- bad input ------------------------------------------------------------------------------------


def damaged_ways(name: str, content: bytes) -> dict[str, bytes | None]:
    ways = {"gone": None, "truncated": content[: len(content) // 2]}
    if name.endswith(".json"):
        return ways | {"a list": b"[]", "other fields": b'{"colour": "red"}'}
    return ways | {"flipped": content[:-1] + bytes([content[-1] ^ 1])}


@pytest.mark.faults
def test_a_damaged_file_of_the_workspace_is_made_again_or_named_with_the_remedy_which_works(root):
    asked = request(root)
    built(asked)
    expected, work = index_in(root / "index"), root / "index.build"
    names = [name for name in contents(work) if not name.endswith(".lock")]
    assert {re.sub(r"schema-\w+", "schema", Path(name).name) for name in names} == {
        "plan.json", "input.json", "prepared.json", "schema.arrow", "trained.json", "trained.index",
        "queries.npy", "query_ids.npy", "shard.json", "codes.bin", "ids.bin", "sizes.npy", "answers.npz",
        "metadata.arrow", "batches.parquet",
    }  # fmt: skip
    ready = shutil.copytree(work, root / "ready")
    named = 0
    for name in names:
        for how, content in damaged_ways(Path(name).name, (work / name).read_bytes()).items():
            shutil.rmtree(root / "index", ignore_errors=True)
            (work / name).unlink()
            if content is not None:
                (work / name).write_bytes(content)
            if name.startswith("schema"):
                shutil.rmtree(work / "shards")
            while (error := refusal(asked)) is not None:
                assert name in error
                assert index_in(root / "index") is None
                remedy = re.search(r"remove (\S+); its contents are then rebuilt", error)
                assert remedy, (how, error)
                shutil.rmtree(remedy[1])
                named += 1
            assert same(index_in(root / "index"), expected), (name, how)
            shutil.rmtree(work)
            shutil.copytree(ready, work)
    assert named > 20


def refusal(request: Request) -> str | None:
    """The error that refuses a build; None if it finishes."""
    try:
        built(request)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("change", ["gone", "renamed", "other rows", "touched"])
def test_a_planned_file_that_is_gone_or_changed_is_named_and_the_index_stays(root, change):
    built(request(root, shard_rows=100))
    expected = index_in(root / "index")
    path = root / "embeddings" / "part-1.parquet"
    if change == "gone":
        path.unlink()
    elif change == "renamed":
        path.rename(path.with_name("part-9.parquet"))
    elif change == "other rows":
        write_part(path.parent, 1, vectors_of(SIZES[1], seed=8))
    else:
        os.utime(path, ns=(0, 0))
    write_parts(root / "embeddings", [20], 3)
    with pytest.raises(InputError, match=r"part-1\.parquet (is gone|changed)"):
        built(request(root, shard_rows=100))
    assert same(index_in(root / "index"), expected)


def test_a_file_that_was_touched_is_accepted_once_its_time_is_restored(root):
    before = built(request(root))
    path = root / "embeddings" / "part-1.parquet"
    copy = root / "copy"
    shutil.copy2(path, copy)  # as `cp -p` does
    path.touch()
    with pytest.raises(InputError, match="modification time"):
        built(request(root))
    shutil.copystat(copy, path)  # as `touch -r` does
    assert built(request(root)) == before
    shutil.copytree(root / "embeddings", root / "elsewhere")
    assert built(request(root, embeddings_uri=f"{root}/elsewhere")) == before


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_place_that_holds_other_files_is_refused_before_any_work_and_stays(where, request_of):
    asked, write, read = request_of(where)
    write("notes.txt", b"mine")
    with pytest.raises(InputError, match=r"/index holds files that no build wrote, such as notes\.txt"):
        built(asked)
    assert read() == {"notes.txt": b"mine"}
    write("notes.txt", None)
    built(asked)
    write("notes.txt", b"mine")  # in an index that was built here
    before = read()
    with pytest.raises(InputError, match=r"notes\.txt"):
        built(replace(asked, model=ModelRecord("another")))
    assert read() == before


@pytest.fixture
def request_of(root: Path, new_bucket: str):
    """A request to build on the disk or in a bucket, and ways to change and read the place."""

    def of(where: str) -> Any:
        if where == "bucket":
            fs = upload(root, new_bucket)
            place = f"{new_bucket.removeprefix('gs://')}/index"

            def write(name: str, content: bytes | None) -> None:
                path = f"{place}/{name}"
                fs.rm_file(path) if content is None else fs.pipe_file(path, content)

            return request(new_bucket), write, lambda: contents(download(new_bucket, root / "copy"))

        def write(name: str, content: bytes | None) -> None:
            path = root / "index" / name
            path.parent.mkdir(exist_ok=True)
            path.unlink() if content is None else path.write_bytes(content)

        return request(root), write, lambda: contents(root / "index")

    return of


def test_folders_beside_the_index_that_others_made_are_left_alone(root):
    for name in ("index.old", "index.new", "index.lock"):
        (root / name).mkdir()
        (root / name / "mine").write_bytes(b"mine")
    built(request(root))
    built(request(root, model=ModelRecord("another")))
    assert [(root / f"index.{name}" / "mine").read_bytes() for name in ("old", "new", "lock")] == [
        b"mine"
    ] * 3


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"work_uri": "{root}/index"}, "is replaced as a whole"),
        ({"work_uri": "{root}/index/work"}, "is replaced as a whole"),
        ({"index_uri": "/"}, "not a folder"),
        ({"index_uri": "gs://bucket"}, "not a folder"),
        ({"index_uri": "/proc"}, "mounted disk"),
        ({"index_uri": "{root}/embeddings"}, "no build wrote"),
        ({"work_uri": "/sys/laion"}, "cannot write /sys/laion"),
        ({"work_uri": "{root}/embeddings/part-0.parquet"}, "cannot write .*part-0"),
        ({"index_uri": "/sys/laion/index", "work_uri": "{root}/work"}, "cannot write /sys/laion"),
        ({"index_key": "IVF64,Flat"}, "needs 2,496 rows"),
        ({"columns": ("colour",)}, "no column 'colour'"),
    ],
)
def test_what_cannot_be_built_is_said_in_a_sentence(root, gcs, more, problem):  # noqa: ARG001
    before = contents(root / "embeddings")
    asked = request(
        root, **{k: v.format(root=root) if isinstance(v, str) else v for k, v in more.items()}
    )
    with pytest.raises(InputError, match=problem):
        built(asked)
    assert contents(root / "embeddings") == before


def test_metadata_without_columns_is_refused_and_other_input_then_planned_afresh(root):
    (root / "embeddings" / "part-1.parquet").unlink()
    for number in (0, 2):
        path = root / "embeddings" / f"part-{number}.parquet"
        pq.write_table(pq.read_table(path).select(["embedding"]), path)
    with pytest.raises(InputError, match="has no column that an index can keep"):
        built(request(root))
    write_parts(root / "embeddings", SIZES)
    assert built(request(root)).rows == sum(SIZES)


def test_values_that_do_not_fit_the_metadata_of_earlier_files_are_named(root):
    built(request(root))
    table = pq.read_table(root / "embeddings" / "part-0.parquet")
    table = table.set_column(1, "row", pa.array(["text"] * len(table)))
    pq.write_table(table.drop_columns("embedding").append_column("embedding", table["embedding"]),
                   root / "embeddings" / "part-3.parquet")  # fmt: skip
    with pytest.raises(InputError, match=r"part-3.*type"):
        built(request(root))


def test_too_little_space_is_an_error_with_both_numbers_before_the_first_byte(root, monkeypatch):
    build = Build(request(root))
    build.plan()
    build.train()
    usage, free = shutil.disk_usage(root), 1234
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    needed = sum(SIZES) * (DIMENSION * 4 + 8)
    before = set(contents(root))
    with pytest.raises(InputError, match=f"1,234 bytes free, shard 000000 needs {needed:,}") as refused:
        build.encode(0)
    assert refused.value.about == "build_uri"
    free = needed
    build.encode(0)
    free = needed - 1
    between = set(contents(root))
    assert between > before
    with pytest.raises(InputError, match=f"{free:,} bytes free, the index needs {needed:,}"):
        build.finish()
    assert set(contents(root)) - between == {".index.lock"}
    free = needed
    assert build.finish().stored == sum(SIZES)


def test_a_disk_that_fills_up_is_reported_and_the_build_goes_on_later(root):
    for limit in (1000, 9000):
        with pytest.raises(InputError, match=r"cannot write .*choose a folder"), files_limited_to(limit):
            built(request(root))
        assert index_in(root / "index") is None
    assert built(request(root)).rows == sum(SIZES)


def test_on_another_disk_than_the_index_metadata_is_copied_and_compared(root, tmp_path):
    if root.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one disk")
    asked = request(root, index_uri=str(tmp_path / "index"), work_uri=str(root / "work"))
    build = Build(asked)
    build.plan()
    build.train()
    build.encode(0)
    path = root / "work" / "shards" / "000000" / "metadata.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(InputError, match=f"{path} differs from what was written"):
        build.finish()
    path.write_bytes(content)
    build.finish()
    built(request(root))
    assert same(index_in(tmp_path / "index"), index_in(root / "index"))


# --- settings that change, and two builds at once -------------------------------------------------


def test_other_vectors_columns_or_keys_are_never_mixed_with_those_before(root):
    shutil.rmtree(root / "embeddings")
    (root / "embeddings").mkdir()
    one, two = vectors_of(400, seed=1), vectors_of(400, seed=2)
    np.savez(root / "embeddings" / "a.npz", l14_img=one, b32_img=two, wide=vectors_of(400, dimension=16))
    pq.write_table(pa.table({"url": ["x"] * 400, "row": range(400)}), root / "embeddings" / "a.parquet")
    for key, rows in (("l14_img", one), ("b32_img", two), ("wide", vectors_of(400, dimension=16))):
        asked = request(root, key=key)
        with pytest.raises(InputError, match="train"):
            Build(asked).finish()
        assert built(asked).dimension == rows.shape[1]
        queries = np.load(root / "index.build" / "trained" / "queries.npy")
        own = np.load(root / "index.build" / "trained" / "query_ids.npy")
        np.testing.assert_allclose(queries, unit(rows)[own], atol=1e-6)
        assert search(root / "index", rows, 1, dedup_threshold=1, nprobe=8)["id"].to_pylist() == [
            *range(400)
        ]
        assert json.loads((root / "index" / "model.json").read_text())["dimension"] == rows.shape[1]
    before = index_in(root / "index")
    built(request(root, key="wide", columns=("url",)))
    assert open_folder(root / "index")[1].take(np.array([0])).column_names.count("row") == 0
    built(request(root, key="wide"))
    assert same(index_in(root / "index"), before)
    assert built(request(root, key="wide", index_key="IVF4,Flat")).lists == 4


def test_two_builds_at_once_wait_for_each_other_and_never_mix(root):
    expected = shutil.copytree(root, root / "expected")
    built(request(expected, shard_rows=100))
    lines: list[str] = []
    errors: list[BaseException] = []

    def run(**more: Any) -> None:
        try:
            Build(request(root, shard_rows=100, **more), lines.append).run()
        except InputError as error:
            errors.append(error)

    # The same build twice, and one in another workspace to the same place.
    other = {"work_uri": str(root / "other"), "model": ModelRecord("other")}
    threads = [threading.Thread(target=run, kwargs=more) for more in ({}, {}, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert any("waiting for another build" in line for line in lines)
    model = json.loads((root / "index" / "model.json").read_text()).get("name")
    built(request(expected, shard_rows=100, model=ModelRecord(model)))
    assert same(index_in(root / "index"), index_in(expected / "index"))
    assert builder.PLAN in contents(root / "other")
    assert LISTS in contents(root / "index")


def test_an_index_of_a_single_image_is_built(root):
    shutil.rmtree(root / "embeddings")
    write_parts(root / "embeddings", [1])
    assert built(request(root, index_key=None)).rows == 1


@pytest.mark.parametrize("urls", [{"x": [1, 2, 3]}, {"url": [1, 2, 3], "caption": ["a", "b", "c"]}])
def test_metadata_without_urls_is_refused_before_anything_is_trained(root, urls):
    path = root / "embeddings/part-0.parquet"
    vectors = pq.read_table(path, columns=["embedding"]).slice(0, 3)
    shutil.rmtree(root / "embeddings")
    path.parent.mkdir()
    pq.write_table(pa.table({"embedding": vectors["embedding"], **urls}), path)
    with pytest.raises(InputError, match=r"no text column with URLs \(found (x|url) of type int64"):
        Build(request(root)).plan()


def test_a_flipped_bit_in_an_archive_is_noticed(root):
    shutil.rmtree(root / "embeddings")
    (root / "embeddings").mkdir()
    np.savez(root / "embeddings/0.npz", l14_img=np.random.default_rng(0).normal(size=(300, 16)))
    pq.write_table(pa.table({"url": ["u"] * 300}), root / "embeddings/0.parquet")
    content = bytearray((root / "embeddings/0.npz").read_bytes())
    content[5000] ^= 1
    (root / "embeddings/0.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"0\.npz is damaged \(its checksum is wrong\)"):
        built(request(root, index_key=None))
