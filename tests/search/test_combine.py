"""Both URL sets as one: a worked example, and any two sets against the slow obvious way."""

import json
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laion_assets.index.faiss_index import Decoder
from laion_assets.io.errors import InputError
from laion_assets.io.tables import Provenance, decoder_footer
from laion_assets.search.combine import _taken_in_order, check_same_origin, combine

EAST, ALMOST_EAST, NORTH, WEST, SOUTH = (
    (1.0, 0.0),
    (0.99, 0.141),
    (0.0, 1.0),
    (-1.0, 0.0),
    (0.0, -1.0),
)


class InMemory:
    """A stored table that lies in memory, in batches of two rows."""

    def __init__(self, rows: list[dict], *, seed: bool, footer: dict[str, str] | None = None) -> None:
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
        raw = Decoder(None, np.empty(0, np.int64), 2)
        self.footer = decoder_footer(raw.to_bytes()) | (footer or {})
        self.schema = self._table.schema
        self.where = "memory"

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
    found = combine(InMemory(knn, seed=True), InMemory(centroid, seed=False), threshold, pictures=0)
    rows = pa.Table.from_batches(found.table.batches, found.table.schema).to_pylist()
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
    monkeypatch.setattr("laion_assets.search.combine.ROWS_AT_ONCE", at_once)
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
    knn.footer = centroid.footer = {}  # no decoder
    assert combine(knn, centroid, 1.0, pictures=0).funnel.kept == 2


def test_the_texts_of_all_images_together_may_be_more_than_two_gigabytes() -> None:
    """An array of strings ends there; 25 million URLs are more. To see it fail takes 9 GB."""
    table = InMemory([row(1, "a", 1, EAST)], seed=True)
    together = _taken_in_order(table, InMemory([], seed=False), np.array([0]), ["url", "caption"])
    assert set(together.schema.types) == {pa.large_string()}
    found = combine(table, InMemory([], seed=False), 0.94, pictures=0)
    assert [batch.schema for batch in found.table.batches] == [found.table.schema]
    assert found.table.schema.field("url").type == pa.string()


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


def made_from(seeds: str, index: str | None, written: str) -> InMemory:
    settings = {"nb_images_centroid": 9, "dedup_threshold": 0.94, "target_images": None, "nprobe": 64}
    settings["origins"] = dict.fromkeys(settings, "default")
    footer = Provenance("cats", seeds, index, settings, "run", written, asked=settings).to_footer()
    assert json.loads(footer["laion_assets"])["seeds"] == seeds
    return InMemory([], seed=True, footer=footer)


def test_sets_of_other_seeds_or_another_index_are_refused_with_the_one_to_make_again() -> None:
    knn, seeds = made_from("s1", "i1", "2026-01-02"), made_from("s1", None, "2026-01-01")
    assert check_same_origin(knn, made_from("s1", "i1", "2026-01-03"), seeds).index == "i1"
    with pytest.raises(InputError, match=r"centroid_urls .* other seeds .* materialize centroid_urls"):
        check_same_origin(knn, made_from("s2", "i1", "2026-01-03"), seeds)
    with pytest.raises(InputError, match=r"different indices .* materialize knn_urls again"):
        check_same_origin(knn, made_from("s1", "i2", "2026-01-03"), seeds)


def test_sets_that_do_not_say_what_was_asked_for_are_to_be_made_again() -> None:
    """Those of an older version."""
    footer = Provenance("cats", "s1", "i1", {}, "run", "2026-01-02").to_footer()
    older, seeds = InMemory([], seed=True, footer=footer), made_from("s1", None, "2026-01-01")
    with pytest.raises(
        InputError, match=r"knn_urls of 'cats' .* older version: materialize knn_urls again"
    ):
        check_same_origin(older, older, seeds)
