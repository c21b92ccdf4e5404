"""What is new in the sources: runs for new seeds, and word to Dagster of what its graph starts from.

Deciding is a pure function over what was seen before, what is there now and what was already done; the
sensors around it only look and report. What must not live here: how seed sets and indices are listed,
and how settings are compared.
Dagster's concept: https://docs.dagster.io/guides/automate/sensors
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any

import dagster as dg

from laion_assets.defs.assets.seed_embeddings import seed_embeddings, seed_folder
from laion_assets.defs.assets.staged_laion_index import laion_index_source
from laion_assets.defs.partitions import seed_sets
from laion_assets.defs.resources import LaionIndex, SeedFolder
from laion_assets.defs.settings import RetrievalConfig
from laion_assets.defs.settings_check import (
    COMBINED,
    BlockListNow,
    block_list_now,
    check_again,
    last_made,
)
from laion_assets.defs.sources import is_known, last_versions, sighting
from laion_assets.io.errors import InputError
from laion_assets.seeds.seed_sets import check_name

SECONDS_BETWEEN_TICKS = 15
SECONDS_BETWEEN_LOOKS_AT_THE_INDEX = 300
SECONDS_BETWEEN_LOOKS_AT_THE_SETTINGS = 60
RUNS_PER_TICK = 5
NAMES_SHOWN = 10
GONE = "removed"  # the data version of a seed set without a seed file: its folder is gone, or empty


@dataclass(frozen=True)
class Moving:
    """What the cursor remembers of a seed set that is not yet as Dagster knows it.

    Attributes:
        fingerprint: at the last tick.
        since: when it was first seen, in milliseconds; it keeps run keys apart when a set changes back.
        asked: whether a run was requested.

    """

    fingerprint: str
    since: int
    asked: bool = False


@dataclass(frozen=True)
class Decision:
    """What one tick decided.

    Attributes:
        moving: for the next tick.
        run: seed sets to run.
        report: seed sets of which Dagster is told what is in them now.
        waiting: seed sets that still change, or wait for their turn.

    """

    moving: Mapping[str, Moving]
    run: tuple[str, ...]
    report: tuple[str, ...]
    waiting: tuple[str, ...]


def decide(
    moving: Mapping[str, Moving],
    present: Mapping[str, str],
    known: Mapping[str, str],
    done: Mapping[str, str],
    now: int,
    at_most: int = RUNS_PER_TICK,
) -> Decision:
    """Compare the seed sets with what was seen and done before; a pure function.

    A set must look the same at two ticks in a row before it is acted on: uploads take time. Dagster is
    told of a set at the tick after its run was requested: a daemon that is killed between the two then
    requests it again, under the same key.

    Args:
        moving: of the last tick.
        present: fingerprint of each seed set now.
        known: of each, as Dagster was last told; a set that is as told is at rest.
        done: of each, as last materialized.
        now: time of the tick, in milliseconds.
        at_most: runs to start; the others wait for the next tick.

    """
    next_moving: dict[str, Moving] = {}
    run: list[str] = []
    report: list[str] = []
    for name, fingerprint in present.items():
        seen = moving.get(name)
        if known.get(name) == fingerprint:
            continue
        if seen is None or seen.fingerprint != fingerprint:
            next_moving[name] = Moving(fingerprint, now)
        elif seen.asked or done.get(name) == fingerprint:
            report.append(name)
        elif len(run) < at_most:
            run.append(name)
            next_moving[name] = replace(seen, asked=True)
        else:
            next_moving[name] = seen
    waiting = tuple(name for name, seen in next_moving.items() if not seen.asked)
    return Decision(next_moving, tuple(run), tuple(report), waiting)


def as_cursor(saw: str, state: Mapping[str, Any] | None = None) -> str:
    """Write what a tick leaves for the next one.

    In the UI's list of ticks the cursor is what one reads: a skip reason shows only on hovering. So it
    begins with the sentence on what the tick saw, and what has to be remembered, if anything, stands
    behind it.
    """
    sentence = " ".join(saw.split())
    return f"{sentence}\n{json.dumps(state)}" if state else sentence


def state_in(cursor: str | None) -> dict[str, Any]:
    """Read what the last tick wanted to be remembered."""
    state: dict[str, Any] = json.loads((cursor or "").partition("\n")[2] or "{}")
    return state


def build_seed_sets_sensor(job: dg.UnresolvedAssetJobDefinition) -> dg.SensorDefinition:
    """Return the sensor that runs the job for every new or changed seed set."""

    @dg.sensor(
        name="seed_sets_sensor",
        job=job,
        minimum_interval_seconds=SECONDS_BETWEEN_TICKS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Registers seed sets as partitions, runs those whose seeds are new or changed, and "
        "tells Dagster what is in them. What each tick saw stands in the column Cursor.",
    )
    def seed_sets_sensor(
        context: dg.SensorEvaluationContext, seeds: dg.ResourceParam[SeedFolder]
    ) -> dg.SensorResult:
        state = state_in(context.cursor)
        try:
            listing = seeds.listing()
        except InputError as error:
            return _nothing_to_do(str(error), state)
        found = {name: seed_set.fingerprint for name, seed_set in listing.sets.items()}
        present = {name: mark for name, mark in found.items() if _is_usable(name)}
        known = last_versions(context.instance, seed_folder.key, dg.DagsterEventType.ASSET_OBSERVATION)
        done = last_versions(
            context.instance, seed_embeddings.key, dg.DagsterEventType.ASSET_MATERIALIZATION
        )
        moving = {name: Moving(*seen) for name, seen in state.items()}
        decision = decide(moving, present, known, done, time.time_ns() // 1_000_000)
        registered = context.instance.get_dynamic_partitions(seed_sets.name or "")
        gone = [name for name in registered if name in known and name not in found]
        news = {
            "running": decision.run,
            "waiting for": decision.waiting,
            "no table of it yet (running or failed):": [
                name for name, mark in present.items() if known.get(name) == mark != done.get(name)
            ],
            "removed, tables kept:": gone,
            "impossible names, rename:": [repr(n) for n in found if n not in present],
            "ignored files:": listing.ignored,
        }
        saw = _sentence(news, len(present))
        context.log.info(saw)
        new = [name for name in present if name not in registered and name not in decision.waiting]
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(
                    partition_key=name,
                    run_key=f"{name}:{present[name]}:{decision.moving[name].since}",
                )
                for name in decision.run
            ],
            dynamic_partitions_requests=[seed_sets.build_add_request(new)] if new else [],
            asset_events=[
                event
                for name, version in (
                    *((name, present[name]) for name in decision.report),
                    *((name, GONE) for name in gone if known[name] != GONE),
                )
                for event in sighting(seed_folder.key, version, name)
            ],
            cursor=as_cursor(saw, {name: astuple(seen) for name, seen in decision.moving.items()}),
            skip_reason=None if decision.run else saw,
        )

    return seed_sets_sensor


def build_laion_index_sensor() -> dg.SensorDefinition:
    """Return the sensor that tells Dagster when the published index has changed; it starts nothing."""

    @dg.sensor(
        name="laion_index_sensor",
        minimum_interval_seconds=SECONDS_BETWEEN_LOOKS_AT_THE_INDEX,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Tells Dagster which version of the index is at its source: staged_laion_index is "
        "stale when it has changed. What each tick saw stands in the column Cursor.",
    )
    def laion_index_sensor(
        context: dg.SensorEvaluationContext, laion_index: dg.ResourceParam[LaionIndex]
    ) -> dg.SensorResult:
        try:
            version = laion_index.source_version()
        except InputError as error:
            return _nothing_to_do(str(error))
        if is_known(context.instance, laion_index_source.key, version):
            return _nothing_to_do(f"{laion_index.index_uri} is as it was, version {version}")
        saw = f"{laion_index.index_uri} is new or has changed, version {version}"
        return dg.SensorResult(
            asset_events=sighting(laion_index_source.key, version),
            cursor=as_cursor(saw),
            skip_reason=saw,
        )

    return laion_index_sensor


@dataclass(frozen=True)
class Compared:
    """What the cursor remembers of the settings that sets were compared with.

    Attributes:
        settings: of the environment and by default.
        block_list: as it was at the last tick.
        read_up_to: storage id of the newest materialization that was compared with them.
        warned: sets that were made with other settings.
        gone: sets that were removed, of which nothing is said until they are back.

    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    block_list: Mapping[str, Any] = field(default_factory=dict)
    read_up_to: int = 0
    warned: Sequence[str] = ()
    gone: Sequence[str] = ()


