"""Forget a seed set: delete its tables, pictures and runs, and its partition.

Dagster's concept: https://docs.dagster.io/guides/build/partitions-and-backfills
"""

from collections.abc import Iterator
from dataclasses import dataclass

import dagster as dg
from pydantic import Field

from laion_assets.defs.announcements import withdraw_failed
from laion_assets.defs.checks import CENTROID, CENTROID_URLS, COMBINED, KNN_URLS
from laion_assets.defs.dagster_internals import PARTITION_NAME_TAG, PartitionKeyFilter
from laion_assets.defs.failures import as_failures
from laion_assets.defs.io_manager import Tables
from laion_assets.defs.partitions import JOB, SEED_SETS
from laion_assets.defs.sources import REMOVED, Version, seed_folder
from laion_assets.defs.terminal import count
from laion_assets.io.errors import InputError
from laion_assets.io.tables import remove

FORGET_JOB, FORGET_STEP = "forget_seed_set", "forget"
ASSETS = ("seed_embeddings", "centroid_vector", "knn_urls", "centroid_urls", "combined_urls")
IN_PROGRESS = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@dataclass(frozen=True)
class Belongings:
    """What is stored of a seed set.

    Attributes:
        seed_set: its name.
        files: locations of its tables, their decoders and pictures.
        runs: ids of its runs.

    """

    seed_set: str
    files: tuple[str, ...]
    runs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{count(len(self.files), 'file')} and {count(len(self.runs), 'run')} of {self.seed_set!r}"


def belongings(instance: dg.DagsterInstance, tables: Tables, seed_set: str) -> Belongings:
    """Find what is stored of a seed set.

    Raises:
        InputError: nothing is, or one of its runs is still in progress.

    """
    runs = [run for run in _runs(instance, seed_set) if is_of_seed_sets(run)]
    if waiting := [run.run_id for run in runs if run.status in IN_PROGRESS]:
        raise InputError(
            f"{count(len(waiting), 'run')} of {seed_set!r} ({waiting[0][:8]}) is queued or running: wait "
            "for its end or terminate it, then try again"
        )
    found = Belongings(
        seed_set,
        tuple(uri for asset in ASSETS for uri in tables.files(asset, seed_set)),
        tuple(run.run_id for run in runs),
    )
    known = instance.get_dynamic_partitions(SEED_SETS)
    if seed_set not in known and not found.files and not found.runs:
        raise InputError(
            f"nothing is stored of {seed_set!r}; the seed sets are {', '.join(sorted(known)) or 'none'}"
        )
    return found


def forget(instance: dg.DagsterInstance, found: Belongings) -> None:
    """Delete what is stored of a seed set, its partition last, so that a killed call can be repeated.

    Its folder is not touched. If the folder is still there or returns, the set starts anew.
    """
    for uri in found.files:
        remove(uri)
    for event in _nothing_left(instance, found.seed_set):
        instance.report_runless_asset_event(event)
    for run in found.runs:
        instance.delete_run(run)
    for asset in ASSETS:  # the cache would still show the partition as materialized, once it returns
        instance.event_log_storage.wipe_asset_cached_status(dg.AssetKey(asset))
    instance.delete_dynamic_partition(SEED_SETS, found.seed_set)


class Forget(dg.Config):
    """What the job is asked to forget."""

    seed_set: str = Field(description="the seed set to forget")


def forget_job() -> dg.JobDefinition:
    """Return the job that forgets the seed set in its configuration."""

    @dg.op(name=FORGET_STEP)
    def forget_seed_set(
        context: dg.OpExecutionContext, config: Forget, tables: dg.ResourceParam[Tables]
    ) -> None:
        """Delete what is stored of a seed set."""
        with as_failures():
            found = belongings(context.instance, tables, config.seed_set)
            for uri in found.files:
                context.log.info(f"deleting {uri}")
            forget(context.instance, found)
            context.log.info(f"deleted {found}, and its partition")

    @dg.job(
        name=FORGET_JOB,
        description="Deletes the tables, pictures, runs and the partition of one seed set, without "
        "asking. Delete its folder first: a folder that is still there is run again.",
    )
    def job() -> None:
        forget_seed_set()

    return job


def _runs(instance: dg.DagsterInstance, seed_set: str) -> list[dg.DagsterRun]:
    return list(instance.get_runs(dg.RunsFilter(tags={PARTITION_NAME_TAG: seed_set})))


def is_of_seed_sets(run: dg.DagsterRun) -> bool:
    """Return whether a run is of a seed set's assets; a shard may have the name of a seed set."""
    chosen = {key.to_user_string() for key in run.asset_selection or ()}
    return run.job_name == JOB or bool(chosen.intersection(ASSETS))


def _nothing_left(
    instance: dg.DagsterInstance, seed_set: str
) -> Iterator[dg.AssetObservation | dg.AssetMaterialization | dg.AssetCheckEvaluation]:
    """Yield events that supersede what the UI and the sensor know of the set."""
    yield from Version(seed_folder.key, REMOVED, seed_set).events()
    for last in _last_evaluations(instance, seed_set):
        yield _passed(last, seed_set, "was forgotten")


def nothing_red(instance: dg.DagsterInstance, seed_set: str) -> Iterator[dg.AssetCheckEvaluation]:
    """Let no asset be red because of a set whose folder was removed.

    Withdraws failed tables, and yields evaluations that supersede failed checks of severity ERROR.
    """
    withdraw_failed(instance, ASSETS, seed_set)
    for last in _last_evaluations(instance, seed_set):
        if not last.passed and last.severity is dg.AssetCheckSeverity.ERROR:
            yield _passed(last, seed_set, "was removed")


def _last_evaluations(instance: dg.DagsterInstance, seed_set: str) -> Iterator[dg.AssetCheckEvaluation]:
    keys = [spec.key for spec in (*CENTROID, *KNN_URLS, *CENTROID_URLS, *COMBINED)]
    found = instance.event_log_storage.get_latest_asset_check_execution_by_key(
        keys, PartitionKeyFilter(key=seed_set)
    )
    return (record.evaluation for record in found.values() if record.evaluation)


def _passed(last: dg.AssetCheckEvaluation, seed_set: str, what: str) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(
        asset_key=last.asset_key,
        check_name=last.check_name,
        passed=True,
        description=f"the seed set {seed_set!r} {what}",
        partition=seed_set,
    )
