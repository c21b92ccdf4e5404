"""Results around a query, compared with brute force over the stored vectors."""

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from helpers import indices
from hypothesis import given, settings
from hypothesis import strategies as st

from laion_assets.index import faiss_index
from laion_assets.index.decoder import Decoder
from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.index.vectors import unit
from laion_assets.io.errors import InputError
from laion_assets.search import retrieval
from laion_assets.search.filters import BlockList, Filters
from laion_assets.search.retrieval import Found, Request, retrieve, retrieve_table

ALL_LISTS = 1 << 20


def brute_force(stored: np.ndarray, query: np.ndarray, k: int, threshold: float) -> list[tuple[int, int]]:
    """The (rank, id) that stay of the k rows nearest to a query."""
    scores = stored @ query
    nearest = np.lexsort((np.arange(len(stored)), -scores))[:k]
    return [(int(place) + 1, int(nearest[place])) for place in staying(stored[nearest], threshold)]


def staying(rows: np.ndarray, threshold: float) -> np.ndarray:
    """The places of the rows that stay, of rows in order of rank."""
    rows = unit(rows).astype(np.float64)
    linked = rows @ rows.T > np.float32(threshold)
    label = np.arange(len(rows))
    while True:
        lowest = np.array([min([label[i], *label[linked[i]]]) for i in range(len(label))], dtype=int)
        if (lowest == label).all():
            return np.flatnonzero(label == np.arange(len(label)))
        label = lowest


def open_folder(folder: Path) -> tuple[Index, Metadata]:
    files = sorted((folder / "metadata").iterdir())
    return Index(*indices.index_paths(folder)), Metadata(files)


def ordered(table: pa.Table, query: int | None = None) -> list[tuple[int, int]]:
    rows = table if query is None else table.filter(pa.compute.equal(table["seed"], query))
    return list(zip(rows["rank"].to_pylist(), rows["id"].to_pylist(), strict=True))


@pytest.mark.parametrize("k", [1, 40, 700])
def test_the_demo_index_gives_what_brute_force_gives(demo, k) -> None:
    index, metadata = open_folder(demo.index)
    stored = indices.reconstructed(demo.index)
    every = pa.concat_tables(
        pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        for path in sorted((demo.index / "metadata").iterdir())
    )
    queries = unit(np.random.default_rng(k).standard_normal((5, index.dimension)).astype(np.float32))
    queries[0] = unit(stored[:1])[0]
    table, found = retrieve_table(index, metadata, queries, Request(k, 0.94, ALL_LISTS), per_seed=True)
    received = retrieve_table(index, metadata, queries, Request(k, 1.0, ALL_LISTS), per_seed=True)[0]
    for number, query in enumerate(queries):
        ids = np.array([found_id for _, found_id in ordered(received, number)])
        assert len(np.unique(ids)) == k
        # Rows whose scores differ by rounding alone may swap places: so scores are compared, not ids.
        best = -np.sort(-(stored @ query))[:k]
        np.testing.assert_allclose(stored[ids] @ query, best, atol=2e-6)
        stay = staying(stored[ids], 0.94)
        assert ordered(table, number) == [*zip(stay + 1, ids[stay], strict=True)]
    ids = table["id"].to_numpy()
    expected = np.einsum("nd,nd->n", stored[ids], queries[table["seed"].to_numpy()])
    np.testing.assert_allclose(table["similarity"].to_numpy(), expected, atol=2e-6)
    for name in ("url", "caption"):
        assert table[name].to_pylist() == every[name].take(pa.array(ids)).to_pylist()
    decoder = Decoder.from_bytes(found.decoder)
    codes = np.frombuffer(b"".join(table["code"].to_pylist()), np.uint8).reshape(len(table), -1)
    np.testing.assert_allclose(decoder.decode(codes), stored[ids], atol=1e-6)
    funnel = found.funnel
    assert funnel.requested == funnel.received == 5 * k
    assert funnel.kept == len(table) == funnel.received - funnel.near_duplicates
    assert found.recall == 1.0


