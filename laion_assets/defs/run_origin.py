"""Runs of the command line belong to the code location, as those that the UI launches.

Without an origin, Dagster leaves a run out of Overview > Timeline and of the page of its job.
"""

from __future__ import annotations

from typing import Any

import dagster as dg

from laion_assets.defs.dagster_internals import (
    REPOSITORY_LABEL_TAG,
    RegisteredCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)

LOCATION = "laion_assets"
REPOSITORY = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(LOCATION), "__repository__")


def give_origin(instance: dg.DagsterInstance) -> None:
    """Let an instance create runs of the code location.

    `execute_in_process` has no argument for it, but the method that it calls has.
    """
    create = instance.create_run_for_job

    def create_run_for_job(job_def: dg.JobDefinition, **arguments: Any) -> dg.DagsterRun:
        arguments["tags"] = {**arguments["tags"], REPOSITORY_LABEL_TAG: REPOSITORY.get_label()}
        origin = RemoteJobOrigin(REPOSITORY, job_def.name)
        return create(job_def, remote_job_origin=origin, **arguments)

    vars(instance)["create_run_for_job"] = create_run_for_job
