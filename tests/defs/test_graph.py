"""The asset graph: its shape, what a run makes and reports, and what it refuses."""

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.project import (
    Project,
    contents,
    failures,
    materialization,
    new_project,
    reported,
    working_op,
)
from markdown_it import MarkdownIt
from PIL import Image

from laion_assets.definitions import build_defs
from laion_assets.defs.drawing.thumbnails import SHEET_BYTES, SHEET_HEIGHT, SHEET_WIDTH
from laion_assets.defs.provenance import PROVENANCE_KEY
from laion_assets.defs.report import PREVIEW_ROWS
from laion_assets.defs.settings import FIELDS, THIS_RUN
from laion_assets.io.checksums import crc32c
from laion_assets.io.tables import DESCRIPTIONS, StoredTable
from laion_assets.seeds import list_folder
from laion_assets.staging import Manifest

TABLES = ("seed_embeddings", "centroid_vector", "knn_urls", "centroid_urls", "combined_urls")


def provenance(path: Path) -> dict[str, Any]:
    return json.loads(pq.read_metadata(path).metadata[PROVENANCE_KEY.encode()])


def data_version(result: dg.ExecuteInProcessResult, asset: str) -> str:
    return materialization(result, asset).tags["dagster/data_version"]


# --- the graph ------------------------------------------------------------------------------------


def test_the_graph_is_this():
    defs = build_defs({})
    dg.Definitions.validate_loadable(defs)
    graph = defs.resolve_asset_graph()
    found = {}
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        op = working_op(node.assets_def.node_def) if node.is_materializable else None
        found[key.to_user_string()] = (
            node.group_name,
            "by seed set" if node.partitions_def else "whole",
            {parent.to_user_string() for parent in node.parent_keys},
            op.pool if op else None,
            "on NVMe" if op and "node_selector" in op.tags["dagster-k8s/config"] else "anywhere",
        )
    assert found == {
        "laion_index_source": ("sources", "whole", set(), None, "anywhere"),
        "seed_folder": ("sources", "by seed set", set(), None, "anywhere"),
        "retrieval_settings": ("sources", "by seed set", set(), None, "anywhere"),
        "seed_sets": ("sources", "whole", set(), None, "anywhere"),
        "staged_laion_index": ("index", "whole", {"laion_index_source"}, "staging", "on NVMe"),
        "seed_embeddings": ("seeds", "by seed set", {"seed_folder"}, None, "anywhere"),
        "centroid_vector": ("seeds", "by seed set", {"seed_embeddings"}, None, "anywhere"),
        "knn_urls": (
            "urls",
            "by seed set",
            {"seed_embeddings", "staged_laion_index", "retrieval_settings"},
            "retrieval",
            "on NVMe",
        ),
        "centroid_urls": (
            "urls",
            "by seed set",
            {"centroid_vector", "staged_laion_index", "retrieval_settings", "knn_urls"},
            "retrieval",
            "on NVMe",
        ),
        "combined_urls": (
            "urls",
            "by seed set",
            {"knn_urls", "centroid_urls", "seed_embeddings"},
            None,
            "anywhere",
        ),
    }


def test_only_the_settings_of_a_request_can_be_changed_for_a_run():
    job = build_defs({}).resolve_job_def("seed_set_job")
    fields = job.run_config_schema.config_type.fields["resources"].config_type.fields
    assert set(fields["retrieval_config"].config_type.fields["config"].config_type.fields) == set(FIELDS)


# --- one whole run on the demo --------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(demo, tmp_path_factory):
    """A read-only project in which everything is materialized for one seed set."""
    root = tmp_path_factory.mktemp("done")
    with new_project(root, demo.index, demo.seeds) as project:
        result = project.run("flower")
        assert failures(result) == {}
        yield project, result


@pytest.fixture
def finished(done, project):
    """A separate project in which everything is materialized for the seed set flower."""
    shutil.copytree(done[0].cache, project.cache)
    shutil.copytree(done[0].output, project.output)
    return project


