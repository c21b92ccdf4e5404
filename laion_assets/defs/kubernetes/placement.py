"""Where assets run on a cluster: what their pods request, and which steps are retried.

`staged_laion_index`, `knn_urls` and `centroid_urls` run on the NVMe node. The others run on any node, but
`seed_embeddings` on a GPU node if LAION_EMBED_DEVICE is cuda. Each asset chooses with
`Placement.with_index`, `any_node` or `embedding`.

Only the executor of `step_pods` reads the op tags; other executors ignore them.

Dagster's concept: https://docs.dagster.io/deployment/oss/deployment-options/kubernetes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import dagster as dg

from laion_assets.io.errors import InputError

NODE_PREFIX = "LAION_NVME_"
VOLUME = "laion-index"
GPU = "nvidia.com/gpu"  # resource, and key of the taint
ASSET_LABEL = "laion-assets/asset"
CLAIM_LABEL = "laion-assets/claim"
RUNS_ON_TAG = "laion_assets/runs_on"  # only for searching in the UI; op tags decide
BUILDING_RESOURCES = {"requests": {"cpu": "6", "memory": "16Gi"}, "limits": {"memory": "32Gi"}}
ANY_NODE_RESOURCES = {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "16Gi"}}


@dataclass(frozen=True)
class NvmeNode:
    """The resources that a step requests to read the index. The defaults suit GKE and `k8s/`.

    Attributes:
        label: label `key=value` of nodes with local NVMe.
        taint: key of the taint that keeps other pods off these nodes.
        claim: the PersistentVolumeClaim on the local volume.
        mount: mount path of the volume; the pod's LAION_CACHE_DIR.
        cpu: cores requested; a staging step and a searching step fit on a node with 16.
        memory: memory requested.
        memory_limit: memory above which the step is OOM-killed; cached pages of the index do not count.
        group: group of the image's user, which may write to the volume.
        pending_seconds: seconds that a pod may wait for a node before its step fails.

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
        """Check values that would otherwise fail much later.

        Raises:
            InputError: a value is malformed; the message names the variable and what is allowed.

        """
        if self.label.count("=") != 1:
            raise InputError(f"LAION_NVME_LABEL is {self.label!r}: write it as key=value")
        for name in ("group", "pending_seconds"):
            if not getattr(self, name).isdecimal():
                raise InputError(
                    f"{NODE_PREFIX}{name.upper()} is {getattr(self, name)!r}: give a whole number"
                )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> NvmeNode:
        """Read LAION_NVME_LABEL and the other variables from the environment, or take the defaults."""
        return cls(**{n: environment[v] for n, v in cls.variables().items() if environment.get(v)})

    @classmethod
    def variables(cls) -> Mapping[str, str]:
        """Return the environment variable of each field, by field name."""
        return {field.name: f"{NODE_PREFIX}{field.name.upper()}" for field in fields(cls)}


@dataclass(frozen=True)
class Pod:
    """The pod settings in an asset's definition.

    Attributes:
        tags: tags of the asset, for the UI.
        op_tags: tags of the op, for the executor.
        retry_policy: retry policy of the step.

    """

    tags: Mapping[str, str]
    op_tags: Mapping[str, Any]
    retry_policy: dg.RetryPolicy | None


