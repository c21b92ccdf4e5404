"""New seed data starts one run per content, once it is unchanged across two ticks."""

import itertools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
from helpers.project import Ticks, failures, new_project, reported
from hypothesis import given
from hypothesis import strategies as st

from laion_assets.defs.history import figures_of
from laion_assets.defs.resources import SeedFolder
from laion_assets.defs.sensors import RUNS_PER_TICK, TEAM_TAG, Pending, decide
from laion_assets.defs.sources import last_version
from laion_assets.io.errors import InputError
from laion_assets.seeds import folder

# --- the sensor, tick by tick ---------------------------------------------------------------------


@pytest.fixture
def ticks(tmp_path):
    with new_project(tmp_path, tmp_path / "no index is needed") as project:
        yield Ticks(project)


def put(ticks: Ticks, name: str, number: int = 0, file: str = "a.npy") -> Path:
    path = ticks.project.seeds / name / file
    path.parent.mkdir(exist_ok=True)
    np.save(path, np.eye(4, dtype=np.float32) + number)
    return path


def test_a_seed_set_is_run_once_for_each_content_it_has(ticks):
    assert ticks.tick() == []
    assert ticks.said == "nothing new; 0 seed sets"
    put(ticks, "cats", 1)
    assert ticks.tick() == []
    assert "waiting for unchanged files: cats" in ticks.said
    assert ticks.tick_and_work() == ["cats"]
    assert ticks.said == "queued: cats (1 file of embeddings); 1 seed set"
    assert [ticks.tick() for _ in range(3)] == [[]] * 3
    assert ticks.said == "not materialized: cats; 1 seed set"  # only its embeddings are
    put(ticks, "cats", 2)
    assert [ticks.tick_and_work() for _ in range(4)] == [[], ["cats"], [], []]
    put(ticks, "cats", 1)
    assert [ticks.tick_and_work() for _ in range(4)] == [[], ["cats"], [], []]
    assert len(set(ticks.run_keys)) == 3
    (ticks.project.seeds / "cats" / "a.npy").touch()  # written again with the same content
    assert [ticks.tick() for _ in range(3)] == [[]] * 3


@pytest.mark.parametrize(
    ("settings", "tags"),
    [
        ("team: vision", {TEAM_TAG: "vision"}),
        ("nprobe: 3", {}),
        ("team: [a, b]", {}),
        ("not yaml: [", {}),
    ],
)
def test_a_run_is_tagged_with_the_team_of_its_set(ticks, settings, tags):
    put(ticks, "cats")
    (ticks.project.seeds / "cats" / "settings.yaml").write_text(settings)
    ticks.tick()
    (request,) = ticks.evaluate("seed_sets_sensor", ticks.cursor).run_requests
    assert request.tags.items() >= tags.items()
    assert (TEAM_TAG in request.tags) == bool(tags)


def test_a_run_has_a_time_limit_that_grows_with_its_seeds(ticks):
    for name, files in {"small": 1, "large": 30}.items():
        for number in range(files):
            put(ticks, name, number, f"{number}.npy")
    ticks.tick()
    small, large = sorted(
        int(request.tags["dagster/max_runtime"])
        for request in ticks.evaluate("seed_sets_sensor", ticks.cursor).run_requests
    )
    assert 2 * 86_400 <= small < large < 10 * 86_400


def test_a_run_is_not_asked_for_again_while_it_is_under_way(ticks):
    put(ticks, "cats")
    assert [ticks.tick() for _ in range(5)] == [[], ["cats"], [], [], []]


def test_what_the_command_line_has_run_already_becomes_a_partition_and_no_run(ticks):
    put(ticks, "cats")
    assert ticks.project.run("cats", "seed_embeddings").success
    assert [ticks.tick() for _ in range(3)] == [[]] * 3
    assert ticks.project.instance.get_dynamic_partitions("seed_sets") == ["cats"]
    put(ticks, "cats", 2)
    assert [ticks.tick_and_work() for _ in range(3)] == [[], ["cats"], []]


