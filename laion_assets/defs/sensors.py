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
from laion_assets.seeds import Listing, SeedSet, check_name

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
        state = state_in(context.cursor)
        try:
            listing = seeds.listing(LISTING_SECONDS)
        except InputError as error:
            return nothing_to_do(sentence(error), state)
        seen = _Seen.of(context.instance, listing)
        pending = {name: Pending(*each) for name, each in state.items()}
        is_index_there = built_index is None or last_version(context.instance, built_index) is not None
        decision = _decided(seen, pending, at_most=RUNS_PER_TICK if is_index_there else 0)
        settings = list(_changed_settings(seen, seeds, laion_index, defaults))
        states = _states(seen, pending, decision, is_index_there=is_index_there)
        report = _summary(states, _news(listing, settings), len(seen.present))
        context.log.info(report)
        return dg.SensorResult(
            run_requests=[
                _run_request(seeds, seen.present[name], decision.pending[name]) for name in decision.run
            ],
            dynamic_partitions_requests=_partition_requests(seen, decision),
            asset_events=[
                *_versions(seen, decision, settings),
                *_no_longer_red(seen),
                *_table(seen, states),
            ],
            cursor=as_cursor(
                report,
                {name: each for name, each in state.items() if name in listing.failed}
                | {name: astuple(each) for name, each in decision.pending.items()},
            ),
            skip_reason=None if decision.run else report,
        )

    return seed_sets_sensor


@dataclass(frozen=True)
class _Seen:
    """What a tick compares: the seeds folder, and what Dagster knows of its sets.

    Attributes:
        instance: the instance with the history.
        listing: the contents of the folder.
        present: the sets whose name can be used, by name.
        known: fingerprint of each set in its last report.
        done: fingerprint of each set in its last materialization.
        registered: sets with a partition.
        removed: those of them whose folder is gone.
        stored: state in Dagster of each present or removed set.

    """

    instance: dg.DagsterInstance
    listing: Listing
    present: Mapping[str, SeedSet]
    known: Mapping[str, str]
    done: Mapping[str, str]
    registered: Sequence[str]
    removed: Sequence[str]
    stored: Mapping[str, State]

    @classmethod
    def of(cls, instance: dg.DagsterInstance, listing: Listing) -> _Seen:
        """Read what Dagster knows of the sets in a listing."""
        present = {name: found for name, found in listing.sets.items() if _is_usable(name)}
        embedded = last_versions(
            instance, dg.AssetKey("seed_embeddings"), dg.DagsterEventType.ASSET_MATERIALIZATION
        )
        registered = instance.get_dynamic_partitions(SEED_SETS)
        removed = [name for name in registered if name not in listing.sets and name not in listing.failed]
        return cls(
            instance,
            listing,
            present,
            last_versions(instance, seed_folder.key, dg.DagsterEventType.ASSET_OBSERVATION),
            {name: files_version(version) for name, version in embedded.items()},
            registered,
            removed,
            states_of(instance, list({*present, *removed})),
        )


def _decided(seen: _Seen, pending: Mapping[str, Pending], *, at_most: int) -> Decision:
    versions = {name: found.fingerprint for name, found in seen.present.items()}
    restored = [n for n, v in versions.items() if seen.known.get(n) != v and seen.done.get(n) == v]
    return decide(
        pending,
        versions,
        seen.known,
        seen.done,
        time.time_ns() // 1_000_000,
        at_most=at_most,
        failed=[name for name in restored if _last_run_failed(seen.instance, name)],
    )


def _run_request(seeds: SeedFolder, seed_set: SeedSet, pending: Pending) -> dg.RunRequest:
    return dg.RunRequest(
        partition_key=seed_set.name,
        run_config=run_config({}),  # not today's settings, which may change before it starts
        run_key=f"{seed_set.name}:{seed_set.fingerprint}:{pending.since}",
        tags={**_time_limit(seed_set), **_team_tag(seeds, seed_set)},
    )


