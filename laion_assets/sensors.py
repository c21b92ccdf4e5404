"""New seed data starts a run: the sensor over the folder of seed sets.

Deciding is a pure function over what was seen before, what is there now and what was already done; the
sensor around it only looks and reports. What must not live here: how seed sets are listed.
Dagster's concept: https://docs.dagster.io/guides/automate/sensors
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import dagster as dg
from dagster._core.definitions.data_version import extract_data_version_from_entry

from laion_assets.partitions import seed_sets
from laion_assets.resources import SeedFolder
from laion_assets.retrieval.errors import InputError
from laion_assets.retrieval.seeds import check_name

SECONDS_BETWEEN_TICKS = 15
RUNS_PER_TICK = 5


@dataclass(frozen=True)
class Seen:
    """What the cursor remembers of one seed set.

    Attributes:
        fingerprint: at the last tick; empty for a set that is gone.
        settled: whether that was decided on: run, or found to be done already.
        changes: how often was decided; it keeps run keys apart when a set changes back, or comes back.

    """

    fingerprint: str
    settled: bool = False
    changes: int = 0


@dataclass(frozen=True)
class Decision:
    """What one tick decided.

    Attributes:
        memory: for the next tick.
        run: seed sets to run.
        waiting: seed sets that still change, or wait for their turn.

    """

    memory: Mapping[str, Seen]
    run: tuple[str, ...]
    waiting: tuple[str, ...]


def decide(
    memory: Mapping[str, Seen],
    present: Mapping[str, str],
    done: Mapping[str, str | None],
    at_most: int = RUNS_PER_TICK,
) -> Decision:
    """Compare the seed sets with what was seen and done before; a pure function.

    Args:
        memory: of the last tick.
        present: fingerprint of each seed set now.
        done: data version of each set's last materialized seeds.
        at_most: runs to start; the others wait for the next tick.

    A set must look the same at two ticks in a row before it is acted on: uploads take time.

    """
    next_memory = {name: Seen("", changes=seen.changes) for name, seen in memory.items()}
    run: list[str] = []
    waiting: list[str] = []
    for name, fingerprint in present.items():
        seen = memory.get(name, Seen(""))
        if fingerprint != seen.fingerprint:
            next_memory[name] = Seen(fingerprint, changes=seen.changes)
            waiting.append(name)
            continue
        needs_run = not seen.settled and done.get(name) != fingerprint
        if needs_run and len(run) == at_most:
            next_memory[name] = seen
            waiting.append(name)
            continue
        if needs_run:
            run.append(name)
        next_memory[name] = Seen(fingerprint, True, seen.changes + (not seen.settled))
    return Decision(next_memory, tuple(run), tuple(waiting))


def build_seed_sets_sensor(job: dg.UnresolvedAssetJobDefinition) -> dg.SensorDefinition:
    """Return the sensor that runs the job for every new or changed seed set."""

    @dg.sensor(
        name="seed_sets_sensor",
        job=job,
        minimum_interval_seconds=SECONDS_BETWEEN_TICKS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Registers seed sets as partitions and runs those whose seeds are new or changed.",
    )
    def seed_sets_sensor(
        context: dg.SensorEvaluationContext, seeds: dg.ResourceParam[SeedFolder]
    ) -> dg.SensorResult | dg.SkipReason:
        try:
            found = {name: seed_set.fingerprint for name, seed_set in seeds.list().items()}
        except InputError as error:
            return dg.SkipReason(str(error))
        present = {name: mark for name, mark in found.items() if _is_usable(name)}
        memory = {k: Seen(**v) for k, v in json.loads(context.cursor or "{}").items()}
        registered = set(context.instance.get_dynamic_partitions(seed_sets.name or ""))
        done = {name: _materialized_version(context.instance, name) for name in present}
        decision = decide(memory, present, done)
        new = [name for name in present if name not in registered and name not in decision.waiting]
        context.log.info(_sentence(found, present, decision))
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(
                    partition_key=name,
                    run_key=f"{name}:{present[name]}:{decision.memory[name].changes}",
                )
                for name in decision.run
            ],
            dynamic_partitions_requests=[seed_sets.build_add_request(new)] if new else [],
            cursor=json.dumps({name: asdict(seen) for name, seen in decision.memory.items()}),
            skip_reason=None if decision.run else _sentence(found, present, decision),
        )

    return seed_sets_sensor


def _is_usable(name: str) -> bool:
    try:
        check_name(name)
    except InputError:
        return False
    return True


def _materialized_version(instance: dg.DagsterInstance, seed_set: str) -> str | None:
    record = instance.get_latest_data_version_record(
        dg.AssetKey("seed_embeddings"), partition_key=seed_set
    )
    version = extract_data_version_from_entry(record.event_log_entry) if record else None
    return version.value if version else None


def _sentence(found: Mapping[str, str], present: Mapping[str, str], decision: Decision) -> str:
    parts = [f"{len(present)} seed sets"]
    if decision.run:
        parts.append(f"running {', '.join(decision.run)}")
    if decision.waiting:
        parts.append(f"waiting for {', '.join(decision.waiting)}")
    unusable = [repr(name) for name in found if name not in present]
    if unusable:
        parts.append(f"names that cannot be used: {', '.join(unusable)}; rename these folders")
    if len(parts) == 1:
        parts.append("nothing new")
    return "; ".join(parts)
