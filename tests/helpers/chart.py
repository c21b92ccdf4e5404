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
RELEASE = "dagster"
NAMESPACE = "laion"


def run_launcher(**environment: str) -> dict[str, Any]:
    """Configuration of the K8sRunLauncher, which the chart copies; some variables may be others."""
    launcher: dict[str, Any] = VALUES["runLauncher"]["config"]["customRunLauncher"]
    assert (VALUES["runLauncher"]["type"], launcher["class"]) == ("CustomRunLauncher", "K8sRunLauncher")
    config: dict[str, Any] = launcher["config"]
    container = config["run_k8s_config"]["container_config"]
    told = {variable["name"]: variable["value"] for variable in container["env"]} | environment
    env = [{"name": name, "value": value} for name, value in told.items()]
    run_config = config["run_k8s_config"] | {"container_config": container | {"env": env}}
    return config | {"run_k8s_config": run_config}


def deployments() -> dict[str, dict[str, Any]]:
    """The pods of the chart's Deployments, with what the security of a pod depends on."""
    code = VALUES["dagster-user-deployments"]
    parts = {
        "user-deployments": (DEPLOYMENT, code["serviceAccount"]["name"]),
        "dagster-webserver": (VALUES["dagsterWebserver"], VALUES["serviceAccount"]["name"]),
        "dagster-daemon": (VALUES["dagsterDaemon"], VALUES["serviceAccount"]["name"]),
    }
    return {name: _pod(name, part, account) for name, (part, account) in parts.items()}


def _pod(component: str, part: dict[str, Any], account: str) -> dict[str, Any]:
    container = {
        "name": component,
        "image": f"{part['image']['repository']}:{part['image']['tag']}",
        "securityContext": part["securityContext"],
        "resources": part["resources"],
        "volumeMounts": part["volumeMounts"],
    }
    spec: dict[str, Any] = {
        "serviceAccountName": account,
        "securityContext": part["podSecurityContext"],
        "containers": [container],
        "volumes": part["volumes"],
    }
    if component != "user-deployments":
        assert part["checkDbReadyInitContainer"] is False, "it would run the chart's image of PostgreSQL"
        image = VALUES["busybox"]["image"]
        waiting = {"name": "init-user-deployment", "image": f"{image['repository']}:{image['tag']}"}
        spec["initContainers"] = [waiting | {"securityContext": part["securityContext"]}]
    metadata = {"name": component, "namespace": NAMESPACE, "labels": {"component": component}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def instance_config(
    kubeconfig: Path, postgres: dict[str, Any], logs: Path, **environment: str
) -> dict[str, Any]:
    """The dagster.yaml of the chart, with a cluster and a database at hand; logs go to a folder."""
    monitoring = VALUES["dagsterDaemon"]["runMonitoring"]
    concurrency = VALUES["concurrency"]
    sensors = VALUES["dagsterDaemon"]["sensors"]
    return {
        "storage": {"postgres": {"postgres_db": postgres}},
        "scheduler": {"module": "dagster._core.scheduler", "class": "DagsterDaemonScheduler"},
        "run_launcher": {
            "module": "dagster_k8s",
            "class": "K8sRunLauncher",
            "config": run_launcher(**environment)
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
            "runs": {
                "max_concurrent_runs": concurrency["runs"]["maxConcurrentRuns"],
                "tag_concurrency_limits": concurrency["runs"]["tagConcurrencyLimits"],
            },
        },
        "sensors": {"use_threads": sensors["useThreads"], "num_workers": sensors["numWorkers"]},
        "retention": {"sensor": {"purge_after_days": VALUES["retention"]["sensor"]["purgeAfterDays"]}},
        "compute_logs": {
            "module": "dagster._core.storage.local_compute_log_manager",
            "class": "LocalComputeLogManager",
            "config": {"base_dir": str(logs)},
        },
        "telemetry": VALUES["telemetry"],
        **VALUES["additionalInstanceConfig"],
    }
