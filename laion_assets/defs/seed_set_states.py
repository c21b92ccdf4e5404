"""What is so for each seed set: waiting, queued, running, failed or done.

`states_of` reads Dagster's history; the seeds sensor adds what only it knows and reports the table.

Dagster's concept: https://docs.dagster.io/guides/build/partitions-and-backfills
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from itertools import groupby

import dagster as dg

from laion_assets.defs.dagster_internals import DATA_VERSION_TAG, PARTITION_NAME_TAG
from laion_assets.defs.drawing.markup import table
from laion_assets.defs.forget import ASSETS, IN_PROGRESS, is_of_seed_sets
from laion_assets.defs.history import asset_of_step
from laion_assets.defs.partitions import seed_sets as partitions
from laion_assets.defs.terminal import one_line, some

RUNS_READ = 100  # the latest; the last run of other sets is read one at a time
LOOKED_UP = 25  # sets whose last run is read so, and whose error is
ROWS_SHOWN = 200  # of the table; the event log keeps every table
BEFORE_START = (
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
)
ABOUT = 160  # characters of the last column

seed_sets_table = dg.AssetSpec(
    "seed_sets",
    group_name="sources",
    kinds={"table"},
    description="A table of all seed sets: the state of each, since when, and why. External: the "
    "seeds sensor reports it whenever it changes.",
)


class Is(StrEnum):
    """The state of a seed set, what needs attention first."""

    FAILED = "failed"
    REFUSED = "name cannot be used"
    UNLISTED = "cannot be listed"
    RUNNING = "running"
    QUEUED = "queued"
    SETTLING = "waiting for unchanged files"
    NEXT = "waiting for its turn"
    NO_INDEX = "waiting for the index"
    NOT_MADE = "not materialized"
    REMOVED = "removed"
    DONE = "done"


@dataclass(frozen=True)
class State:
    """What is so for a seed set; a row of the table.

    Attributes:
        seed_set: its name.
        state: one of `Is`.
        since: time of the change to this state in UTC, to the minute; empty if unknown.
        about: the asset that runs; the asset that failed and its error; or what to do.
        contents: its seeds.
        ignored: names of ignored files.
        run: id of its last run.

    """

    seed_set: str
    state: Is
    since: str = ""
    about: str = ""
    contents: str = ""
    ignored: str = ""
    run: str = ""


def moment(seconds: float | None) -> str:
    """Return a time as text in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%b %d %H:%M} UTC" if seconds else ""


def states_of(instance: dg.DagsterInstance, seed_sets: Sequence[str]) -> dict[str, State]:
    """Read the states of seed sets from the statuses of their partitions and from their last runs."""
    statuses = {
        asset: instance.get_status_by_partition(dg.AssetKey(asset), seed_sets, partitions) or {}
        for asset in ASSETS
    }
    last = _last_runs(instance)
    lookups = LOOKED_UP
    states = {}
    for name in seed_sets:
        of_set = {asset: str(found.get(name)).rpartition(".")[2] for asset, found in statuses.items()}
        open_ended = {"FAILED", "IN_PROGRESS"} & {*of_set.values()}
        if open_ended and name not in last and lookups:
            lookups -= 1
            last |= _last_runs(instance, name)
        states[name] = _state(name, of_set, last.get(name))
    for name in [name for name, found in states.items() if found.run][:LOOKED_UP]:
        states[name] = _explained(instance, states[name])
    return states


def _state(name: str, statuses: Mapping[str, str], last: dg.RunRecord | None) -> State:
    """Return the state of a set, given the status of its partition of each asset."""
    found = {*statuses.values()}
    if last and last.dagster_run.status in IN_PROGRESS:
        run_id, created = last.dagster_run.run_id, last.create_timestamp.timestamp()
        if last.dagster_run.status in BEFORE_START:
            return State(name, Is.QUEUED, moment(created), run=run_id)
        return State(name, Is.RUNNING, moment(last.start_time or created), run=run_id)
    if last and last.dagster_run.status is dg.DagsterRunStatus.FAILURE:
        return State(name, Is.FAILED, moment(last.end_time), run=last.dagster_run.run_id)
    if "FAILED" in found:
        failed = next(asset for asset, status in statuses.items() if status == "FAILED")
        return State(name, Is.FAILED, about=f"no {failed}")
    if "IN_PROGRESS" in found:
        return State(name, Is.QUEUED)
    if found == {"MATERIALIZED"}:
        return State(name, Is.DONE, moment(last.end_time) if last else "")
    missing = next(asset for asset, status in statuses.items() if status == "None")
    return State(name, Is.NOT_MADE, about=f"no {missing}")


