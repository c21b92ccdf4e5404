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

from laion_assets.defs.dagster_internals import MAX_RUNTIME_SECONDS_TAG, PARTITION_NAME_TAG
from laion_assets.defs.failures import sentence
from laion_assets.defs.forget import nothing_red
from laion_assets.defs.launchpad import run_config
from laion_assets.defs.partitions import SEED_SETS, seed_sets
from laion_assets.defs.provenance import files_version
from laion_assets.defs.resources import LaionIndex, SeedFolder
from laion_assets.defs.seed_set_states import (
    Is,
    State,
    as_event,
    by_state,
    is_reported,
    moment,
    states_of,
)
from laion_assets.defs.settings import Defaults, team_of
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
from laion_assets.defs.terminal import count, some
from laion_assets.io.errors import InputError
from laion_assets.io.text import printable
from laion_assets.seeds import SeedSet, check_name

SEEDS_INTERVAL = 15  # seconds between ticks
INDEX_INTERVAL = 300  # seconds between ticks
LISTING_SECONDS = 20.0  # of a tick; Dagster ends a tick after 60 seconds
RUNS_PER_TICK = 5
RUN_SECONDS = 2 * 24 * 3600  # longest run of a set without seeds: time to copy the largest index
SEED_SECONDS = 2  # more for each image, and for each KiB of other seeds
SETTINGS_PER_TICK = 100  # seed sets whose new settings are reported; each needs a database write
TEAM_TAG = "laion_assets/team"  # counted by tag_concurrency_limits in dagster.yaml


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
    job: dg.UnresolvedAssetJobDefinition, built_index: dg.AssetKey | None = None, *, is_on: bool = True
) -> dg.SensorDefinition:
    """Return the sensor that runs the job for every new or changed seed set.

    Args:
        job: the job to run.
        built_index: the index if it is built here; seed sets then wait for the first one.
        is_on: whether the sensor runs before anybody turns it on. With an index in a bucket it would read
            gigabytes for each set that is already there, which costs money that nobody agreed to spend.

    """

    @dg.sensor(
        name="seed_sets_sensor",
        job=job,
        minimum_interval_seconds=SEEDS_INTERVAL,
        default_status=dg.DefaultSensorStatus.RUNNING if is_on else dg.DefaultSensorStatus.STOPPED,
        description="Registers seed sets as partitions, runs those whose seeds are new or changed, and "
        "reports their versions and current settings. The asset seed_sets shows the state of each set, "
        "and the Cursor column in short.",
    )
    def seed_sets_sensor(
        context: dg.SensorEvaluationContext,
        seeds: dg.ResourceParam[SeedFolder],
        laion_index: dg.ResourceParam[LaionIndex],
        defaults: dg.ResourceParam[Defaults],
    ) -> dg.SensorResult:
        state, instance = state_in(context.cursor), context.instance
        try:
            listing = seeds.listing(LISTING_SECONDS)
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
        pending = {name: Pending(*seen) for name, seen in state.items()}
        decision = decide(
            pending,
            versions,
            known,
            done,
            time.time_ns() // 1_000_000,
            at_most=RUNS_PER_TICK if is_index_there else 0,
            failed=[name for name in restored if _last_run_failed(instance, name)],
        )
        registered = instance.get_dynamic_partitions(SEED_SETS)
        removed = [name for name in registered if name not in listing.sets and name not in listing.failed]
        settings = list(
            _changed_settings(
                instance,
                {name: present[name] for name in registered if name in present},
                seeds,
                laion_index,
                defaults,
            )
        )
        stored = states_of(instance, list({*present, *removed}))
        # Nothing was made of these, so nothing is lost with the partition.
        forgotten = [
            name
            for name in removed
            if name not in done and stored[name].state not in (Is.QUEUED, Is.RUNNING)
        ]
        states = [
            *(
                _state(
                    stored[name], found, pending.get(name), decision, done, is_index_there=is_index_there
                )
                for name, found in present.items()
            ),
            *(_removed(stored[name], has_tables=name in done) for name in removed),
            *(
                State(repr(name), Is.REFUSED, about=_why_unusable(name))
                for name in listing.sets
                if name not in present
            ),
            *(
                State(printable(name), Is.UNLISTED, about=reason)
                for name, reason in listing.failed.items()
            ),
        ]
        report = _summary(
            states,
            {
                "settings changed:": [
                    version.seed_set or "" for version in settings if version.metadata[CHANGED] != FIRST
                ],
                "ignored files:": listing.ignored,
            },
            len(present),
        )
        context.log.info(report)
        outside = [file for file in listing.ignored if file.partition("/")[0] not in present]
        overview = as_event(states, outside)
        new = [name for name in present if name not in registered and name not in decision.waiting]
        seen = [
            *(seeds_version(present[name]) for name in decision.report),
            *(Version(seed_folder.key, REMOVED, name) for name in removed if known.get(name) != REMOVED),
            *settings,
        ]
        no_longer_red = [
            event
            for name in removed
            if known.get(name) != REMOVED or stored[name].state is Is.FAILED
            for event in nothing_red(instance, name)
        ]
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(
                    partition_key=name,
                    run_config=run_config({}),  # not today's settings, which may change before it starts
                    run_key=f"{name}:{versions[name]}:{decision.pending[name].since}",
                    tags={**_time_limit(present[name]), **_team_tag(seeds, present[name])},
                )
                for name in decision.run
            ],
            dynamic_partitions_requests=[
                *([seed_sets.build_add_request(new)] if new else []),
                *([seed_sets.build_delete_request(forgotten)] if forgotten else []),
            ],
            asset_events=[
                *(event for version in seen for event in version.events()),
                *no_longer_red,
                *([] if is_reported(instance, overview) else [overview]),
            ],
            cursor=as_cursor(
                report,
                {name: seen for name, seen in state.items() if name in listing.failed}
                | {name: astuple(seen) for name, seen in decision.pending.items()},
            ),
            skip_reason=None if decision.run else report,
        )

    return seed_sets_sensor


