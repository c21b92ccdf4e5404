"""With all locations in a bucket of a real server: the same tables, and errors that name the problem."""

import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import fsspec
import numpy as np
import pyarrow as pa
import pytest
from helpers.gcs import describe, gcs_server
from helpers.project import Demo, Project, Ticks, failures, new_project, reported, stale

from laion_assets.cli import main
from laion_assets.defs.failures import sentence
from laion_assets.defs.io_manager import Tables
from laion_assets.defs.places import Places
from laion_assets.defs.provenance import Provenance
from laion_assets.defs.resources import LaionIndex, SeedFolder
from laion_assets.io.errors import InputError
from laion_assets.io.storage import new_file, open_storage
from laion_assets.io.tables import StoredTable, new_table
from laion_assets.seeds import find_seed_set, list_folder, read_seeds

TABLES = ("seed_embeddings", "centroid_vector", "knn_urls", "centroid_urls", "combined_urls")


@pytest.fixture(scope="module")
def bucket(gcs: str, demo: Demo) -> str:  # noqa: ARG001
    """A bucket with the demo's index and seeds."""
    fs, _ = open_storage("gs://laion")
    fs.mkdir("laion")
    fs.put(f"{demo.index}/", "laion/index/", recursive=True)
    fs.put(f"{demo.seeds}/", "laion/seeds/", recursive=True)
    return "gs://laion"


