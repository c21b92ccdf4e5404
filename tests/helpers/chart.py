"""The official chart's output for k8s/values.yaml, limited to pods and Dagster's instance.

The chart's templates are not at hand here; this says in Python what they do with the values we set.
"""

from pathlib import Path
from typing import Any

import yaml
from helpers.project import REPOSITORY

VALUES: dict[str, Any] = yaml.safe_load((REPOSITORY / "k8s" / "values.yaml").read_text())
(DEPLOYMENT,) = VALUES["dagster-user-deployments"]["deployments"]
IMAGE = f"{DEPLOYMENT['image']['repository']}:{DEPLOYMENT['image']['tag']}"
DAGSTER_HOME = "/opt/dagster/dagster_home"  # the chart's default


def container_context(**environment: str) -> dict[str, Any]:
    """What the code location tells of the pods that run its code; some variables may be others."""
    told = {variable["name"]: variable["value"] for variable in DEPLOYMENT["env"]} | environment
    return {
        "k8s": {
            "image_pull_policy": DEPLOYMENT["image"]["pullPolicy"],
            "env": [{"name": name, "value": value} for name, value in told.items()],
            "resources": DEPLOYMENT["resources"],
        }
    }


def run_launcher() -> dict[str, Any]:
    """Configuration of the K8sRunLauncher."""
    launcher = VALUES["runLauncher"]["config"]["k8sRunLauncher"]
    snake = {
        "containerConfig": "container_config",
        "podSpecConfig": "pod_spec_config",
        "jobSpecConfig": "job_spec_config",
    }
    return {
        "job_namespace": "laion",
        "service_account_name": VALUES["global"]["serviceAccountName"],
        "instance_config_map": "dagster-instance",
        "dagster_home": DAGSTER_HOME,
        "postgres_password_secret": VALUES["global"]["postgresqlSecretName"],
        "image_pull_policy": launcher["imagePullPolicy"],
        "run_k8s_config": {snake[key]: value for key, value in launcher["runK8sConfig"].items()},
    }


def instance_config(kubeconfig: Path, postgres: dict[str, Any], logs: Path) -> dict[str, Any]:
    """The dagster.yaml of the chart, with a cluster and a database at hand; logs go to a folder."""
    monitoring = VALUES["dagsterDaemon"]["runMonitoring"]
    concurrency = VALUES["concurrency"]
    return {
        "storage": {"postgres": {"postgres_db": postgres}},
        "run_launcher": {
            "module": "dagster_k8s",
            "class": "K8sRunLauncher",
            "config": run_launcher()
            | {"load_incluster_config": False, "kubeconfig_file": str(kubeconfig)},
        },
        "run_coordinator": {
            "module": "dagster._core.run_coordinator",
            "class": VALUES["dagsterDaemon"]["runCoordinator"]["type"],
        },
        "run_monitoring": {
            "enabled": monitoring["enabled"],
            "start_timeout_seconds": monitoring["startTimeoutSeconds"],
            "cancel_timeout_seconds": monitoring["cancelTimeoutSeconds"],
            "max_resume_run_attempts": monitoring["maxResumeRunAttempts"],
            "poll_interval_seconds": monitoring["pollIntervalSeconds"],
            "free_slots_after_run_end_seconds": monitoring["freeSlotsAfterRunEndSeconds"],
        },
        "concurrency": {
            "pools": {
                "default_limit": concurrency["pools"]["defaultLimit"],
                "granularity": concurrency["pools"]["granularity"],
            },
            "runs": {"max_concurrent_runs": concurrency["runs"]["maxConcurrentRuns"]},
        },
        "compute_logs": {
            "module": "dagster._core.storage.local_compute_log_manager",
            "class": "LocalComputeLogManager",
            "config": {"base_dir": str(logs)},
        },
        "telemetry": VALUES["telemetry"],
        "nux": {"enabled": False},
        **VALUES["additionalInstanceConfig"],
    }