def test_a_set_that_is_still_being_uploaded_is_waited_for(ticks):
    for number in range(3):
        put(ticks, "cats", number, f"{number}.npy")
        assert ticks.tick() == []
        assert "waiting for unchanged files: cats" in ticks.said
        assert not ticks.project.instance.get_dynamic_partitions("seed_sets")
    assert ticks.tick_and_work() == ["cats"]
    assert ticks.tick() == []


def test_a_broken_set_holds_up_no_other_and_runs_when_it_was_mended(ticks):
    broken = put(ticks, "broken")
    broken.write_bytes(b"no array")
    put(ticks, "good")
    (ticks.project.seeds / "empty").mkdir()
    assert ticks.tick() == []
    assert sorted(ticks.tick()) == ["broken", "good"]
    assert "broken/a.npy" in failures(ticks.project.run("broken", "seed_embeddings"))["seed_embeddings"]
    assert ticks.project.run("good", "seed_embeddings").success
    assert [ticks.tick() for _ in range(3)] == [[]] * 3  # a failure is not tried again by itself
    assert ticks.said == "failed: broken (in seed_embeddings); not materialized: good; 2 seed sets"
    put(ticks, "broken", 5)
    assert [ticks.tick_and_work() for _ in range(3)] == [[], ["broken"], []]


def test_a_state_that_is_restored_runs_again_only_if_the_last_run_failed(ticks):
    put(ticks, "cats")
    assert [ticks.tick_and_work() for _ in range(3)] == [[], ["cats"], []]
    settings = ticks.project.seeds / "cats" / "settings.yaml"

    settings.write_text("nprob: 5")
    assert [ticks.tick() for _ in range(2)] == [[], ["cats"]]
    settings.unlink()  # before the run that was requested has begun
    assert [ticks.tick() for _ in range(4)] == [[]] * 4

    settings.write_text("nprob: 5")
    assert [ticks.tick() for _ in range(2)] == [[], ["cats"]]
    told = failures(ticks.project.run("cats", "seed_embeddings"))["seed_embeddings"]
    assert "did you mean nprobe?" in told
    assert ticks.tick() == []
    assert ticks.said == "failed: cats (in seed_embeddings); 1 seed set"
    settings.unlink()
    assert [ticks.tick_and_work() for _ in range(4)] == [[], ["cats"], [], []]
    assert ticks.said == "not materialized: cats; 1 seed set"


def test_a_folder_whose_name_cannot_be_used_is_named_and_blocks_nothing(ticks):
    for name in ("a..b", "what?", "good"):
        put(ticks, name)
    assert ticks.tick() == []
    assert "'a..b'" in ticks.said
    assert "'what?'" in ticks.said
    assert "name cannot be used:" in ticks.said
    assert ticks.tick_and_work() == ["good"]
    assert ticks.project.instance.get_dynamic_partitions("seed_sets") == ["good"]


def test_a_set_that_cannot_be_listed_for_a_while_is_neither_removed_nor_run_again(ticks, monkeypatch):
    for name in ("cats", "dogs", "new"):
        put(ticks, name)
    assert [ticks.tick_and_work() for _ in range(2)] == [[], ["cats", "dogs", "new"]]
    list_files = folder.list_files

    def failing(fs: Any, root: str, *more: Any) -> Any:
        if root.endswith(("/cats", "/new")):
            raise InputError(f"{root} cannot be listed (Input/output error)")
        return list_files(fs, root, *more)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "list_files", failing)
        put(ticks, "dogs", 2)
        assert [ticks.tick_and_work() for _ in range(3)] == [[], ["dogs"], []]
    assert f"cannot be listed: cats ({ticks.project.seeds}/cats cannot be listed (Input" in ticks.said
    assert "removed" not in ticks.said
    reported = list(ticks.reported)
    assert [ticks.tick() for _ in range(3)] == [[]] * 3
    assert ("seed_folder", "cats") not in ticks.reported[len(reported) :]


def test_names_that_are_not_text_end_no_tick(ticks):
    put(ticks, "good")
    for name in (b"caf\xe9/a.npy", b"good/caf\xe9.txt", b"good/caf\xe9.npy"):
        path = os.fsencode(ticks.project.seeds) + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        shutil.copy(ticks.project.seeds / "good" / "a.npy", path)
    assert [ticks.tick_and_work() for _ in range(3)] == [[], ["good"], []]
    assert ticks.said.isprintable()
    assert "name cannot be used: 'caf\\udce9'" in ticks.said
    assert "ignored files: good/caf\\udce9.txt" in ticks.said


