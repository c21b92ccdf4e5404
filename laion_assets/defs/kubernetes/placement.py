"""Where assets run on a cluster: what their pods ask for, and when a step is worth another try.

Only the executor of `step_pods` reads the op tags; elsewhere they do nothing.
What must not live here: imports of anything of ours, this is a leaf; calls to a cluster.
Dagster's concept: https://docs.dagster.io/deployment/oss/deployment-options/kubernetes
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import dagster as dg

VOLUME = "laion-index"
ASSET_LABEL = "laion-assets/asset"
CLAIM_LABEL = "laion-assets/claim"
SPARSE = os.environ.get("LAION_STAGING") == "sparse"
# Tags of assets, to be seen and searched for in the UI; where a step runs is decided by its op tags.
RUNS_WITH_INDEX = {"laion_assets/runs_on": "node_with_claim" if SPARSE else "nvme_node"}
RUNS_ON_ANY_NODE = {"laion_assets/runs_on": "any_node"}
ANY_NODE_RESOURCES = {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "16Gi"}}


@dataclass(frozen=True)
class NvmeNode:
    """What a step that touches the index asks for. The defaults are GKE's, and those of `k8s/`.

    Attributes:
        label: `key=value` that nodes with local NVMe carry.
        taint: key of the taint that keeps everything else off them.
        claim: the PersistentVolumeClaim on the local volume.
        mount: where it is mounted; the pod's LAION_CACHE_DIR.
        cpu: cores requested; one step that stages and one that searches fit a node of 16.
        memory: requested.
        memory_limit: above this the step is OOM-killed; pages of the index do not count, they give way.
        group: of the user in the image, who gets to write to the volume.
        pending_seconds: how long a pod may wait for a node before its step fails.

    """

    label: str = "cloud.google.com/gke-local-nvme-ssd=true"
    taint: str = "laion-assets/nvme"
    claim: str = "laion-index"
    mount: str = "/mnt/laion"
    cpu: str = "6"
    memory: str = "24Gi"
    memory_limit: str = "48Gi"
    group: str = "1000"
    pending_seconds: str = "1800"

    def __post_init__(self) -> None:
        """Check the form of what Kubernetes or we would trip over much later."""
        if self.label.count("=") != 1:
            raise ValueError(f"LAION_NVME_LABEL is {self.label!r}: write it as key=value")
        for name in ("group", "pending_seconds"):
            if not getattr(self, name).isdecimal():
                raise ValueError(
                    f"LAION_NVME_{name.upper()} is {getattr(self, name)!r}: give a whole number"
                )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> NvmeNode:
        """Take LAION_NVME_LABEL and so on from the environment, and the default for what is not set."""
        variables = {field.name: f"LAION_NVME_{field.name.upper()}" for field in fields(cls)}
        return cls(**{n: environment[v] for n, v in variables.items() if environment.get(v)})


def on_any_node(asset: str) -> dict[str, Any]:
    """Op tags of an asset that needs no index: what it takes to read, combine and write tables."""
    return {
        "dagster-k8s/config": {
            "container_config": {"resources": ANY_NODE_RESOURCES},
            "pod_template_spec_metadata": {"labels": {ASSET_LABEL: asset}},
        }
    }


def with_index(asset: str, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Op tags of an asset that touches the index: a pod with a claim, where LAION_STAGING wants it.

    A full copy is on a node with local NVMe. What sparse staging keeps is small, and any node does.
    """
    node = NvmeNode.from_environment(environment)
    staging = environment.get("LAION_STAGING")
    tags = on_node_with_claim(asset, node) if staging == "sparse" else on_nvme_node(asset, node)
    if not staging:  # a bucket would be read sparse by default, which is not what NVMe is for
        tags["dagster-k8s/config"]["container_config"]["env"].append(
            {"name": "LAION_STAGING", "value": "full"}
        )
    return tags


def on_nvme_node(asset: str, node: NvmeNode) -> dict[str, Any]:
    """Op tags of an asset that touches the index, a full copy.

    All of them mount one claim on a local volume: the scheduler then puts every such pod on the node
    that holds the data, and the index is staged once.
    """
    return _with_claim(
        asset,
        node,
        {
            "node_selector": dict([node.label.split("=")]),
            "tolerations": [{"key": node.taint, "operator": "Exists", "effect": "NoSchedule"}],
        },
    )


def on_node_with_claim(asset: str, node: NvmeNode) -> dict[str, Any]:
    """Op tags of an asset that touches the index, staged sparse.

    A disk that outlives its node follows the pods, but to one node at a time (ReadWriteOnce): where one
    of them runs, the others go.
    """
    together = {
        "label_selector": {"match_labels": {CLAIM_LABEL: node.claim}},
        "topology_key": "kubernetes.io/hostname",
    }
    affinity = {"required_during_scheduling_ignored_during_execution": [together]}
    return _with_claim(asset, node, {"affinity": {"pod_affinity": affinity}})


def _with_claim(asset: str, node: NvmeNode, placement: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dagster-k8s/config": {
            "container_config": {
                "resources": {
                    "requests": {"cpu": node.cpu, "memory": node.memory},
                    "limits": {"memory": node.memory_limit},
                },
                "env": [{"name": "LAION_CACHE_DIR", "value": node.mount}],
                "volume_mounts": [{"name": VOLUME, "mount_path": node.mount}],
                "security_context": {
                    "allow_privilege_escalation": False,
                    "capabilities": {"drop": ["ALL"]},
                },
            },
            "pod_spec_config": {
                **placement,
                "security_context": {
                    "run_as_non_root": True,
                    "fs_group": int(node.group),
                    # The owner of the volume's root says it all: no walk over 2.5 TB at every start.
                    "fs_group_change_policy": "OnRootMismatch",
                },
                "volumes": [{"name": VOLUME, "persistent_volume_claim": {"claim_name": node.claim}}],
            },
            "pod_template_spec_metadata": {
                "labels": {ASSET_LABEL: asset, CLAIM_LABEL: node.claim},
                "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
            },
        }
    }


def is_cluster(environment: Mapping[str, str]) -> bool:
    """Tell whether this process is a pod: Kubernetes sets this variable in all of them."""
    return "KUBERNETES_SERVICE_HOST" in environment


def executor(environment: Mapping[str, str]) -> dg.ExecutorDefinition | None:
    """Return one pod for each step inside a cluster, Dagster's default executor anywhere else."""
    if not is_cluster(environment):
        return None
    # Here, because it takes as long to load as all of Dagster, and each step is a process of its own.
    from laion_assets.defs.kubernetes.step_pods import step_pods

    return step_pods


def retry_policy(environment: Mapping[str, str]) -> dg.RetryPolicy | None:
    """Another try for a step whose pod was evicted or killed; `as_failures` keeps our own errors from it.

    Only in pods: on one machine an interrupt is somebody's Ctrl-C, and Dagster would start over.
    """
    if not is_cluster(environment):
        return None
    return dg.RetryPolicy(max_retries=2, delay=10, backoff=dg.Backoff.EXPONENTIAL)


RETRY_POLICY = retry_policy(os.environ)
