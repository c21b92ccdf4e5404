"""For the same index, query, k, nprobe and threshold we keep what clip-retrieval keeps.

Its `KnnService` runs unchanged in its own environment. It searches with the nprobe and efSearch that are
stored in the index. They are set here before, efSearch to twice nprobe: as autofaiss stores it, as the
peer sets it itself where it raises nprobe, and as we set it at every search. With an index that stores
another efSearch the graph over the lists may choose other lists, and answers differ in the rows of these.

Where the peer is wrong we are not the same on purpose: see the last tests here. Its columns come in a
random order, so they are compared by name.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import copies, indices
from helpers.answers import Answer, Question, ask
from helpers.same import Rows, brute_force_components, differences

from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.index.vectors import unit
from laion_assets.io.errors import InputError
from laion_assets.search.links import SIZES, Sizes
from laion_assets.search.near_duplicates import components
from laion_assets.search.retrieval import Request, retrieve_table
from laion_assets.seeds import find_seed_set, read_seeds

ROWS = 20_000
SEEDS = 100
TWO_FILES = "LAION's form, lists on disk"
BUILT = "built from embeddings in clip-retrieval's layout"
FORMS = {
    BUILT: copies.LAION_FORM,
    TWO_FILES: copies.LAION_FORM,
    "one file": copies.LAION_FORM,
    "IVF Flat": "IVF64,Flat",
    "Flat": "Flat",
    "HNSW": "HNSW16",
}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return copies.images(np.random.default_rng(0), ROWS + SEEDS)


@pytest.fixture(scope="module")
def seeds(images) -> np.ndarray:
    return images[ROWS:]


@pytest.fixture(scope="module")
def centroid(seeds) -> np.ndarray:
    return unit(seeds[:20].mean(axis=0)[None])


@pytest.fixture(scope="module")
def folders(images, tmp_path_factory) -> dict[str, Path]:
    """The same images as an index of every form."""
    made = {}
    for number, (form, key) in enumerate(FORMS.items()):
        folder = made[form] = tmp_path_factory.mktemp(f"index{number}")
        if form == BUILT:
            copies.build(folder, images[:ROWS], key)
            continue
        if form == TWO_FILES:
            copies.write_two_files(folder, images[:ROWS])
        else:
            copies.write_one_file(folder, images[:ROWS], key)
        copies.write_metadata(folder, ROWS)
    return made


def open_folder(folder: Path) -> tuple[Index, Metadata]:
    return Index(*indices.index_paths(folder)), Metadata(sorted((folder / "metadata").iterdir()))


def ours(question: Question, queries: np.ndarray) -> list[pa.Table]:
    """Our table for each query."""
    request = Request(question.k, question.threshold, question.nprobe)
    table, _ = retrieve_table(*open_folder(Path(question.folder)), queries, request, per_seed=True)
    return [table.filter(pa.compute.equal(table["seed"], seed)) for seed in range(len(queries))]


def kept_by_peer(answer: Answer) -> Rows:
    return Rows(
        np.array([row["id"] for row in answer.rows], np.int64),
        np.array([row["similarity"] for row in answer.rows]),
    )


def kept_by_us(table: pa.Table) -> Rows:
    return Rows(table["id"].to_numpy(), table["similarity"].to_numpy())


def check_same(question: Question, queries: np.ndarray) -> None:
    """Compare the rows, their order and similarities, and their texts."""
    answers, tables = ask(question, queries), ours(question, queries)
    vectors = unit(indices.reconstructed(Path(question.folder)))
    exchanged = 0
    for answer, table in zip(answers, tables, strict=True):
        theirs, mine, received = kept_by_peer(answer), kept_by_us(table), Rows(*answer.received)
        assert differences(theirs, mine, received, vectors, question.threshold) == []
        exchanged += len(np.setxor1d(theirs.ids, mine.ids))
        texts = {row["id"]: (row["url"], row["caption"]) for row in answer.rows}
        for row, *text in zip(
            *(table[name].to_pylist() for name in ("id", "url", "caption")), strict=True
        ):
            assert (
                tuple(text) == texts.get(row, tuple(text)) == (copies.url_of(row), copies.caption_of(row))
            )
    kept = sum(map(len, tables))
    got = sum(len(answer.received[0]) for answer in answers)
    print(f"\n{question}: {len(queries)} queries, {got:,} received, {kept:,} kept, {exchanged} exchanged")
    assert 0 < kept <= got


@pytest.mark.parametrize("threshold", [0.94, 0.9])
@pytest.mark.parametrize(("k", "nprobe"), [(1_000, 8), (5_000, 48), (10_000, 64)])
def test_around_a_centroid_the_same_rows_stay(folders, centroid, k, nprobe, threshold) -> None:
    check_same(Question(str(folders[TWO_FILES]), k, nprobe, threshold), centroid)


@pytest.mark.parametrize("threshold", [0.94, 0.9])
def test_around_each_of_a_hundred_seeds_the_same_rows_stay(folders, seeds, threshold) -> None:
    check_same(Question(str(folders[TWO_FILES]), 830, 32, threshold), seeds)


@pytest.mark.parametrize("form", [form for form in FORMS if form != TWO_FILES])
def test_in_an_index_of_another_form_the_same_rows_stay(folders, centroid, seeds, form) -> None:
    nprobe = 32 if "IVF" in FORMS[form] else None
    check_same(Question(str(folders[form]), 1_000, nprobe), np.vstack([centroid, seeds[:10]]))


def test_where_the_probed_lists_hold_fewer_than_asked_for_the_same_rows_stay(folders, seeds) -> None:
    check_same(Question(str(folders[TWO_FILES]), 5_000, 1), seeds[:10])


@pytest.mark.parametrize("threshold", [0.94, 0.9])
def test_the_same_vectors_have_the_same_components(folders, centroid, threshold) -> None:
    (answer,) = ask(Question(str(folders[TWO_FILES]), 10_000, 64, threshold), centroid)
    theirs = np.arange(len(answer.vectors))
    for group in answer.groups:
        theirs[group] = min(group)
    assert len(theirs) == 10_000
    surely, perhaps = (
        brute_force_components(answer.vectors, threshold + shift).max() + 1 for shift in (1e-6, -1e-6)
    )
    assert surely == perhaps, "no pair may be at the threshold, or components could differ"
    for sizes in (SIZES, Sizes(small=100), Sizes(small=len(theirs))):
        np.testing.assert_array_equal(components(answer.vectors, threshold, sizes), theirs)


def exactly_at(cosine: np.float32) -> np.ndarray:
    """Two rows whose lengths are 1 and whose product is this number, all to the last bit."""
    rest = np.float32(np.sqrt(1 - np.float64(cosine) ** 2))
    rows = np.zeros((2, copies.DIMENSION), np.float32)
    rows[0, 0] = 1
    for step in range(-8, 9):
        rows[1, :2] = cosine, rest + step * np.spacing(rest)
        if np.linalg.norm(rows[1]) == 1 and np.array_equal(unit(rows), rows):
            return rows
    raise AssertionError("no such rows")


def test_a_pair_exactly_at_the_threshold_stays_on_both_sides_and_one_above_does_not(tmp_path) -> None:
    limit = np.float32(0.94)
    copies.write_metadata(tmp_path, 2)
    for cosine, kept in ((limit, [0, 1]), (np.nextafter(limit, np.float32(1)), [0])):
        rows = exactly_at(cosine)
        copies.write_one_file(tmp_path, rows, "Flat")
        question = Question(str(tmp_path), 2)
        (answer,), (table,) = ask(question, rows[:1]), ours(question, rows[:1])
        assert kept_by_peer(answer).ids.tolist() == table["id"].to_pylist() == kept


# --- where the peer is wrong ----------------------------------------------------------------------


def test_texts_stay_with_their_rows_where_metadata_is_missing_and_with_the_peer_they_do_not(
    images, centroid, tmp_path
) -> None:
    copies.write_one_file(tmp_path, images[:ROWS], "Flat")
    covered = ROWS // 2
    copies.write_metadata(tmp_path, covered)
    question = Question(str(tmp_path), 200)
    (answer,), (table,) = ask(question, centroid), ours(question, centroid)
    shifted = [
        row for row in answer.rows if row.get("url", copies.url_of(row["id"])) != copies.url_of(row["id"])
    ]
    assert shifted, "the peer gives rows the texts of others"
    assert len(table)
    for row, url in zip(table["id"].to_pylist(), table["url"].to_pylist(), strict=True):
        assert row < covered
        assert url == copies.url_of(row)


def test_a_query_that_is_not_finite_is_refused_with_its_row_and_with_the_peer_finds_nothing(
    folders, centroid, tmp_path
) -> None:
    broken = centroid.copy()
    broken[0, 3] = np.nan
    (answer,) = ask(Question(str(folders[TWO_FILES]), 10, 8), broken)
    assert answer.rows == []
    (tmp_path / "broken").mkdir()
    np.save(tmp_path / "broken" / "seed.npy", broken)
    with pytest.raises(InputError, match=r"broken/seed\.npy row 0"):
        read_seeds(str(tmp_path), find_seed_set(str(tmp_path), "broken"))


@pytest.mark.parametrize(("k", "nprobe"), [(1_000, 8), (10_000, 64)])
def test_at_a_threshold_of_one_all_that_the_peer_receives_stays(folders, centroid, k, nprobe) -> None:
    """The peer at 1.0 lets rounding decide which exact copies are linked.

    Or it dies: where a row is linked to one that is not even linked to itself, its dictionary
    of neighbours grows while it goes through it.
    """
    folder = folders[TWO_FILES]
    (answer,) = ask(Question(str(folder), k, nprobe), centroid)
    (table,) = ours(Question(str(folder), k, nprobe, 1.0), centroid)
    received, vectors = Rows(*answer.received), unit(indices.reconstructed(folder))
    assert len(table) == len(received) == k
    assert differences(received, kept_by_us(table), received, vectors, 1.0) == []
