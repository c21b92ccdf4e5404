"""Everything sent to a cluster: each of our pods as dagster-k8s creates it, and each file of k8s/.

The pods are made by dagster-k8s's own functions and checked against Kubernetes' strict schemas.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import kubernetes
import kubernetes_validate
import pytest
import yaml
from dagster._config import process_config, resolve_to_config_type
from dagster._core.instance.config import dagster_instance_config_schema
from dagster_gcp.gcs import GCSComputeLogManager
from dagster_k8s import K8sRunLauncher, construct_dagster_k8s_job
from dagster_k8s.container_context import K8sContainerContext
from dagster_k8s.job import get_user_defined_k8s_config
from helpers import cluster as stand_in
from helpers.chart import DEPLOYMENT, IMAGE, VALUES, deployments, instance_config, run_launcher
from helpers.policy import denials
from helpers.project import REPOSITORY, Demo, failures, new_project, working_op

from laion_assets.definitions import build_defs
from laion_assets.defs.assets import build_assets, index_assets
from laion_assets.defs.history import nodes_with_a_copy
from laion_assets.defs.kubernetes import placement
from laion_assets.defs.kubernetes.placement import CombiningPod, NvmeNode, Placement, on_nvme_node
from laion_assets.defs.kubernetes.step_pods import prefer_nodes
from laion_assets.defs.places import Places
from laion_assets.defs.settings import FIELDS, variable_of
from laion_assets.io.errors import InputError

ON_NVME = {"staged_laion_index", "knn_urls", "centroid_urls"}
BUILDING = {"trained_index", "index_shards", "laion_index"}
KUBERNETES = "1.34"
INSIDE = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


def validate(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def assets_for(**environment: str) -> dict[str, dg.AssetsDefinition]:
    """The assets by name, as defined on a cluster."""
    given = INSIDE | environment
    placed = Placement.from_environment(given, Places.from_environment(given).sparse_budget)
    made = [*build_assets(placed), *index_assets(placed)]
    return {asset.key.path[-1]: asset for asset in made}


def step_pod(asset: dg.AssetsDefinition) -> dict[str, Any]:
    """The Job of a step from `k8s_job_executor`, merged from launcher and step."""
    launcher = launcher_of()
    context = K8sContainerContext.create_for_run(
        dg.DagsterRun(job_name="seed_set_job"), launcher, include_run_tags=False
    ).merge(
        K8sContainerContext(run_k8s_config=get_user_defined_k8s_config(working_op(asset.node_def).tags))
    )
    job = construct_dagster_k8s_job(
        context.get_k8s_job_config(IMAGE, launcher),
        args=["dagster", "api", "execute_step"],
        job_name=f"dagster-step-{asset.key.path[-1].replace('_', '-')}",
        user_defined_k8s_config=context.run_k8s_config,
        component="step_worker",
    )
    made: dict[str, Any] = kubernetes.client.ApiClient().sanitize_for_serialization(job)
    return made


def launcher_of() -> K8sRunLauncher:
    return K8sRunLauncher(
        **run_launcher(),
        load_incluster_config=False,
        k8s_client_batch_api=object(),
        k8s_client_core_api=object(),
    )


@pytest.fixture(scope="module", autouse=True)
def no_cluster_is_looked_for():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes.config, "load_kube_config", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def step_pods() -> dict[str, dict[str, Any]]:
    return {name: step_pod(asset) for name, asset in assets_for().items()}


# --- the pods -------------------------------------------------------------------------------------


def test_every_step_is_a_job_that_kubernetes_accepts(step_pods):
    assert len(step_pods) == 9
    for job in step_pods.values():
        validate(job)


def test_steps_that_touch_the_index_have_the_folder_of_their_node_and_the_others_nothing(step_pods):
    for asset, job in step_pods.items():
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        folders = [volume["hostPath"] for volume in pod["volumes"] if "hostPath" in volume]
        if asset in ON_NVME:
            assert folders == [{"path": NvmeNode().folder, "type": "Directory"}]
            assert pod["nodeSelector"] == {"laion-assets/nvme": "true"}
            (mount,) = [m for m in container["volumeMounts"] if m["name"] == placement.VOLUME]
            assert {"name": "LAION_CACHE_DIR", "value": mount["mountPath"]} in container["env"]
        else:
            assert not folders
            assert not {"nodeSelector", "tolerations", "affinity"} & pod.keys()


def test_steps_prefer_nodes_with_a_copy_and_then_nodes_without_other_such_steps():
    op_tags = on_nvme_node("knn_urls", NvmeNode(), NvmeNode().searching)
    tags = {key: json.dumps(value) for key, value in op_tags.items()}
    config = json.loads(prefer_nodes(tags, ["nvme-1", "nvme-2"])["dagster-k8s/config"])
    affinity = config["pod_spec_config"]["affinity"]
    (near,) = affinity["node_affinity"]["preferred_during_scheduling_ignored_during_execution"]
    (apart,) = affinity["pod_anti_affinity"]["preferred_during_scheduling_ignored_during_execution"]
    (expression,) = near["preference"]["match_expressions"]
    assert expression["values"] == ["nvme-1", "nvme-2"]
    assert near["weight"] > apart["weight"]
    selected = apart["pod_affinity_term"]["label_selector"]["match_labels"]
    assert selected.items() <= config["pod_template_spec_metadata"]["labels"].items()
    assert prefer_nodes(tags, []) == tags
    elsewhere = {key: json.dumps(value) for key, value in placement.on_any_node("x").items()}
    assert prefer_nodes(elsewhere, ["nvme-1"]) == elsewhere


def test_nodes_with_a_copy_are_those_that_staged_the_current_index_the_latest_first():
    with dg.DagsterInstance.ephemeral() as instance:
        assert nodes_with_a_copy(instance) == []
        for node, version in (("d", "1"), ("a", "2"), ("b", "2"), ("a", "2")):
            instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    "staged_laion_index",
                    metadata={"node": node},
                    tags={"dagster/data_version": version},
                )
            )
        assert nodes_with_a_copy(instance) == ["a", "b"]


def test_a_node_runs_one_search_and_beside_it_staging_steps():
    node = NvmeNode()
    search, stage = float(node.cpu), float(placement.STAGING_RESOURCES["requests"]["cpu"])
    assert 2 * search > stand_in.GKE_16_CORES > search + 2 * stage


def test_steps_request_what_they_need_and_those_with_the_index_are_not_evicted(step_pods):
    node = NvmeNode()
    for asset, job in step_pods.items():
        template = job["spec"]["template"]
        (container,) = template["spec"]["containers"]
        expected = (
            placement.STAGING_RESOURCES
            if asset == "staged_laion_index"
            else node.searching
            if asset in ON_NVME
            else placement.BUILDING_RESOURCES
            if asset in BUILDING
            else placement.ANY_NODE_RESOURCES
        )
        assert container["resources"] == expected
        stays = "cluster-autoscaler.kubernetes.io/safe-to-evict"
        annotations = template["metadata"].get("annotations", {})
        assert annotations.get(stays) == ("false" if asset in ON_NVME else None)


def test_the_pod_that_embeds_gets_the_model_and_no_cache_on_a_volume(step_pods):
    (container,) = step_pods["seed_embeddings"]["spec"]["template"]["spec"]["containers"]
    told = {variable["name"]: variable.get("value") for variable in container["env"]}
    folder, _, name = told["LAION_MODEL"].rpartition("/")
    assert "LAION_CACHE_DIR" not in told
    assert f"gcloud storage cp --recursive {name} {folder}/" in (K8S / "README.md").read_text()


def test_a_pod_names_its_asset_and_is_never_started_twice_by_kubernetes(step_pods):
    for asset, job in step_pods.items():
        assert job["spec"]["template"]["metadata"]["labels"]["laion-assets/asset"] == asset
        assert job["spec"]["backoffLimit"] == 0
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


# --- settings -------------------------------------------------------------------------------------


def test_large_tables_are_combined_on_an_nvme_node_with_its_disk_for_intermediate_files():
    chosen = {"ON": "nvme_node", "CPU": "8", "MEMORY": "12Gi", "MEMORY_LIMIT": "24Gi"}
    assets = assets_for(**{f"LAION_COMBINE_{name}": value for name, value in chosen.items()})
    job = step_pod(assets["combined_urls"])
    validate(job)
    template = job["spec"]["template"]
    assert denials(as_pod(job)) == []
    (container,) = template["spec"]["containers"]
    assert template["spec"]["nodeSelector"] == {"laion-assets/nvme": "true"}
    assert {"name": "TMPDIR", "value": NvmeNode().mount} in container["env"]
    assert container["resources"] == {
        "requests": {"cpu": "8", "memory": "12Gi"},
        "limits": {"memory": "24Gi"},
    }
    with pytest.raises(InputError, match="LAION_COMBINE_ON is 'somewhere': choose any_node or nvme_node"):
        assets_for(LAION_COMBINE_ON="somewhere")


def test_every_setting_reaches_the_pod():
    settings = {
        "LAION_NVME_LABEL": "disk=fast",
        "LAION_NVME_TAINT": "example/disk",
        "LAION_NVME_FOLDER": "/other/folder",
        "LAION_NVME_MOUNT": "/other/mount",
        "LAION_NVME_CPU": "3",
        "LAION_NVME_MEMORY": "5Gi",
        "LAION_NVME_MEMORY_LIMIT": "7Gi",
        "LAION_NVME_GROUP": "4321",
    }
    node = NvmeNode.from_environment(settings)
    tags = json.dumps(on_nvme_node("knn_urls", node, node.searching))
    for value in ("fast", *list(settings.values())[1:-1], "4321"):
        assert f'"{value}"' in tags or f" {value}" in tags
    default = json.dumps(on_nvme_node("knn_urls", NvmeNode(), NvmeNode().searching))
    assert not [value for value in settings.values() if f'"{value}"' in default]


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("LAION_NVME_LABEL", "fast", "key=value"),
        ("LAION_NVME_FOLDER", "laion", "an absolute path"),
        ("LAION_NVME_FOLDER", "/mnt/../etc", "an absolute path without .."),
        ("LAION_NVME_GROUP", "staff", "a whole number"),
        ("LAION_NVME_PENDING_SECONDS", "5m", "a whole number"),
    ],
)
def test_a_wrong_setting_is_named(variable, value, remedy):
    with pytest.raises(InputError, match=f"{variable} is '{value}': .*{remedy}"):
        build_defs({variable: value})


def test_pods_only_inside_a_cluster():
    inside = build_defs(INSIDE | {"LAION_NVME_PENDING_SECONDS": "7"}).executor
    assert inside is not None
    assert inside.name == "k8s"
    assert build_defs({}).executor is dg.in_process_executor


def test_steps_on_a_cluster_must_be_able_to_stage_on_an_empty_node():
    fail = INSIDE | {"LAION_LOST_INDEX": "fail"}
    with pytest.raises(InputError, match=r"LAION_LOST_INDEX is 'fail'.*LAION_NVME_CLAIM"):
        build_defs(fail)
    assert build_defs(fail | {"LAION_NVME_CLAIM": "laion-index"})
    assert build_defs({"LAION_LOST_INDEX": "fail"})


# --- sparse copies and claims ---------------------------------------------------------------------


def test_sparse_pods_go_to_any_node_with_room_for_the_budget():
    sparse = assets_for(LAION_STAGING="sparse", LAION_SPARSE_BUDGET="50GB")
    for name in ON_NVME:
        job = step_pod(sparse[name])
        validate(job)
        pod = job["spec"]["template"]["spec"]
        assert not {"nodeSelector", "tolerations", "affinity"} & pod.keys()
        room = int(pod["containers"][0]["resources"]["requests"]["ephemeral-storage"])
        assert 50 * 10**9 < room < 70 * 10**9
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == placement.VOLUME]
        assert volume["emptyDir"] == {"sizeLimit": str(room)}


@pytest.mark.parametrize("staging", ["full", "sparse"])
def test_with_a_claim_pods_go_to_any_node_but_together(staging):
    (claim,) = manifests("claim.yaml")
    claimed = assets_for(LAION_STAGING=staging, LAION_NVME_CLAIM=claim["metadata"]["name"])
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    for name in ON_NVME:
        job = step_pod(claimed[name])
        validate(job)
        template = job["spec"]["template"]
        assert "nodeSelector" not in template["spec"]
        claims = [v["persistentVolumeClaim"] for v in template["spec"]["volumes"] if "emptyDir" not in v]
        assert claims == [{"claimName": claim["metadata"]["name"]}]
        assert template["spec"]["securityContext"]["fsGroup"] == int(NvmeNode().group)
        (term,) = template["spec"]["affinity"]["podAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


# --- retries --------------------------------------------------------------------------------------


def test_steps_are_tried_again_in_a_cluster_and_only_there():
    for environment, tried_again in (({}, False), (INSIDE, True)):
        placed = Placement.from_environment(environment, 0)
        assets = [*build_assets(placed), *index_assets(placed)]
        assert {bool(working_op(asset.node_def).retry_policy) for asset in assets} == {tried_again}


BROKEN = {
    "seed_embeddings": "laion_assets.defs.assets.seed_embeddings.read_seeds",
    "centroid_vector": "laion_assets.defs.assets.seed_embeddings.centroid",
    "staged_laion_index": "laion_assets.defs.resources.stage",
    "knn_urls": "laion_assets.defs.assets.url_sets.retrieve",
    "combined_urls": "laion_assets.defs.assets.combined_urls.combine",
}


@pytest.mark.parametrize("asset", BROKEN)
def test_an_error_of_ours_is_not_tried_again(asset, demo: Demo, tmp_path, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the wire was cut")

    policy = placement.retry_policy(INSIDE)
    monkeypatch.setattr(placement, "retry_policy", lambda _: policy)
    with new_project(tmp_path, demo.index, demo.seeds) as project:
        monkeypatch.setattr(BROKEN[asset], broken)
        assert working_op(project.job.get_node_named(asset).definition).retry_policy == policy
        result = project.run("fruit")
        assert asset in failures(result)
        assert set(failures(result).values()) == {"OSError: the wire was cut"}
        assert not result.filter_events(lambda event: event.is_step_up_for_retry)


# --- what an operator applies ---------------------------------------------------------------------

K8S = REPOSITORY / "k8s"
# Google's own kinds, of which Kubernetes' schemas know nothing; and kustomize's, read by kubectl.
OTHERS = {"BackendConfig", "ManagedCertificate", "Kustomization"}


def manifests(name: str = "*.yaml") -> list[dict[str, Any]]:
    files = [path for path in sorted(K8S.glob(name)) if path.name != "values.yaml"]
    assert files
    return [manifest for path in files for manifest in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str, name: str | None = None) -> dict[str, Any]:
    (found,) = [
        manifest
        for manifest in manifests()
        if manifest["kind"] == kind and name in (None, manifest.get("metadata", {}).get("name"))
    ]
    return found


def test_every_manifest_is_one_that_kubernetes_accepts():
    for manifest in manifests():
        if manifest["kind"] not in OTHERS:
            validate(manifest)


def test_the_kustomization_has_all_of_it_but_the_proxy_and_the_claim():
    listed = set(yaml.safe_load((K8S / "kustomization.yaml").read_text())["resources"])
    there = {path.name for path in K8S.glob("*.yaml")}
    assert listed == there - {"kustomization.yaml", "values.yaml", "iap.yaml", "claim.yaml"}


@pytest.mark.parametrize(("said", "read_by_pods"), [(None, "full"), ("full", None), ("in-place", None)])
def test_pods_on_nvme_stage_fully_unless_it_is_said_otherwise(said, read_by_pods):
    given = {"LAION_STAGING": said} if said else {}
    pod = Placement.from_environment(given, 0).with_index("knn_urls")
    tags = pod.op_tags["dagster-k8s/config"]
    told = {variable["name"]: variable.get("value") for variable in tags["container_config"]["env"]}
    assert told.get("LAION_STAGING") == read_by_pods
    assert "node_selector" in tags["pod_spec_config"]


@pytest.mark.parametrize(("staging", "where"), [("full", "nvme_node"), ("sparse", "any_node")])
def test_where_an_asset_runs_can_be_searched_for_in_the_ui(staging, where):
    defs = build_defs(
        INSIDE | {"LAION_STAGING": staging, "LAION_EMBEDDINGS_URI": "gs://bucket/embeddings"}
    )
    graph = defs.resolve_asset_graph()
    told = {
        key.to_user_string(): graph.get(key).tags[placement.RUNS_ON_TAG]
        for key in graph.materializable_asset_keys
    }
    assert told == {name: where if name in ON_NVME else "any_node" for name in assets_for()}


def test_the_steps_of_a_build_share_a_pool_of_their_own_and_wait_for_no_search():
    pools = {name: working_op(asset.node_def).pool for name, asset in assets_for().items()}
    assert {name for name, pool in pools.items() if pool == "building"} == BUILDING
    stripes = assets_for()["combined_urls"].node_def.node_named("compare").definition
    assert stripes.pool == "combining"  # otherwise most of their pods would wait too long for a node
    for folder in (REPOSITORY / "k8s" / "values.yaml", REPOSITORY / "dagster.yaml"):
        assert '"combining", "building"' in folder.read_text()


def test_label_taint_and_folder_are_the_same_everywhere():
    node = NvmeNode()
    pod = of_kind("DaemonSet", "disks")["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == dict([node.label.split("=")])
    assert [toleration["key"] for toleration in pod["tolerations"]] == [node.taint]
    readme = (K8S / "README.md").read_text()
    assert f"--node-labels {node.label}" in readme
    assert f"--node-taints {node.taint}=true:NoSchedule" in readme
    assert node.folder in (K8S / "policy.yaml").read_text()
    assert dict([node.label.split("=")]) == {stand_in.NVME: "true"}
    assert (node.taint, node.folder) == (stand_in.NVME, stand_in.FOLDER)


def test_the_copy_on_each_node_is_verified_as_the_policy_allows():
    template = of_kind("DaemonSet", "verify")["spec"]["template"]
    assert denials(template) == []
    node, pod = NvmeNode(), template["spec"]
    assert pod["nodeSelector"] == dict([node.label.split("=")])
    assert [toleration["key"] for toleration in pod["tolerations"]] == [node.taint]
    assert pod["securityContext"]["fsGroup"] == int(node.group)
    (container,) = pod["containers"]
    (folder,) = [volume["hostPath"] for volume in pod["volumes"] if "hostPath" in volume]
    assert folder["path"] == node.folder
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {node.mount, "/tmp", "/home/laion"}, "the root of the container is read-only"
    assert container["env"] == [{"name": "LAION_CACHE_DIR", "value": node.mount}]
    assert "laion-assets verify --repair" in container["args"][0]


# What the script that prepares disks calls; each notes its arguments, and does what matters of it.
STUBS = {
    "mountpoint": '[ -e "$ROOT/mounted" ]',
    "mdadm": 'mkdir -p "$ROOT/dev/md" && touch "$ROOT/dev/md/laion"',
    "blkid": '[ -e "$ROOT/formatted" ]',
    "mkfs.ext4": 'touch "$ROOT/formatted"',
    "mount": '[ ! -e "$ROOT/broken" ] && touch "$ROOT/mounted"',
    "install": "true",
}


@pytest.fixture
def prepare_disks(tmp_path) -> Callable[..., tuple[int, list[str]]]:
    """Run the real script on a node with some files; return its exit code and the commands it ran."""
    pod = of_kind("DaemonSet", "disks")["spec"]["template"]["spec"]
    (script,) = pod["initContainers"][0]["args"]
    script = script.replace("/dev/", f"{tmp_path}/dev/").replace("/mnt/", f"{tmp_path}/mnt/")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, does in STUBS.items():
        (programs / name).write_text(
            f'#!/bin/bash\necho {name} "$@" >> "$ROOT/ran"\n{does} 2> "$ROOT/null"\n'
        )
        (programs / name).chmod(0o755)

    def run(*files: str) -> tuple[int, list[str]]:
        for name in files:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "ran").write_text("")
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "ROOT": str(tmp_path)}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
        assert not done.stderr
        ran = [line.replace(f"{tmp_path}", "") for line in (tmp_path / "ran").read_text().splitlines()]
        return done.returncode, ran

    return run


DISKS = [f"dev/disk/by-id/google-local-ssd-block{number}" for number in range(3)]
CREATE = "mdadm --create /dev/md/laion --level=0 --force --run --raid-devices=3 /" + " /".join(DISKS)
FOLDER = "install --directory --owner 1000 --group 1000 --mode 2775 " + NvmeNode().folder
MOUNT = "mount -o discard,defaults /dev/md/{} /mnt/disks/raid/0"


def test_the_disks_of_a_fresh_node_become_one_and_are_mounted_once(prepare_disks):
    failed, ran = prepare_disks(*DISKS)
    assert (failed, ran[1], ran[3:]) == (
        0, CREATE, ["mkfs.ext4 -m 0 -F /dev/md/laion", MOUNT.format("laion"), FOLDER]
    )  # fmt: skip
    assert prepare_disks() == (0, ["mountpoint --quiet /mnt/disks/raid/0", FOLDER])


def test_an_array_that_survived_a_reboot_is_used_with_what_it_holds(prepare_disks):
    failed, ran = prepare_disks(*DISKS, "dev/md/127", "formatted")
    assert (failed, ran[1:]) == (0, ["blkid /dev/md/127", MOUNT.format("127"), FOLDER])


def test_a_node_without_disks_or_whose_file_system_is_broken_gets_no_folder(prepare_disks, tmp_path):
    assert prepare_disks()[0] == 1
    assert prepare_disks(*DISKS, "broken")[0] == 1
    assert not (tmp_path / "mnt" / "disks" / "raid" / "0").exists()


def test_the_proxy_is_asked_for_before_the_ui_can_be_reached_through_it():
    annotations = VALUES["dagsterWebserver"]["service"]["annotations"]
    asked = json.loads(annotations["cloud.google.com/backend-config"])
    assert asked == {"default": of_kind("BackendConfig")["metadata"]["name"]}


# --- what may not happen --------------------------------------------------------------------------


def as_pod(job: dict[str, Any]) -> dict[str, Any]:
    """The pod that Kubernetes makes for a job."""
    template = job["spec"]["template"]
    return {"apiVersion": "v1", "kind": "Pod"} | template


def test_the_policy_admits_every_pod_that_we_start(step_pods):
    assert set(deployments()) == {"user-deployments", "dagster-webserver", "dagster-daemon"}
    for pod in deployments().values():
        validate(pod)
        assert denials(pod) == []
    for job in step_pods.values():
        assert denials(as_pod(job)) == []
    for environment in ({"LAION_STAGING": "sparse"}, {"LAION_NVME_CLAIM": "laion-index"}):
        assert denials(as_pod(step_pod(assets_for(**environment)["knn_urls"]))) == []


def with_volume(pod: dict[str, Any], path: str, kind: str) -> None:
    pod["spec"]["volumes"].append({"name": "more", "hostPath": {"path": path, "type": kind}})


def in_container(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(pod: dict[str, Any]) -> None:
        (container,) = pod["spec"]["containers"]
        if field in ("ports", "livenessProbe", "lifecycle"):
            container[field] = value
        else:
            container["securityContext"][field] = value

    return change


def in_pod(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda pod: pod["spec"]["securityContext"].update({field: value})


NOT_ALLOWED: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "another folder": ("hostPath", lambda pod: with_volume(pod, "/etc", "Directory")),
    "the disk itself": ("hostPath", lambda pod: with_volume(pod, "/mnt/disks/raid/0", "Directory")),
    "a way out": ("hostPath", lambda pod: with_volume(pod, f"{NvmeNode().folder}/../..", "Directory")),
    "another type": ("hostPath", lambda pod: with_volume(pod, NvmeNode().folder, "DirectoryOrCreate")),
    "another account": ("hostPath", lambda pod: pod["spec"].update(serviceAccountName="laion-code")),
    "root with the folder": ("hostPath", in_container("runAsUser", 0)),
    "maybe root with the folder": ("hostPath", in_pod("runAsNonRoot", False)),
    "the node's network": ("hostNetwork", lambda pod: pod["spec"].update(hostNetwork=True)),
    "the node's processes": ("hostPID", lambda pod: pod["spec"].update(hostPID=True)),
    "privileged": ("privileged", in_container("privileged", True)),
    "a capability": ("capability", in_container("capabilities", {"add": ["SYS_ADMIN"]})),
    "a port of the node": ("hostPort", in_container("ports", [{"containerPort": 1, "hostPort": 1}])),
    "a probe elsewhere": (
        "host field", in_container("livenessProbe", {"httpGet": {"host": "169.254.169.254", "port": 80}}),
    ),
    "a hook elsewhere": (
        "host field", in_container("lifecycle", {"preStop": {"httpGet": {"host": "10.0.0.1", "port": 1}}})
    ),
    "no AppArmor": ("AppArmor", in_container("appArmorProfile", {"type": "Unconfined"})),
    "no AppArmor, by the annotation of older clusters": (
        "AppArmor", lambda pod: pod["metadata"].setdefault("annotations", {}).update(
            {"container.apparmor.security.beta.kubernetes.io/dagster": "unconfined"}
        ),
    ),
    "SELinux": ("SELinux", in_container("seLinuxOptions", {"type": "spc_t"})),
    "unmasked /proc": ("procMount", in_container("procMount", "Unmasked")),
    "no seccomp": ("seccomp", in_pod("seccompProfile", {"type": "Unconfined"})),
    "a sysctl of the node": ("sysctls", in_pod("sysctls", [{"name": "kernel.msgmax", "value": "1"}])),
    "a Windows host process": ("Windows", in_container("windowsOptions", {"hostProcess": True})),
    "an init container": (
        "privileged", lambda pod: pod["spec"].update(
            initContainers=[{"name": "i", "image": "i", "securityContext": {"privileged": True}}]
        ),
    ),
    "an ephemeral container": (
        "privileged", lambda pod: pod["spec"].update(
            ephemeralContainers=[{"name": "i", "image": "i", "securityContext": {"privileged": True}}]
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_ALLOWED)
def test_the_policy_denies(what, step_pods):
    told, change = NOT_ALLOWED[what]
    pod = json.loads(json.dumps(as_pod(step_pods["knn_urls"])))
    change(pod)
    validate(pod)
    (denied,) = denials(pod)
    assert told in denied


def test_the_policy_covers_every_pod_of_the_namespace_and_fails_closed():
    policy = of_kind("ValidatingAdmissionPolicy")["spec"]
    (rule,) = policy["matchConstraints"]["resourceRules"]
    assert set(rule["resources"]) == {"pods", "pods/ephemeralcontainers"}
    assert set(rule["operations"]) == {"CREATE", "UPDATE"}
    binding = of_kind("ValidatingAdmissionPolicyBinding")["spec"]
    assert binding["policyName"] == of_kind("ValidatingAdmissionPolicy")["metadata"]["name"]
    assert binding["validationActions"] == ["Deny"]
    selected = binding["matchResources"]["namespaceSelector"]["matchLabels"]
    assert selected == {"kubernetes.io/metadata.name": run_launcher()["job_namespace"]}


def test_all_containers_are_confined_beyond_the_baseline(step_pods):
    run_pod = K8sContainerContext.create_for_run(
        dg.DagsterRun(job_name="seed_set_job"), launcher_of(), include_run_tags=True
    )
    run_job = construct_dagster_k8s_job(
        run_pod.get_k8s_job_config(IMAGE, launcher_of()),
        args=["dagster", "api", "execute_run"],
        job_name="dagster-run",
        user_defined_k8s_config=run_pod.run_k8s_config,
    )
    jobs = [kubernetes.client.ApiClient().sanitize_for_serialization(run_job), *step_pods.values()]
    for pod in [*deployments().values(), *map(as_pod, jobs)]:
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert re.fullmatch(r".*@sha256:DIGEST", container["image"])
        (main,) = spec["containers"]
        assert {"/tmp", "/home/laion"} <= {mount["mountPath"] for mount in main["volumeMounts"]}
        assert {"requests", "limits"} <= main["resources"].keys()


def test_each_kind_of_pod_has_its_own_account_and_steps_have_no_token(step_pods):
    accounts = {
        pod["metadata"]["name"] for pod in manifests("accounts.yaml") if pod["kind"] == "ServiceAccount"
    }
    used = {name: pod["spec"]["serviceAccountName"] for name, pod in deployments().items()}
    assert used == {
        "user-deployments": "laion-code",
        "dagster-webserver": "laion-dagster",
        "dagster-daemon": "laion-dagster",
    }  # fmt: skip
    assert run_launcher()["service_account_name"] == "laion-code"
    for job in step_pods.values():
        spec = job["spec"]["template"]["spec"]
        assert spec["serviceAccountName"] == placement.STEP_ACCOUNT
        assert spec["automountServiceAccountToken"] is False
    assert accounts == {*used.values(), placement.STEP_ACCOUNT}
    for part in (VALUES, VALUES["dagster-user-deployments"]):
        assert (part["rbacEnabled"], part["serviceAccount"]["create"]) == (False, False)
    subjects = {subject["name"] for subject in of_kind("RoleBinding")["subjects"]}
    assert subjects == accounts - {placement.STEP_ACCOUNT}, "steps need nothing from the cluster"
    readme = (K8S / "README.md").read_text()
    assert all(f"/sa/{account}" in readme for account in accounts)


def test_a_run_s_tags_change_nothing_of_its_pods():
    tag = {"dagster-k8s/config": json.dumps({"container_config": {"env": [{"name": "A", "value": "B"}]}})}
    with pytest.raises(Exception, match=r"violated the allowed list: container_config\.env"):
        K8sContainerContext.create_for_run(
            dg.DagsterRun(job_name="seed_set_job", tags=tag), launcher_of(), include_run_tags=True
        )


def test_only_the_proxy_reaches_the_ui_and_only_the_ui_and_the_daemon_the_code_server():
    policies = [one for one in manifests("network.yaml") if one["metadata"]["namespace"] == "laion"]
    (closed,) = [
        one for one in policies if one["spec"]["podSelector"] == {} and "egress" not in one["spec"]
    ]
    assert closed["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in closed["spec"]
    entries = {
        one["spec"]["podSelector"]["matchLabels"]["component"]: one["spec"]["ingress"]
        for one in policies
        if "ingress" in one["spec"]
    }
    assert entries.keys() == {"user-deployments", "dagster-webserver"} <= deployments().keys()
    (code,), (web,) = entries["user-deployments"], entries["dagster-webserver"]
    assert code["ports"] == [{"port": DEPLOYMENT["port"]}]
    (peers,) = code["from"][0]["podSelector"]["matchExpressions"]
    assert set(peers["values"]) == deployments().keys() - {"user-deployments"}
    assert all(set(peer) == {"ipBlock"} for peer in web["from"])


def test_actions_of_ci_are_pinned_by_commit():
    workflows = [path.read_text() for path in (REPOSITORY / ".github" / "workflows").iterdir()]
    used = [action for text in workflows for action in re.findall(r"uses: (\S+)", text)]
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action)] == []


def test_the_image_s_user_is_the_one_who_may_write():
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    (user, group) = re.findall(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)[0]
    assert user != "0"
    assert group == NvmeNode().group
    assert run_launcher()["run_k8s_config"]["pod_spec_config"]["security_context"]["fsGroup"] == int(
        group
    )
    assert f"--owner {user} --group {group} --mode 2775" in FOLDER
    assert "/usr/local/bin/nslookup" in dockerfile, "the chart's init containers call it"


def test_the_same_module_and_image_serve_the_code_location_and_the_steps():
    workspace = yaml.safe_load((REPOSITORY / "workspace.yaml").read_text())
    module = workspace["load_from"][0]["python_module"]["module_name"]
    assert DEPLOYMENT["dagsterApiGrpcArgs"] == ["-m", module]
    assert DEPLOYMENT["includeConfigInLaunchedRuns"] == {"enabled": False}
    launched = run_launcher()["run_k8s_config"]["container_config"]
    assert (launched["env"], launched["resources"]) == (DEPLOYMENT["env"], DEPLOYMENT["resources"])
    kustomization = yaml.safe_load((K8S / "kustomization.yaml").read_text())
    (image,) = kustomization["images"]
    assert f"{image['newName']}@{image['digest']}" == IMAGE
    pods = [of_kind("DaemonSet", name)["spec"]["template"]["spec"] for name in ("disks", "verify")]
    containers = [each for pod in pods for each in (*pod.get("initContainers", ()), *pod["containers"])]
    assert {container["image"] for container in containers} == {image["name"]}
    for part in ("dagsterWebserver", "dagsterDaemon"):
        assert VALUES[part]["image"] == DEPLOYMENT["image"]


def test_dagster_takes_what_the_chart_makes_of_the_values(tmp_path):
    database = {"hostname": "db", "username": "dagster", "password": "", "db_name": "dagster"}
    config = instance_config(tmp_path / "kubeconfig", database, tmp_path)
    schema = resolve_to_config_type(dagster_instance_config_schema())
    read = process_config(schema, config)
    assert read.success, read.errors
    logs = VALUES["computeLogManager"]
    assert logs["type"] == GCSComputeLogManager.__name__
    (config,) = logs["config"].values()
    assert process_config(resolve_to_config_type(GCSComputeLogManager.config_type()), config).success


def test_the_chart_limits_and_frees_what_dagster_yaml_does():
    local = yaml.safe_load((REPOSITORY / "dagster.yaml").read_text())
    pools = VALUES["concurrency"]["pools"]
    assert pools["defaultLimit"] == local["concurrency"]["pools"]["default_limit"]
    assert pools["granularity"] == local["concurrency"]["pools"]["granularity"]
    monitoring = VALUES["dagsterDaemon"]["runMonitoring"]
    assert monitoring["enabled"]
    freed = local["run_monitoring"]["free_slots_after_run_end_seconds"]
    assert monitoring["freeSlotsAfterRunEndSeconds"] == freed
    assert monitoring["startTimeoutSeconds"] >= int(NvmeNode().pending_seconds)
    assert VALUES["dagsterWebserver"]["service"]["type"] == "ClusterIP"


def test_every_variable_in_the_values_is_one_that_is_read():
    known = {variable_of(name) for name in (*Places.model_fields, *FIELDS)} | nvme_variables()
    assert {variable["name"] for variable in DEPLOYMENT["env"]} <= known
    readme = (K8S / "README.md").read_text()
    pattern = r"^\| `(LAION_(?:NVME|COMBINE)_\w+)` \| `?([^`|]+?)`? \|"
    told = dict(re.findall(pattern, readme, re.MULTILINE))
    assert told == {
        of.variables()[name]: value or "none"
        for of in (NvmeNode, CombiningPod)
        for name, value in vars(of()).items()
    }


def nvme_variables() -> set[str]:
    return {*NvmeNode.variables().values(), *CombiningPod.variables().values()}


def commands_of_the_recipe(*words: str) -> list[str]:
    """The commands in README.md that begin with some words, continued lines joined."""
    blocks = re.findall(r"^```\n(.*?)^```", (K8S / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line.split()[: len(words)] == list(words)]


def test_the_cluster_upgrades_on_a_channel_with_an_exclusion_and_both_pools_are_autoscaled():
    (cluster,) = commands_of_the_recipe("gcloud", "container", "clusters", "create")
    assert "--release-channel stable" in cluster
    assert "--enable-dataplane-v2" in cluster, "without it, network policies are not enforced"
    (exclusion,) = commands_of_the_recipe("gcloud", "container", "clusters", "update")
    assert "--add-maintenance-exclusion-scope no_minor_or_node_upgrades" in exclusion
    (nvme,) = commands_of_the_recipe("gcloud", "container", "node-pools", "create", "nvme")
    assert "--enable-autoscaling --num-nodes 0 --min-nodes 0" in nvme
    assert "--enable-autoscaling" in cluster
    (limit,) = re.findall(r"--max-nodes (\d+)", nvme)
    for pool in ("retrieval", "staging"):
        (command,) = [one for one in commands_of_the_recipe("kubectl", "exec") if f"set {pool}" in one]
        assert command.endswith(f"concurrency set {pool} {limit}")


def test_the_chart_is_updated_before_it_is_used_and_an_upgrade_migrates_the_database():
    commands = commands_of_the_recipe("helm")
    uses = [number for number, one in enumerate(commands) if "dagster/dagster" in one]
    updates = [number for number, one in enumerate(commands) if one == "helm repo update"]
    assert all(any(update < use for update in updates) for use in uses)
    (migration,) = commands_of_the_recipe("helm", "template")
    assert "--set migrate.enabled=true --show-only templates/job-instance-migrate.yaml" in migration
    (stop,) = commands_of_the_recipe("kubectl", "scale")
    assert "--replicas 0" in stop


def test_every_image_is_ours():
    ours = yaml.safe_load((K8S / "kustomization.yaml").read_text())["images"][0]["name"]
    used = re.findall(
        r"^\s*image: (\S+)", "".join(p.read_text() for p in K8S.glob("*.yaml")), re.MULTILINE
    )
    assert set(used) <= {ours, "&image", "*image"}
    assert VALUES["busybox"]["image"].items() <= DEPLOYMENT["image"].items()


INDEX_GIB = 2_328  # of LAION-5B


def test_each_machine_of_the_recipe_has_room_for_the_index_and_a_search():
    row = r"^\| `([\w-]+)` \| (\d+), (\d+) GB \| \d+(?:, fixed)? \| ([\d,]+) GiB \| .* \| \$([\d.]+) \|$"
    machines = re.findall(row, (K8S / "README.md").read_text(), re.MULTILINE)
    assert {name.split("-")[0] for name, *_ in machines} == {"n2", "c3", "c3d", "c4", "c4d", "z3"}
    for _, cores, memory, disk, _ in machines:
        assert int(disk.replace(",", "")) > INDEX_GIB
        assert int(cores) > float(NvmeNode().cpu)
        assert int(memory) > int(NvmeNode().memory_limit.removesuffix("Gi"))
    prices = {name: price for name, *_, price in machines}
    scale = (REPOSITORY / "docs" / "scale.md").read_text()
    told = re.findall(r"^\| `([\w-]+)` \| \d+ \| ([\d.]+) \|", scale, re.MULTILINE)
    assert told
    assert {name: price for name, price in told if prices[name] != price} == {}


def test_the_proxy_uses_google_s_own_client():
    assert of_kind("BackendConfig")["spec"]["iap"] == {"enabled": True}


def test_ticks_expire_and_nobody_is_asked_for_an_address(tmp_path):
    kept = {"skipped": 7, "success": 30, "failure": 30, "started": -1}
    on_one_machine = yaml.safe_load((REPOSITORY / "dagster.yaml").read_text())
    of_the_chart = instance_config(tmp_path, {}, tmp_path)
    for config in (on_one_machine, of_the_chart):
        assert config["retention"]["sensor"]["purge_after_days"] == kept
    assert VALUES["retention"]["enabled"]
    assert VALUES["additionalInstanceConfig"]["nux"] == {"enabled": False}
    assert VALUES["telemetry"] == {"enabled": False}


def locked_versions(path: Path) -> dict[str, str]:
    """The versions in a lock, each of which has hashes."""
    text = path.read_text()
    hashed = re.findall(r"^(\S+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
    found = {name: version for name, version, _ in hashed}
    assert len(found) == text.count("==")
    return found


def test_the_image_holds_exactly_the_packages_that_were_tested_and_their_hashes_are_compared():
    tested = locked_versions(REPOSITORY / "requirements.lock")
    of_the_image = locked_versions(K8S / "requirements.lock")
    assert of_the_image.items() <= tested.items()
    assert {"dagster-postgres", "dagster-k8s"} <= of_the_image.keys()
    assert "pytest" not in of_the_image
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert "COPY k8s/requirements.lock " in dockerfile
    assert "--no-deps --require-hashes --requirement requirements.lock" in dockerfile


def test_dagster_and_its_chart_have_one_version():
    locked = locked_versions(REPOSITORY / "requirements.lock")["dagster"]
    told = set(re.findall(r"--version (\S+)", (K8S / "README.md").read_text()))
    assert told | set(re.findall(r"--version (\S+)", (K8S / "values.yaml").read_text())) == {locked}


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\]\(((?!https:)[^)#]+)\)", (K8S / "README.md").read_text())))
)
def test_what_the_recipe_points_to_is_there(target):
    assert (K8S / target).exists()