@pytest.fixture(scope="module")
def on_bucket(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with all locations in the bucket."""
    places = {
        "LAION_INDEX_URI": f"{bucket}/index",
        "LAION_METADATA_URI": f"{bucket}/index/metadata",
        "LAION_SEEDS_URI": f"{bucket}/seeds",
        "LAION_OUTPUT_URI": f"{bucket}/output",
    }
    with new_project(tmp_path_factory.mktemp("on_bucket"), Path("unused"), **places) as project:
        yield project


def test_the_whole_graph_in_a_bucket_makes_the_tables_that_it_makes_on_a_disk(
    on_bucket: Project, project: Project, bucket: str
) -> None:
    result, local = on_bucket.run("flower"), project.run("flower")
    assert failures(result) == failures(local) == {}
    for name in TABLES:
        stored = StoredTable(f"{bucket}/output/{name}/flower.parquet")
        expected = StoredTable(str(project.table(name, "flower")))
        assert stored.read() == expected.read()
        made, as_made = (Provenance.of(table) for table in (stored, expected))
        assert replace(made, run="", written="") == replace(as_made, run="", written="")
        assert made.run == result.run_id
        assert reported(result, name)["dagster/uri"] == stored.where
        if name in ("knn_urls", "centroid_urls"):
            assert stored.attachment("decoder") == expected.attachment("decoder")
    picture = reported(result, "combined_urls")["picture"]
    assert picture == f"{bucket}/output/combined_urls/flower.png"
    with fsspec.open(picture) as png:
        assert png.read() == Path(reported(local, "combined_urls")["picture"]).read_bytes()
    assert not on_bucket.output.exists()


def test_the_command_line_prints_where_the_tables_are(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("INDEX", "SEEDS", "OUTPUT"):
        monkeypatch.setenv(f"LAION_{name}_URI", f"{bucket}/{name.lower()}")
    assert main(["materialize", "fruit"]) == 0
    printed = capsys.readouterr().out.split()
    for name in TABLES[2:]:
        assert f"{bucket}/output/{name}/fruit.parquet" in printed
    assert f"{bucket}/output/combined_urls/fruit.png" in printed
    assert main(["materialize", "friut"]) == 1
    assert "did you mean 'fruit'?" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


# --- what Dagster's UI shows as stale -------------------------------------------------------------


def test_the_ui_knows_what_is_stale(on_bucket: Project, bucket: str) -> None:
    fs, root = open_storage(f"{bucket}/seeds/fruit")
    ticks = Ticks(on_bucket)
    assert ticks.tick() == []
    assert "fruit" in ticks.tick()
    assert failures(on_bucket.run("fruit")) == {}
    assert stale(on_bucket, "fruit") == set()
    ticks.tick()
    assert "is unchanged" in ticks.look_at_index()
    assert ("seed_folder", "fruit") not in ticks.reported  # the run said it already
    assert stale(on_bucket, "fruit") == set()

    fs.pipe_file(f"{root}/more #1 ä 50%?.npy", npy(seeds_of(1)))
    reported_before = len(ticks.reported)
    assert [ticks.tick() for _ in range(3)] == [[], ["fruit"], []]
    assert ticks.reported[reported_before:] == [("seed_folder", "fruit")]
    assert stale(on_bucket, "fruit") == {"seed_embeddings"}
    assert [ticks.tick() for _ in range(2)] == [[], []]
    assert len(ticks.reported) == reported_before + 1  # once for each content, not at every tick
    assert failures(on_bucket.run("fruit")) == {}
    assert stale(on_bucket, "fruit") == set()

    fs.pipe_file(f"{root}/more #1 ä 50%?.npy", npy(seeds_of(2)))
    assert failures(on_bucket.run("fruit", "seed_embeddings", "centroid_vector")) == {}
    assert stale(on_bucket, "fruit") == {"knn_urls", "centroid_urls", "combined_urls"}
    assert failures(on_bucket.run("fruit")) == {}
    assert stale(on_bucket, "fruit") == set()
    assert [ticks.tick() for _ in range(3)] == [[]] * 3  # by hand before the sensor saw it
    assert stale(on_bucket, "fruit") == set()

    captions = f"{bucket}/index/metadata/000001.arrow"
    index, path = open_storage(captions)
    table = pa.ipc.open_file(index.cat_file(path)).read_all()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.take(pa.array(range(len(table))[::-1])))
    index.pipe_file(path, index.cat_file(path))  # the same bytes once more
    assert "is unchanged" in ticks.look_at_index()
    index.pipe_file(path, sink.getvalue().to_pybytes())
    assert "has changed" in ticks.look_at_index()
    assert "is unchanged" in ticks.look_at_index()
    assert stale(on_bucket, "fruit") == {"staged_laion_index"}
    assert failures(on_bucket.run("fruit")) == {}
    assert stale(on_bucket, "fruit") == set()


def test_other_code_makes_an_asset_stale(project: Project) -> None:
    assert failures(project.run("fruit")) == {}
    assert stale(project, "fruit") == set()
    project.defs = dg.Definitions(
        dg.map_asset_specs(
            lambda spec: (
                spec.replace_attributes(code_version="other")
                if spec.key.to_user_string() == "seed_embeddings"
                else spec
            ),
            project.defs.assets or [],
        ),
        resources=project.defs.resources,
    )
    assert stale(project, "fruit") == {"seed_embeddings"}


# --- seeds in a bucket ----------------------------------------------------------------------------


def npy(vectors: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    return buffer.getvalue()


def seeds_of(number: int, dimension: int = 256) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((2, dimension)).astype(np.float32)


@pytest.fixture
def ticks(new_bucket: str, tmp_path: Path) -> Iterator[Ticks]:
    """A sensor over seeds in a bucket of its own."""
    places = {"LAION_SEEDS_URI": f"{new_bucket}/seeds/", "LAION_OUTPUT_URI": f"{new_bucket}/output"}
    with new_project(tmp_path, tmp_path / "no index is needed", **places) as project:
        yield Ticks(project)


def test_an_upload_is_waited_for_and_the_same_bytes_again_are_nothing_new(
    ticks: Ticks, new_bucket: str, gcs_root: Path
) -> None:
    fs, root = open_storage(f"{new_bucket}/seeds")
    assert ticks.tick() == []
    for fact in (f"{new_bucket}/seeds/ is not a folder", "LAION_SEEDS_URI"):
        assert fact in ticks.said
    for number in range(3):
        fs.pipe_file(f"{root}/cats/{number}.npy", npy(seeds_of(number)))
        assert ticks.tick() == []
    assert ticks.tick_and_work() == ["cats"]
    fs.pipe_file(f"{root}/cats/0.npy", npy(seeds_of(0)))
    assert [ticks.tick() for _ in range(3)] == [[]] * 3
    fs.pipe_file(f"{root}/cats/0.npy", npy(seeds_of(9)))
    assert [ticks.tick_and_work() for _ in range(3)] == [[], ["cats"], []]

    describe(gcs_root / f"{root}/cats/0.npy", Md5Hash="", Generation=5)  # as of a composite object
    info = fs.info(f"{root}/cats/0.npy")
    assert "crc32c" in info
    assert not info.get("md5Hash")
    assert [ticks.tick() for _ in range(3)] == [[]] * 3
    assert ticks.cursor == "not materialized: cats; 1 seed set"


def test_names_of_every_kind_are_read_as_they_are(ticks: Ticks, new_bucket: str) -> None:
    names = ["a b.npy", "#1.npy", "x#2023.npy", "50%.npy", "a%20b.npy", "q?generation=3.npy", "[1]*.npy"]
    names += ["ü/é/深い.npy", "deep/er/and/deeper.npy"]
    fs, root = open_storage(f"{new_bucket}/seeds/Größe 1")
    for number, name in enumerate(names):
        fs.pipe_file(f"{root}/{name}", npy(seeds_of(number)))
    assert [ticks.tick_and_work() for _ in range(2)] == [[], ["Größe 1"]]
    stored = StoredTable(f"{new_bucket}/output/seed_embeddings/Größe 1.parquet")
    assert set(stored.read(["file"])["file"].to_pylist()) == set(names)


def test_markers_of_folders_are_no_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with gcs_server(tmp_path / "empty", preloaded=True) as url:  # the other kind keeps no markers
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        fs, root = open_storage("gs://marked/seeds")
        fs.mkdir("marked")
        for marker in ("", "cats/", "cats/deep/", "cats/folder.npy/", "empty/"):
            fs.pipe_file(f"{root}/{marker}", b"")
        fs.pipe_file(f"{root}/cats/deep/a.npy", npy(seeds_of(1)))
        (seed_set,) = list_folder("gs://marked/seeds").sets.values()
        assert [file.name for file in seed_set.files] == ["deep/a.npy"]
        assert find_seed_set("gs://marked/seeds", "cats") == seed_set
        with pytest.raises(InputError, match="seed set 'empty' is empty"):
            find_seed_set("gs://marked/seeds", "empty")


def test_a_set_of_thousands_of_files_is_read_many_at_a_time(
    ticks: Ticks, new_bucket: str, gcs_root: Path
) -> None:
    fs, root = open_storage(f"{new_bucket}/seeds/many")
    fs.pipe_file(f"{root}/0.npy", npy(seeds_of(0)))
    for number in range(1, 1200):
        os.link(gcs_root / root / "0.npy", gcs_root / root / f"{number}.npy")
    listed = find_seed_set(f"{new_bucket}/seeds", "many")
    fs.pipe_file(f"{root}/7.npy", npy(seeds_of(7)))
    fs.rm_file(f"{root}/8.npy")
    with pytest.raises(InputError) as caught:
        read_seeds(f"{new_bucket}/seeds", listed)
    assert "many/7.npy changed while it was being read" in str(caught.value)
    assert "many/8.npy cannot be read (it is gone)" in str(caught.value)
    assert [ticks.tick_and_work() for _ in range(2)] == [[], ["many"]]
    stored = StoredTable(f"{new_bucket}/output/seed_embeddings/many.parquet")
    assert len(stored) == 2 * 1199


# --- tables in a bucket ---------------------------------------------------------------------------


@pytest.mark.faults
def test_a_writer_that_is_killed_leaves_nothing_under_the_name(new_bucket: str) -> None:
    uri = f"{new_bucket}/knn_urls/flower.parquet"
    program = (
        "import sys, time\n"
        "from laion_assets.io.storage import new_file\n"
        "with new_file(sys.argv[1]) as sink:\n"
        "    for _ in range(3): sink.write(bytes(20 << 20))\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, uri], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        writer.kill()
    fs, root = open_storage(new_bucket)
    assert fs.find(root) == []
    with new_file(uri) as sink:
        sink.write(b"whole")
    assert fs.cat_file(f"{root}/knn_urls/flower.parquet") == b"whole"


def test_a_table_is_read_from_a_bucket_a_part_at_a_time(new_bucket: str) -> None:
    def batches(count: int) -> Iterator[pa.RecordBatch]:
        for number in range(count):
            text = np.random.default_rng(number).bytes(1 << 20)
            yield pa.record_batch({"url": [text[at : at + 64].hex() for at in range(0, 1 << 20, 64)]})

    peaks = {}
    for count in (3, 24):
        uri = f"{new_bucket}/knn_urls/{count}.parquet"
        with new_table(uri, pa.schema({"url": pa.string()})) as table:
            for batch in batches(count):
                table.write(batch)
        stored = StoredTable(uri)
        tracemalloc.start()
        assert sum(len(batch) for batch in stored.batches()) == count << 14
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[24] < peaks[3] + (1 << 20)


# --- what a bucket refuses ------------------------------------------------------------------------


def written(uri: str) -> None:
    with new_table(Tables(uri).uri("knn_urls", "flower"), pa.schema({"url": pa.string()})):
        pass


USES: dict[str, Callable[[str], object]] = {
    "LAION_SEEDS_URI": lambda uri: SeedFolder(uri).listing(),
    "LAION_INDEX_URI": lambda uri: LaionIndex.at(
        Places.from_environment({"LAION_INDEX_URI": uri})
    ).source_version(),
    "LAION_OUTPUT_URI": written,
}


@pytest.fixture(params=USES)
def setting(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def refusal(setting: str, uri: str) -> str:
    with pytest.raises(InputError) as caught:
        USES[setting](uri)
    (told,) = sentence(caught.value).splitlines()
    assert uri.partition("/x")[0] in told
    return told


@contextmanager
def answering(status: int, message: str) -> Iterator[str]:
    """A server that answers every request like Google's when it refuses it."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"error": {"code": status, "message": message}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs retries without waiting."""

    async def sleep(_: float) -> None:
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=sleep))