def test_files_that_nobody_reads_are_named_in_every_tick_and_in_the_report(ticks):
    put(ticks, "cats")
    for name in ("notes.txt", "cats/labels.json"):
        (ticks.project.seeds / name).write_text("no seeds")
    assert [ticks.tick_and_work() for _ in range(3)] == [[], ["cats"], []]
    assert ticks.said == "not materialized: cats; ignored files: cats/labels.json, notes.txt; 1 seed set"
    told = reported(ticks.project.run("cats", "seed_embeddings"), "seed_embeddings")
    assert told["ignored files"] == ["labels.json"]


def test_many_sets_take_turns(ticks):
    names = [f"set {number:02}" for number in range(2 * RUNS_PER_TICK + 1)]
    for name in names:
        put(ticks, name)
    launched = [ticks.tick() for _ in range(5)]
    assert [len(each) for each in launched] == [0, RUNS_PER_TICK, RUNS_PER_TICK, 1, 0]
    assert sorted(itertools.chain(*launched)) == names


def test_without_a_seeds_folder_the_sensor_says_which_setting_and_forgets_nothing(ticks):
    put(ticks, "cats")
    assert [ticks.tick_and_work() for _ in range(2)] == [[], ["cats"]]
    away = ticks.project.seeds.rename(ticks.project.seeds.with_name("away"))
    assert ticks.tick() == []
    assert str(ticks.project.seeds) in ticks.said
    assert "LAION_SEEDS_URI" in ticks.said
    away.rename(ticks.project.seeds)
    assert [ticks.tick() for _ in range(3)] == [[]] * 3


def test_a_set_that_was_removed_runs_when_it_comes_back_with_other_seeds_and_back_again(ticks):
    for number in (1, 2, 1):
        put(ticks, "cats", number)
        assert [ticks.tick_and_work() for _ in range(3)] == [[], ["cats"], []]
        shutil.rmtree(ticks.project.seeds / "cats")
        assert ticks.tick() == []


def test_a_set_that_is_removed_is_reported_once_and_keeps_what_was_made_of_it(ticks):
    for name in ("cats", "dogs"):
        put(ticks, name)
    assert [ticks.tick_and_work() for _ in range(3)] == [[], ["cats", "dogs"], []]
    away = (ticks.project.seeds / "cats").rename(ticks.project.seeds.with_name("away"))
    ticks.reported.clear()
    assert [ticks.tick() for _ in range(3)] == [[]] * 3
    assert ticks.said == (
        "not materialized: dogs; removed: cats (its tables are kept until you forget it); 1 seed set"
    )
    assert ticks.reported == [("seed_folder", "cats")]
    assert version_of_cats(ticks) == "removed"
    assert ticks.project.instance.get_dynamic_partitions("seed_sets") == ["cats", "dogs"]
    assert ticks.project.table("seed_embeddings", "cats").exists()
    away.rename(ticks.project.seeds / "cats")  # with the same bytes
    assert [ticks.tick() for _ in range(3)] == [[]] * 3
    assert ticks.said == "not materialized: cats, dogs; 2 seed sets"
    assert version_of_cats(ticks) == SeedFolder(str(ticks.project.seeds)).find("cats").fingerprint


def test_the_seed_folder_shows_its_files_and_what_was_read_from_them(ticks):
    put(ticks, "cats")
    (ticks.project.seeds / "cats" / "notes.odt").write_bytes(b"")
    assert [ticks.tick_and_work() for _ in range(2)] == [[], ["cats"]]
    latest = ticks.project.instance.get_latest_materialization_event(dg.AssetKey("seed_folder"))
    shown = figures_of(latest.asset_materialization.metadata)
    assert shown["about"].startswith("1 file of embeddings, 1 ignored file, ")
    assert shown["seeds"] == "4 vectors of 4 dimensions"
    assert "notes.odt" in shown["ignored files, no seeds"]


