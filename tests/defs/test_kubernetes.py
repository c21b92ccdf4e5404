"""Everything sent to a cluster: each of our pods as dagster-k8s creates it, and each file of k8s/.

The pods are made by dagster-k8s's own functions and checked against Kubernetes' strict schemas.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import dagster as dg
import kubernetes
import kubernetes_validate
import pytest
import yaml
from dagster._config import process_config, resolve_to_config_type
from dagster._core.instance.config import dagster_instance_config_schema
from dagster_k8s import K8sRunLauncher, construct_dagster_k8s_job
from dagster_k8s.container_context import K8sContainerContext
from dagster_k8s.job import get_user_defined_k8s_config
from helpers.chart import DEPLOYMENT, IMAGE, VALUES, container_context, instance_config, run_launcher
from helpers.project import REPOSITORY, Demo, failures, new_project
from kubernetes.client import ApiException

from laion_assets.definitions import build_defs
from laion_assets.defs.assets import build_assets, index_assets
from laion_assets.defs.kubernetes import claim, placement
from laion_assets.defs.kubernetes.placement import NvmeNode, Placement, on_nvme_node
from laion_assets.defs.kubernetes.step_pods import RENEW, why_it_cannot_start
from laion_assets.defs.places import Places
from laion_assets.defs.settings import FIELDS, variable_of
from laion_assets.io.errors import InputError
from laion_assets.staging import parse_size

ON_NVME = {"staged_laion_index", "knn_urls", "centroid_urls"}
BUILDING = {"trained_index", "index_shards", "laion_index"}
KUBERNETES = "1.34"
INSIDE = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


def validate(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def assets_for(**environment: str) -> dict[str, dg.AssetsDefinition]:
    """The assets by name, as defined on a cluster."""
    placed = Placement.from_environment(INSIDE | environment)
    made = [*build_assets(placed), *index_assets(placed)]
    return {asset.key.path[-1]: asset for asset in made}


def step_pod(asset: dg.AssetsDefinition) -> dict[str, Any]:
    """The Job of a step from `k8s_job_executor`, merged from launcher, code location and step."""
    launcher = K8sRunLauncher(
        **run_launcher(),
        load_incluster_config=False,
        k8s_client_batch_api=object(),
        k8s_client_core_api=object(),
    )
    context = K8sContainerContext.create_for_run(
        dg.DagsterRun(job_name="seed_set_job"), launcher, include_run_tags=False
    )
    for more in (
        K8sContainerContext.create_from_config(container_context()),
        K8sContainerContext(run_k8s_config=get_user_defined_k8s_config(asset.op.tags)),
    ):
        context = context.merge(more)
    job = construct_dagster_k8s_job(
        context.get_k8s_job_config(IMAGE, launcher),
        args=["dagster", "api", "execute_step"],
        job_name=f"dagster-step-{asset.key.path[-1].replace('_', '-')}",
        user_defined_k8s_config=context.run_k8s_config,
        component="step_worker",
    )
    made: dict[str, Any] = kubernetes.client.ApiClient().sanitize_for_serialization(job)
    return made


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


def test_steps_request_what_they_need_and_those_with_the_index_are_not_evicted(step_pods):
    node = NvmeNode()
    for asset, job in step_pods.items():
        template = job["spec"]["template"]
        (container,) = template["spec"]["containers"]
        expected = (
            {
                "requests": {"cpu": node.cpu, "memory": node.memory},
                "limits": {"memory": node.memory_limit},
            }
            if asset in ON_NVME
            else placement.BUILDING_RESOURCES
            if asset in BUILDING
            else placement.ANY_NODE_RESOURCES
        )
        assert container["resources"] == expected
        stays = "cluster-autoscaler.kubernetes.io/safe-to-evict"
        annotations = template["metadata"].get("annotations", {})
        assert annotations.get(stays) == ("false" if asset in ON_NVME else None)
        if asset in ON_NVME:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert template["spec"]["securityContext"]["runAsNonRoot"] is True
            assert template["spec"]["securityContext"]["fsGroup"] == int(node.group)


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
    ("variable", "value", "remedy"),
    [
        ("LAION_NVME_LABEL", "fast", "key=value"),
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


# --- pods that do not start -----------------------------------------------------------------------


def test_a_step_that_may_not_look_at_the_claim_names_the_file_that_lets_it():
    def forbidden(*_: Any) -> None:
        raise ApiException(403, "Forbidden")

    core = SimpleNamespace(read_namespaced_persistent_volume_claim=forbidden)
    claimed = SimpleNamespace(persistent_volume_claim=SimpleNamespace(claim_name="laion-index"))
    pod = SimpleNamespace(
        metadata=SimpleNamespace(namespace="laion"), spec=SimpleNamespace(volumes=[claimed])
    )
    told = why_it_cannot_start(core, NvmeNode(), "knn_urls", pod)
    for fact in ("the claim laion-index", "Forbidden", "apply k8s/dagster-may-look.yaml"):
        assert fact in told
    assert (K8S / "dagster-may-look.yaml").exists()


# --- retries --------------------------------------------------------------------------------------


def test_steps_are_tried_again_in_a_cluster_and_only_there():
    for environment, tried_again in (({}, False), (INSIDE, True)):
        placed = Placement.from_environment(environment)
        assets = [*build_assets(placed), *index_assets(placed)]
        assert {bool(asset.op.retry_policy) for asset in assets} == {tried_again}


BROKEN = {
    "seed_embeddings": "laion_assets.defs.assets.seed_embeddings.read_seeds",
    "centroid_vector": "laion_assets.defs.assets.seed_embeddings.centroid",
    "staged_laion_index": "laion_assets.defs.resources.stage",
    "knn_urls": "laion_assets.defs.assets.url_sets.retrieve",
    "combined_urls": "laion_assets.defs.assets.url_sets.combine",
}


@pytest.mark.parametrize("asset", BROKEN)
def test_an_error_of_ours_is_not_tried_again(asset, demo: Demo, tmp_path, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the wire was cut")

    policy = placement.retry_policy(INSIDE)
    monkeypatch.setattr(placement, "retry_policy", lambda _: policy)
    with new_project(tmp_path, demo.index, demo.seeds) as project:
        monkeypatch.setattr(BROKEN[asset], broken)
        assert project.job.get_node_named(asset).definition.retry_policy == policy
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


def test_the_kustomization_has_all_of_it_but_the_proxy_and_the_other_claim():
    listed = set(yaml.safe_load((K8S / "kustomization.yaml").read_text())["resources"])
    there = {path.name for path in K8S.glob("*.yaml")}
    assert listed == there - {"kustomization.yaml", "values.yaml", "iap.yaml", "sparse-claim.yaml"}


def test_the_claim_of_sparse_staging_has_the_same_name_and_room_for_the_budget():
    (claim,), (usual,) = manifests("sparse-claim.yaml"), manifests("claim.yaml")
    assert claim["metadata"] == usual["metadata"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    readme = (K8S / "README.md").read_text()
    (budget,) = re.findall(r"name: LAION_SPARSE_BUDGET, value: (\w+)", readme)
    room = parse_size(claim["spec"]["resources"]["requests"]["storage"] + "B")
    assert 0.7 * room < parse_size(budget) < 0.9 * room


def test_sparse_pods_go_to_any_node_but_together():
    sparse = assets_for(LAION_STAGING="sparse")
    for name in ON_NVME:
        job = step_pod(sparse[name])
        validate(job)
        template = job["spec"]["template"]
        assert not {"nodeSelector", "tolerations"} & template["spec"].keys()
        (term,) = template["spec"]["affinity"]["podAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize(("said", "read_by_pods"), [(None, "full"), ("full", None), ("in-place", None)])
def test_pods_on_nvme_stage_fully_unless_it_is_said_otherwise(said, read_by_pods):
    given = {"LAION_STAGING": said} if said else {}
    pod = Placement.from_environment(given).with_index("knn_urls")
    tags = pod.op_tags["dagster-k8s/config"]
    told = {variable["name"]: variable["value"] for variable in tags["container_config"]["env"]}
    assert told.get("LAION_STAGING") == read_by_pods
    assert "node_selector" in tags["pod_spec_config"]


@pytest.mark.parametrize(("staging", "where"), [("full", "nvme_node"), ("sparse", "node_with_claim")])
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
    pools = {name: asset.op.pool for name, asset in assets_for().items()}
    assert {name for name, pool in pools.items() if pool == "building"} == BUILDING
    for folder in (REPOSITORY / "k8s" / "values.yaml", REPOSITORY / "dagster.yaml"):
        assert '"building"' in folder.read_text()


def test_claim_class_label_and_taint_are_the_same_everywhere():
    node = NvmeNode()
    (wanted,) = manifests("claim.yaml")
    assert wanted["metadata"]["name"] == node.claim
    storage = of_kind("StorageClass")
    assert wanted["spec"]["storageClassName"] == storage["metadata"]["name"]
    assert storage["volumeBindingMode"] == "WaitForFirstConsumer"
    classes = yaml.safe_load(of_kind("ConfigMap")["data"]["storageClassMap"])
    assert set(classes) == {storage["metadata"]["name"]}
    cleanup = of_kind("Deployment", "node-cleanup")["spec"]["template"]["spec"]["containers"][0]
    assert f"--storageclass-names={storage['metadata']['name']}" in cleanup["args"]
    for name in ("raid", "volume-provisioner"):
        pod = of_kind("DaemonSet", name)["spec"]["template"]["spec"]
        assert pod["nodeSelector"] == dict([node.label.split("=")])
        assert [toleration["key"] for toleration in pod["tolerations"]] == [node.taint]
    assert f"--node-taints {node.taint}=true:NoSchedule" in (K8S / "README.md").read_text()


# What the script that prepares disks calls; each notes its arguments, and does what matters of it.
STUBS = {
    "mountpoint": '[ -e "$ROOT/mounted" ]',
    "mdadm": 'mkdir -p "$ROOT/dev/md" && touch "$ROOT/dev/md/laion"',
    "blkid": '[ -e "$ROOT/formatted" ]',
    "mkfs.ext4": 'touch "$ROOT/formatted"',
    "mount": '[ ! -e "$ROOT/broken" ] && touch "$ROOT/mounted"',
}


@pytest.fixture
def prepare_disks(tmp_path) -> Callable[..., tuple[int, list[str]]]:
    """Run the real script on a node with some files; return its exit code and the commands it ran."""
    pod = of_kind("DaemonSet", "raid")["spec"]["template"]["spec"]
    (script,) = (variable["value"] for variable in pod["containers"][0]["env"])
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
MOUNT = "mount -o discard,defaults /dev/md/{} /mnt/disks/raid/0"


def test_the_disks_of_a_fresh_node_become_one_and_are_mounted_once(prepare_disks):
    failed, ran = prepare_disks(*DISKS)
    assert (failed, ran[1], ran[3:]) == (
        0, CREATE, ["mkfs.ext4 -m 0 -F /dev/md/laion", MOUNT.format("laion")]
    )  # fmt: skip
    assert prepare_disks() == (0, ["mountpoint --quiet /mnt/disks/raid/0"])


def test_an_array_that_survived_a_reboot_is_used_with_what_it_holds(prepare_disks):
    failed, ran = prepare_disks(*DISKS, "dev/md/127", "formatted")
    assert (failed, ran[1:]) == (0, ["blkid /dev/md/127", MOUNT.format("127")])


def test_a_node_without_disks_or_whose_file_system_is_broken_gets_no_volume(prepare_disks, tmp_path):
    assert prepare_disks()[0] == 1
    assert prepare_disks(*DISKS, "broken")[0] == 1
    assert not (tmp_path / "mnt" / "disks" / "raid" / "0").exists()


def test_the_proxy_is_asked_for_before_the_ui_can_be_reached_through_it():
    annotations = VALUES["dagsterWebserver"]["service"]["annotations"]
    asked = json.loads(annotations["cloud.google.com/backend-config"])
    assert asked == {"default": of_kind("BackendConfig")["metadata"]["name"]}


def test_whoever_looks_at_the_claim_may():
    for file, kind in (("renew-claim.yaml", "delete"), ("dagster-may-look.yaml", "get")):
        allowed = {
            (resource, verb)
            for manifest in manifests(file)
            for rule in manifest.get("rules", ())
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        assert allowed >= {
            ("persistentvolumeclaims", kind),
            ("persistentvolumes", kind),
            ("nodes", "list"),
        }
    accounts = {
        subject["name"]
        for manifest in manifests("dagster-may-look.yaml")
        for subject in manifest.get("subjects", ())
    }
    assert accounts == {VALUES["serviceAccount"]["name"]} == {VALUES["global"]["serviceAccountName"]}


def test_the_job_that_renews_the_claim_runs_what_there_is():
    job = of_kind("CronJob")
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"][:3] == ["python", "-m", claim.__name__]
    kustomization = yaml.safe_load((K8S / "kustomization.yaml").read_text())
    (generated,), (image,) = kustomization["configMapGenerator"], kustomization["images"]
    assert pod["volumes"][0]["configMap"]["name"] == generated["name"]
    assert container["args"][3] == f"{container['volumeMounts'][0]['mountPath']}/{generated['files'][0]}"
    assert container["image"] == image["name"] == image["name"].lower(), "or a new name would miss it"
    assert f"{image['newName']}:{image['newTag']}" == IMAGE
    assert f"--from=cronjob/{job['metadata']['name']}" in RENEW
    assert RENEW in (K8S / "README.md").read_text()
    assert (
        pod["serviceAccountName"]
        == of_kind("ServiceAccount", job["metadata"]["name"])["metadata"]["name"]
    )


def test_the_image_s_user_is_the_one_who_may_write():
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    (user, group) = re.findall(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)[0]
    assert user != "0"
    assert group == NvmeNode().group
    launched = VALUES["runLauncher"]["config"]["k8sRunLauncher"]["runK8sConfig"]
    assert launched["podSpecConfig"]["securityContext"]["fsGroup"] == int(group)
    assert "--constraint requirements.lock" in dockerfile


def test_the_same_module_and_image_serve_the_code_location_and_the_steps():
    workspace = yaml.safe_load((REPOSITORY / "workspace.yaml").read_text())
    module = workspace["load_from"][0]["python_module"]["module_name"]
    assert DEPLOYMENT["dagsterApiGrpcArgs"] == ["-m", module]
    assert DEPLOYMENT["includeConfigInLaunchedRuns"] == {"enabled": True}
    for part in ("dagsterWebserver", "dagsterDaemon"):
        assert VALUES[part]["image"] == DEPLOYMENT["image"]


def test_dagster_takes_what_the_chart_makes_of_the_values(tmp_path):
    database = {"hostname": "db", "username": "dagster", "password": "", "db_name": "dagster"}
    config = instance_config(tmp_path / "kubeconfig", database, tmp_path)
    schema = resolve_to_config_type(dagster_instance_config_schema())
    read = process_config(schema, config)
    assert read.success, read.errors


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
    told = dict(re.findall(r"^\| `(LAION_NVME_\w+)` \| `([^`]+)` \|", readme, re.MULTILINE))
    assert told == {f"LAION_NVME_{n.upper()}": value for n, value in vars(NvmeNode()).items()}


def nvme_variables() -> set[str]:
    return {f"LAION_NVME_{name.upper()}" for name in vars(NvmeNode())}


def test_dagster_and_its_chart_have_one_version():
    (locked,) = re.findall(
        r"^dagster==(.+)$", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE
    )
    told = set(re.findall(r"--version (\S+)", (K8S / "README.md").read_text()))
    assert told | set(re.findall(r"--version (\S+)", (K8S / "values.yaml").read_text())) == {locked}


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\]\(((?!https:)[^)#]+)\)", (K8S / "README.md").read_text())))
)
def test_what_the_recipe_points_to_is_there(target):
    assert (K8S / target).exists()