def _last_runs(instance: dg.DagsterInstance, seed_set: str | None = None) -> dict[str, dg.RunRecord]:
    """Return the last run of a set, or of all sets with a recent one."""
    wanted = dg.RunsFilter(tags={PARTITION_NAME_TAG: seed_set}) if seed_set else None
    found: dict[str, dg.RunRecord] = {}
    for record in instance.get_run_records(wanted, limit=RUNS_READ):
        name = record.dagster_run.tags.get(PARTITION_NAME_TAG)
        if name and is_of_seed_sets(record.dagster_run):
            found.setdefault(name, record)
    return found


def _explained(instance: dg.DagsterInstance, state: State) -> State:
    """Add the asset that runs, or the one that failed with its error."""
    if state.state is Is.RUNNING:
        steps = instance.get_run_step_stats(state.run)
        at_work = dict.fromkeys(asset_of_step(step.step_key) for step in steps if not step.end_time)
        return replace(state, about=", ".join(at_work))
    if state.state is not Is.FAILED:
        return state
    failures = instance.all_logs(state.run, of_type=dg.DagsterEventType.STEP_FAILURE)
    if not failures:
        return replace(state, about="the run ended before its steps did")
    first = failures[0].get_dagster_event()
    failure = first.step_failure_data.user_failure_data
    error = first.step_failure_data.error
    sentence = (failure and failure.description) or (error.message if error else "")
    return replace(state, about=one_line(f"{asset_of_step(str(first.step_key))}: {sentence}"))


def in_order(states: Iterable[State]) -> list[State]:
    """Sort states by what needs attention first, then by name."""
    order = [*Is]
    return sorted(states, key=lambda state: (order.index(state.state), state.seed_set))


def by_state(states: Iterable[State]) -> dict[Is, list[State]]:
    """Group states, what needs attention first."""
    return {key: [*group] for key, group in groupby(in_order(states), key=lambda state: state.state)}


def is_reported(instance: dg.DagsterInstance, event: dg.AssetMaterialization) -> bool:
    """Return whether the last reported table is the same."""
    latest = instance.get_latest_materialization_event(event.asset_key)
    known = latest.asset_materialization.tags if latest and latest.asset_materialization else {}
    return known == event.tags


def as_event(states: Iterable[State], ignored: Sequence[str]) -> dg.AssetMaterialization:
    """Return the event that reports the table; its data version changes with the table.

    Args:
        states: state of each seed set.
        ignored: ignored files outside of the sets.

    """
    ordered = in_order(states)
    counted = [f"{len(group)} {state}" for state, group in by_state(ordered).items()]
    unread = [f"{state.seed_set}: {state.ignored}" for state in ordered if state.ignored]
    unread += [f"{name} (in no seed set)" for name in ignored]
    content = json.dumps([[asdict(state) for state in ordered], unread], sort_keys=True)
    return dg.AssetMaterialization(
        seed_sets_table.key,
        metadata={
            "states": ", ".join(counted) or "no seed sets",
            "seed sets": table([_row(state) for state in ordered[:ROWS_SHOWN]]),
            **({"ignored files": some(unread)} if unread else {}),
        },
        tags={DATA_VERSION_TAG: hashlib.sha256(content.encode()).hexdigest()[:16]},
    )


def _row(state: State) -> dict[str, str]:
    """Return a row of the table; the page has room for four narrow columns."""
    about = state.about or state.contents
    return {
        "seed set": state.seed_set,
        "state": str(state.state),
        "since": state.since,
        "about": about if len(about) <= ABOUT else about[: ABOUT - 1] + "…",
    }