def test_a_set_that_is_removed_before_anything_was_made_of_it_leaves_no_partition(ticks):
    put(ticks, "cats")
    assert [ticks.tick() for _ in range(4)] == [[], ["cats"], [], []]
    assert ticks.said == "not materialized: cats; 1 seed set"
    shutil.rmtree(ticks.project.seeds / "cats")
    assert ticks.tick() == []
    assert ticks.said == "removed: cats; 0 seed sets"
    assert ticks.project.instance.get_dynamic_partitions("seed_sets") == []
    assert ticks.tick() == []
    assert ticks.said == "nothing new; 0 seed sets"


def test_a_folder_that_was_emptied_is_as_one_that_is_gone(ticks):
    put(ticks, "cats")
    assert [ticks.tick_and_work() for _ in range(3)] == [[], ["cats"], []]
    (ticks.project.seeds / "cats" / "a.npy").unlink()
    (ticks.project.seeds / "cats" / "settings.yaml").write_text("nprobe: 5")
    assert ticks.tick() == []
    assert ticks.said == "removed: cats (its tables are kept until you forget it); 0 seed sets"
    assert version_of_cats(ticks) == "removed"


def test_a_set_whose_partition_was_deleted_is_no_longer_missed(ticks):
    put(ticks, "cats")
    assert [ticks.tick_and_work() for _ in range(3)] == [[], ["cats"], []]
    shutil.rmtree(ticks.project.seeds / "cats")
    ticks.tick()
    ticks.project.instance.delete_dynamic_partition("seed_sets", "cats")
    assert ticks.tick() == []
    assert ticks.said == "nothing new; 0 seed sets"


def overview(ticks: Ticks) -> Mapping[str, dg.MetadataValue]:
    """What the page of `seed_sets` shows."""
    event = ticks.project.instance.get_latest_materialization_event(dg.AssetKey("seed_sets"))
    return event.asset_materialization.metadata


def table_of_sets(ticks: Ticks) -> dict[str, tuple[str, str]]:
    """State and explanation of each seed set on the page of `seed_sets`."""
    rows = [record.data for record in overview(ticks)["seed sets"].records]
    return {row["seed set"]: (row["state"], row["about"]) for row in rows}


def new_run(ticks: Ticks, seed_set: str, status: dg.DagsterRunStatus) -> None:
    """A run of all assets, as the daemon starts it or leaves it behind."""
    ticks.project.instance.create_run_for_job(
        ticks.project.job, tags={"dagster/partition": seed_set}, status=status
    )


def test_the_table_of_seed_sets_says_what_is_so_for_each_and_is_reported_when_it_changes(ticks):
    instance, names = ticks.project.instance, ("broken", "killed", "queued", "running", "gone")
    for name in names:
        put(ticks, name)
    (ticks.project.seeds / "broken" / "a.npy").write_bytes(b"no array")
    (ticks.project.seeds / "queued" / "notes.txt").write_text("no seeds")
    assert ticks.tick() == []
    assert {state for state, *_ in table_of_sets(ticks).values()} == {"waiting for unchanged files"}
    assert sorted(ticks.tick()) == sorted(names)
    assert {state for state, *_ in table_of_sets(ticks).values()} == {"queued"}
    ticks.project.run("broken")
    new_run(ticks, "killed", dg.DagsterRunStatus.FAILURE)
    new_run(ticks, "queued", dg.DagsterRunStatus.NOT_STARTED)
    new_run(ticks, "running", dg.DagsterRunStatus.STARTED)
    assert ticks.project.run("gone", "seed_embeddings").success
    shutil.rmtree(ticks.project.seeds / "gone")
    (ticks.project.seeds / "a..b").mkdir()
    np.save(ticks.project.seeds / "a..b" / "a.npy", np.eye(4, dtype=np.float32))
    put(ticks, "new")
    assert ticks.tick() == []
    found = table_of_sets(ticks)
    assert {name: state for name, (state, *_) in found.items()} == {
        "broken": "failed",
        "killed": "failed",
        "'a..b'": "name cannot be used",
        "running": "running",
        "queued": "queued",
        "new": "waiting for unchanged files",
        "gone": "removed",
    }
    assert [*found][:2] == ["broken", "killed"]  # what needs attention first
    assert "broken/a.npy" in found["broken"][1]
    assert found["broken"][1].startswith("seed_embeddings: ")
    assert found["killed"][1] == "the run ended before its steps did"
    assert overview(ticks)["ignored files"].value == "queued: notes.txt (no seeds)"
    assert "forget" in found["gone"][1]
    key = dg.AssetKey("seed_sets")
    reported = [
        instance.fetch_materializations(key, limit=10).records for _ in range(3) if not ticks.tick()
    ]
    assert len(reported[-1]) == len(reported[-2])