def build_settings_sensor() -> dg.SensorDefinition:
    """Return the sensor that checks again when settings in the environment have changed."""

    @dg.sensor(
        name="settings_sensor",
        minimum_interval_seconds=SECONDS_BETWEEN_LOOKS_AT_THE_SETTINGS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Warns of sets that were made with other settings than a run would use now. Starts "
        "nothing; a changed settings.yaml does. What each tick saw stands in the column Cursor.",
    )
    def settings_sensor(
        context: dg.SensorEvaluationContext, laion_index: dg.ResourceParam[LaionIndex]
    ) -> dg.SensorResult:
        state = state_in(context.cursor)
        last = Compared(**state)
        try:
            settings = RetrievalConfig().resolve(os.environ).values()
        except InputError as error:
            return _nothing_to_do(str(error), state)
        made = context.instance.event_log_storage.get_latest_storage_id_by_partition(
            COMBINED, dg.DagsterEventType.ASSET_MATERIALIZATION
        )
        known = last_versions(context.instance, seed_folder.key, dg.DagsterEventType.ASSET_OBSERVATION)
        gone = {name for name in made if known.get(name) == GONE}
        listed_before = BlockListNow(**last.block_list)
        listed = block_list_now(laion_index, listed_before)
        changed = settings != last.settings or (
            (listed.told, listed.wrong) != (listed_before.told, listed_before.wrong)
        )
        back = set(last.gone) - gone
        new = {
            name
            for name, place in made.items()
            if name not in gone and (changed or name in back or place > last.read_up_to)
        }
        if not new and gone == set(last.gone):
            as_before = replace(last, block_list=asdict(listed))
            return _nothing_to_do(f"nothing new; {_made_with_others(last.warned)}", asdict(as_before))
        looked_up = {name: last_made(context.instance, name, listed) for name in sorted(new)}
        found = {name: made for name, made in looked_up.items() if made}
        warned = {name for name, made in found.items() if not made.as_now}
        # The step has said already that it is as it should be, unless this sensor said otherwise since.
        for name in sorted(warned | (found.keys() & set(last.warned))):
            check_again(context.instance, found[name])
        now = Compared(
            settings,
            asdict(listed),
            max(made.values(), default=0),
            sorted((set(last.warned) - new - gone) | warned),
            sorted(gone),
        )
        return _nothing_to_do(f"{_sets(len(new))} compared; {_made_with_others(now.warned)}", asdict(now))

    return settings_sensor


def _made_with_others(warned: Sequence[str]) -> str:
    return f"made with other settings: {_some(warned) if warned else 'none'}"


def _nothing_to_do(saw: str, state: Mapping[str, Any] | None = None) -> dg.SensorResult:
    """Start no run: what the tick saw, and remembers, is all there is to it."""
    return dg.SensorResult(cursor=as_cursor(saw, state), skip_reason=saw)


def _is_usable(name: str) -> bool:
    try:
        check_name(name)
    except InputError:
        return False
    return True


def _sentence(news: Mapping[str, Sequence[str]], sets: int) -> str:
    """What a tick saw, the news first."""
    parts = [f"{what} {_some(names)}" for what, names in news.items() if names]
    return "; ".join([*(parts or ["nothing new"]), _sets(sets)])


def _sets(number: int) -> str:
    return f"{number} seed set{'' if number == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