@dataclass(frozen=True)
class Placement:
    """Where assets run, in one environment.

    Attributes:
        node: resources requested by steps that read the index.
        staging: `LAION_STAGING`; empty if unset.
        embed_device: `LAION_EMBED_DEVICE`; empty if unset.
        retry_policy: retry policy of every step; None outside a cluster.

    """

    node: NvmeNode
    staging: str
    embed_device: str
    retry_policy: dg.RetryPolicy | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Placement:
        """Read LAION_NVME_*, LAION_STAGING, and whether this process runs on a cluster."""
        return cls(
            NvmeNode.from_environment(environment),
            environment.get("LAION_STAGING", ""),
            environment.get("LAION_EMBED_DEVICE", ""),
            retry_policy(environment),
        )

    def any_node(self, asset: str) -> Pod:
        """Return the pod of an asset that needs no index."""
        return self._pod("any_node", on_any_node(asset))

    def building(self, asset: str) -> Pod:
        """Return the pod of an asset that builds the index, with many cores on any node."""
        return self._pod("any_node", on_any_node(asset, BUILDING_RESOURCES))

    def embedding(self, asset: str) -> Pod:
        """Return the pod of an asset that embeds images, with a GPU if LAION_EMBED_DEVICE is cuda."""
        gpu = self.embed_device == "cuda"
        return self._pod("gpu_node" if gpu else "any_node", on_any_node(asset, gpu=gpu))

    def with_index(self, asset: str) -> Pod:
        """Return the pod of an asset that reads the index.

        A full copy needs a node with local NVMe. A sparse copy is small, so any node suffices.
        """
        if self.staging == "sparse":
            return self._pod("node_with_claim", on_node_with_claim(asset, self.node))
        # The default would stage a bucket sparse, but NVMe nodes are meant for full copies.
        unless_set = {} if self.staging else {"LAION_STAGING": "full"}
        return self._pod("nvme_node", on_nvme_node(asset, self.node, unless_set))

    def _pod(self, runs_on: str, op_tags: Mapping[str, Any]) -> Pod:
        return Pod({RUNS_ON_TAG: runs_on}, op_tags, self.retry_policy)


def on_any_node(
    asset: str, resources: Mapping[str, Any] = ANY_NODE_RESOURCES, *, gpu: bool = False
) -> dict[str, Any]:
    """Return op tags of an asset that needs no index, with resources to combine and write tables."""
    requests, limits = resources["requests"], resources["limits"]
    tolerations = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}] if gpu else []
    return {
        "dagster-k8s/config": {
            "container_config": {
                "resources": {"requests": requests, "limits": limits | ({GPU: "1"} if gpu else {})}
            },
            "pod_spec_config": {"tolerations": tolerations} if gpu else {},
            "pod_template_spec_metadata": {"labels": {ASSET_LABEL: asset}},
        }
    }


def on_nvme_node(
    asset: str, node: NvmeNode, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return op tags of an asset that reads a full copy of the index.

    All such pods mount one claim on a local volume, so the scheduler puts them on the node that holds the
    data, and the index is staged once.
    """
    return _with_claim(
        asset,
        node,
        {
            "node_selector": dict([node.label.split("=")]),
            "tolerations": [{"key": node.taint, "operator": "Exists", "effect": "NoSchedule"}],
        },
        environment or {},
    )


def on_node_with_claim(asset: str, node: NvmeNode) -> dict[str, Any]:
    """Return op tags of an asset that reads a sparsely staged index.

    A disk that outlives its node follows the pods, but to only one node at a time (ReadWriteOnce), so the
    pods are kept together.
    """
    together = {
        "label_selector": {"match_labels": {CLAIM_LABEL: node.claim}},
        "topology_key": "kubernetes.io/hostname",
    }
    affinity = {"required_during_scheduling_ignored_during_execution": [together]}
    return _with_claim(asset, node, {"affinity": {"pod_affinity": affinity}}, {})


def _with_claim(
    asset: str, node: NvmeNode, placement: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, Any]:
    variables = {"LAION_CACHE_DIR": node.mount, **environment}
    return {
        "dagster-k8s/config": {
            "container_config": {
                "resources": {
                    "requests": {"cpu": node.cpu, "memory": node.memory},
                    "limits": {"memory": node.memory_limit},
                },
                "env": [{"name": name, "value": value} for name, value in variables.items()],
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
                    # Check only the volume's root, instead of walking 2.5 TB at every start.
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
    """Return whether this process runs in a pod, from a variable that Kubernetes sets there."""
    return "KUBERNETES_SERVICE_HOST" in environment


def retry_policy(environment: Mapping[str, str]) -> dg.RetryPolicy | None:
    """Return a policy that retries steps whose pod was evicted or killed; `as_failures` excludes errors.

    It applies only on a cluster: on one machine an interrupt is Ctrl-C, and Dagster would start again.
    """
    if not is_cluster(environment):
        return None
    return dg.RetryPolicy(max_retries=2, delay=10, backoff=dg.Backoff.EXPONENTIAL)