def test_one_run_materializes_all_six_assets(done, tmp_path):
    project, result = done
    made = [event.asset_key.to_user_string() for event in result.get_asset_materialization_events()]
    assert sorted(made) == sorted([*TABLES, "staged_laion_index"])
    decoders = {
        name: f"{name}/flower.{crc32c(StoredTable(path).attachment('decoder')):08x}.decoder"
        for name in ("knn_urls", "centroid_urls")
        for path in [str(project.table(name, "flower"))]
    }
    assert set(contents(project.output)) == {
        *(f"{name}/flower.parquet" for name in TABLES),
        *decoders.values(),
        "combined_urls/flower.png",
    }
    again = shutil.copytree(project.output, tmp_path / "output")  # a folder of tables can be moved whole
    moved = StoredTable(str(again / "knn_urls" / "flower.parquet"))
    assert moved.attachment("decoder") == (project.output / decoders["knn_urls"]).read_bytes()


def test_what_is_reported_of_a_table_is_what_is_in_the_file(done):
    project, result = done
    for name in TABLES:
        told = reported(result, name)
        path = project.table(name, "flower")
        stored = pq.read_table(path)
        assert told["dagster/uri"] == str(path)
        assert told["dagster/partition_row_count"] == len(stored)
        columns = {column.name: column.type for column in told["dagster/column_schema"].columns}
        assert columns == {field.name: str(field.type) for field in stored.schema}
        assert told["seconds"] >= 0
        first = stored.slice(0, PREVIEW_ROWS)
        assert len(told["first rows"].records) == len(first) > 0
        if "rank" in stored.column_names:
            shown = [record.data["rank"] for record in told["first rows"].records]
            assert shown == first["rank"].to_pylist()
        event = materialization(result, name)
        numbers = [k for k, v in event.metadata.items() if isinstance(v.value, int | float)]
        assert numbers == ["dagster/partition_row_count"]  # Dagster plots numbers, all sets as one line
        assert len(event.metadata) <= 10
    assert reported(result, "seed_embeddings")["dimension"] == 256
    (centroid,) = reported(result, "centroid_vector")["first rows"].records
    assert 0 < centroid.data["norm_of_mean"] < 1


def test_no_page_shows_an_empty_value_or_a_figure_twice(done):
    _, result = done
    events = result.get_asset_materialization_events()
    assert len(events) == 6
    for event in events:
        metadata = event.materialization.metadata
        details = list(leaves(metadata["details"].value))
        for name, value in [*details, *((name, value.value) for name, value in metadata.items())]:
            assert value not in (None, "", [], {}), (event.asset_key, name)
        if "settings" in metadata:
            settings = [record.data for record in metadata["settings"].records]
            details += [(row["setting"], row["value"]) for row in settings]
        figures = [(name.replace("_", " "), str(value)) for name, value in details]
        assert len(figures) == len({*figures})
        assert not {name for name, _ in details} & metadata.keys()


