"""Near-duplicates compared with brute force: the algorithm for large inputs, on small inputs."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from laion_assets.index import vectors as vectors_module
from laion_assets.index.decoder import Decoder
from laion_assets.index.vectors import Coded, unit
from laion_assets.io import spill
from laion_assets.io.processes import in_processes
from laion_assets.search import caps
from laion_assets.search.caps import find_links_of_stripe, plan_comparison
from laion_assets.search.links import SIZES, Links, Sizes
from laion_assets.search.near_duplicates import components, components_of_lists

ALMOST_ALL = {"small": 0, "sample": 40, "chunk": 6, "cap": 2, "batch": 5}
ALMOST_ALL |= {"block": 4, "tile": 4, "tiles": 2, "panel": 27, "met": 9, "many": 20}
BY_CAPS = {"widths": (6,), **ALMOST_ALL}
WAYS = {
    "as it is": SIZES,
    "by caps": Sizes(**BY_CAPS),
    "by caps on two axes": Sizes(**BY_CAPS | {"widths": (2,)}),
    "on axes of a chosen number": Sizes(**BY_CAPS | {"widths": (2, 4, 8, 12)}),
    "all rows in caps": Sizes(**BY_CAPS | {"cap": 0}),
    "no rows in caps": Sizes(**BY_CAPS | {"cap": 1000}),
    "near pairs in one product": Sizes(**BY_CAPS | {"single": 1000}),
    "near pairs one by one": Sizes(**BY_CAPS | {"single": 1, "fine": 1}),
    "each cap in a product of its own": Sizes(**BY_CAPS | {"many": 0}),
    "each row a chunk": Sizes(**BY_CAPS | {"chunk": 1}),
}
WAYS_WITH_LISTS = {
    "as it is": SIZES,
    "by caps": WAYS["by caps"],
    "lists whose rows are all alike": Sizes(many_of_row=0),
    "a few rows of a list at a time": Sizes(rows_of_list=7),
}
thresholds = st.sampled_from([0.0, 0.3, 0.6, 0.8, 0.94, 0.99, 0.9999])


def brute_force(rows: np.ndarray, threshold: float) -> np.ndarray:
    """The lowest row of each row's component, all pairs compared in float64."""
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0).astype(np.float64)
    linked = rows @ rows.T > np.float32(threshold)
    _, component = connected_components(linked, directed=False)
    lowest = [np.flatnonzero(component == number)[0] for number in range(component.max(initial=-1) + 1)]
    return np.array(lowest, np.int64)[component]