def version_of_cats(ticks: Ticks) -> str | None:
    """The data version of the partition in the UI."""
    return last_version(ticks.project.instance, dg.AssetKey("seed_folder"), "cats")


# --- the decision, in every order of events -------------------------------------------------------

NAMES = ("a", "b", "c", "d")
# What a set looks like at a tick: gone, or one of three contents.
LOOKS = st.fixed_dictionaries({name: st.sampled_from([None, "A", "B", "C"]) for name in NAMES})
# Sets whose run ends before the tick, having read what is there now; those of them whose run fails; and
# sets that are run by hand.
SOME = st.frozensets(st.sampled_from(NAMES))


@given(st.lists(st.tuples(LOOKS, SOME, SOME, SOME), max_size=12), st.integers(1, 3))
def test_whatever_happens_each_content_at_rest_is_run_under_a_key_of_its_own(history, at_most):
    pending: Mapping[str, Pending] = {}
    known: dict[str, str] = {}
    done: dict[str, str] = {}
    failed: set[str] = set()
    under_way: set[str] = set()
    keys: list[str] = []
    before: dict[str, str] = {}
    asked: dict[str, str] = {}  # content of the last request of each set
    tried: dict[str, str] = {}  # content that the last run of each set read
    clock = itertools.count()

    def tick(looks: dict[str, str | None]) -> int:
        nonlocal pending, before
        present = {name: look for name, look in looks.items() if look}
        decision = decide(pending, present, known, done, next(clock), at_most, failed)
        assert len(decision.run) <= at_most
        for name in decision.run:
            assert before.get(name) == present[name], "requested before it was at rest"
            assert done.get(name) != present[name] or name in failed, "requested though it is done"
            assert known.get(name) != present[name], "requested though nothing changed"
            keys.append(f"{name}:{present[name]}:{decision.pending[name].since}")
            asked[name] = present[name]
            under_way.add(name)
        for name in decision.report:
            assert before.get(name) == present[name], "reported before it was at rest"
            assert known.get(name) != present[name], "reported though it is known"
            known[name] = present[name]
        pending, before = decision.pending, present
        return len(decision.run) + len(decision.report)

    for looks, ended, failing, by_hand in history:
        for name in (ended & under_way) | by_hand:
            if look := looks[name]:
                known[name] = tried[name] = look  # a run says what it reads
                if name in failing:
                    failed.add(name)
                else:
                    done[name] = look
                    failed.discard(name)
        under_way -= ended
        tick(looks)
    final = history[-1][0] if history else {}
    for _ in range(3 + len(NAMES)):
        tick(final)
    assert tick(final) == 0, "requests or reports again and again"
    assert not pending, "remembers what is at rest"
    assert len(set(keys)) == len(keys), "Dagster starts no run for a key it knows"
    for name, look in final.items():
        if look:
            assert known[name] == look
            is_made = done.get(name) == look and name not in failed
            assert is_made or look in (asked.get(name), tried.get(name)), "a seed set was lost"


@given(st.permutations(NAMES))
def test_sets_that_wait_for_their_turn_all_get_it(order):
    present = dict.fromkeys(order, "A")
    known: dict[str, str] = {}
    pending = decide({}, present, known, {}, 0, at_most=1).pending
    run = []
    for now in range(len(NAMES)):
        decision = decide(pending, present, known, {}, now, at_most=1)
        pending = decision.pending
        known |= {name: present[name] for name in decision.report}
        run += decision.run
        assert set(decision.waiting) == set(NAMES) - set(run)
    assert sorted(run) == sorted(NAMES)
