"""The code location: everything Dagster knows of this platform, and nothing else.

Dagster's concept: https://docs.dagster.io/guides/build/projects
"""

import os
from collections.abc import Mapping

import dagster as dg

from laion_assets.defs import resources
from laion_assets.defs.assets import seed_embeddings as seeds
from laion_assets.defs.assets import staged_laion_index as index
from laion_assets.defs.assets import url_sets as urls
from laion_assets.defs.io_manager import tables_in
from laion_assets.defs.kubernetes import placement as kubernetes
from laion_assets.defs.launcher import end_with_parent
from laion_assets.defs.sensors import (
    build_laion_index_sensor,
    build_seed_sets_sensor,
    build_settings_sensor,
)
from laion_assets.defs.settings import RetrievalConfig

JOB = "seed_set_job"
OWNER = "team:image_data"  # whom the UI names for every asset

ASSETS = (
    index.staged_laion_index,
    seeds.seed_embeddings,
    seeds.centroid_vector,
    urls.knn_urls,
    urls.centroid_urls,
    urls.combined_urls,
)


def build_defs(
    environment: Mapping[str, str] = os.environ,
    loggers: Mapping[str, dg.LoggerDefinition] | None = None,
) -> dg.Definitions:
    """Assemble the code location for an environment; tests and the command line bring their own."""
    resources.refuse_misspelt(environment)
    job = dg.define_asset_job(
        JOB,
        selection=dg.AssetSelection.assets(*ASSETS),
        description="Everything for one seed set, from the seeds to combined_urls; "
        "the staged index is checked, and mended if need be.",
    )
    places = {
        index.laion_index_source.key: resources.index_from(environment).index_uri,
        seeds.seed_folder.key: resources.seeds_from(environment).uri,
    }

    def as_shown(spec: dg.AssetSpec) -> dg.AssetSpec:
        owned = spec.merge_attributes(owners=[OWNER])
        if spec.key not in places:
            return owned
        uri = places[spec.key]
        return owned.merge_attributes(kinds={resources.storage_kind(uri)}, metadata={"dagster/uri": uri})

    return dg.Definitions(
        assets=dg.map_asset_specs(as_shown, [index.laion_index_source, seeds.seed_folder, *ASSETS]),
        jobs=[job],
        sensors=[build_seed_sets_sensor(job), build_laion_index_sensor(), build_settings_sensor()],
        resources={
            "laion_index": resources.as_resource(resources.index_from(environment)),
            "seeds": resources.as_resource(resources.seeds_from(environment)),
            "pictures": resources.as_resource(resources.pictures_from(environment)),
            "retrieval_config": RetrievalConfig(),
            "io_manager": tables_in(resources.output_from(environment)),
        },
        executor=kubernetes.executor(environment),
        loggers=loggers,
    )


@dg.definitions
def defs() -> dg.Definitions:
    """What Dagster loads: the code location for this environment."""
    return build_defs()


end_with_parent()  # here, because each process of a run loads this module, and no other code of ours