def test_seeds_in_batches_find_what_they_find_alone(demo, monkeypatch) -> None:
    index, metadata = open_folder(demo.index)
    queries = unit(indices.reconstructed(demo.index)[::300])
    whole = retrieve_table(index, metadata, queries, Request(20, 0.94), per_seed=True)[0]
    monkeypatch.setattr(retrieval, "RESULT_BYTES", 1)
    batched = retrieve_table(index, metadata, queries, Request(20, 0.94), per_seed=True)[0]
    assert [*zip(batched["seed"].to_pylist(), ordered(batched), strict=True)] == [
        *zip(whole["seed"].to_pylist(), ordered(whole), strict=True)
    ]


def test_at_a_threshold_of_one_nothing_is_decoded(demo, monkeypatch) -> None:
    index, metadata = open_folder(demo.index)
    monkeypatch.delattr(retrieval, "Coded")
    table, _ = retrieve_table(
        index, metadata, unit(indices.reconstructed(demo.index)[:2]), Request(20, 1.0), per_seed=True
    )
    assert len(table) == 40


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 1 << 30), k=st.integers(1, 60), threshold=st.sampled_from([0.6, 0.94, 1.0]))
@pytest.mark.parametrize("form", indices.FORMS)
def test_every_form_of_index_gives_what_brute_force_gives(
    tmp_path_factory, form, seed, k, threshold
) -> None:
    folder = tmp_path_factory.mktemp("index") / "index"
    random = np.random.default_rng(seed)
    indices.write_index(folder, indices.random_rows(random, 50), form)
    indices.write_metadata(folder, pa.table({"url": [f"u{i}" for i in range(50)]}), files=3)
    index, metadata = open_folder(folder)
    stored = indices.reconstructed(folder)
    query = indices.random_rows(random, 1)
    table, _ = retrieve_table(index, metadata, query, Request(k, threshold, ALL_LISTS), per_seed=False)
    if form == "HNSW" or "fewer" in form:  # a graph search is approximate; so are scores there
        assert set(table["id"].to_pylist()) <= set(range(50))
        return
    ranks, ids = zip(*brute_force(stored, query[0], k, threshold), strict=True)
    if len(np.unique((stored @ query[0]).round(5))) == 50:  # no ties, which may fall either way
        assert ordered(table) == [*zip(ranks, ids, strict=True)]
    assert table["url"].to_pylist() == [f"u{i}" for i in table["id"].to_pylist()]


def test_a_request_the_lists_cannot_fill_is_counted(demo) -> None:
    index, metadata = open_folder(demo.index)
    query = unit(indices.reconstructed(demo.index)[:1])
    _, found = retrieve_table(index, metadata, query, Request(2000, 0.94, 1), per_seed=False)
    assert 0 < found.funnel.received < found.funnel.requested == 2000
    assert found.recall < 0.9


def test_an_error_of_the_recall_check_ends_the_search(demo, monkeypatch) -> None:
    index, metadata = open_folder(demo.index)
    query = unit(indices.reconstructed(demo.index)[:1])
    monkeypatch.delattr(faiss_index, "sampled_lists")
    with pytest.raises(NameError, match="sampled_lists"):
        retrieve_table(index, metadata, query, Request(20, 0.94, 1), per_seed=False)


def test_nprobe_follows_from_the_images_wanted_and_not_from_what_is_stored(tmp_path) -> None:
    rows = indices.random_rows(np.random.default_rng(4), 4000)
    indices.write_index(tmp_path, rows, indices.MANY_LISTS)
    indices.write_metadata(tmp_path, pa.table({"url": ["u"] * 4000}), batch=999)
    assert faiss.extract_index_ivf(indices.read_with_faiss(tmp_path)).nprobe == 1
    index, metadata = open_folder(tmp_path)
    chosen = {k: index.nprobe_for(k) for k in (1, 60, 3000, 10**9)}
    assert chosen[1] == 64 < chosen[60] == 96 < chosen[3000] == chosen[10**9] == index.nlist
    assert (index.nprobe_for(1, 3), index.nprobe_for(1, 10**9)) == (3, index.nlist)
    # The graph over the lists returns as many as are asked for, not its own efSearch of 64.
    for k in (1, 60, 3000):
        _, found = retrieve_table(index, metadata, unit(rows[:3]), Request(k, 1.0), per_seed=True)
        assert found.nprobe == chosen[k]
        assert found.funnel.received == found.funnel.requested == 3 * k
        assert found.recall == pytest.approx(recall(tmp_path, unit(rows[:3]), k, chosen[k]), abs=0.01)
    _, found = retrieve_table(index, metadata, unit(rows[:3]), Request(900, 1.0, 4), per_seed=True)
    assert found.funnel.received < found.funnel.requested
    assert found.recall < 0.9