def _team_tag(seeds: SeedFolder, seed_set: SeedSet) -> Mapping[str, str]:
    """Return the tag with the set's team; none if its settings are unusable, which the run reports."""
    try:
        team = team_of(seeds.settings(seed_set), seed_set.name)
    except InputError:
        return {}
    return {TEAM_TAG: team} if team else {}


def _time_limit(seed_set: SeedSet) -> Mapping[str, str]:
    """Return the tag with the seconds after which Dagster ends a run, which would otherwise hang."""
    others = sum(file.size for file in (*seed_set.vectors, *seed_set.prompts)) >> 10
    seconds = RUN_SECONDS + SEED_SECONDS * (len(seed_set.images) + others)
    return {MAX_RUNTIME_SECONDS_TAG: str(seconds)}


def _last_run_failed(instance: dg.DagsterInstance, seed_set: str) -> bool:
    last = instance.get_runs(dg.RunsFilter(tags={PARTITION_NAME_TAG: seed_set}), limit=1)
    return bool(last) and last[0].status is dg.DagsterRunStatus.FAILURE


def _state(
    stored: State,
    found: SeedSet,
    before: Pending | None,
    decision: Decision,
    done: Mapping[str, str],
    *,
    is_index_there: bool,
) -> State:
    """Return the state of a set whose folder is there: what Dagster knows, unless the set has changed.

    Args:
        stored: the state in Dagster.
        found: its folder.
        before: its state in the last tick, if it had changed.
        decision: the decisions of this tick.
        done: fingerprint of each set in its last materialization.
        is_index_there: whether there is an index to search.

    """
    name, now = found.name, decision.pending.get(found.name)
    described = replace(stored, contents=found.contents(), ignored=_ignored(found))
    if name in decision.waiting and now is not None:
        since = moment(now.since / 1000)
        if before != now:
            return replace(described, state=Is.SETTLING, since=since, about="", run="")
        state = Is.NEXT if is_index_there else Is.NO_INDEX
        return replace(described, state=state, since=since, about="", run="")
    if name in decision.run:
        return replace(described, state=Is.QUEUED, since="", about="", run="")
    if stored.state is Is.DONE and done.get(name) != found.fingerprint:
        return replace(described, state=Is.NOT_MADE, about="its tables are of earlier files")
    return described


def _removed(stored: State, *, has_tables: bool) -> State:
    about = "its tables are kept until you forget it" if has_tables else ""
    return State(stored.seed_set, Is.REMOVED, about=about)


def _ignored(found: SeedSet) -> str:
    """Name the ignored files of a set, with the reason."""
    reasons = {"no seeds": found.ignored, "the set has embeddings": found.not_embedded}
    return "; ".join(f"{some(names)} ({why})" for why, names in reasons.items() if names)


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


def _is_usable(name: str) -> bool:
    return not _why_unusable(name)


def _why_unusable(name: str) -> str:
    try:
        check_name(name)
    except InputError as error:
        return sentence(error)
    return ""


def _summary(states: Sequence[State], news: Mapping[str, Sequence[str]], sets: int) -> str:
    """Return the report of a tick in one line, what needs attention first."""
    parts = [
        f"{state}: {some([_named(each) for each in group])}"
        for state, group in by_state(states).items()
        if state is not Is.DONE
    ]
    parts += [f"{what} {some(names)}" for what, names in news.items() if names]
    return "; ".join([*(parts or ["nothing new"]), count(sets, "seed set")])


def _named(state: State) -> str:
    """Name a set with the detail that matters in its state."""
    step = state.about.partition(":")[0]
    detail = {
        Is.FAILED: step and f"in {step}",
        Is.RUNNING: state.about,
        Is.REMOVED: state.about,
        Is.UNLISTED: state.about,
        Is.SETTLING: state.contents,
        Is.QUEUED: state.contents,
    }.get(state.state)
    return f"{state.seed_set} ({detail})" if detail else state.seed_set