def clumps(random: np.random.Generator, n: int, dimension: int = 16) -> np.ndarray:
    """Unit rows: some alone, some equal, some in clumps of every width, some in chains."""
    centres = random.standard_normal((max(1, n // 5), dimension))
    rows = centres[random.integers(len(centres), size=n)]
    spread = random.choice([0, 0.003, 0.05, 0.1, 0.2, 2], size=(n, 1))
    rows += spread * random.standard_normal(rows.shape)
    chain = np.linspace(0, 2, n // 4)
    rows[: len(chain)] = centres[0] + chain[:, None] * random.standard_normal(dimension)
    return unit(random.permutation(rows).astype(np.float32))


def coded(rows: np.ndarray) -> Coded:
    """Rows as codes that are vectors."""
    return Coded(rows.view(np.uint8), Decoder(None, np.empty(0, np.int64), rows.shape[1]))


def near_copies(random: np.random.Generator, originals: np.ndarray, n: int) -> np.ndarray:
    """Unit rows, each near to one of the originals: some pairs of copies are linked, some are not."""
    noise = random.standard_normal((n, originals.shape[1])) / np.sqrt(originals.shape[1])
    rows = originals[random.integers(len(originals), size=n)]
    rows = rows + random.choice([0.01, 0.1, 0.3], size=(n, 1)) * noise
    return unit(rows.astype(np.float32))


def all_different(random: np.random.Generator, n: int) -> np.ndarray:
    """Random directions, of which no two are alike."""
    return unit(random.standard_normal((n, 48)).astype(np.float32))


def cone(random: np.random.Generator, n: int) -> np.ndarray:
    """Copies of originals with cosines about 0.6, which differ evenly in all directions."""
    originals = unit(1.2 * all_different(random, 1) + all_different(random, n // 2 + 1))
    return near_copies(random, originals, n)


def one_clump(random: np.random.Generator, n: int) -> np.ndarray:
    """Copies of one original."""
    return near_copies(random, all_different(random, 1), n)


def clumps_that_nearly_touch(random: np.random.Generator, n: int) -> np.ndarray:
    """Copies of three originals with cosines about the default threshold."""
    return near_copies(random, unit(4 * all_different(random, 1) + all_different(random, 3)), n)


GEOMETRIES = [all_different, cone, one_clump, clumps_that_nearly_touch]


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1 << 30),
    geometry=st.sampled_from([clumps, *GEOMETRIES]),
    n=st.integers(1, 150),
    threshold=thresholds,
)
@pytest.mark.parametrize("way", WAYS)
def test_any_rows_have_the_components_that_brute_force_finds(way, geometry, seed, n, threshold) -> None:
    rows = geometry(np.random.default_rng(seed), n)
    found = components(rows, threshold, WAYS[way])
    np.testing.assert_array_equal(found, brute_force(rows, threshold))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_few_pairs_are_compared_at_full_width_whatever_the_geometry(geometry, monkeypatch) -> None:
    rows = geometry(np.random.default_rng(0), 5000)
    expected = components(rows, 0.94, Sizes(small=len(rows)))
    find, linked, compared = Links.find, Links.linked, []
    monkeypatch.setattr(Links, "find", lambda s, a, b: compared.append(len(a) * len(b)) or find(s, a, b))
    monkeypatch.setattr(Links, "linked", lambda s, a, b: compared.append(len(a)) or linked(s, a, b))
    sizes = Sizes(small=0, sample=400, widths=(8, 16, 24, 32, 40), chunk=64)
    np.testing.assert_array_equal(components(rows, 0.94, sizes), expected)
    assert sum(compared) < len(rows) ** 2 / 16


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1 << 30), n=st.integers(1, 100), threshold=thresholds)
def test_all_entries_to_keep_of_long_lists_are_foreseen(seed, n, threshold) -> None:
    rows = clumps(np.random.default_rng(seed), n)
    members, lists, foreseen = np.tile(np.arange(n), 2), np.repeat([0, 1], n), []
    labels = components_of_lists(rows, members, lists, threshold, WAYS["by caps"], foreseen.append)
    kept = np.flatnonzero(labels == np.arange(2 * n))
    assert set(kept) <= set(np.concatenate(foreseen))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1 << 30), n=st.integers(1, 150), threshold=thresholds, many=st.integers(1, 7))
def test_stripes_compared_apart_find_the_links_of_the_whole(seed, n, threshold, many) -> None:
    random = np.random.default_rng(seed)
    rows = clumps(random, n)
    links = Links(rows, threshold, WAYS["by caps"])
    comparison, _ = plan_comparison(links)
    before = links.forest.labels().copy()
    for stripe in random.permutation(many).tolist():
        alone = Links(rows, threshold, WAYS["by caps"])
        alone.forest.connect(np.arange(n), before)
        find_links_of_stripe(alone, comparison, (stripe, many))
        links.forest.connect(np.arange(n), alone.forest.labels())
    np.testing.assert_array_equal(links.forest.labels(), brute_force(rows, threshold))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1 << 30), n=st.integers(1, 60), lists=st.integers(1, 8), threshold=thresholds)
@pytest.mark.parametrize("way", WAYS_WITH_LISTS)
def test_each_list_has_the_components_it_has_alone(way, seed, n, lists, threshold) -> None:
    random = np.random.default_rng(seed)
    rows = clumps(random, n)
    each = [random.permutation(n)[: random.integers(0, n + 1)] for _ in range(lists)]
    members = np.concatenate(each)
    number = np.repeat(np.arange(lists), [len(part) for part in each])
    found = components_of_lists(rows, members, number, threshold, WAYS_WITH_LISTS[way])
    starts = np.cumsum([0, *(len(part) for part in each)])
    alone = [
        brute_force(rows[part], threshold) + start for part, start in zip(each, starts, strict=False)
    ]
    np.testing.assert_array_equal(found, np.concatenate(alone))


def at_cosines(cosines: list[float]) -> np.ndarray:
    """The first row, and rows that have these cosines with it as float32 numbers, exactly."""
    rest = [np.sqrt(1 - np.float64(cosine) ** 2) for cosine in cosines]
    return np.array([[1, 0], *zip(cosines, rest, strict=True)], np.float32)


