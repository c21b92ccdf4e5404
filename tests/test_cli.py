"""The command line: what it prints, refuses and keeps, and how it recovers."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.builds import vectors_of, write_part, write_parts
from helpers.project import REPOSITORY, Demo, contents, files_limited_to
from helpers.published import publish, publish_all
from helpers.staging import write_source
from PIL import Image

from laion_assets.build import builder
from laion_assets.cli import _failures, main
from laion_assets.defs.launcher import LocalRunLauncher
from laion_assets.staging import stage

ASSETS = (
    "staged_laion_index", "seed_embeddings", "centroid_vector",
    "knn_urls", "centroid_urls", "combined_urls",
)  # fmt: skip


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command in a folder, as a person would."""
    return subprocess.Popen(
        [sys.executable, "-m", "laion_assets.cli", *arguments],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass(frozen=True)
class Done:
    """The result of a finished command."""

    status: int
    out: str
    err: str


def end(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=120)
    return Done(process.returncode, out, err)


def checkout(folder: Path, demo: Demo) -> Path:
    """A folder like a checkout in which the demo's data was built."""
    shutil.copy(REPOSITORY / "dagster.yaml", folder)
    shutil.copytree(demo.index, folder / "data" / "index")
    shutil.copytree(demo.seeds, folder / "data" / "seeds")
    return folder


@contextmanager
def history(folder: Path, home: str = ".") -> Iterator[dg.DagsterInstance]:
    """Dagster's history as the UI would show it; the paths in a checkout's dagster.yaml are relative."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with dg.DagsterInstance.from_config(str(folder / home)) as instance:
            yield instance


def table_of(done: Done) -> dict[str, tuple[list[int], Path]]:
    """The table at the end of what was printed: the counts and the file of each asset."""
    _, header, table = done.out.partition("requested  received      kept\n")
    assert header
    rows = re.findall(r"^(\w+)((?: +[\d,]+)+)   (\S+)$", table, re.MULTILINE)
    return {
        name: ([int(count.replace(",", "")) for count in counts.split()], Path(path))
        for name, counts, path in rows
    }


# --- one story in two commands -------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    folder: Path
    demo: Done
    flower: Done


@pytest.fixture(scope="module")
def story(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The demo; a seed set with settings of its own."""
    folder = checkout(tmp_path_factory.mktemp("checkout"), demo)
    first = end(start(folder, "demo"))
    (folder / ".env").write_text("LAION_NB_IMAGES_CENTROID=90\nLAION_NB_IMAGES_KNN=7\n")
    flower = end(
        start(folder, "materialize", "flower", "--nb-images-knn", "20", "--dedup-threshold", "1")
    )
    (folder / ".env").unlink()
    return Story(folder, first, flower)


def test_a_run_ends_well_and_prints_nothing_but_its_story(story: Story) -> None:
    for done in (story.demo, story.flower):
        assert (done.status, done.err) == (0, "")
        told, _, table = done.out.partition("\n\n")
        allowed = "|".join([*ASSETS, "run", "demo index", "demo seeds"])
        strange = [line for line in told.splitlines() if not re.match(rf"({allowed})(: | \w)", line)]
        assert strange == []
        assert len(told.splitlines()) <= 12
        assert table.rstrip().splitlines()[-1].startswith("contact sheet: data/output/")
        assert len(table.strip().splitlines()) == 6


def test_the_table_says_what_is_in_the_files(story: Story) -> None:
    for done, seed_set in ((story.demo, "fruit"), (story.flower, "flower")):
        told = table_of(done)
        assert list(told) == ["knn_urls", "centroid_urls", "combined_urls"]
        for name, (counts, path) in told.items():
            assert path == Path(f"data/output/{name}/{seed_set}.parquet")
            assert counts[-1] == pq.read_metadata(story.folder / path).num_rows
        sheet = story.folder / Path(done.out.rpartition("contact sheet: ")[2].strip())
        assert sheet.read_bytes().startswith(b"\x89PNG")


def test_options_come_before_the_env_file_and_that_before_the_defaults(story: Story) -> None:
    seeds = pq.read_metadata(story.folder / "data/output/seed_embeddings/flower.parquet").num_rows
    told = table_of(story.flower)
    assert told["knn_urls"][0] == [20 * seeds] * 3  # at a threshold of 1 all that is received is kept
    assert told["centroid_urls"][0] == [90] * 3
    assert table_of(story.demo)["centroid_urls"][0][0] == 500


def test_the_index_is_fetched_once(story: Story) -> None:
    fetched = [
        re.findall(r"staged_laion_index: .*; ([\d,]+|nothing) (?:of them fetched|to do)", done.out)
        for done in (story.demo, story.flower)
    ]
    size = sum(map(len, contents(story.folder / "data" / "index").values()))
    staged = sum(map(len, contents(story.folder / "data" / "cache").values()))
    (first,) = fetched[0]
    assert 0 < int(first.replace(",", "")) <= min(size, staged)
    assert fetched[1] == ["nothing"]


def test_history_outlives_the_commands(story: Story) -> None:
    with history(story.folder) as instance:
        runs = [(run.tags["dagster/partition"], run.status.value) for run in instance.get_runs()]
        assert runs == [("flower", "SUCCESS"), ("fruit", "SUCCESS")]
        assert set(instance.get_dynamic_partitions("seed_sets")) == {"fruit", "flower"}
        key = dg.AssetKey("combined_urls")
        assert instance.get_materialized_partitions(key) == {"fruit", "flower"}
    assert {path.name for path in story.folder.iterdir()} == {"dagster.yaml", "data"}


@pytest.mark.faults
def test_a_run_that_was_killed_is_reported_and_holds_up_nobody(story: Story) -> None:
    folder = story.folder
    before = contents(folder / "data" / "output")
    (folder / "data" / "seeds" / "many").mkdir()
    seeds = np.random.default_rng(0).standard_normal((2000, 256), np.float32)
    np.save(folder / "data" / "seeds" / "many" / "seeds.npy", seeds)
    process = start(folder, "materialize", "many", "--nb-images-knn", "3000")  # minutes of work
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("knn_urls: searching"):  # not the step that cuts the seeds
            process.send_signal(signal.SIGKILL)
    assert end(process).status == -signal.SIGKILL
    with history(folder) as instance:
        (killed,) = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        assert len(instance.event_log_storage.get_concurrency_info("retrieval").claimed_slots) == 1

    again = end(start(folder, "demo"))
    assert (again.status, again.err) == (0, "")
    assert "already built" in again.out
    assert re.search(rf"run {killed.run_id} was killed.* failed", again.out)
    with history(folder) as instance:
        run = instance.get_run_by_id(killed.run_id)
        assert run is not None
        assert (run.status, run.tags["dagster/partition"]) == (dg.DagsterRunStatus.FAILURE, "many")
        for pool in ("staging", "retrieval"):
            held = instance.event_log_storage.get_concurrency_info(pool)
            assert (held.slot_count, held.claimed_slots, held.pending_steps) == (1, [], [])
    after = contents(folder / "data" / "output")
    of_flower = {name: held for name, held in before.items() if "flower" in name}
    assert len(of_flower) == 8  # five tables, two decoders, a picture
    assert {name: after[name] for name in of_flower} == of_flower
    assert not any(name.endswith("urls/many.parquet") for name in after)


# --- what is refused ------------------------------------------------------------------------------

# What is typed and set, the exit status, and what the error must name.
MISTAKES: dict[str, tuple[list[str], dict[str, str], int, tuple[str, ...]]] = {
    "a name that is nearly one": (
        ["materialize", "flowr"], {}, 1, ("no seed set 'flowr'", "/data/seeds", "did you mean 'flower'?"),
    ),
    "a name with a slash": (["materialize", "flower/x"], {}, 1, ("'flower/x'", "'/'")),
    "a name that leaves the folder": (["materialize", ".."], {}, 1, ("'..'",)),
    "no images": (
        ["materialize", "flower", "--nb-images-knn", "0"], {}, 1,
        ("nb_images_knn is 0", "command line", "1 or more"),
    ),
    "a cosine of 2": (
        ["materialize", "flower", "--dedup-threshold", "2"], {}, 1,
        ("dedup_threshold is 2.0", "command line", "up to 1"),
    ),
    "filters that cannot be read": (
        ["materialize", "flower", "--filters", "width >> 5"], {}, 1,
        ("filters", "'width >> 5'", "command line"),
    ),
    "not a number": (
        ["materialize", "flower", "--nprobe", "x"], {}, 2,
        ("--nprobe is 'x': give a whole number",),
    ),
    "no command": ([], {}, 2, ("COMMAND is missing", "laion-assets --help")),
    "a command that is none": (
        ["materialise", "flower"], {}, 2, ("no command 'materialise'", "laion-assets --help"),
    ),
    "a command of two lines": (["a'b\nc"], {}, 2, (r"""no command "a'b\nc": see""",)),
    "no seed set": (["materialize"], {}, 2, ("SEED_SET is missing", "laion-assets materialize --help")),
    "an option that is none": (
        ["verify", "--all\n: give 5"], {}, 2, (r"--all\n: give 5", "laion-assets --help"),
    ),
    "an option that is two": (
        ["plan", "--se", "5"], {}, 2, ("error: --se could match --seeds, --seed-set: see",),
    ),
    "an option that takes no value": (
        ["verify", "--repair=3"], {}, 2, ("--repair takes no value: give none",),
    ),
    "an option without a value": (["dev", "--port"], {}, 2, ("--port has no value: give one",)),
    "a plan for seeds of two kinds": (
        ["plan", "--target-images", "5", "--seeds", "5", "--seed-set", "fruit"], {}, 2,
        ("--seed-set and --seeds are given: give only one",),
    ),
    "a plan for no seeds": (
        ["plan", "--target-images", "5"], {}, 2, ("neither --seeds nor --seed-set is given: give one",),
    ),
    "a variable that is not a number": (
        ["materialize", "flower"], {"LAION_NPROBE": "x"}, 1,
        ("nprobe is 'x'", "LAION_NPROBE", "a whole number"),
    ),
    "a way of staging that is none": (
        ["materialize", "flower"], {"LAION_STAGING": "inplace"}, 1,
        ("LAION_STAGING is 'inplace'", "'full', 'sparse' or 'in-place'"),
    ),
    "an owner that is none": (
        ["materialize", "flower"], {"LAION_OWNER": "me"}, 1, ("LAION_OWNER is 'me'", "team:"),
    ),
    "a label of nodes that is none": (
        ["materialize", "flower"], {"LAION_NVME_LABEL": "x"}, 1,
        ("LAION_NVME_LABEL is 'x'", "key=value"),
    ),
    "a label of nodes that is none, in the UI": (
        ["dev"], {"LAION_NVME_LABEL": "x"}, 1, ("LAION_NVME_LABEL is 'x'", "key=value"),
    ),
    "a port that is none": (["dev", "--port", "99999"], {}, 1, ("--port is 99999", "1 to 65535")),
    "port 0": (["dev", "--port", "0"], {}, 1, ("--port is 0", "1 to 65535")),
    "a demo that is none": (
        ["demo"], {"LAION_INDEX_URI": "/elsewhere"}, 1, ("LAION_INDEX_URI is set", "unset it"),
    ),
    "nothing to build from": (["build"], {}, 1, ("no embeddings", "(LAION_EMBEDDINGS_URI)")),
    "embeddings that are not there": (
        ["build"], {"LAION_EMBEDDINGS_URI": "none"}, 1, ("no folder none", "(LAION_EMBEDDINGS_URI)"),
    ),
    "a layout that is none": (
        ["build"], {"LAION_EMBEDDINGS_URI": "none", "LAION_EMBEDDINGS_LAYOUT": "zip"}, 1,
        ("LAION_EMBEDDINGS_LAYOUT is 'zip'", "'parquet'"),
    ),
    "a demo beside embeddings of one's own": (
        ["demo"], {"LAION_EMBEDDINGS_URI": "/e"}, 1, ("LAION_EMBEDDINGS_URI is set", "unset it"),
    ),
    "a wrong setting of the UI": (
        ["dev"], {"LAION_SPARSE_BUDGET": "much"}, 1, ("LAION_SPARSE_BUDGET is 'much'", "300GB"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def to_mistake(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which nothing was run."""
    return checkout(tmp_path_factory.mktemp("mistakes"), demo)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_an_error_that_names_it_and_the_remedy_and_leaves_nothing_behind(
    name, to_mistake, monkeypatch, capsys
) -> None:
    arguments, environment, status, facts = MISTAKES[name]
    monkeypatch.chdir(to_mistake)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    try:
        ended = main(list(arguments))
    except SystemExit as wrong_usage:  # argparse ends so
        ended = wrong_usage.code
    assert ended == status
    told = capsys.readouterr()
    assert told.out == ""
    assert [fact for fact in ("error: ", *facts) if fact not in told.err] == [], told.err
    assert len(told.err.splitlines()) == 1
    assert {path.name for path in (to_mistake / "data").iterdir()} == {"index", "seeds"}


@pytest.fixture
def run_here(monkeypatch, capsys) -> Callable[..., Done]:
    """Run a command in this process: most of a process of its own is Python starting up."""

    def run(folder: Path, *arguments: str, **environment: str) -> Done:
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            for name, value in environment.items():
                patch.setenv(name, value)
            status = main(list(arguments))
        told = capsys.readouterr()
        return Done(status, told.out, told.err)

    return run


def test_dev_refuses_a_port_in_use_and_starts_nothing(tmp_path, run_here) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        done = run_here(tmp_path, "dev", "--port", str(port))
    assert (done.status, done.out) == (1, "")
    assert done.err == f"error: port {port} is in use: choose another with --port, or `make dev PORT=N`\n"
    assert list(tmp_path.iterdir()) == []


def test_without_data_the_demo_is_offered_unless_a_place_is_set(demo, tmp_path, run_here) -> None:
    image = str(min((demo.images / "fruit").iterdir()))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    seeds = {"LAION_SEEDS_URI": str(demo.seeds)}
    ended = {
        "no seeds": run_here(tmp_path, "materialize", "mine"),
        "no index": run_here(tmp_path, "materialize", "fruit", **seeds),
        "look": run_here(tmp_path, "look", image),
        "set": run_here(tmp_path, "look", image, LAION_INDEX_URI=str(tmp_path / "none")),
        "to build": run_here(elsewhere, "materialize", "fruit", LAION_EMBEDDINGS_URI="e", **seeds),
    }
    assert {done.status for done in ended.values()} == {1}
    offered = {name: done.err.count("run `laion-assets demo`") for name, done in ended.items()}
    assert offered == {"no seeds": 1, "no index": 1, "look": 1, "set": 0, "to build": 0}, ended
    assert "run `laion-assets build`" in ended["to build"].err


def test_what_is_kept_of_a_target_is_printed(demo, tmp_path, run_here) -> None:
    places = {"LAION_INDEX_URI": str(demo.index), "LAION_SEEDS_URI": str(demo.seeds)}
    done = run_here(tmp_path, "materialize", "fruit", "--target-images", "300", **places)
    assert (done.status, done.err) == (0, "")
    (kept,), _ = table_of(done)["combined_urls"]
    assert f"\ntarget 300: {kept} kept of the {kept} that it needs\n" in done.out


def test_images_are_indexed_and_looked_into_though_the_first_is_broken(demo, tmp_path, run_here) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(demo.images / "fruit", mine)
    (mine / "0.jpg").write_bytes(b"")
    done = run_here(tmp_path, "index-images", "mine")
    images = len(list(mine.iterdir())) - 1
    assert done.status == 0
    assert done.err.splitlines()[0] == f"left out: {mine / '0.jpg'} is empty (0 bytes): use another file"
    assert f"{images} of {images} rows in IVF1,Flat" in done.out
    assert f"images most like {sorted(mine.iterdir())[1]}" in done.out
    variables = dict(re.findall(r"^export (\w+)=(\S+)$", done.out, re.M))
    (tmp_path / "other").mkdir()
    looked = run_here(tmp_path / "other", "look", str(sorted(mine.iterdir())[1]), **variables)
    assert (looked.status, looked.out.count(mine.as_uri())) == (0, images)
    made = tmp_path / "data" / "indices" / "mine"
    assert variables["LAION_CACHE_DIR"] == str(made / "cache")
    assert variables["LAION_OUTPUT_URI"] == str(made / "output")
    assert sorted(path.name for path in (tmp_path / "other" / "data").iterdir()) == ["look"]


def test_make_dev_builds_no_demo_beside_an_index_of_ones_own(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAION_INDEX_URI", "/an/index")
    assert main(["demo", "--data-only"]) == 0
    assert capsys.readouterr().out == "LAION_INDEX_URI is set: no demo is needed\n"
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_to_fails_the_run_in_a_sentence(
    demo, tmp_path, run_here
) -> None:
    folder = checkout(tmp_path, demo)
    done = run_here(folder, "materialize", "flower", LAION_OUTPUT_URI="/sys/laion")
    assert done.status == 1
    (told,) = done.err.splitlines()
    for fact in (
        "error: seed_embeddings: ",
        "/sys/laion/seed_embeddings/flower.parquet",
        "LAION_OUTPUT_URI",
    ):
        assert fact in told
    assert "requested" not in done.out
    with history(folder) as instance:
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.FAILURE


# --- building an index ----------------------------------------------------------------------------


@pytest.fixture
def to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with embeddings of 2,400 rows that make 4 shards, and nothing else."""
    publish_all(tmp_path / "embeddings", "clip-retrieval")
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "EMBEDDINGS_URI": "embeddings", "SHARD_ROWS": "600", "INDEX_KEY": "IVF16,Flat",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"LAION_{name}", value)
    return tmp_path


def written(folder: Path) -> dict[Path, int]:
    files = (path for path in folder.glob("data/index*/**/*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in files}


def test_an_index_is_built_shard_by_shard_and_once(to_build, monkeypatch, capsys) -> None:
    monkeypatch.setattr("laion_assets.io.progress.SECONDS_BETWEEN_LINES", 0)
    assert main(["build"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    lines = told.out.splitlines()
    story = (
        r"trained_index: training IVF16,Flat on [\d,]+ rows",
        r"trained_index: IVF16,Flat trained on [\d,]+ rows; 2,400 rows planned in 4 shards",
        r"index_shards: rows: 600 of 600, [\d,.e+]+/s, 0 s left",
        *(rf"index_shards: 00000{n}: 600 rows in [\d.]+ s, .* vectors per second" for n in range(4)),
        r"laion_index: merging the shards \(4\)",
        r"laion_index: 2,400 of 2,400 rows can be found; 100\.0% of the 100 best rows are found .*",
        rf"2,400 of 2,400 rows in IVF16,Flat, at {to_build}/data/index",
    )
    for expected in story:
        assert any(re.fullmatch(expected, line) for line in lines), (expected, lines)
    assert re.fullmatch(story[-1], lines[-2])
    assert "laion-assets materialize" in lines[-1]
    assert len(lines) < 20
    before = written(to_build)
    assert main(["build"]) == 0
    assert written(to_build) == before
    again = capsys.readouterr().out
    assert "index_shards" not in again
    assert "laion_index: nothing is new" in again
    with history(to_build, "data/dagster") as instance:
        assert instance.get_materialized_partitions(dg.AssetKey("index_shards")) == {
            f"00000{n}" for n in range(4)
        }


def test_rows_without_a_usable_vector_are_counted_in_the_output(tmp_path, monkeypatch, capsys) -> None:
    write_part(tmp_path / "embeddings", 0, vectors_of(60), null=(3, 40))
    monkeypatch.setenv("LAION_EMBEDDINGS_URI", "embeddings")
    monkeypatch.chdir(tmp_path)
    assert main(["build"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("000000: 60 rows (2 without a usable vector) in" in line for line in lines)
    assert lines[-2].startswith("58 of 60 rows (2 without a usable vector) in IVF1,Flat, at ")


@pytest.mark.faults
def test_a_shard_that_fails_is_named_and_the_others_are_built(to_build, capsys) -> None:
    file = to_build / "embeddings" / "metadata" / "metadata_1.parquet"  # training does not read it
    content = file.read_bytes()
    file.write_bytes(content[:200] + b"\xff" * 4000 + content[4200:])
    assert main(["build"]) == 1
    told = capsys.readouterr()
    failed, last = told.err.splitlines()
    assert failed.startswith("error: shard 000001: index_shards: ")
    assert "metadata_1.parquet" in failed
    assert last == "1 shard failed; the others are done"
    assert [line[14:20] for line in told.out.splitlines() if re.match(r"index_shards: \d", line)] == [
        "000000", "000002", "000003",
    ]  # fmt: skip
    assert not (to_build / "data" / "index").exists()
    file.write_bytes(content)
    assert main(["build"]) == 0
    told = capsys.readouterr()
    assert [line[14:20] for line in told.out.splitlines() if re.match(r"index_shards: \d", line)] == [
        "000001"
    ]


@pytest.mark.usefixtures("to_build")
def test_a_wrong_key_ends_a_build_in_a_sentence(monkeypatch, capsys) -> None:
    monkeypatch.setenv("LAION_INDEX_KEY", "nonsense")
    assert main(["build"]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith('error: trained_index: the index "nonsense" ')
    assert told.endswith("(LAION_INDEX_KEY)")


@pytest.mark.usefixtures("to_build")
@pytest.mark.parametrize("key", ["nonsense", "IVF16,PQ7", "IVF64,Flat", "IVF2,PQ8x8"])
def test_plan_build_refuses_the_keys_that_build_refuses(key, monkeypatch, capsys) -> None:
    monkeypatch.setenv("LAION_INDEX_KEY", key)
    told = []
    for command in (["build"], ["plan-build"], ["plan-build", "--rows", "2400", "--dimension", "24"]):
        assert main(command) == 1
        told.append(capsys.readouterr().err.replace("trained_index: ", ""))
    assert told[0] == told[1] == told[2]
    assert f'"{key}"' in told[0]
    assert '"IVF1,Flat"' in told[0]


def test_plan_build_estimates_what_is_left_of_a_build(tmp_path, monkeypatch, capsys) -> None:
    write_parts(tmp_path / "embeddings", [400, 300])
    for name, value in {
        "EMBEDDINGS_URI": "embeddings", "SHARD_ROWS": "300", "INDEX_KEY": "IVF8,Flat",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"LAION_{name}", value)
    monkeypatch.chdir(tmp_path)

    def planned() -> dict[str, str]:
        before = written(tmp_path)
        assert main(["plan-build"]) == 0
        assert written(tmp_path) == before
        lines = capsys.readouterr().out.splitlines()
        return {line[:10].strip(): line[10:] for line in lines}

    fresh = planned()
    assert (fresh["rows"], fresh["shards"]) == ("700", "2, which can be encoded in parallel")
    assert "700 rows" in fresh["training"]
    assert main(["build"]) == 0
    capsys.readouterr()
    done = planned()
    assert (done["rows"], done["shards"]) == ("700, 700 of them encoded already", "0 left")
    assert (done["training"], done["encoding"]) == ("done already", "done already")
    write_parts(tmp_path / "embeddings", [100], first=2)
    more = planned()
    assert (more["rows"], more["shards"]) == ("800, 700 of them encoded already", "1 left")
    assert more["training"] == "done already"
    assert "3.20kB of vectors" in more["encoding"]
    assert "4.00kB of codes" in more["encoding"]
    monkeypatch.setenv("LAION_INDEX_KEY", "IVF4,Flat")  # another index: everything again
    assert (planned()["rows"], planned()["shards"]) == ("800", "3, which can be encoded in parallel")


@pytest.mark.faults
@pytest.mark.parametrize("sent", [signal.SIGTERM])
def test_a_build_that_is_interrupted_goes_on_where_it_was(sent, to_build, monkeypatch, capsys) -> None:
    encode = builder.encode_shard

    def interrupted(workspace, shard, *more):
        if shard.number == 2:
            os.kill(os.getpid(), sent)
            time.sleep(5)
        return encode(workspace, shard, *more)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "encode_shard", interrupted)
        assert main(["build"]) == 128 + sent
    assert capsys.readouterr().err.splitlines()[-1] == (
        "interrupted: finished work is kept, run the command again to continue"
    )
    before = written(to_build)
    assert main(["build"]) == 0
    assert before.items() <= written(to_build).items()
    assert re.findall(r"^index_shards: (\d+)", capsys.readouterr().out, re.M) == ["000002", "000003"]


@pytest.mark.faults
def test_a_build_that_is_killed_goes_on_where_it_was(to_build, capsys) -> None:
    for number in range(4, 7):
        publish(to_build / "embeddings", "clip-retrieval", number, 600, 600 * number)
    process = start(to_build, "build")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("index_shards: 000001"):
            process.send_signal(signal.SIGKILL)
    assert end(process).status == -signal.SIGKILL
    before = written(to_build)
    assert main(["build"]) == 0
    told = capsys.readouterr().out
    assert "was killed; it is now marked as failed" in told
    again = re.findall(r"^index_shards: (\d+)", told, re.M)
    assert set(again) <= {f"{n:06}" for n in range(2, 7)}
    kept = {path for path in before if path.parent.name in ("000000", "000001")}
    assert len(kept) > 8
    assert {path: written(to_build)[path] for path in kept} == {path: before[path] for path in kept}


@pytest.mark.faults
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_while_it_embeds_ends_in_a_sentence(sent, demo, tmp_path) -> None:
    folder = checkout(tmp_path, demo)
    picture = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(picture, "PNG")
    (folder / "data" / "seeds" / "many").mkdir()
    for number in range(500):  # a minute of work
        image = folder / "data" / "seeds" / "many" / f"{number}.png"
        image.write_bytes(picture.getvalue() + number.to_bytes(2))
    process = start(folder, "materialize", "many")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("seed_embeddings: many holds"):
            break
    while process.poll() is None:  # again, where it comes while Python collects garbage, and is lost
        process.send_signal(sent)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    done = end(process)
    assert done.status == 128 + sent
    assert (
        done.err.splitlines()[-1]
        == "interrupted: finished work is kept, run the command again to continue"
    )
    assert "Stack Trace" not in done.err
    with history(folder) as instance:
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.FAILURE


def test_an_error_cannot_act_on_a_terminal(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAION_SEEDS_URI", "\x1b[2J\x9b1m\udcff\nerror: none")
    assert main(["materialize", "cats"]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.isprintable()
    assert "\\x1b[2J\\x9b1m\\udcff\\nerror: none" in told


def test_verify_names_the_damage_mends_it_and_says_so(tmp_path, monkeypatch, capsys) -> None:
    index, cache = write_source(tmp_path / "index"), tmp_path / "cache"
    monkeypatch.setenv("LAION_INDEX_URI", str(index))
    monkeypatch.setenv("LAION_CACHE_DIR", str(cache))
    monkeypatch.chdir(tmp_path)
    stage(str(index), None, cache)
    assert main(["verify"]) == 0
    assert "5 files" in (intact := capsys.readouterr().out)
    assert intact.endswith("intact\n")
    path = cache / "metadata" / "001.arrow"
    path.write_bytes(path.read_bytes().replace(b"example.org", b"examplf.org", 1))
    assert main(["verify"]) == 1
    assert f"{path} is damaged: bytes 0 to" in (damaged := capsys.readouterr().out)
    assert "verify --repair" in damaged
    assert main(["verify", "--repair"]) == 0
    assert path.read_bytes() == (index / "metadata" / "001.arrow").read_bytes()
    assert main(["verify"]) == 0


# --- without a checkout ---------------------------------------------------------------------------


def test_the_version_is_that_of_the_package(capsys) -> None:
    with pytest.raises(SystemExit) as ended:  # argparse ends so
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"laion-assets {version('laion_assets')}\n"


@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [("plan --target-images 5 --seeds 5", "1"), ("--help", "")]
)
def test_output_that_nobody_reads_ends_a_command_without_a_traceback(
    tmp_path, monkeypatch, arguments, unbuffered
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    command = [sys.executable, "-m", "laion_assets.cli", *arguments.split()]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ran:
        assert ran.stdout
        assert ran.stderr
        ran.stdout.close()  # as `head` does
        assert (ran.stderr.read(), ran.wait()) == (b"", 128 + signal.SIGPIPE)


def test_in_any_folder_the_history_is_kept_below_its_data_until_it_is_forgotten(
    demo, tmp_path, run_here, monkeypatch
) -> None:
    places = {"LAION_INDEX_URI": str(demo.index), "LAION_SEEDS_URI": str(demo.seeds)}
    done = run_here(tmp_path, "materialize", "fruit", "--nb-images-knn", "3", **places)
    assert (done.status, done.err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
    home = tmp_path / "data" / "dagster"
    packaged = resources.files("laion_assets.defs") / "instance.yaml"
    assert (home / "dagster.yaml").read_text() == packaged.read_text()
    with history(tmp_path, "data/dagster") as instance:
        (run,) = instance.get_runs()
        assert (run.status, run.tags["dagster/partition"]) == (dg.DagsterRunStatus.SUCCESS, "fruit")
        assert run.remote_job_origin  # or Overview > Timeline leaves it out
        assert run.remote_job_origin.repository_origin.get_label() == "__repository__@laion_assets"
        assert isinstance(instance.run_launcher, LocalRunLauncher)
        assert instance.get_concurrency_config().pool_config.default_pool_limit == 1

    plan = ("plan", "--target-images", "50", "--seed-set", "fruit")
    planned = run_here(tmp_path, *plan, **places)
    assert (planned.status, planned.err) == (0, "")
    assert f"measured by run {run.run_id[:8]}" in planned.out

    (home / "dagster.yaml").write_text(packaged.read_text() + "# mine\n")  # what is there is not replaced
    assert run_here(tmp_path, *plan, **places).status == 0
    assert (home / "dagster.yaml").read_text().endswith("# mine\n")

    before = contents(tmp_path / "data" / "output")
    for options, answer, status in (([], None, 1), ([], "n", 1), ([], "y", 0), (["--yes"], None, 1)):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer or ""))
        monkeypatch.setattr("sys.stdin.isatty", lambda answer=answer: answer is not None)
        done = run_here(tmp_path, "forget", "fruit", *options, **places)
        assert done.status == status
        left = contents(tmp_path / "data" / "output")
        assert left == (before if options == [] and status else {})
    assert "nothing is stored of 'fruit'" in done.err
    with history(tmp_path, "data/dagster") as instance:
        assert (instance.get_runs(), instance.get_dynamic_partitions("seed_sets")) == ([], [])


def test_dagster_home_decides_where_the_history_is(demo, tmp_path, run_here) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    places = {"LAION_INDEX_URI": str(demo.index), "LAION_SEEDS_URI": str(demo.seeds)}
    folder = tmp_path / "folder"
    folder.mkdir()
    done = run_here(folder, "materialize", "fruit", DAGSTER_HOME=str(home), **places)
    assert (done.status, done.err) == (0, "")
    with history(home) as instance:
        assert len(instance.get_runs()) == 1


@pytest.mark.faults
def test_commands_that_start_a_history_at_once_do_not_disturb_each_other(tmp_path):
    command = [sys.executable, "-c", "from laion_assets.cli import instance\nwith instance({}): pass"]
    options = {"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **options) for _ in range(4)]
    for each in started:
        errors = each.communicate()[1]
        assert each.returncode == 0, errors


@pytest.mark.faults
def test_a_history_that_cannot_be_written_is_told_in_a_sentence(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with files_limited_to(64 << 10):  # as on a full disk
        assert main(["forget", "fruit", "--yes"]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "data" / "dagster") in told
    assert "free space there" in told
    assert "DAGSTER_HOME" in told


def test_a_check_that_blocks_is_told_in_a_sentence_without_a_stack_trace() -> None:
    spec = dg.AssetCheckSpec("is_intact", asset="index", blocking=True)

    @dg.asset(check_specs=[spec])
    def index():
        failed = dg.AssetCheckResult(passed=False, check_name="is_intact", description="it has no rows")
        return dg.MaterializeResult(check_results=[failed])

    result = dg.materialize([index], raise_on_error=False)
    assert list(_failures(result)) == ["index: check is_intact failed: it has no rows"]
