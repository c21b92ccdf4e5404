"""Imports of Dagster internals, all in this module.

Dagster may move or change internals in any minor release, so pyproject.toml pins the minor version. A
test checks that each exists. After an upgrade, this is the only module to adapt.
"""

from dagster._core.definitions.data_version import DATA_VERSION_TAG, extract_data_version_from_entry
from dagster._core.definitions.executor_definition import multiple_process_executor_requirements
from dagster._core.errors import DagsterHomeNotSetError, DagsterUserCodeUnreachableError
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.events import AssetMaterializationPlannedData, DagsterEvent, RunFailureReason
from dagster._core.execution.plan.objects import StepFailureData, UserFailureData
from dagster._core.executor.step_delegating import (
    CheckStepHealthResult,
    StepDelegatingExecutor,
    StepHandler,
    StepHandlerContext,
)
from dagster._core.instance.utils import RUNLESS_JOB_NAME, RUNLESS_RUN_ID
from dagster._core.launcher.base import CheckRunHealthResult, WorkerStatus
from dagster._core.launcher.default_run_launcher import DefaultRunLauncher
from dagster._core.remote_origin import (
    RegisteredCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.snap import ExecutionPlanSnapshot
from dagster._core.storage.partition_status_cache import AssetPartitionStatus
from dagster._core.storage.tags import (
    AUTO_RETRY_RUN_ID_TAG,
    GRPC_INFO_TAG,
    HIDDEN_TAG_PREFIX,
    MAX_RETRIES_TAG,
    MAX_RUNTIME_SECONDS_TAG,
    PARTITION_NAME_TAG,
    REPOSITORY_LABEL_TAG,
    RUN_KEY_TAG,
    WILL_RETRY_TAG,
)
from dagster._grpc.client import DagsterGrpcClient
from dagster._grpc.types import GetCurrentRunsResult
from dagster._serdes import ConfigurableClassData, deserialize_value
from dagster_shared.error import SerializableErrorInfo

__all__ = [
    "AUTO_RETRY_RUN_ID_TAG",
    "DATA_VERSION_TAG",
    "GRPC_INFO_TAG",
    "HIDDEN_TAG_PREFIX",
    "MAX_RETRIES_TAG",
    "MAX_RUNTIME_SECONDS_TAG",
    "PARTITION_NAME_TAG",
    "REPOSITORY_LABEL_TAG",
    "RUNLESS_JOB_NAME",
    "RUNLESS_RUN_ID",
    "RUN_KEY_TAG",
    "WILL_RETRY_TAG",
    "AssetMaterializationPlannedData",
    "AssetPartitionStatus",
    "CheckRunHealthResult",
    "CheckStepHealthResult",
    "ConfigurableClassData",
    "DagsterEvent",
    "DagsterGrpcClient",
    "DagsterHomeNotSetError",
    "DagsterUserCodeUnreachableError",
    "DefaultRunLauncher",
    "ExecutionPlanSnapshot",
    "GetCurrentRunsResult",
    "PartitionKeyFilter",
    "RegisteredCodeLocationOrigin",
    "RemoteJobOrigin",
    "RemoteRepositoryOrigin",
    "RunFailureReason",
    "SerializableErrorInfo",
    "StepDelegatingExecutor",
    "StepFailureData",
    "StepHandler",
    "StepHandlerContext",
    "UserFailureData",
    "WorkerStatus",
    "deserialize_value",
    "extract_data_version_from_entry",
    "multiple_process_executor_requirements",
]
