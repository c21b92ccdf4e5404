"""The stand-in for a cluster follows the rules on which the other tests rely."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes
import pytest
from dagster_k8s.models import k8s_model_from_dict
from helpers.cluster import Cluster, running_cluster, wait_until
from kubernetes.client import ApiClient, ApiException, BatchV1Api, CoreV1Api, V1PodSpec

from laion_assets.defs.kubernetes.placement import COPY_LABEL, NvmeNode, on_nvme_node
from laion_assets.defs.kubernetes.step_pods import prefer_nodes, why_it_cannot_start


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path) as cluster:
        kubernetes.config.load_kube_config(str(cluster.kubeconfig))
        yield cluster


def job(name: str, *command: str, nodes: tuple[str, ...] = (), **wanted: Any) -> dict[str, Any]:
    """A job that requests an NVMe node, like a step; it may prefer some."""
    node = NvmeNode(**wanted)
    op_tags = on_nvme_node("knn_urls", node, node.searching)
    tags = prefer_nodes({key: json.dumps(value) for key, value in op_tags.items()}, nodes)
    config = json.loads(tags["dagster-k8s/config"])
    spec = k8s_model_from_dict(
        V1PodSpec,
        config["pod_spec_config"]
        | {"restart_policy": "Never"}
        | {"containers": [config["container_config"] | {"name": "dagster", "image": "any"}]},
    )
    pod = ApiClient().sanitize_for_serialization(spec)
    pod["containers"][0]["args"] = list(command)
    pod["securityContext"]["runAsNonRoot"] = True
    template = {"metadata": {"labels": {COPY_LABEL: "node"}}, "spec": pod}
    return {"metadata": {"name": name}, "spec": {"backoffLimit": 0, "template": template}}


def submit(made: dict[str, Any]) -> None:
    BatchV1Api().create_namespaced_job("laion", made)


def pod_of(job: str, phase: str) -> Any:
    def found() -> Any:
        pods = CoreV1Api().list_namespaced_pod("laion", label_selector=f"job-name={job}").items
        return pods and pods[0].status.phase == phase and pods[0].status.conditions and pods[0]

    return wait_until(found, f"the pod of {job} is {phase}", 20)


def test_a_job_with_a_typo_is_refused(cluster: Cluster):
    wrong = job("typo", "true")
    wrong["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(ApiException) as refused:
        submit(wrong)
    assert refused.value.status == 422
    assert not cluster.of("jobs")


@pytest.mark.usefixtures("cluster")
def test_a_label_or_a_selector_that_is_none_is_refused():
    wrong = job("label", "true")
    wrong["spec"]["template"]["metadata"]["labels"]["dagster/op"] = "search[1]"
    with pytest.raises(ApiException) as refused:
        submit(wrong)
    assert refused.value.status == 422
    with pytest.raises(ApiException) as refused:
        CoreV1Api().list_namespaced_pod("laion", label_selector="dagster/op=search[1]")
    assert refused.value.status == 400


def test_a_command_runs_with_the_folder_of_its_node_where_it_is_mounted(cluster: Cluster):
    cluster.add_node("nvme-1", nvme=True)
    submit(job("touch", "touch", "/mnt/laion"))
    pod = pod_of("touch", "Succeeded")
    assert pod.spec.node_name == "nvme-1"
    assert cluster.disk("nvme-1").is_dir()


def test_a_pod_waits_until_the_disks_of_its_node_are_prepared(cluster: Cluster):
    cluster.add_node("nvme-1", nvme=True)
    cluster.disk("nvme-1").rmdir()
    submit(job("early", "true"))
    waiting = pod_of("early", "Pending")
    wait_until(lambda: pod_of("early", "Pending").status.container_statuses, "the kubelet says why")
    waiting = pod_of("early", "Pending")
    told = why_it_cannot_start(NvmeNode(), "knn_urls", waiting)
    assert f"ContainerCreating {NvmeNode().folder} is not a directory" in told
    cluster.disk("nvme-1").mkdir()
    pod_of("early", "Succeeded")


def test_a_pod_that_fits_nowhere_waits_and_says_why(cluster: Cluster):
    cluster.add_node("any", nvme=False)
    cluster.add_node("nvme-1", nvme=True)
    submit(job("large", "true", cpu="17"))
    told = why_it_cannot_start(NvmeNode(), "knn_urls", pod_of("large", "Pending"))
    for fact in (
        "knn_urls cannot start",
        "Pending for 1800 s",
        "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match",
        "LAION_NVME_PENDING_SECONDS",
    ):
        assert fact in told


def test_a_node_with_a_copy_is_preferred_and_any_other_is_next(cluster: Cluster):
    for name in ("nvme-1", "nvme-2", "nvme-3"):
        cluster.add_node(name, nvme=True)
    submit(job("first", "sleep", "60", nodes=("gone", "nvme-2")))
    assert pod_of("first", "Running").spec.node_name == "nvme-2"
    submit(job("second", "sleep", "60", nodes=("gone", "nvme-2")))
    assert pod_of("second", "Running").spec.node_name in ("nvme-1", "nvme-3")


def test_pods_without_a_copy_to_go_to_spread(cluster: Cluster):
    for name in ("nvme-1", "nvme-2"):
        cluster.add_node(name, nvme=True)
    for number in ("1", "2"):
        submit(job(number, "sleep", "60", cpu="2"))
    assert {pod_of(number, "Running").spec.node_name for number in "12"} == {"nvme-1", "nvme-2"}


def test_required_affinity_and_taints_decide_before_preferences(cluster: Cluster):
    for name in ("nvme-1", "nvme-2"):
        cluster.add_node(name, nvme=True)
    term = {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": {COPY_LABEL: "node"}},
    }
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    on_the_second = {"key": "kubernetes.io/hostname", "operator": "In", "values": ["nvme-2"]}
    affinities = {
        "there": {
            "nodeAffinity": {required: {"nodeSelectorTerms": [{"matchExpressions": [on_the_second]}]}}
        },
        "together": {"podAffinity": {required: [term]}},
        "apart": {"podAntiAffinity": {required: [term]}},
        "nowhere": {"podAntiAffinity": {required: [term]}},
    }
    for name, affinity in affinities.items():
        made = job(name, "sleep", "60", nodes=("nvme-1",), cpu="2")
        made["spec"]["template"]["spec"]["affinity"] |= affinity
        submit(made)
        pod_of(name, "Pending" if name == "nowhere" else "Running")
    nodes = [pod_of(name, "Running").spec.node_name for name in ("there", "together", "apart")]
    assert nodes == ["nvme-2", "nvme-2", "nvme-1"]
    assert (
        "2 node(s) didn't match pod anti-affinity rules"
        in pod_of("nowhere", "Pending").status.conditions[0].message
    )
    unwilling = job("unwilling", "true")
    del unwilling["spec"]["template"]["spec"]["tolerations"]
    submit(unwilling)
    assert (
        "2 node(s) had untolerated taint" in pod_of("unwilling", "Pending").status.conditions[0].message
    )


def test_a_pool_grows_from_zero_only_for_pods_that_fit_its_nodes(cluster: Cluster):
    cluster.add_node("any", nvme=False)
    cluster.pool_size = 2
    submit(job("large", "true", cpu="17"))
    pod_of("large", "Pending")
    submit(job("fits", "true"))
    assert pod_of("fits", "Succeeded").spec.node_name == "pool-1"
    assert cluster.nodes() == ["any", "pool-1"]


def test_a_pod_above_its_memory_limit_is_killed(cluster: Cluster):
    cluster.add_node("nvme-1", nvme=True)
    submit(
        job(
            "greedy",
            "python",
            "-c",
            "import time; x = b'1' * 200_000_000; time.sleep(60)",
            memory_limit="100Mi",
        )
    )
    (status,) = pod_of("greedy", "Failed").status.container_statuses
    assert (status.state.terminated.reason, status.state.terminated.exit_code) == ("OOMKilled", 137)
