"""A table's footer records its inputs, and tables with different inputs are not combined."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from laion_assets.defs.provenance import Provenance, check_continues, check_same_origin, files_version
from laion_assets.defs.settings import Defaults, RetrievalConfig
from laion_assets.io.errors import InputError
from laion_assets.io.tables import StoredTable, new_table

SCHEMA = pa.schema({"id": pa.int64()})


def made(**given: Any) -> Provenance:
    """The provenance of a table of the set cats: seeds s1, index i1, default settings."""
    config = {name: given.pop(name) for name in [*given] if name in RetrievalConfig.model_fields}
    block_list = given.pop("block_list", None)
    settings = RetrievalConfig(**config).resolve(Defaults({}), block_list=block_list)
    settings = settings.with_expect_alive(0.75, "default")  # as a search records it
    about = {"seeds": "s1", "index": "i1", "model": "m1", "run": "run", "own": {}, "settings": settings}
    about["written"] = "2026-01-02"
    return Provenance("cats", **(about | given))


@pytest.fixture
def stored(tmp_path: Path):
    """Write a table without rows, with its provenance."""

    def write(name: str, provenance: Provenance | None) -> StoredTable:
        uri = str(tmp_path / f"{name}.parquet")
        with new_table(uri, SCHEMA) as table:
            table.footer = provenance.to_footer() if provenance else {}
        return StoredTable(uri, f"materialize {name} again")

    return write


@pytest.fixture
def checked(stored):
    """Compare two sets with each other and with the seeds s1."""

    def check(knn: Provenance, centroid: Provenance) -> Provenance:
        tables = {"knn_urls": knn, "centroid_urls": centroid, "seed_embeddings": made(index=None)}
        return check_same_origin(*(stored(name, each) for name, each in tables.items()))

    return check


def test_a_table_returns_the_provenance_that_was_written_into_its_footer(stored):
    settings = made(nprobe=9, filters="width > 5", block_list="list.txt, 3 ids").settings
    own = {"nb_images_knn": 7, "filters": "width > 5"}
    provenance = made(settings=settings.with_nprobe(7), own=own, counts={"requested": 9, "kept": 3})
    assert Provenance.of(stored("knn_urls", provenance)) == provenance


@pytest.mark.parametrize(
    "change",
    [
        lambda _: None,
        lambda told: {**told, "settings": {"nb_images_knn": 50, "origins": {}}},  # of version 0.1
        lambda told: {name: value for name, value in told.items() if name != "seeds"},
        lambda told: {name: value for name, value in told.items() if name != "own"},
        lambda told: {**told, "more": 1},
        lambda told: {**told, "settings": {**told["settings"], "values": {"nb_pictures": 5}}},
    ],
)
def test_a_table_that_does_not_say_what_it_was_made_from_is_to_be_made_again(stored, monkeypatch, change):
    told = change(made().to_json())
    monkeypatch.setattr(Provenance, "to_json", lambda _: told)
    with pytest.raises(InputError) as refused:
        Provenance.of(stored("knn_urls", made() if told else None))
    for fact in ("knn_urls.parquet", "materialize knn_urls again"):
        assert fact in str(refused.value)


def test_sets_of_one_index_and_of_these_seeds_are_combined(checked):
    found = checked(made(written="2026-01-02"), made(written="2026-01-03"))
    assert (found.index, found.seeds, found.seed_set) == ("i1", "s1", "cats")


@pytest.mark.parametrize("asset", ["knn_urls", "centroid_urls"])
def test_a_set_of_other_seeds_is_named(checked, asset):
    other = made(seeds="s2", index="i2")
    with pytest.raises(InputError) as refused:
        checked(*((other, made()) if asset == "knn_urls" else (made(), other)))
    for fact in (f"{asset} of 'cats'", "other seeds", "settings.yaml", "s1", "s2"):
        assert fact in str(refused.value)
    assert str(refused.value).endswith(f"materialize {asset} again")


@pytest.mark.parametrize("asset", ["knn_urls", "centroid_urls"])
@pytest.mark.parametrize("model", ["m2", None])
def test_a_set_whose_seeds_another_model_embedded_is_named(checked, asset, model):
    other = made(model=model)
    with pytest.raises(InputError) as refused:
        checked(*((other, made()) if asset == "knn_urls" else (made(), other)))
    for fact in (f"{asset} of 'cats'", "another model", model or "none", "m1"):
        assert fact in str(refused.value)
    assert str(refused.value).endswith(f"materialize {asset} again")


def test_the_version_of_seeds_covers_the_model_where_there_is_one():
    versions = [made(model=model).seeds_version for model in (None, "m1", "m2")]
    assert versions[0] == "s1"
    assert len(set(versions)) == 3
    assert {files_version(version) for version in versions} == {"s1"}


@pytest.mark.parametrize(
    ("other", "facts"),
    [
        ({"index": "i2"}, ("indices", "i1", "i2")),
        ({"filters": "width > 5"}, ("filters", "none", "width > 5")),
        ({"block_list": "list.txt, 3 ids"}, ("block lists", "none", "list.txt, 3 ids")),
    ],
    ids=["index", "filters", "block list"],
)
@pytest.mark.parametrize("older", ["knn_urls", "centroid_urls"])
def test_of_two_sets_that_disagree_the_older_is_to_be_made_again(checked, other, facts, older):
    one, two = made(), made(**other)
    days = {"knn_urls": ("2026-01-01", "2026-01-02"), "centroid_urls": ("2026-01-02", "2026-01-01")}
    knn, centroid = replace(one, written=days[older][0]), replace(two, written=days[older][1])
    with pytest.raises(InputError) as refused:
        checked(knn, centroid)
    for fact in ("knn_urls and centroid_urls of 'cats'", *facts, f"materialize {older}"):
        assert fact in str(refused.value)


# --- the settings of both -------------------------------------------------------------------------


def test_each_count_and_its_origin_are_those_of_its_own_set(checked):
    found = checked(made(nb_images_knn=7, nb_images_centroid=1), made(nb_images_centroid=9)).settings
    assert (found.values.nb_images_knn, found.values.nb_images_centroid) == (7, 9)
    assert found.origins["nb_images_knn"] == found.origins["nb_images_centroid"] != "default"
    assert checked(made(), made()).settings == made().settings


def test_the_lower_threshold_of_both_holds_with_its_origin(checked):
    lower, higher = made(dedup_threshold=0.8), made()
    for found in (checked(lower, higher).settings, checked(higher, lower).settings):
        assert found.values.dedup_threshold == 0.8
        assert found.origins["dedup_threshold"] != "default"


def test_an_nprobe_or_a_target_that_only_one_set_has_is_not_one_of_both(checked):
    both = checked(made(nprobe=9, target_images=100), made(nprobe=9, target_images=100)).settings
    assert (both.values.nprobe, both.values.target_images) == (9, 100)
    found = checked(made(nprobe=9, target_images=100), made(nprobe=7)).settings
    assert (found.values.nprobe, found.values.target_images) == (None, None)
    assert not {"nprobe", "target_images"} & found.origins.keys()


def test_a_search_for_a_target_adds_only_to_what_was_found_for_the_same_request():
    knn = made(target_images=100)
    check_continues(knn, made(target_images=100))
    others = {
        "seeds s1 -> s2": {"seeds": "s2"},
        "index i1 -> i2": {"index": "i2"},
        "model m1 -> none": {"model": None},
        "expect_alive none -> 0.5": {"expect_alive": 0.5},
        "dedup_threshold 0.94 -> 0.9": {"dedup_threshold": 0.9},
    }
    for fact, other in others.items():
        with pytest.raises(InputError, match=f"{fact}.*materialize knn_urls again"):
            check_continues(knn, made(target_images=100, **other))