def recall(folder: Path, queries: np.ndarray, k: int, nprobe: int) -> float:
    """The share of the rows found that plain faiss finds too when it probes four times the lists."""
    index = indices.read_with_faiss(folder)
    ivf = faiss.extract_index_ivf(index)
    found = []
    for lists in (nprobe, min(4 * nprobe, ivf.nlist)):
        ivf.nprobe = lists
        faiss.downcast_index(ivf.quantizer).hnsw.efSearch = 2 * lists
        found.append(index.search(queries, k)[1])
    shares = [len(set(few) & set(many)) / k for few, many in zip(*found, strict=True)]
    return float(np.mean(shares))


@pytest.mark.parametrize(("threshold", "urls"), [(1.0, ["c", "d"]), (0.94, ["c"])])
def test_rows_without_metadata_or_url_are_counted_and_displace_nothing(tmp_path, threshold, urls) -> None:
    row = indices.random_rows(np.random.default_rng(1), 1)
    indices.write_index(tmp_path, np.repeat(row, 6, axis=0), "Flat")
    indices.write_metadata(tmp_path, pa.table({"url": pa.array(["", None, "c", "d"], pa.string())}))
    index, metadata = open_folder(tmp_path)
    table, found = retrieve_table(index, metadata, row, Request(6, threshold), per_seed=False)
    assert [r["url"] for r in table.to_pylist()] == urls
    assert (found.funnel.received, found.funnel.without_url, found.funnel.kept) == (6, 4, len(urls))
    assert found.funnel.near_duplicates == 2 - len(urls)


@pytest.mark.parametrize("form", indices.FORMS)
def test_a_request_of_which_no_row_has_metadata_gives_an_empty_table(tmp_path, form) -> None:
    rows = indices.random_rows(np.random.default_rng(6), 400)
    indices.write_index(tmp_path, rows, form)
    indices.write_metadata(tmp_path, pa.table({"url": ["only this one"]}))
    index, metadata = open_folder(tmp_path)
    table, found = retrieve_table(index, metadata, unit(rows[-1:]), Request(5, 0.94, 1), per_seed=False)
    assert len(table) == found.funnel.kept == 0
    assert found.funnel.without_url == found.funnel.received > 0
    decoder = Decoder.from_bytes(found.decoder)
    assert decoder.decode(np.empty((0, index.code_size), np.uint8)).shape == (0, index.dimension)


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("nprobe", [1, 2, 8])
def test_recall_is_told_whatever_the_length_of_the_vectors(tmp_path, scale, nprobe) -> None:
    rows = indices.random_rows(np.random.default_rng(7), 400)
    indices.write_index(tmp_path, rows * np.float32(scale), indices.MANY_LISTS)
    indices.write_metadata(tmp_path, pa.table({"url": ["u"] * len(rows)}))
    index, metadata = open_folder(tmp_path)
    _, found = retrieve_table(index, metadata, unit(rows[:16]), Request(20, 1.0, nprobe), per_seed=True)
    assert 0 < found.recall <= 1


def test_seeds_of_another_dimension_are_refused(demo) -> None:
    index, metadata = open_folder(demo.index)
    with pytest.raises(InputError, match="7 dimensions, the index has 256"):
        retrieve_table(index, metadata, np.ones((1, 7), np.float32), Request(1, 0.94), per_seed=False)