def leaves(figures: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The figures of a JSON object and of those in it; one that is empty is a leaf."""
    for name, value in figures.items():
        yield from leaves(value) if value and isinstance(value, dict) else [(name, value)]


def test_what_is_handed_over_names_its_seed_set_and_carries_no_images(done):
    project, _ = done
    table = pq.read_table(project.table("combined_urls", "flower"))
    assert set(table["seed_set"].to_pylist()) == {"flower"}
    assert "thumbnail" not in table.column_names
    assert "thumbnail" in pq.read_schema(project.table("knn_urls", "flower")).names  # for contact sheets
    for name in TABLES:
        for field in pq.read_schema(project.table(name, "flower")):
            if field.name in DESCRIPTIONS:
                assert field.metadata[b"description"].decode() == DESCRIPTIONS[field.name]


def test_the_counts_go_from_requested_to_kept_without_a_gap(done):
    project, result = done
    seeds = reported(result, "seed_embeddings")["seeds"]
    for name, requested in (("knn_urls", 50 * seeds), ("centroid_urls", 500)):
        told = reported(result, name)
        assert told["requested"] == requested
        assert told["requested"] >= told["received"] > told["kept"] > 0
        lost = ("without url", "blocked", "filtered", "near duplicates")
        assert told["received"] - sum(told[reason] for reason in lost) == told["kept"]
        assert told["kept"] == pq.read_metadata(project.table(name, "flower")).num_rows
        assert told["yield"] == round(told["kept"] / told["requested"], 6)
    told = reported(result, "combined_urls")
    dropped = told["repeated ids"] + told["repeated urls"] + told["near duplicates"]
    assert (told["knn"], told["centroid"]) == (
        reported(result, "knn_urls")["kept"],
        reported(result, "centroid_urls")["kept"],
    )
    assert told["knn"] + told["centroid"] - dropped == told["kept"]
    assert told["kept"] == pq.read_metadata(project.table("combined_urls", "flower")).num_rows


def test_data_versions_are_the_fingerprints_of_index_and_seeds(done):
    project, result = done
    manifest = Manifest.read(project.cache)
    assert manifest is not None
    assert data_version(result, "staged_laion_index") == manifest.fingerprint
    seed_set = list_folder(str(project.seeds)).sets["flower"]
    assert data_version(result, "seed_embeddings") == seed_set.fingerprint


def test_every_footer_says_what_the_table_was_made_from(done):
    project, result = done
    seeds = list_folder(str(project.seeds)).sets["flower"].fingerprint
    index = data_version(result, "staged_laion_index")
    for name in TABLES:
        made = provenance(project.table(name, "flower"))
        assert (made["seed_set"], made["seeds"], made["run"]) == ("flower", seeds, result.run_id)
        if name.endswith("urls"):
            assert made["index"] == index
            assert made["settings"]["values"]["nb_images_knn"] == 50
            assert made["settings"]["origins"]["nb_images_knn"] == "default"
            assert made["settings"]["computed"] == ["nprobe"]
            told = reported(result, name)["provenance"]
            assert {*told} == {"seed_set", "seeds", "index", "run", "written"}
            assert told.items() <= made.items()


def test_the_contact_sheet_is_a_picture_small_enough_for_the_event_log(done):
    _, result = done
    for name in ("seed_embeddings", "knn_urls", "centroid_urls", "combined_urls"):
        text = reported(result, name)["contact sheet"]
        start, _, data = text.rstrip(")").partition(";base64,")
        assert start.startswith("![contact sheet](data:image/")
        picture = base64.b64decode(data, validate=True)
        assert len(picture) <= SHEET_BYTES
        size = Image.open(io.BytesIO(picture)).size
        assert min(size) > 100
        assert size[0] <= SHEET_WIDTH
        assert size[1] <= SHEET_HEIGHT
    saved = reported(result, "combined_urls")["picture"]
    assert Image.open(saved).format == "PNG"


# --- settings -------------------------------------------------------------------------------------


def test_settings_come_from_the_run_then_the_environment_then_the_default(finished, capfd):
    other = finished.with_environment(LAION_NB_IMAGES_KNN="7", LAION_NB_IMAGES_CENTROID="9")
    result = other.run("flower", "knn_urls", "centroid_urls", nb_images_knn=3, dedup_threshold=1.0)
    seeds = pq.read_metadata(finished.table("seed_embeddings", "flower")).num_rows
    told = reported(result, "knn_urls")
    assert told["requested"] == told["kept"] == 3 * seeds  # at 1.0 nothing is a near-duplicate
    assert told["settings"]["nb_images_knn"] == f"3 ({THIS_RUN})"
    assert told["settings"]["nb_images_centroid"] == "9 (LAION_NB_IMAGES_CENTROID)"
    assert told["settings"]["dedup_threshold"] == f"1.0 ({THIS_RUN})"
    assert reported(result, "centroid_urls")["requested"] == 9
    result = other.run("flower", "centroid_urls", nprobe=10_000)
    assert "capped at the index's lists" in reported(result, "centroid_urls")["settings"]["nprobe"]
    assert "nprobe 10,000 searches all rows: the index has " in capfd.readouterr().err
    told = reported(other.run("flower", "knn_urls", nprobe=1), "knn_urls")
    assert told["requested"] == 7 * seeds
    assert told["settings"]["nb_images_knn"] == "7 (LAION_NB_IMAGES_KNN)"
    assert told["settings"]["nprobe"] == f"1 ({THIS_RUN})"
    assert told["settings"]["dedup_threshold"] == "0.94 (default)"


def test_a_setting_out_of_bounds_is_named_with_its_origin_and_costs_no_table(finished):
    before = contents(finished.output)
    told = {
        name: failures(finished.run("flower", name, dedup_threshold=1.5))[name]
        for name in ("knn_urls", "centroid_urls")
    }
    for sentence in told.values():
        for fact in ("dedup_threshold is 1.5", f"(from {THIS_RUN})", "a number above 0 up to 1"):
            assert fact in sentence
    other = finished.with_environment(LAION_NB_IMAGES_KNN="0")
    told = failures(other.run("flower", "knn_urls")) | failures(other.run("flower", "seed_embeddings"))
    assert set(told) == {"knn_urls", "seed_embeddings"}  # at once
    for sentence in told.values():
        for fact in ("nb_images_knn is '0'", "(from LAION_NB_IMAGES_KNN)", "a whole number of 1 or more"):
            assert fact in sentence
    assert contents(finished.output) == before


# --- what cannot be done, in a sentence -----------------------------------------------------------


def test_a_run_without_a_seed_set_asks_for_one(project):
    told = failures(project.run(None))
    assert set(told) == {"seed_embeddings", "staged_laion_index"}
    for sentence in told.values():
        for fact in ("no seed set was chosen", "partition"):
            assert fact in sentence
    assert failures(project.run(None, "staged_laion_index")) == {}


@pytest.mark.parametrize("place", ["file", "system folder"])
def test_an_output_that_cannot_be_written_to_is_named_with_the_remedy(demo, tmp_path, place):
    in_the_way = tmp_path / "file"
    in_the_way.write_bytes(b"mine")
    output = in_the_way if place == "file" else Path("/sys/laion")
    with new_project(tmp_path, demo.index, demo.seeds, LAION_OUTPUT_URI=str(output)) as project:
        told = failures(project.run("flower", "seed_embeddings"))["seed_embeddings"]
    for fact in (f"cannot write {output}/seed_embeddings/flower.parquet", "LAION_OUTPUT_URI"):
        assert fact in told
    assert in_the_way.read_bytes() == b"mine"


def test_seeds_of_another_dimension_than_the_index_are_refused_by_the_search(project):
    (project.seeds / "short").mkdir()
    np.save(project.seeds / "short" / "a.npy", np.eye(3, 64, dtype=np.float32))
    told = failures(project.run("short"))
    assert set(told) == {"knn_urls"}
    assert "64 dimensions" in told["knn_urls"]
    assert "256" in told["knn_urls"]
    assert {name for name in contents(project.output) if ".unfinished/" not in name} == {
        "seed_embeddings/short.parquet",
        "centroid_vector/short.parquet",
    }


def test_bad_seeds_are_told_of_and_cost_no_table(finished):
    before = contents(finished.output)
    np.save(finished.seeds / "flower" / "bad.npy", np.full((2, 256), np.nan, np.float32))
    told = failures(finished.run("flower", "seed_embeddings"))["seed_embeddings"]
    assert "flower/bad.npy row 0" in told
    assert contents(finished.output) == before


def test_a_table_that_is_gone_is_an_error_that_says_what_to_materialize(finished):
    finished.table("seed_embeddings", "flower").unlink()
    told = failures(finished.run("flower", "centroid_vector"))["centroid_vector"]
    assert "materialize seed_embeddings again" in told


def test_url_sets_of_other_seeds_are_not_combined_until_they_are_made_again(finished):
    before = contents(finished.output / "combined_urls")
    shutil.copy(finished.seeds / "fruit" / "seeds.parquet", finished.seeds / "flower" / "more.parquet")
    assert finished.run("flower", "seed_embeddings").success
    told = failures(finished.run("flower", "combined_urls"))["combined_urls"]
    assert "other seeds" in told
    assert "materialize knn_urls" in told
    assert contents(finished.output / "combined_urls") == before
    assert finished.run("flower", "knn_urls").success
    told = failures(finished.run("flower", "combined_urls"))["combined_urls"]
    assert "centroid_urls of 'flower' was made from other seeds" in told
    assert finished.run("flower", "centroid_vector", "centroid_urls").success
    assert finished.run("flower", "combined_urls").success


def test_url_sets_of_different_indices_are_not_combined(finished, demo, tmp_path):
    other = shutil.copytree(demo.index, tmp_path / "other")
    table = pa.ipc.open_file(other / "metadata" / "000001.arrow").read_all()
    with pa.ipc.new_file(str(other / "metadata" / "000001.arrow"), table.schema) as writer:
        writer.write_table(table.slice(0, len(table) - 1))
    moved = Project(tmp_path, other, finished.instance)
    assert moved.run("flower", "staged_laion_index", "knn_urls").success
    told = failures(moved.run("flower", "combined_urls"))["combined_urls"]
    assert "different indices" in told
    assert "materialize centroid_urls, the older one" in told
    assert moved.run("flower", "centroid_urls").success
    assert moved.run("flower", "combined_urls").success


# --- an index and seeds without pictures, from the open web ---------------------------------------


@pytest.fixture
def plain(tmp_path):
    """An index in one file with Parquet metadata, as written by autofaiss and clip-retrieval."""
    vectors = np.random.default_rng(5).standard_normal((60, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(16)
    index.add(vectors)
    root = tmp_path / "plain"
    (root / "metadata").mkdir(parents=True)
    faiss.write_index(index, str(root / "image.index"))
    urls = [f"https://example.org/{i}.jpg?a=1|2&b=<i>)" for i in range(60)]
    urls[0] = "javascript:alert(1)"
    captions = [f"<script>alert({i})</script> | [click](javascript:alert(2)) **now**" for i in range(60)]
    captions[1] = None
    pq.write_table(
        pa.table({"image_path": urls, "caption": captions}), root / "metadata" / "metadata_0.parquet"
    )
    with new_project(tmp_path, root) as project:
        folder = project.seeds / "mine" / "img_emb"
        folder.mkdir(parents=True)
        np.save(folder / "img_emb_0.npy", vectors[:2].astype(np.float16))
        yield project


def test_without_pictures_there_are_links_and_nothing_of_the_web_becomes_markup(plain):
    result = plain.run("mine", nb_images_knn=20)
    assert failures(result) == {}
    assert "picture" not in reported(result, "combined_urls")
    assert "contact sheet" not in reported(result, "seed_embeddings")
    rendering = MarkdownIt("commonmark", {"html": True})
    rendering.validateLink = lambda _: True  # let the page decide, not the renderer
    for name in ("knn_urls", "centroid_urls", "combined_urls"):
        text = reported(result, name)["contact sheet"]
        assert "LAION_SHOW_REMOTE_PICTURES=true" in text.partition("\n")[0]  # how to have pictures
        shown = rendering.render(text)
        assert shown.partition("</ol>")[0].count("<li>") == 20
        assert "<code>&lt;script&gt;alert(" in shown
        assert "**now**" in shown
        assert "<script" not in shown
        assert 'href="javascript' not in shown
        assert shown.count("<a href=") == text.count("(<https://example.org/") >= 19
        assert "<img" not in shown
    assert "javascript:alert" in reported(result, "knn_urls")["contact sheet"]
