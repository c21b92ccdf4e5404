"""Request runs for changed seed sets; report source versions.

`decide` is pure; the sensors list, call it and report.

Dagster's concept: https://docs.dagster.io/guides/automate/sensors
"""

from __future__ import annotations

import json
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import dagster as dg

from laion_assets.defs.dagster_internals import PARTITION_NAME_TAG
from laion_assets.defs.failures import sentence
from laion_assets.defs.forget import IN_PROGRESS
from laion_assets.defs.partitions import SEED_SETS, seed_sets
from laion_assets.defs.provenance import files_version
from laion_assets.defs.resources import LaionIndex, SeedFolder
from laion_assets.defs.settings import Defaults
from laion_assets.defs.sources import (
    CHANGED,
    FIRST,
    REMOVED,
    Version,
    current_settings,
    is_known,
    laion_index_source,
    last_version,
    last_versions,
    retrieval_settings,
    seed_folder,
    seeds_version,
    settings_version,
    with_changes,
)
from laion_assets.io.errors import InputError
from laion_assets.seeds import SeedSet, check_name

SEEDS_INTERVAL = 15  # seconds between ticks
INDEX_INTERVAL = 300  # seconds between ticks
RUNS_PER_TICK = 5
SETTINGS_PER_TICK = 100  # seed sets whose new settings are reported; each needs a database write
NAMES_SHOWN = 10


@dataclass(frozen=True)
class Pending:
    """The cursor's state of a seed set that differs from its last report.

    Attributes:
        fingerprint: fingerprint at the last tick.
        since: time of the first tick that saw the change, in milliseconds. It is part of the run key, so
            that a set that changes back is run again.
        requested: whether a run was requested.

    """

    fingerprint: str
    since: int
    requested: bool = False


@dataclass(frozen=True)
class Decision:
    """The decisions of one tick.

    Attributes:
        pending: state for the next tick.
        run: seed sets to run.
        report: seed sets whose current version to report.
        waiting: seed sets that are still changing or wait for their turn.

    """

    pending: Mapping[str, Pending]
    run: tuple[str, ...]
    report: tuple[str, ...]
    waiting: tuple[str, ...]


def decide(
    pending: Mapping[str, Pending],
    present: Mapping[str, str],
    known: Mapping[str, str],
    done: Mapping[str, str],
    now: int,
    at_most: int = RUNS_PER_TICK,
    failed: Container[str] = (),
) -> Decision:
    """Compare the seed sets with their last reports and materializations; a pure function.

    A set must be unchanged across two ticks before it is run, because uploads take time. It is reported
    at the tick after its run was requested. So if the daemon is killed in between, it requests the run
    again under the same key.

    Args:
        pending: state of the last tick.
        present: current fingerprint of each seed set.
        known: fingerprint of each set in its last report; a set that equals it is unchanged.
        done: fingerprint of each set in its last materialization.
        now: time of the tick, in milliseconds.
        at_most: most runs to request; other sets wait for the next tick.
        failed: sets whose last run failed; they run again even if their files return to a version that
            was materialized before.

    """
    next_pending: dict[str, Pending] = {}
    run: list[str] = []
    report: list[str] = []
    for name, fingerprint in present.items():
        seen = pending.get(name)
        if known.get(name) == fingerprint:
            continue
        if seen is None or seen.fingerprint != fingerprint:
            next_pending[name] = Pending(fingerprint, now)
        elif seen.requested or (done.get(name) == fingerprint and name not in failed):
            report.append(name)
        elif len(run) < at_most:
            run.append(name)
            next_pending[name] = replace(seen, requested=True)
        else:
            next_pending[name] = seen
    waiting = tuple(name for name, seen in next_pending.items() if not seen.requested)
    return Decision(next_pending, tuple(run), tuple(report), waiting)


def as_cursor(report: str, state: Mapping[str, Any] | None = None) -> str:
    """Return the cursor of a tick: a one-line report, then the state as JSON.

    The UI's list of ticks shows the cursor, but a skip reason only on hovering.
    """
    line = " ".join(report.split())
    return f"{line}\n{json.dumps(state)}" if state else line


