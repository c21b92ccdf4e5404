"""Where assets run: op tags that ask for a node with local NVMe, and the choice of the executor.

Only `k8s_job_executor` reads these tags; elsewhere they do nothing. What must not live here: imports of
anything of ours, this is a leaf.
Dagster's concept: https://docs.dagster.io/deployment/oss/deployment-options/kubernetes
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

CACHE_MOUNT = "/mnt/laion"
CACHE_CLAIM = "laion-index"
NVME_NODE_LABEL = {"cloud.google.com/gke-local-nvme-ssd": "true"}
NVME_TAINT = "laion-assets/nvme"

# One claim on a local volume, mounted by all three assets that touch the index: the scheduler then puts
# every such pod on the node that holds the data, and the index is staged once.
NVME_OP_TAGS: Mapping[str, Any] = {
    "dagster-k8s/config": {
        "container_config": {
            "resources": {
                "requests": {"cpu": "8", "memory": "24Gi"},
                "limits": {"memory": "48Gi"},
            },
            "volume_mounts": [{"name": "laion-index", "mount_path": CACHE_MOUNT}],
        },
        "pod_spec_config": {
            "node_selector": NVME_NODE_LABEL,
            "tolerations": [{"key": NVME_TAINT, "operator": "Exists", "effect": "NoSchedule"}],
            "security_context": {"run_as_non_root": True, "fs_group": 1000},
            "volumes": [
                {
                    "name": "laion-index",
                    "persistent_volume_claim": {"claim_name": CACHE_CLAIM},
                }
            ],
        },
        "pod_template_spec_metadata": {
            "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
        },
    }
}


def executor(environment: Mapping[str, str]) -> dg.ExecutorDefinition | None:
    """Return one pod for each step inside a cluster, Dagster's default executor anywhere else."""
    if "KUBERNETES_SERVICE_HOST" not in environment:
        return None
    # Here, because it takes as long to load as all of Dagster, and each step is a process of its own.
    from dagster_k8s import k8s_job_executor

    return k8s_job_executor
