"""Where assets run on a cluster: what their pods request, and which steps are retried.

`staged_laion_index`, `knn_urls` and `centroid_urls` run on NVMe nodes, each of which can hold a copy of
the index. The others run on any node, but `seed_embeddings` on a GPU node if LAION_EMBED_DEVICE is cuda,
and `combined_urls` where LAION_COMBINE_ON says. Each asset chooses with a method of `Placement`.

Only the executor of `step_pods` reads the op tags; other executors ignore them.

Dagster's concept: https://docs.dagster.io/deployment/oss/deployment-options/kubernetes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import dagster as dg

from laion_assets.io.errors import InputError

VOLUME = "laion-index"
GPU = "nvidia.com/gpu"  # resource, and key of the taint
ASSET_LABEL = "laion-assets/asset"
COPY_LABEL = "laion-assets/copy"  # where a pod finds its copy of the index: node, claim or pod
HOSTNAME = "kubernetes.io/hostname"
NODE_VARIABLE = "NODE_NAME"  # set in pods that read the index, from Kubernetes' downward API
STEP_ACCOUNT = "laion-steps"  # Kubernetes service account of step pods, in k8s/accounts.yaml
RUNS_ON_TAG = "laion_assets/runs_on"  # only for searching in the UI; op tags decide
BUILDING_RESOURCES = {"requests": {"cpu": "6", "memory": "16Gi"}, "limits": {"memory": "32Gi"}}
ANY_NODE_RESOURCES = {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "16Gi"}}
STAGING_RESOURCES = {"requests": {"cpu": "2", "memory": "8Gi"}, "limits": {"memory": "16Gi"}}
SMALL_FILES = 10 * 10**9  # bytes beside the sparse budget: files that are copied in full, and page maps


@dataclass(frozen=True)
class PodSettings:
    """Settings of pods, each with an environment variable."""

    prefix: ClassVar[str]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the variables that are set in the environment, and take the defaults of the others.

        Raises:
            InputError: a value cannot be used; the message names the variable and what is allowed.

        """
        return cls(**{n: environment[v] for n, v in cls.variables().items() if environment.get(v)})

    @classmethod
    def variables(cls) -> Mapping[str, str]:
        """Return the environment variable of each field, by field name."""
        return {field.name: f"{cls.prefix}{field.name.upper()}" for field in fields(cls)}


@dataclass(frozen=True)
class NvmeNode(PodSettings):
    """The resources that a step requests to read the index. The defaults suit GKE and `k8s/`.

    Attributes:
        label: label `key=value` of nodes with local NVMe.
        taint: key of the taint that keeps other pods off these nodes.
        folder: folder of the index on each node, which `k8s/disks.yaml` makes.
        claim: a PersistentVolumeClaim in place of the folder; all steps then share one node.
        mount: mount path of the folder or claim; the pod's LAION_CACHE_DIR.
        cpu: cores requested by a search; more than half a node's, so that each node runs one search.
        memory: memory requested by a search.
        memory_limit: memory above which a search is OOM-killed; cached pages of the index do not count.
        group: group of the image's user, which may write to the folder or claim.
        pending_seconds: seconds that a pod may wait for a node before its step fails.

    """

    prefix: ClassVar[str] = "LAION_NVME_"

    label: str = "laion-assets/nvme=true"
    taint: str = "laion-assets/nvme"
    folder: str = "/mnt/disks/raid/0/laion"
    claim: str = ""
    mount: str = "/mnt/laion"
    cpu: str = "8"
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
        if not self.folder.startswith("/") or ".." in self.folder.split("/"):
            raise InputError(f"LAION_NVME_FOLDER is {self.folder!r}: give an absolute path without ..")
        for name in ("group", "pending_seconds"):
            if not getattr(self, name).isdecimal():
                variable = self.variables()[name]
                raise InputError(f"{variable} is {getattr(self, name)!r}: give a whole number")

    @property
    def searching(self) -> Mapping[str, Mapping[str, str]]:
        """The resources of a search."""
        return _resources(self.cpu, self.memory, self.memory_limit)

    @property
    def tolerations(self) -> list[dict[str, str]]:
        """What lets a pod run on these nodes."""
        return [{"key": self.taint, "operator": "Exists", "effect": "NoSchedule"}]


