"""Request the next step of a build: training, shards or the merge.

Dagster's concept: https://docs.dagster.io/guides/automate/sensors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import dagster as dg

from laion_assets.build import Wanted
from laion_assets.defs.dagster_internals import RUN_KEY_TAG
from laion_assets.defs.failures import sentence
from laion_assets.defs.partitions import SHARDS, index_shards
from laion_assets.defs.resources import IndexBuilder
from laion_assets.defs.sensors import as_cursor, nothing_to_do, state_in
from laion_assets.defs.sources import Version, embedding_files, is_known, last_version, last_versions
from laion_assets.defs.terminal import count, some
from laion_assets.io.errors import InputError

INTERVAL = 60  # seconds between ticks
SHARDS_AT_ONCE = 50  # shards that are running or queued
KEYS_PER_QUERY = 200
TRAINED, ENCODED, MERGED = "trained_index", "index_shards", "laion_index"
TRAIN_JOB, ENCODE_JOB, PUBLISH_JOB = "train_index_job", "encode_shard_job", "publish_index_job"


def build_jobs(assets: Sequence[dg.AssetsDefinition]) -> list[dg.UnresolvedAssetJobDefinition]:
    """Define a job for each step of a build.

    Args:
        assets: the assets of `index_assets`, in order.

    """
    steps = (
        (TRAIN_JOB, "Trains the index on a sample of the embeddings."),
        (ENCODE_JOB, "Encodes one shard of the embeddings."),
        (PUBLISH_JOB, "Merges all shards into the index at LAION_INDEX_URI."),
    )
    return [
        dg.define_asset_job(name, selection=dg.AssetSelection.assets(asset), description=about)
        for (name, about), asset in zip(steps, assets, strict=True)
    ]


def build_embeddings_sensor(jobs: Sequence[dg.UnresolvedAssetJobDefinition]) -> dg.SensorDefinition:
    """Return the sensor that adds new embeddings to the index, one step after another."""

    @dg.sensor(
        name="embedding_files_sensor",
        jobs=jobs,
        minimum_interval_seconds=INTERVAL,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Lists the embeddings, registers their shards as partitions, and runs the missing "
        "steps: training, shards, then the merge. The Cursor column shows what each tick found.",
    )
    def embedding_files_sensor(
        context: dg.SensorEvaluationContext, index_builder: dg.ResourceParam[IndexBuilder]
    ) -> dg.SensorResult:
        instance, state = context.instance, state_in(context.cursor)
        try:
            with index_builder.open(context.log.info) as build:
                listing = build.listing()
                if state.get("listed") != listing.version:  # uploads take time
                    return nothing_to_do(
                        "the embeddings are new or still changing", {"listed": listing.version}
                    )
                plan = build.stored_plan()
                build.check_planned(plan, listing)
                prepared = build.prepared()
                is_prepared = build.is_prepared(prepared, listing)
                wanted = build.wanted(plan)
                settings, times = build.settings, prepared.times if prepared else 0
        except InputError as error:
            return nothing_to_do(sentence(error), state)
        if wanted and is_prepared:
            step = _shards_or_merge(instance, wanted, times)
        else:  # new files need it too: it assigns ids to their rows
            key = f"train:{listing.version}:{settings}:{times}"
            request = dg.RunRequest(run_key=key, job_name=TRAIN_JOB)
            step = _once(instance, TRAINED, request, "the embeddings or the settings change")
        names = [shard.name for shard in plan.shards]
        registered = set(instance.get_dynamic_partitions(SHARDS))
        new = [name for name in names if name not in registered]
        version = Version(embedding_files.key, listing.version)
        planned = f"; {count(plan.rows, 'row')} in {count(len(names), 'shard')}" if names else ""
        report = f"{step.report}{planned}"
        context.log.info(report)
        return dg.SensorResult(
            run_requests=step.requests,
            dynamic_partitions_requests=[index_shards.build_add_request(new)] if new else [],
            asset_events=() if is_known(instance, version) else version.events(),
            cursor=as_cursor(report, {"listed": listing.version}),
            skip_reason=None if step.requests else report,
        )

    return embedding_files_sensor


@dataclass(frozen=True)
class _Step:
    """The runs and the report of a tick."""

    report: str
    requests: Sequence[dg.RunRequest] = ()


def _shards_or_merge(instance: dg.DagsterInstance, wanted: Wanted, times: int) -> _Step:
    """Request runs for shards that are not encoded, or for the merge once all are.

    Dagster launches each run key once, so a failed shard is not rerun automatically and does not block
    other shards.

    Args:
        instance: the instance with the history of runs.
        wanted: fingerprints of the inputs of shards and index.
        times: number of changes of the settings, so that settings that return get new run keys.

    """
    done = last_versions(instance, dg.AssetKey(ENCODED), dg.DagsterEventType.ASSET_MATERIALIZATION)
    missing = {
        f"{n}:{version}:{times}": n for n, version in wanted.shards.items() if done.get(n) != version
    }
    if not missing:
        if last_version(instance, dg.AssetKey(MERGED)) == wanted.index:
            return _Step("nothing new: the index holds all rows")
        request = dg.RunRequest(run_key=f"publish:{wanted.index}:{times}", job_name=PUBLISH_JOB)
        return _once(instance, MERGED, request, "the embeddings change")
    requests: list[dg.RunRequest] = []
    running: list[str] = []
    failed: list[str] = []
    for start in range(0, len(missing), KEYS_PER_QUERY):
        keys = list(islice(missing, start, start + KEYS_PER_QUERY))
        launched = _launched(instance, keys)
        for key in keys:
            if key in launched:
                (failed if launched[key].is_finished else running).append(missing[key])
            elif len(requests) + len(running) < SHARDS_AT_ONCE:
                requests.append(
                    dg.RunRequest(run_key=key, job_name=ENCODE_JOB, partition_key=missing[key])
                )
        if len(requests) + len(running) >= SHARDS_AT_ONCE:
            break
    news = {
        f"{len(missing):,} of {count(len(wanted.shards), 'shard')} to encode:": [
            *running,
            *(request.partition_key or "" for request in requests),
        ],
        "failed: see the run's error; a shard runs again once its files are repaired, or when you "
        "materialize it:": failed,
    }
    return _Step("; ".join(f"{what} {some(names)}" for what, names in news.items() if names), requests)


def _once(instance: dg.DagsterInstance, asset: str, request: dg.RunRequest, until: str) -> _Step:
    """Return a run that is launched once for its key."""
    before = _launched(instance, [request.run_key or ""]).get(request.run_key or "")
    if before is None:
        return _Step(f"making {asset}", [request])
    if not before.is_finished:
        return _Step(f"making {asset}")
    return _Step(
        f"{asset} failed: see the run's error; it runs again once {until}, or when you materialize it"
    )


def _launched(instance: dg.DagsterInstance, keys: Sequence[str]) -> Mapping[str, dg.DagsterRun]:
    """Return the last run of each launched run key."""
    runs = instance.get_runs(dg.RunsFilter(tags={RUN_KEY_TAG: list(keys)}))
    return {run.tags[RUN_KEY_TAG]: run for run in reversed(runs)}
