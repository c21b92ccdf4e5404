"""Request what a build needs next: training, shards, the merge.

Dagster's concept: https://docs.dagster.io/guides/automate/sensors
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import dagster as dg

from laion_assets.build import Plan, Wanted
from laion_assets.defs.failures import sentence
from laion_assets.defs.partitions import SHARDS, index_shards
from laion_assets.defs.resources import IndexBuilder
from laion_assets.defs.sensors import as_cursor, state_in
from laion_assets.defs.sources import Version, embedding_files, is_known, last_version, last_versions
from laion_assets.io.errors import InputError

INTERVAL = 60  # seconds between ticks
SHARDS_PER_TICK = 50
TRAIN_JOB, ENCODE_JOB, PUBLISH_JOB = "train_index_job", "encode_shard_job", "publish_index_job"


def build_jobs(assets: Sequence[dg.AssetsDefinition]) -> list[dg.UnresolvedAssetJobDefinition]:
    """Define a job for each step of a build.

    Args:
        assets: of `index_assets`, in order.

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
    """Return the sensor that builds new embeddings into the index, a step after the other."""

    @dg.sensor(
        name="embedding_files_sensor",
        jobs=jobs,
        minimum_interval_seconds=INTERVAL,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Lists the embeddings, registers their shards as partitions, and runs what the index "
        "lacks: training, shards, then the merge. The column Cursor shows what each tick found.",
    )
    def embedding_files_sensor(
        context: dg.SensorEvaluationContext, index_builder: dg.ResourceParam[IndexBuilder]
    ) -> dg.SensorResult:
        instance, state = context.instance, state_in(context.cursor)
        try:
            build = index_builder.open(context.log.info)
            listed = build.source_version()
            if state.get("listed") != listed:  # uploads take time: wait until two ticks see the same
                return _tick("embeddings are new or still change", {"listed": listed})
            plan = build.plan() if state.get("planned") != listed else build.stored_plan()
            wanted = build.wanted(plan)
        except InputError as error:
            return _tick(sentence(error), state)
        version = Version(embedding_files.key, listed)
        events = () if is_known(instance, version) else version.events()
        names = [shard.name for shard in plan.shards]
        registered = set(instance.get_dynamic_partitions(SHARDS))
        new = [name for name in names if name not in registered]
        requests = list(_requests(instance, plan, wanted))
        report = f"{plan.rows:,} rows in {len(names):,} shards; " + (
            f"{len(requests):,} runs wanted" if requests else "nothing to do"
        )
        return dg.SensorResult(
            run_requests=requests,
            dynamic_partitions_requests=[index_shards.build_add_request(new)] if new else [],
            asset_events=events,
            cursor=as_cursor(report, {"listed": listed, "planned": listed}),
            skip_reason=None if requests else report,
        )

    return embedding_files_sensor


def _requests(instance: dg.DagsterInstance, plan: Plan, wanted: Wanted | None) -> Iterator[dg.RunRequest]:
    """Yield the runs of the next step. Dagster launches none twice for one key: what failed waits.

    Args:
        instance: its history says what is done.
        plan: all shards.
        wanted: what the steps are to be made from; None where the index is not trained.

    """
    if wanted is None:
        first = plan.shards[0].fingerprint if plan.shards else ""
        yield dg.RunRequest(run_key=f"train:{first}", job_name=TRAIN_JOB)
        return
    done = last_versions(instance, dg.AssetKey("index_shards"), dg.DagsterEventType.ASSET_MATERIALIZATION)
    missing = {
        name: made_from for name, made_from in wanted.shards.items() if done.get(name) != made_from
    }
    for name, made_from in list(missing.items())[:SHARDS_PER_TICK]:
        yield dg.RunRequest(run_key=f"{name}:{made_from}", job_name=ENCODE_JOB, partition_key=name)
    if not missing and last_version(instance, dg.AssetKey("laion_index")) != wanted.index:
        yield dg.RunRequest(run_key=f"publish:{wanted.index}", job_name=PUBLISH_JOB)


def _tick(report: str, state: dict[str, str]) -> dg.SensorResult:
    return dg.SensorResult(cursor=as_cursor(report, state), skip_reason=report)