@dataclass(frozen=True)
class CombiningPod(PodSettings):
    """The resources that `combined_urls` requests. The defaults suit some million images.

    Attributes:
        on: `any_node`; or `nvme_node`, whose large disk then holds the intermediate files.
        cpu: cores requested; it uses all that are idle.
        memory: memory requested.
        memory_limit: memory above which it is OOM-killed.

    """

    prefix: ClassVar[str] = "LAION_COMBINE_"

    on: str = "any_node"
    cpu: str = "1"
    memory: str = "4Gi"
    memory_limit: str = "16Gi"

    def __post_init__(self) -> None:
        """Check the choice.

        Raises:
            InputError: there is no such choice.

        """
        if self.on not in ("any_node", "nvme_node"):
            raise InputError(f"LAION_COMBINE_ON is {self.on!r}: choose any_node or nvme_node")

    @property
    def resources(self) -> Mapping[str, Mapping[str, str]]:
        """The resources of the pod."""
        return _resources(self.cpu, self.memory, self.memory_limit)


def _resources(cpu: str, memory: str, memory_limit: str) -> Mapping[str, Mapping[str, str]]:
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": memory_limit}}


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
        combine: resources requested by the step that combines.
        staging_mode: `LAION_STAGING`; empty if unset.
        sparse_budget: bytes that sparse staging may use.
        embed_device: `LAION_EMBED_DEVICE`; empty if unset.
        retry_policy: retry policy of every step; None outside a cluster.

    """

    node: NvmeNode
    combine: CombiningPod
    staging_mode: str
    sparse_budget: int
    embed_device: str
    retry_policy: dg.RetryPolicy | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], sparse_budget: int) -> Placement:
        """Read LAION_NVME_*, LAION_COMBINE_*, LAION_STAGING, and whether this process runs on a cluster.

        Raises:
            InputError: a variable cannot be used on a cluster.

        """
        node = NvmeNode.from_environment(environment)
        if is_cluster(environment) and environment.get("LAION_LOST_INDEX") == "fail" and not node.claim:
            raise InputError(
                "LAION_LOST_INDEX is 'fail', but steps on a cluster must be able to stage the index on "
                "an empty node: remove it, or keep one copy on a volume with LAION_NVME_CLAIM"
            )
        return cls(
            node,
            CombiningPod.from_environment(environment),
            environment.get("LAION_STAGING", ""),
            sparse_budget,
            environment.get("LAION_EMBED_DEVICE", ""),
            retry_policy(environment),
        )

    def any_node(self, asset: str) -> Pod:
        """Return the pod of an asset that needs no index."""
        return self._pod("any_node", on_any_node(asset))

    def combining(self, asset: str) -> Pod:
        """Return the pod of an asset that combines tables; NVMe nodes hold its intermediate files."""
        if self.combine.on == "any_node":
            return self._pod("any_node", on_any_node(asset, self.combine.resources))
        return self._on_nvme(asset, self.combine.resources, {"TMPDIR": self.node.mount})

    def building(self, asset: str) -> Pod:
        """Return the pod of an asset that builds the index, with many cores on any node."""
        return self._pod("any_node", on_any_node(asset, BUILDING_RESOURCES))

    def embedding(self, asset: str) -> Pod:
        """Return the pod of an asset that embeds images, with a GPU if LAION_EMBED_DEVICE is cuda."""
        gpu = self.embed_device == "cuda"
        return self._pod("gpu_node" if gpu else "any_node", on_any_node(asset, gpu=gpu))

    def staging(self, asset: str) -> Pod:
        """Return the pod of an asset that stages the index; it fits on a node beside a search."""
        return self._with_copy(asset, STAGING_RESOURCES)

    def with_index(self, asset: str) -> Pod:
        """Return the pod of an asset that searches the index."""
        return self._with_copy(asset, self.node.searching)

    def _with_copy(self, asset: str, resources: Mapping[str, Any]) -> Pod:
        """Place a pod where its copy of the index is or can be.

        A full copy needs a node with local NVMe. A sparse copy is small, so any node suffices. With a
        claim, the volume decides.
        """
        # The default would stage a bucket sparse, but NVMe nodes and claims are meant for full copies.
        mode = {} if self.staging_mode else {"LAION_STAGING": "full"}
        if self.staging_mode == "sparse" and not self.node.claim:
            room = self.sparse_budget + SMALL_FILES
            return self._pod("any_node", with_sparse_copy(asset, self.node, resources, room))
        return self._on_nvme(asset, resources, mode)

    def _on_nvme(self, asset: str, resources: Mapping[str, Any], environment: Mapping[str, str]) -> Pod:
        if self.node.claim:
            config = on_node_with_claim(asset, self.node, resources, environment)
            return self._pod("node_with_claim", config)
        return self._pod("nvme_node", on_nvme_node(asset, self.node, resources, environment))

    def _pod(self, runs_on: str, op_tags: Mapping[str, Any]) -> Pod:
        return Pod({RUNS_ON_TAG: runs_on}, op_tags, self.retry_policy)


def on_any_node(
    asset: str, resources: Mapping[str, Any] = ANY_NODE_RESOURCES, *, gpu: bool = False
) -> dict[str, Any]:
    """Return op tags of an asset that needs no index, with resources to combine and write tables."""
    requests, limits = resources["requests"], resources["limits"]
    tolerations = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}] if gpu else []
    return _op_tags(
        {"resources": {"requests": requests, "limits": limits | ({GPU: "1"} if gpu else {})}},
        {"tolerations": tolerations} if gpu else {},
        {ASSET_LABEL: asset},
    )


def on_nvme_node(
    asset: str,
    node: NvmeNode,
    resources: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return op tags of an asset that reads the full copy on its node.

    The copy is a folder on the node's own disk, so every NVMe node can have one. Pods prefer a node that
    has one, which `step_pods` adds when it starts them, and then a node without other such pods.
    """
    apart = {
        "weight": 1,
        "pod_affinity_term": {
            "label_selector": {"match_labels": {COPY_LABEL: "node"}},
            "topology_key": HOSTNAME,
        },
    }
    return _with_volume(
        asset,
        node,
        resources,
        # Directory: the pod waits until the disks are prepared, instead of filling the boot disk.
        {"host_path": {"path": node.folder, "type": "Directory"}},
        {
            "node_selector": dict([node.label.split("=")]),
            "tolerations": node.tolerations,
            "affinity": {
                "pod_anti_affinity": {"preferred_during_scheduling_ignored_during_execution": [apart]}
            },
        },
        "node",
        environment or {},
    )


