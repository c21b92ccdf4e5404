"""What reaches a cluster: every pod of ours as dagster-k8s makes it, and every file of k8s/.

The pods are made by dagster-k8s's own functions and checked against Kubernetes' strict schemas, then
compared with a snapshot: `UPDATE_SNAPSHOTS=1 make test` writes it anew.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import kubernetes
import kubernetes_validate
import pytest
from conftest import Demo, failures, new_project
from dagster_k8s import K8sRunLauncher, construct_dagster_k8s_job
from dagster_k8s.container_context import K8sContainerContext
from dagster_k8s.job import get_user_defined_k8s_config

from laion_assets import kubernetes as placement
from laion_assets.definitions import ASSETS, build_defs
from laion_assets.kubernetes import NvmeNode, on_nvme_node, retry_policy
from laion_assets.step_pods import executor

ON_NVME = {"staged_laion_index", "knn_urls", "centroid_urls"}
SNAPSHOT = Path(__file__).with_name("step_pods.json")
KUBERNETES = "1.34"


def validate(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def step_pod(asset: dg.AssetsDefinition) -> dict[str, Any]:
    """The Job of a step, merged over the launcher's as `k8s_job_executor` does."""
    launcher = K8sRunLauncher(
        service_account_name="laion-assets",
        instance_config_map="dagster-instance",
        dagster_home="/opt/dagster/dagster_home",
        job_image="laion-assets:1",
        load_incluster_config=False,
        k8s_client_batch_api=object(),
        k8s_client_core_api=object(),
    )
    context = K8sContainerContext.create_for_run(
        dg.DagsterRun(job_name="seed_set_job"), launcher, include_run_tags=False
    ).merge(K8sContainerContext(run_k8s_config=get_user_defined_k8s_config(asset.op.tags)))
    job = construct_dagster_k8s_job(
        context.get_k8s_job_config("laion-assets:1", launcher),
        args=["dagster", "api", "execute_step"],
        job_name=f"dagster-step-{asset.key.path[-1].replace('_', '-')}",
        user_defined_k8s_config=context.run_k8s_config,
        component="step_worker",
    )
    made: dict[str, Any] = kubernetes.client.ApiClient().sanitize_for_serialization(job)
    return made


@pytest.fixture(scope="module")
def step_pods() -> dict[str, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes.config, "load_kube_config", lambda *_, **__: None)
        return {asset.key.path[-1]: step_pod(asset) for asset in ASSETS}


# --- the pods -------------------------------------------------------------------------------------


def test_every_step_is_a_job_that_kubernetes_accepts(step_pods):
    assert len(step_pods) == 6
    for job in step_pods.values():
        validate(job)


def test_the_jobs_are_as_they_were(step_pods):
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SNAPSHOT.write_text(json.dumps(step_pods, indent=1, sort_keys=True) + "\n")
    assert step_pods == json.loads(SNAPSHOT.read_text())


def test_steps_that_touch_the_index_share_one_claim_and_the_others_have_none(step_pods):
    for asset, job in step_pods.items():
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        if asset in ON_NVME:
            assert claims == [{"claimName": "laion-index"}]
            assert pod["nodeSelector"] == {"cloud.google.com/gke-local-nvme-ssd": "true"}
            (mount,) = [m for m in container["volumeMounts"] if m["name"] == placement.VOLUME]
            assert {"name": "LAION_CACHE_DIR", "value": mount["mountPath"]} in container["env"]
        else:
            assert not claims
            assert not {"nodeSelector", "tolerations", "affinity"} & pod.keys()


def test_a_pod_names_its_asset_and_is_never_started_twice_by_kubernetes(step_pods):
    for asset, job in step_pods.items():
        assert job["spec"]["template"]["metadata"]["labels"]["laion-assets/asset"] == asset
        assert job["spec"]["backoffLimit"] == 0
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


# --- settings -------------------------------------------------------------------------------------


def test_every_setting_reaches_the_pod():
    settings = {
        "LAION_NVME_LABEL": "disk=fast",
        "LAION_NVME_TAINT": "example/disk",
        "LAION_NVME_CLAIM": "other-claim",
        "LAION_NVME_MOUNT": "/other/mount",
        "LAION_NVME_CPU": "3",
        "LAION_NVME_MEMORY": "5Gi",
        "LAION_NVME_MEMORY_LIMIT": "7Gi",
        "LAION_NVME_GROUP": "4321",
    }
    tags = json.dumps(on_nvme_node("knn_urls", NvmeNode.from_environment(settings)))
    for value in ("fast", *list(settings.values())[1:-1], "4321"):
        assert f'"{value}"' in tags or f" {value}" in tags
    default = json.dumps(on_nvme_node("knn_urls", NvmeNode()))
    assert not [value for value in settings.values() if f'"{value}"' in default]


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("LAION_NVME_LABEL", "fast", "LAION_NVME_LABEL is 'fast': write it as key=value"),
        ("LAION_NVME_GROUP", "staff", "LAION_NVME_GROUP is 'staff': give a whole number"),
        ("LAION_NVME_PENDING_SECONDS", "5m", "LAION_NVME_PENDING_SECONDS is '5m': give a whole number"),
    ],
)
def test_a_wrong_setting_is_named(variable, value, told):
    with pytest.raises(ValueError, match=told):
        NvmeNode.from_environment({variable: value})


def test_pods_only_inside_a_cluster():
    inside = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    chosen = executor(inside)
    assert chosen is not None
    assert chosen.name == "k8s"
    assert executor({}) is None
    assert build_defs(inside).executor.name == "k8s"  # type: ignore[union-attr]


# --- retries --------------------------------------------------------------------------------------


def test_steps_are_tried_again_in_a_cluster_and_only_there():
    told = (
        "from laion_assets.definitions import ASSETS; "
        "print(*[bool(asset.op.retry_policy) for asset in ASSETS])"
    )

    def tried_again(**environment: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-c", told],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return set(done.stdout.split())

    assert tried_again() == {"False"}
    assert tried_again(KUBERNETES_SERVICE_HOST="10.0.0.1") == {"True"}


BROKEN = {
    "seed_embeddings": "laion_assets.resources.read_seeds",
    "centroid_vector": "laion_assets.assets.seeds.centroid",
    "staged_laion_index": "laion_assets.resources.stage",
    "knn_urls": "laion_assets.assets.urls.retrieve",
    "combined_urls": "laion_assets.assets.urls.combine",
}


@pytest.mark.parametrize("asset", BROKEN)
def test_an_error_of_ours_is_not_tried_again(asset, demo: Demo, tmp_path, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the wire was cut")

    policy = retry_policy({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    for one in ASSETS:
        monkeypatch.setattr(one.op, "_retry_policy", policy)
    with new_project(tmp_path, demo.index, demo.seeds) as project:
        monkeypatch.setattr(BROKEN[asset], broken)
        result = project.run("fruit")
        assert asset in failures(result)
        assert set(failures(result).values()) == {"OSError: the wire was cut"}
        assert not result.filter_events(lambda event: event.is_step_up_for_retry)