@pytest.mark.parametrize("way", WAYS)
def test_the_threshold_is_strict_to_the_last_bit(way) -> None:
    limit = np.float32(0.94)
    above, below = np.nextafter(limit, np.float32(1)), np.nextafter(limit, np.float32(0))
    for cosine, linked in ((above, True), (limit, False), (below, False)):
        rows = at_cosines([cosine])
        assert components(rows, 0.94, WAYS[way]).tolist() == ([0, 0] if linked else [0, 1])


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_are_zero_or_not_finite_are_never_linked(way) -> None:
    rows = np.zeros((9, 8), np.float32)
    rows[[0, 3, 8], 0] = 1
    rows[4] = np.nan
    rows[5, 2] = np.inf
    rows[6] = rows[4]
    assert components(unit(rows), 0.94, WAYS[way]).tolist() == [0, 1, 2, 0, 4, 5, 6, 7, 0]


@pytest.mark.parametrize("way", WAYS)
def test_a_chain_is_one_component_however_far_its_ends_are_apart(way) -> None:
    angles = np.arange(0, np.pi, np.arccos(0.95))
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert rows[0] @ rows[-1] < -0.9
    order = np.random.default_rng(0).permutation(len(rows))
    assert not components(rows[order], 0.94, WAYS[way]).any()
    assert all(a @ b > 0.94 for a, b in pairwise(rows))


@pytest.mark.parametrize("way", WAYS)
def test_a_threshold_of_one_keeps_equal_rows(way) -> None:
    rows = unit(np.ones((20, 7), np.float32))
    assert components(rows, 1.0, WAYS[way]).tolist() == list(range(20))
    assert components_of_lists(rows, np.arange(20), np.zeros(20, int), 1.0).tolist() == list(range(20))
    assert not components(rows, 0.9999, WAYS[way]).any()


def test_rows_decoded_on_every_access_have_the_same_components(monkeypatch) -> None:
    monkeypatch.setattr(spill, "HELD_BYTES", 0)  # all sketches lie on the disk
    rows = 3 * clumps(np.random.default_rng(5), 300)
    monkeypatch.setattr(vectors_module, "ROWS_DECODED_AT_ONCE", 70)
    expected = brute_force(unit(rows), 0.94)
    assert 1 < len(np.unique(expected)) < 300
    for vectors in (unit(rows), coded(rows)):
        for sizes in WAYS.values():
            np.testing.assert_array_equal(components(vectors, 0.94, sizes), expected)


@pytest.mark.parametrize("form", [np.asarray, coded], ids=["in memory", "decoded on every access"])
def test_processes_that_share_the_work_find_the_same_components(form, monkeypatch) -> None:
    shares: list[list[tuple[Links, caps.Caps, tuple[int, int]]]] = []
    monkeypatch.setattr(caps, "thread_count", lambda: 3)
    monkeypatch.setattr(caps, "free_memory", lambda: 1 << 40)
    monkeypatch.setattr(
        caps, "in_processes", lambda work, some: shares.append(some) or in_processes(work, some)
    )
    rows = clumps(np.random.default_rng(6), 400)
    expected = brute_force(rows, 0.94)
    assert 1 < len(np.unique(expected)) < 300
    sizes = Sizes(**BY_CAPS | {"shared": 0})
    np.testing.assert_array_equal(components(form(rows), 0.94, sizes), expected)
    assert [stripe for _, _, stripe in shares[0]] == [(0, 3), (1, 3), (2, 3)]


def test_without_memory_for_processes_threads_find_the_same_components(monkeypatch) -> None:
    monkeypatch.setattr(caps, "thread_count", lambda: 3)
    monkeypatch.setattr(caps, "free_memory", lambda: 0)
    rows = clumps(np.random.default_rng(6), 400)
    sizes = Sizes(**BY_CAPS | {"shared": 0})
    np.testing.assert_array_equal(components(rows, 0.94, sizes), brute_force(rows, 0.94))


def test_no_more_processes_share_the_work_than_memory_has_room_for(monkeypatch) -> None:
    monkeypatch.setattr(caps, "thread_count", lambda: 96)
    rows = 8_000_000
    for free, expected in ((1 << 40, 96), (12 << 30, 29), (600 << 20, 1), (0, 0)):
        monkeypatch.setattr(caps, "free_memory", lambda free=free: free)
        assert caps.processes_for(rows) == expected


def test_rows_opposite_to_a_cap_wider_than_half_the_sphere_are_not_missed() -> None:
    angles = np.radians([0, 50, -50, 100, -100, 180])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    sizes = Sizes(small=0, sample=6, chunk=5, cap=0, block=1, tile=8)
    assert not components(rows, 0.0, sizes).any()