def test_near_duplicates_that_were_removed_are_kept_beside_what_stays_unless_they_are_blocked(demo):
    index, metadata = open_folder(demo.index)
    query = unit(indices.reconstructed(demo.index)[:1])

    def search(*blocked: int) -> tuple[Found, set[str]]:
        listed = BlockList("", np.array(sorted(blocked), np.int64), np.empty(0, np.int64))
        asked = Request(500, 0.94, ALL_LISTS, Filters(block_list=listed))
        table, found = retrieve_table(index, metadata, query, asked, per_seed=False)
        return found, set(table["url"].to_pylist())

    found, kept = search()
    assert found.removed is not None
    gone, stays = (
        part["url"].to_pylist() for part in (found.removed.removed, found.removed.representatives)
    )
    assert 10 < len(gone) == len(set(stays)) <= retrieval.PAIRS
    assert not set(gone) & kept
    assert set(stays) <= kept
    assert {"caption", "thumbnail"} <= set(found.removed.removed.column_names)
    assert 0.94 < np.median(found.removed.cosine) <= 1.0001
    urls = metadata.take(np.arange(len(metadata)), ["url"])["url"].to_pylist()
    blocked = [number for number, url in enumerate(urls) if url in set(gone)]
    again, _ = search(*blocked)
    assert again.removed is not None
    assert not set(again.removed.removed["url"].to_pylist()) & set(gone)


@pytest.mark.parametrize("kind", ["Flat", indices.MANY_LISTS])
def test_progress_moves_within_a_batch_and_ends_with_all_queries(tmp_path, kind) -> None:
    rows = indices.random_rows(np.random.default_rng(0), 4000)
    indices.write_index(tmp_path, rows, kind)
    indices.write_metadata(tmp_path, pa.table({"url": ["u"] * 4000}), batch=999)
    seen: list[float | str] = []
    retrieve(
        *open_folder(tmp_path),
        unit(rows[:40]),
        Request(5, 1.0, 3),
        lambda _: seen.append("rows"),
        per_seed=True,
        progress=seen.append,
    )
    first = seen.index("rows")
    assert seen[first:] == ["rows", 20]
    assert sum(seen[:first]) == 20
    assert first == 1 or seen[0] == 8


@pytest.mark.parametrize("form", [indices.ARROW, indices.PARQUET])
def test_texts_that_are_not_utf_8_are_replaced_and_such_urls_are_dropped_and_counted(
    tmp_path, form
) -> None:
    """Of 60 rows, every third has a caption in Latin-1, and every fourth such a URL."""
    rows = indices.random_rows(np.random.default_rng(1), 60)
    indices.write_index(tmp_path, rows, "Flat")
    captions = [b"caf\xe9" if i % 3 == 0 else b"cafe" for i in range(60)]
    urls = [b"http://a/\xe9.jpg" if i % 4 == 0 else f"http://a/{i}.jpg".encode() for i in range(60)]
    table = pa.table(
        {"url": as_strings(urls), "TEXT": as_strings(captions), "LICENSE": as_strings(captions)}
    )
    indices.write_files(tmp_path / "metadata", [np.arange(60)], table, 7, form)
    index, metadata = open_folder(tmp_path)
    found, about = retrieve_table(index, metadata, rows[:1], Request(60, 1.0, None), per_seed=True)
    assert sorted(found["id"].to_pylist()) == [i for i in range(60) if i % 4]
    for row in found.to_pylist():
        expected = "caf\N{REPLACEMENT CHARACTER}" if row["id"] % 3 == 0 else "cafe"
        assert (row["url"], row["caption"]) == (f"http://a/{row['id']}.jpg", expected)
        assert row["LICENSE"] == expected
    assert (about.funnel.without_url, about.funnel.kept) == (15, 45)
    assert (
        str(about.not_utf8) == "texts that are not UTF-8: 15 rows dropped, bytes replaced in 15 captions"
    )


def as_strings(values: list[bytes]) -> pa.StringArray:
    """Bytes as a column of strings, which Arrow does not validate."""
    raw = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
