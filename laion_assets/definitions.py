"""The code location with all Dagster definitions of this platform.

Dagster's concept: https://docs.dagster.io/guides/build/projects
"""

import os
from collections.abc import Mapping

import dagster as dg

from laion_assets.defs.assets import build_assets, index_assets
from laion_assets.defs.build_sensor import build_embeddings_sensor, build_jobs
from laion_assets.defs.forget import forget_job
from laion_assets.defs.kubernetes.placement import NvmeNode, Placement, is_cluster
from laion_assets.defs.launcher import end_with_parent
from laion_assets.defs.launchpad import prefilled
from laion_assets.defs.old_runs import delete_old_runs_job, weekly
from laion_assets.defs.partitions import JOB
from laion_assets.defs.places import Places
from laion_assets.defs.resources import SeedFolder, resources_from, storage_kind
from laion_assets.defs.retries import build_missed_retries_sensor
from laion_assets.defs.seed_set_states import seed_sets_table
from laion_assets.defs.sensors import build_laion_index_sensor, build_seed_sets_sensor
from laion_assets.defs.settings import Defaults
from laion_assets.defs.sources import SOURCES, embedding_files, laion_index_source, seed_folder
from laion_assets.io.storage import on_this_machine


def build_defs(
    environment: Mapping[str, str] = os.environ,
    loggers: Mapping[str, dg.LoggerDefinition] | None = None,
) -> dg.Definitions:
    """Assemble the code location for an environment.

    Raises:
        InputError: a variable cannot be used or is misspelt.

    """
    places = Places.from_environment(environment)
    placement = Placement.from_environment(environment, places.sparse_budget)
    building = index_assets(placement) if places.embeddings_uri else []
    index = building[-1].key if building else laion_index_source.key
    assets = build_assets(placement, index)
    build = build_jobs(building) if building else []
    job = dg.define_asset_job(
        JOB,
        selection=dg.AssetSelection.assets(*assets),
        config=prefilled(SeedFolder(places.seeds_uri), Defaults.from_environment(environment)),
        description="All assets of one seed set, from the seeds to combined_urls. The staged index is "
        "verified, and restaged if necessary.",
    )
    delete_old_runs = delete_old_runs_job()
    uris = {index: places.index_uri, seed_folder.key: places.seeds_uri}
    if places.embeddings_uri:
        uris[embedding_files.key] = places.embeddings_uri
    sources = [embedding_files if building else laion_index_source, *SOURCES, seed_sets_table]

    def as_shown(spec: dg.AssetSpec) -> dg.AssetSpec:
        owned = spec.merge_attributes(owners=[places.owner])
        if spec.key not in uris:
            return owned
        uri = uris[spec.key]
        return owned.merge_attributes(kinds={storage_kind(uri)}, metadata={"dagster/uri": uri})

    return dg.Definitions(
        assets=dg.map_asset_specs(as_shown, [*sources, *building, *assets]),
        jobs=[job, forget_job(), delete_old_runs, *build],
        schedules=[weekly(delete_old_runs)],
        sensors=[
            build_seed_sets_sensor(
                job, index if building else None, is_on=on_this_machine(places.index_uri)
            ),
            build_embeddings_sensor(build) if build else build_laion_index_sensor(),
            build_missed_retries_sensor(),
        ],
        resources=resources_from(environment),
        executor=_executor(environment),
        loggers=loggers,
    )


def _executor(environment: Mapping[str, str]) -> dg.ExecutorDefinition:
    """Return the executor: a pod per step inside a cluster, one process per run elsewhere.

    Dagster's default, a process per step, imports everything again for each of six steps. The process of
    a run ends with it, and gives its memory back.
    """
    if not is_cluster(environment):
        return dg.in_process_executor
    # Imported only if needed: it takes as long to load as all of Dagster, in the process of each step.
    from laion_assets.defs.kubernetes.step_pods import step_pods

    return step_pods(NvmeNode.from_environment(environment))


@dg.definitions
def defs() -> dg.Definitions:
    """Load the code location for the environment of this process."""
    return build_defs()


end_with_parent()  # the only module of this package that every process of a run loads
