"""The stand-in for a cluster follows the rules on which the other tests rely."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes
import pytest
import yaml
from helpers.cluster import Cluster, running_cluster, wait_until
from helpers.project import REPOSITORY
from kubernetes.client import ApiException, BatchV1Api, CoreV1Api

from laion_assets.defs.kubernetes.claim import renew, what_is_wrong
from laion_assets.defs.kubernetes.placement import NvmeNode, on_nvme_node
from laion_assets.defs.kubernetes.step_pods import why_it_cannot_start

CLAIM = yaml.safe_load((REPOSITORY / "k8s" / "claim.yaml").read_text())


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path) as cluster:
        kubernetes.config.load_kube_config(str(cluster.kubeconfig))
        yield cluster


@pytest.fixture
def core(cluster: Cluster) -> CoreV1Api:
    cluster.create("persistentvolumeclaims", "laion", CLAIM)
    return CoreV1Api()


def job(name: str, *command: str, **wanted: Any) -> dict[str, Any]:
    """A job that requests the node with the index, like a step."""
    tags = on_nvme_node("knn_urls", NvmeNode(**wanted))["dagster-k8s/config"]
    claim = {"name": "laion-index", "persistentVolumeClaim": {"claimName": "laion-index"}}
    container = {
        "name": "dagster",
        "image": "any",
        "args": list(command),
        "resources": tags["container_config"]["resources"],
        "volumeMounts": [{"name": "laion-index", "mountPath": "/mnt/laion"}],
    }
    pod = {
        "restartPolicy": "Never",
        "containers": [container],
        "nodeSelector": tags["pod_spec_config"]["node_selector"],
        "tolerations": tags["pod_spec_config"]["tolerations"],
        "volumes": [claim],
    }
    return {"metadata": {"name": name}, "spec": {"backoffLimit": 0, "template": {"spec": pod}}}


def pod_of(core: CoreV1Api, job: str, phase: str) -> Any:
    def found() -> Any:
        pods = core.list_namespaced_pod("laion", label_selector=f"job-name={job}").items
        return pods and pods[0].status.phase == phase and pods[0].status.conditions and pods[0]

    return wait_until(found, f"the pod of {job} is {phase}", 20)


def test_a_job_with_a_typo_is_refused(cluster: Cluster):
    wrong = job("typo", "true")
    wrong["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(ApiException) as refused:
        BatchV1Api().create_namespaced_job("laion", wrong)
    assert refused.value.status == 422
    assert not cluster.of("jobs")


def test_a_command_runs_with_the_disk_of_its_node_where_it_is_mounted(cluster: Cluster, core: CoreV1Api):
    cluster.add_node("nvme-1", nvme=True)
    BatchV1Api().create_namespaced_job("laion", job("touch", "ls", "/mnt/laion"))
    pod = pod_of(core, "touch", "Succeeded")
    assert pod.spec.node_name == "nvme-1"
    assert what_is_wrong(core, "laion", "laion-index") is None


def test_a_pod_that_fits_nowhere_waits_and_says_why(cluster: Cluster, core: CoreV1Api):
    cluster.add_node("any", nvme=False)
    cluster.add_node("nvme-1", nvme=True)
    BatchV1Api().create_namespaced_job("laion", job("large", "true", cpu="17"))
    pod = pod_of(core, "large", "Pending")
    told = why_it_cannot_start(core, NvmeNode(), "knn_urls", pod)
    for fact in (
        "knn_urls cannot start",
        "Pending for 1800 s",
        "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match",
        "LAION_NVME_PENDING_SECONDS",
    ):
        assert fact in told


def test_a_claim_stays_on_its_node_while_the_node_lives(cluster: Cluster, core: CoreV1Api):
    cluster.add_node("nvme-1", nvme=True)
    cluster.add_node("nvme-2", nvme=True)
    BatchV1Api().create_namespaced_job("laion", job("first", "sleep", "60", cpu="16"))
    assert pod_of(core, "first", "Running").spec.node_name == "nvme-1"
    BatchV1Api().create_namespaced_job("laion", job("second", "true"))
    waiting = pod_of(core, "second", "Pending")
    assert "1 Insufficient cpu, 1 node(s) had volume node affinity conflict" in (
        why_it_cannot_start(core, NvmeNode(), "second", waiting)
    )
    assert "laion-index is usable" in renew(core, "laion", CLAIM)


def test_a_claim_on_a_node_that_is_gone_is_made_anew(cluster: Cluster, core: CoreV1Api):
    cluster.add_node("nvme-1", nvme=True)
    BatchV1Api().create_namespaced_job("laion", job("first", "true"))
    pod_of(core, "first", "Succeeded")
    cluster.remove_node("nvme-1")
    told = what_is_wrong(core, "laion", "laion-index") or ""
    for fact in ("laion-index", "local-nvme-1", "node nvme-1, which is gone"):
        assert fact in told
    cluster.delete("persistentvolumes", "local-nvme-1")
    wait_until(lambda: not cluster.of("persistentvolumes"), "the volume is gone")
    told = what_is_wrong(core, "laion", "laion-index") or ""
    assert "volume local-nvme-1, which is gone" in told
    assert renew(core, "laion", CLAIM) == f"{told}: the claim laion-index was recreated"
    assert what_is_wrong(core, "laion", "laion-index") is None


def test_a_claim_that_was_deleted_is_made_anew(cluster: Cluster, core: CoreV1Api):
    cluster.delete("persistentvolumeclaims", "laion-index")
    wait_until(lambda: not cluster.of("persistentvolumeclaims"), "the claim is gone")
    told = renew(core, "laion", CLAIM)
    for fact in ("laion-index does not exist", "was recreated"):
        assert fact in told