def state_in(cursor: str | None) -> dict[str, Any]:
    """Read the state in the last tick's cursor."""
    state: dict[str, Any] = json.loads((cursor or "").partition("\n")[2] or "{}")
    return state


def build_seed_sets_sensor(
    job: dg.UnresolvedAssetJobDefinition, built_index: dg.AssetKey | None = None
) -> dg.SensorDefinition:
    """Return the sensor that runs the job for every new or changed seed set.

    Args:
        job: the job to run.
        built_index: the index if it is built here; seed sets then wait for the first one.

    """

    @dg.sensor(
        name="seed_sets_sensor",
        job=job,
        minimum_interval_seconds=SEEDS_INTERVAL,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Registers seed sets as partitions, runs those whose seeds are new or changed, and "
        "reports their versions and current settings. The Cursor column shows what each tick found.",
    )
    def seed_sets_sensor(
        context: dg.SensorEvaluationContext,
        seeds: dg.ResourceParam[SeedFolder],
        laion_index: dg.ResourceParam[LaionIndex],
        defaults: dg.ResourceParam[Defaults],
    ) -> dg.SensorResult:
        state, instance = state_in(context.cursor), context.instance
        try:
            listing = seeds.listing()
        except InputError as error:
            return nothing_to_do(sentence(error), state)
        present = {name: found for name, found in listing.sets.items() if _is_usable(name)}
        versions = {name: found.fingerprint for name, found in present.items()}
        known = last_versions(instance, seed_folder.key, dg.DagsterEventType.ASSET_OBSERVATION)
        embedded = last_versions(
            instance, dg.AssetKey("seed_embeddings"), dg.DagsterEventType.ASSET_MATERIALIZATION
        )
        done = {name: files_version(version) for name, version in embedded.items()}
        restored = [n for n, v in versions.items() if known.get(n) != v and done.get(n) == v]
        is_index_there = built_index is None or last_version(instance, built_index) is not None
        decision = decide(
            {name: Pending(*seen) for name, seen in state.items()},
            versions,
            known,
            done,
            time.time_ns() // 1_000_000,
            at_most=RUNS_PER_TICK if is_index_there else 0,
            failed=[name for name in restored if _last_run_failed(instance, name)],
        )
        registered = instance.get_dynamic_partitions(SEED_SETS)
        removed = [name for name in registered if name not in listing.sets]
        # Nothing was made of these, so nothing is lost with the partition.
        forgotten = [name for name in removed if name not in done and not _is_running(instance, name)]
        unmade = [
            name for name, version in versions.items() if known.get(name) == version != done.get(name)
        ]
        # Only for the sets that are shown, because each needs a query.
        failed = [name for name in unmade[:NAMES_SHOWN] if _last_run_failed(instance, name)]
        settings = list(
            _changed_settings(
                instance,
                {name: present[name] for name in registered if name in present},
                seeds,
                laion_index,
                defaults,
            )
        )
        news = {
            "running": [_with_contents(present[name]) for name in decision.run],
            "waiting for" if is_index_there else "waiting until the index is built:": [
                _with_contents(present[name]) for name in decision.waiting
            ],
            "failed, runs again once changed:": failed,
            "not materialized yet:": [name for name in unmade if name not in failed],
            "settings changed:": [
                version.seed_set or "" for version in settings if version.metadata[CHANGED] != FIRST
            ],
            "removed, tables kept until you forget it:": [name for name in removed if name in done],
            "removed:": forgotten,
            "invalid names:": [repr(name) for name in listing.sets if name not in present],
            "ignored files:": listing.ignored,
        }
        report = _summary(news, len(present))
        context.log.info(report)
        new = [name for name in present if name not in registered and name not in decision.waiting]
        seen = [
            *(seeds_version(present[name]) for name in decision.report),
            *(Version(seed_folder.key, REMOVED, name) for name in removed if known.get(name) != REMOVED),
            *settings,
        ]
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(
                    partition_key=name,
                    run_key=f"{name}:{versions[name]}:{decision.pending[name].since}",
                )
                for name in decision.run
            ],
            dynamic_partitions_requests=[
                *([seed_sets.build_add_request(new)] if new else []),
                *([seed_sets.build_delete_request(forgotten)] if forgotten else []),
            ],
            asset_events=[event for version in seen for event in version.events()],
            cursor=as_cursor(report, {name: astuple(seen) for name, seen in decision.pending.items()}),
            skip_reason=None if decision.run else report,
        )

    return seed_sets_sensor


