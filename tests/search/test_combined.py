"""Combining two URL sets: a worked example, and random sets compared with a naive method."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laion_assets.index.decoder import Decoder
from laion_assets.io.errors import InputError
from laion_assets.io.tables import StoredTable
from laion_assets.search import needs, stripes
from laion_assets.search.combined import DECODER, combine
from laion_assets.search.links import Sizes

EAST, ALMOST_EAST, NORTH, WEST, SOUTH = (
    (1.0, 0.0),
    (0.99, 0.141),
    (0.0, 1.0),
    (-1.0, 0.0),
    (0.0, -1.0),
)


class InMemory:
    """A stored table in memory, in batches of two rows."""

    def __init__(self, rows: list[dict], *, seed: bool) -> None:
        codes = [np.array(row["vector"], np.float32).tobytes() for row in rows]
        columns = {
            "id": pa.array([row["id"] for row in rows], pa.int64()),
            "url": pa.array([row["url"] for row in rows], pa.string()),
            "caption": pa.array([f"picture {row['id']}" for row in rows], pa.string()),
            "similarity": pa.array([row["similarity"] for row in rows], pa.float32()),
            "rank": pa.array([row["rank"] for row in rows], pa.int32()),
        }
        if seed:
            columns["seed"] = pa.array([row["seed"] for row in rows], pa.int32())
        columns["code"] = pa.array(codes, pa.binary(8))
        self._table = pa.table(columns)
        self.schema = self._table.schema
        self.attachments = {DECODER: Decoder(None, np.empty(0, np.int64), 2).to_bytes()}

    def attachment(self, name: str) -> bytes:
        return self.attachments[name]

    def batches(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        table = self._table if columns is None else self._table.select(list(columns))
        yield from table.to_batches(max_chunksize=2)


def row(id_: int, url: str, rank: int, vector: tuple[float, float], seed: int = 0) -> dict:
    return {
        "id": id_,
        "url": url,
        "rank": rank,
        "vector": vector,
        "seed": seed,
        "similarity": 1 - rank / 100,
    }


def combined(knn: list[dict], centroid: list[dict], threshold: float = 0.94) -> tuple[list[dict], dict]:
    found = combine(InMemory(knn, seed=True), InMemory(centroid, seed=False), threshold)
    rows = pa.Table.from_batches(found.batches, found.schema).to_pylist()
    return rows, vars(found.funnel)


@pytest.mark.parametrize("at_once", [1, 2, 10])
def test_six_rows_worked_by_hand(monkeypatch, at_once) -> None:
    # knn      id 1 "a" rank 2 east, seed 0; id 2 "b" rank 1 north, seed 1; id 3 "c" rank 3 west, seed 1
    # centroid id 1 "a" rank 1 east, id 4 "c" rank 3 south, id 5 "e" rank 4 almost east
    #
    # id 1 stands in both: the centroid's row has the lower rank and stays, without a seed.
    # id 5 is a near-duplicate of id 1 (cosine 0.99): it goes, and adds nothing to the strategies.
    # ids 3 and 4 have the URL "c" and rank 3 both: the knn row stays.
    # Order: rank 1 id 1, rank 1 id 2, rank 3 id 3.
    knn = [row(1, "a", 2, EAST, 0), row(2, "b", 1, NORTH, 1), row(3, "c", 3, WEST, 1)]
    centroid = [row(1, "a", 1, EAST), row(4, "c", 3, SOUTH), row(5, "e", 4, ALMOST_EAST)]
    monkeypatch.setattr("laion_assets.search.combined.COMBINED_ROWS", at_once)
    monkeypatch.setattr("laion_assets.io.spill.SORTED_ROWS", 2)
    monkeypatch.setattr("laion_assets.io.spill.HELD_BYTES", 0)
    rows, funnel = combined(knn, centroid)
    assert [(r["id"], r["rank"], r["seed"], r["strategies"]) for r in rows] == [
        (1, 1, None, ["knn", "centroid"]),
        (2, 1, 1, ["knn"]),
        (3, 3, 1, ["knn", "centroid"]),
    ]
    assert rows[0]["similarity"] == np.float32(0.99)
    assert rows[0]["caption"] == "picture 1"
    assert funnel == {
        "knn": 3,
        "centroid": 3,
        "repeated_ids": 1,
        "repeated_urls": 1,
        "near_duplicates": 1,
        "beyond_target": 0,
        "kept": 3,
    }


def test_of_equal_rank_and_strategy_the_lower_id_stays() -> None:
    rows, _ = combined([row(9, "x", 1, EAST, 0), row(4, "y", 1, EAST, 1)], [])
    assert [(r["id"], r["seed"]) for r in rows] == [(4, 1)]


def test_two_empty_sets_make_an_empty_one() -> None:
    rows, funnel = combined([], [])
    assert rows == []
    assert funnel["kept"] == 0


def test_at_a_threshold_of_one_nothing_is_decoded() -> None:
    knn, centroid = (
        InMemory([row(1, "a", 1, EAST)], seed=True),
        InMemory([row(2, "b", 1, EAST)], seed=False),
    )
    knn.attachments = centroid.attachments = {}
    assert combine(knn, centroid, 1.0).funnel.kept == 2


def test_all_schemas_are_those_announced() -> None:
    found = combine(InMemory([row(1, "a", 1, EAST)], seed=True), InMemory([], seed=False), 0.94)
    assert [batch.schema for batch in found.batches] == [found.schema]


DIRECTIONS = [(float(np.cos(a)), float(np.sin(a))) for a in np.arange(12) * 0.5]
SETS = st.lists(
    st.tuples(st.integers(0, 7), st.integers(1, 4), st.integers(0, 2)), max_size=12, unique=True
)


@given(knn=SETS, centroid=SETS, urls=st.lists(st.integers(0, 5), min_size=8, max_size=8))
def test_any_two_sets_are_united_as_the_obvious_way_does(knn, centroid, urls) -> None:
    def rows_of(triples: list[tuple[int, int, int]]) -> list[dict]:
        return [row(i, f"u{urls[i]}", rank, DIRECTIONS[i], seed) for i, rank, seed in triples]

    everything = [(r, "knn") for r in rows_of(knn)] + [(r, "centroid") for r in rows_of(centroid)]
    groups = [[member] for member in everything]
    merged = True
    while merged:
        merged = False
        for a in range(len(groups)):
            for b in range(a + 1, len(groups)):
                if any(_same(x, y) for x, _ in groups[a] for y, _ in groups[b]):
                    groups[a] += groups.pop(b)
                    merged = True
                    break
            if merged:
                break
    expected = []
    for group in groups:
        best, strategy = min(group, key=lambda m: (m[0]["rank"], m[1] != "knn", m[0]["id"], m[0]["seed"]))
        names = {name for _, name in group}
        seed = best["seed"] if strategy == "knn" else None
        expected.append((best["rank"], best["id"], seed, [n for n in ("knn", "centroid") if n in names]))
    rows, _ = combined(rows_of(knn), rows_of(centroid), threshold=0.8)
    found = [(r["rank"], r["id"], r["seed"], r["strategies"]) for r in rows]
    assert found == sorted(expected, key=lambda e: e[:2])


def _same(x: dict, y: dict) -> bool:
    cosine = float(np.dot(np.float32(x["vector"]), np.float32(y["vector"])))
    return x["id"] == y["id"] or x["url"] == y["url"] or cosine > 0.8


def test_what_cannot_fit_is_refused_before_any_code_is_read(monkeypatch) -> None:
    monkeypatch.setattr(needs, "free_memory", lambda: 0)
    monkeypatch.setattr(needs, "SMALL", 0)
    monkeypatch.delattr("laion_assets.search.combined.urls_and_codes")
    with pytest.raises(InputError, match="combining 2 different images needs about 550 MB of memory"):
        combined([row(1, "a", 1, EAST)], [row(2, "b", 1, NORTH)])


@settings(deadline=None, max_examples=25)
@given(
    angles=st.lists(st.floats(0, 6), min_size=1, max_size=30),
    in_knn=st.lists(st.booleans(), min_size=30, max_size=30),
    many=st.integers(1, 6),
    chunk=st.integers(1, 6),
)
def test_images_compared_in_any_number_of_stripes_are_combined_as_ever(
    tmp_path_factory, angles, in_knn, many, chunk
) -> None:
    rows = [row(i, f"u{i}", 1, (float(np.cos(a)), float(np.sin(a)))) for i, a in enumerate(angles)]
    knn = InMemory([r for r, chosen in zip(rows, in_knn, strict=False) if chosen], seed=True)
    centroid = InMemory(rows, seed=False)
    folder = tmp_path_factory.mktemp("stripes")
    sizes = Sizes(small=0, chunk=chunk, cap=1, batch=5, block=2, tile=2, tiles=2, panel=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stripes, "SIZES", sizes)
        plan, found = str(folder / "plan.parquet"), [str(folder / f"{i}.parquet") for i in range(many)]
        stripes.write_plan(knn, centroid, 0.94, plan, lambda _: None)
        for number in range(many):
            stripes.compare_stripe(StoredTable(plan), 0.94, (number, many), found[number])
    whole = combine(knn, centroid, 0.94)
    links = stripes.links_in(map(StoredTable, found))
    striped = combine(knn, centroid, 0.94, links=links)
    assert striped.funnel == whole.funnel
    assert list(striped.batches) == list(whole.batches)