def _partition_requests(
    seen: _Seen, decision: Decision
) -> list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest]:
    """Add the partitions of new sets, and delete those of removed sets of which nothing was made."""
    new = [name for name in seen.present if name not in seen.registered and name not in decision.waiting]
    forgotten = [
        name
        for name in seen.removed
        if name not in seen.done and seen.stored[name].state not in (Is.QUEUED, Is.RUNNING)
    ]
    return [
        *([seed_sets.build_add_request(new)] if new else []),
        *([seed_sets.build_delete_request(forgotten)] if forgotten else []),
    ]


def _versions(
    seen: _Seen, decision: Decision, settings: Sequence[Version]
) -> Iterator[dg.AssetObservation | dg.AssetMaterialization]:
    """Yield the reports of the new versions of seeds and settings."""
    changed = [seeds_version(seen.present[name]) for name in decision.report]
    removed = [
        Version(seed_folder.key, REMOVED, name)
        for name in seen.removed
        if seen.known.get(name) != REMOVED
    ]
    for version in (*changed, *removed, *settings):
        yield from version.events()


def _no_longer_red(seen: _Seen) -> Iterator[dg.AssetCheckEvaluation]:
    for name in seen.removed:
        if seen.known.get(name) != REMOVED or seen.stored[name].state is Is.FAILED:
            yield from nothing_red(seen.instance, name)


def _table(seen: _Seen, states: Sequence[State]) -> Iterator[dg.AssetMaterialization]:
    """Yield the table of all sets, if it has changed."""
    outside = [file for file in seen.listing.ignored if file.partition("/")[0] not in seen.present]
    overview = as_event(states, outside)
    if not is_reported(seen.instance, overview):
        yield overview


def _news(listing: Listing, settings: Sequence[Version]) -> Mapping[str, Sequence[str]]:
    changed = [version.seed_set or "" for version in settings if version.metadata[CHANGED] != FIRST]
    return {"settings changed:": changed, "ignored files:": listing.ignored}


def _states(
    seen: _Seen, pending: Mapping[str, Pending], decision: Decision, *, is_index_there: bool
) -> list[State]:
    """Return the states of all sets, whether their folder is there, gone or cannot be read."""
    listing = seen.listing
    return [
        *(
            _state(seen, found, pending.get(name), decision, is_index_there=is_index_there)
            for name, found in seen.present.items()
        ),
        *(_removed(seen.stored[name], has_tables=name in seen.done) for name in seen.removed),
        *(
            State(repr(name), Is.REFUSED, about=_why_unusable(name))
            for name in listing.sets
            if name not in seen.present
        ),
        *(State(printable(name), Is.UNLISTED, about=reason) for name, reason in listing.failed.items()),
    ]


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
    seen: _Seen, found: SeedSet, before: Pending | None, decision: Decision, *, is_index_there: bool
) -> State:
    """Return the state of a set whose folder is there: what Dagster knows, unless the set has changed.

    Args:
        seen: what this tick compares.
        found: the folder of the set.
        before: its state in the last tick, if it had changed.
        decision: the decisions of this tick.
        is_index_there: whether there is an index to search.

    """
    name, now = found.name, decision.pending.get(found.name)
    stored = seen.stored[name]
    described = replace(stored, contents=found.contents(), ignored=_ignored(found))
    if name in decision.waiting and now is not None:
        since = moment(now.since / 1000)
        if before != now:
            return replace(described, state=Is.SETTLING, since=since, about="", run="")
        state = Is.NEXT if is_index_there else Is.NO_INDEX
        return replace(described, state=state, since=since, about="", run="")
    if name in decision.run:
        return replace(described, state=Is.QUEUED, since="", about="", run="")
    if stored.state is Is.DONE and seen.done.get(name) != found.fingerprint:
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
    seen: _Seen, seeds: SeedFolder, laion_index: LaionIndex, defaults: Defaults
) -> Iterator[Version]:
    """Yield the current settings of each registered set, if they differ from its last report."""
    instance = seen.instance
    present = {name: seen.present[name] for name in seen.registered if name in seen.present}
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