def _last_run_failed(instance: dg.DagsterInstance, seed_set: str) -> bool:
    last = instance.get_runs(dg.RunsFilter(tags={PARTITION_NAME_TAG: seed_set}), limit=1)
    return bool(last) and last[0].status is dg.DagsterRunStatus.FAILURE


def _is_running(instance: dg.DagsterInstance, seed_set: str) -> bool:
    return bool(
        instance.get_runs(
            dg.RunsFilter(tags={PARTITION_NAME_TAG: seed_set}, statuses=IN_PROGRESS), limit=1
        )
    )


def _changed_settings(
    instance: dg.DagsterInstance,
    present: Mapping[str, SeedSet],
    seeds: SeedFolder,
    laion_index: LaionIndex,
    defaults: Defaults,
) -> Iterator[Version]:
    """Yield the current settings of each seed set, if they differ from its last report."""
    if not present:
        return
    known = last_versions(instance, retrieval_settings.key, dg.DagsterEventType.ASSET_OBSERVATION)
    listed, unusable = None, None
    try:
        listed = laion_index.block_list_description()  # only once, because it queries the storage
    except InputError as error:
        unusable = sentence(error)
    changed = 0
    for name, seed_set in present.items():
        try:
            settings = unusable or current_settings(defaults, seeds.settings(seed_set), name, listed)
            version = settings_version(name, settings)
        except InputError as error:
            version = settings_version(name, sentence(error))
        if known.get(name) != version.value:
            yield with_changes(instance, version)
            changed += 1
            if changed == SETTINGS_PER_TICK:
                return


def build_laion_index_sensor() -> dg.SensorDefinition:
    """Return the sensor that reports the version of the published index, without starting runs."""

    @dg.sensor(
        name="laion_index_sensor",
        minimum_interval_seconds=INDEX_INTERVAL,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports the version of the index at its source; if it has changed, "
        "staged_laion_index is stale. The Cursor column shows what each tick found.",
    )
    def laion_index_sensor(
        context: dg.SensorEvaluationContext, laion_index: dg.ResourceParam[LaionIndex]
    ) -> dg.SensorResult:
        try:
            version = Version(laion_index_source.key, laion_index.source_version())
        except InputError as error:
            return nothing_to_do(sentence(error))
        if is_known(context.instance, version):
            return nothing_to_do(f"{laion_index.index_uri} is unchanged, version {version.value}")
        report = f"{laion_index.index_uri} is new or has changed, version {version.value}"
        return dg.SensorResult(
            asset_events=version.events(), cursor=as_cursor(report), skip_reason=report
        )

    return laion_index_sensor


def nothing_to_do(report: str, state: Mapping[str, Any] | None = None) -> dg.SensorResult:
    """Return the result of a tick that launches no run, with the reason."""
    return dg.SensorResult(cursor=as_cursor(report, state), skip_reason=report)


def _with_contents(seed_set: SeedSet) -> str:
    return f"{seed_set.name} ({seed_set.contents()})"


def _is_usable(name: str) -> bool:
    try:
        check_name(name)
    except InputError:
        return False
    return True


def _summary(news: Mapping[str, Sequence[str]], sets: int) -> str:
    """Return the report of a tick in one line, changes first."""
    parts = [f"{what} {some(names)}" for what, names in news.items() if names]
    return "; ".join([*(parts or ["nothing new"]), f"{sets} seed set{'' if sets == 1 else 's'}"])


def some(names: Sequence[str]) -> str:
    """List the first names and the number of others."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