@pytest.mark.usefixtures("gcs")
def test_a_bucket_that_is_not_there(setting: str) -> None:
    told = refusal(setting, "gs://nobodys-bucket/x")
    for fact in ("no bucket gs://nobodys-bucket", "create it", setting):
        assert fact in told


def test_an_account_without_the_right(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "robot@project.iam.gserviceaccount.com does not have storage.objects.list access"
    with answering(403, message) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
        told = refusal(setting, "gs://private/x")
    assert message in told
    assert "is denied" in told
    assert setting in told


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("status", "message", "remedy"),
    [
        (401, "Invalid Credentials", "gcloud auth application-default login"),
        (503, "Backend Error", "temporarily unavailable"),
        (None, "", "check the network, and STORAGE_EMULATOR_HOST"),
    ],
)
def test_a_bucket_that_does_not_answer_as_it_should(
    setting: str, status: int | None, message: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status or 200, message) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server if status else "http://127.0.0.1:9")
        told = refusal(setting, "gs://private/x")
    assert message in told
    assert remedy in told


def test_without_credentials(setting: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    told = refusal(setting, "gs://private/x")
    assert "there are no valid credentials" in told
    assert "gcloud auth application-default login" in told
    assert "Workload Identity" in told


@pytest.mark.parametrize(
    "uri", ["gs:/bucket/x", "gs//bucket/x", "gs:///x", "gs://", "gss://bucket/x", "gs://Not_A_Bucket!/x"]
)
@pytest.mark.usefixtures("gcs")
def test_a_slip_of_the_pen(
    setting: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert setting in refusal(setting, uri)
    assert list(tmp_path.iterdir()) == []