def on_node_with_claim(
    asset: str,
    node: NvmeNode,
    resources: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return op tags of an asset that reads the copy on a claim.

    The volume can be used from only one node at a time (ReadWriteOnce), so the pods are kept together.
    """
    together = {
        "label_selector": {"match_labels": {COPY_LABEL: "claim"}},
        "topology_key": HOSTNAME,
    }
    affinity = {"required_during_scheduling_ignored_during_execution": [together]}
    return _with_volume(
        asset,
        node,
        resources,
        {"persistent_volume_claim": {"claim_name": node.claim}},
        {"tolerations": node.tolerations, "affinity": {"pod_affinity": affinity}},
        "claim",
        environment or {},
    )


def with_sparse_copy(
    asset: str, node: NvmeNode, resources: Mapping[str, Any], room: int
) -> dict[str, Any]:
    """Return op tags of an asset that reads a sparse copy of its own, on the disk of any node.

    Args:
        asset: name of the asset.
        node: settings of the pod; label and taint do not apply.
        resources: cores and memory.
        room: bytes of the node's disk.

    """
    disk = {"ephemeral-storage": str(room)}
    more = {name: given | disk for name, given in resources.items()}
    return _with_volume(asset, node, more, {"empty_dir": {"size_limit": str(room)}}, {}, "pod", {})


def _with_volume(
    asset: str,
    node: NvmeNode,
    resources: Mapping[str, Any],
    source: Mapping[str, Any],
    placement: Mapping[str, Any],
    copy: str,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    variables = {"LAION_CACHE_DIR": node.mount, **environment}
    env: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in variables.items()]
    env.append({"name": NODE_VARIABLE, "value_from": {"field_ref": {"field_path": "spec.nodeName"}}})
    return _op_tags(
        {
            "resources": resources,
            "env": env,
            "volume_mounts": [{"name": VOLUME, "mount_path": node.mount}],
        },
        {
            **placement,
            "security_context": {
                "fs_group": int(node.group),
                # Check only the volume's root, instead of walking 2.5 TB at every start.
                "fs_group_change_policy": "OnRootMismatch",
            },
            "volumes": [{"name": VOLUME, **source}],
        },
        {ASSET_LABEL: asset, COPY_LABEL: copy},
        {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
    )


def _op_tags(
    container: Mapping[str, Any],
    pod: Mapping[str, Any],
    labels: Mapping[str, str],
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the tag that dagster-k8s reads; steps get an account of their own, and no token for it."""
    account = {"service_account_name": STEP_ACCOUNT, "automount_service_account_token": False}
    about = {"annotations": dict(annotations)} if annotations else {}
    return {
        "dagster-k8s/config": {
            "container_config": dict(container),
            "pod_spec_config": {**account, **pod},
            "pod_template_spec_metadata": {"labels": dict(labels), **about},
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
