"""A stand-in for a Kubernetes cluster: an API server whose pods are processes on this machine.

It takes objects only if Kubernetes' strict schemas do, and models what placement on local disks is
about: nodes with labels, taints, cores and memory; a volume on the disk of each NVMe node; a claim that
binds to the first node it is used on; pods that stay Pending when nothing fits; nodes that go and come
back. It has no admission, quotas, users, images or RBAC, and enforces no memory limit.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import jsonschema
import kubernetes_validate

VERSION = "1.34"
KINDS = {
    "jobs": ("batch/v1", "Job"),
    "pods": ("v1", "Pod"),
    "nodes": ("v1", "Node"),
    "events": ("v1", "Event"),
    "persistentvolumes": ("v1", "PersistentVolume"),
    "persistentvolumeclaims": ("v1", "PersistentVolumeClaim"),
}
PATH = re.compile(r"^/(?:api|apis/batch)/v1(?:/namespaces/([^/]+))?/(\w+)(?:/([^/]+))?(?:/(\w+))?$")
GRACE_SECONDS = 10
IN_THE_IMAGE = "/opt/dagster/dagster_home"

Object = dict[str, Any]


@dataclass
class Running:
    """The process of a pod."""

    process: subprocess.Popen[bytes]
    log: Path
    reason: str = "Error"
    kill_at: float | None = None


@dataclass
class Cluster:
    """Nodes, objects and processes; a thread does what controllers, scheduler and kubelets would."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    config_maps: dict[str, dict[str, str]] = field(default_factory=dict)
    storage_class: str = "laion-nvme"

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.objects: dict[tuple[str, str], Object] = {}  # by plural and name: names are unique here
        self.running: dict[str, Running] = {}
        self.stopped = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.kubeconfig = self.root / "kubeconfig"
        self.kubeconfig.write_text(_kubeconfig(self.server.server_port))

    # --- what an operator sees to -----------------------------------------------------------------

    def add_node(self, name: str, *, nvme: bool, cpu: int = 16, memory: str = "128Gi") -> None:
        """Add a node; a node with NVMe has an empty disk with a volume."""
        labels = {"kubernetes.io/hostname": name}
        spec: Object = {}
        if nvme:
            labels["cloud.google.com/gke-local-nvme-ssd"] = "true"
            spec["taints"] = [{"key": "laion-assets/nvme", "value": "true", "effect": "NoSchedule"}]
        node = {
            "metadata": {"name": name, "labels": labels},
            "spec": spec,
            "status": {"allocatable": {"cpu": str(cpu), "memory": memory}},
        }
        with self.lock:
            self.create("nodes", "", node)
            if nvme:
                self.disk(name).mkdir(parents=True)
                if ("persistentvolumes", f"local-{name}") not in self.objects:
                    self.create("persistentvolumes", "", _volume(name, self.storage_class))

    def remove_node(self, name: str) -> None:
        """Remove a node with its pods and its disk."""
        with self.lock:
            for pod in self.of("pods"):
                if pod["spec"].get("nodeName") == name:
                    self._kill(pod["metadata"]["name"])
                    self.running.pop(pod["metadata"]["name"], None)
                    del self.objects["pods", pod["metadata"]["name"]]
            del self.objects["nodes", name]
            shutil.rmtree(self.disk(name), ignore_errors=True)

    def replace_node(self, name: str) -> None:
        """Replace a node with one of the same name and an empty disk."""
        self.remove_node(name)
        self.add_node(name, nvme=True)

    def kill(self, pod: str, reason: str = "Error") -> None:
        """Kill the process of a pod with SIGKILL, as the kernel does."""
        with self.lock:
            self.running[pod].reason = reason
            self._kill(pod)

    def disk(self, node: str) -> Path:
        """The disk of a node."""
        return self.root / "nodes" / node

    def pods_of(self, asset: str, phase: str | None = None) -> list[Object]:
        """The pods of an asset, oldest first."""
        with self.lock:
            return [
                copy.deepcopy(pod)
                for pod in self.of("pods")
                if pod["metadata"]["labels"].get("laion-assets/asset") == asset
                and phase in (None, pod["status"]["phase"])
            ]

    # --- objects ----------------------------------------------------------------------------------

    def of(self, plural: str) -> list[Object]:
        return [made for (kind, _), made in list(self.objects.items()) if kind == plural]

    def create(self, plural: str, namespace: str, manifest: Object) -> Object:
        version, kind = KINDS[plural]
        made = copy.deepcopy({"apiVersion": version, "kind": kind} | manifest)
        kubernetes_validate.validate(made, VERSION, strict=True)
        made["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": _now()}
        if namespace:
            made["metadata"]["namespace"] = namespace
        made.setdefault("status", {})
        with self.lock:
            key = plural, made["metadata"]["name"]
            if key in self.objects:
                raise FileExistsError(f"{plural} {key[1]} exists")
            self.objects[key] = made
        return made

    def delete(self, plural: str, name: str) -> None:
        """Delete an object, after the processes of its pod or of its claim's pods have ended."""
        with self.lock:
            found = self.objects[plural, name]
            found["metadata"]["deletionTimestamp"] = _now()
            if plural == "pods" and name in self.running:
                running = self.running[name]
                running.kill_at = running.kill_at or time.monotonic() + GRACE_SECONDS
                _signal(running.process, signal.SIGTERM)

    # --- controllers ------------------------------------------------------------------------------

    def work(self) -> None:
        while not self.stopped.wait(0.1):
            with self.lock:
                for job in self.of("jobs"):
                    self._control(job)
                for pod in self.of("pods"):
                    if "nodeName" not in pod["spec"]:
                        self._schedule(pod)
                    self._watch(pod)
                self._remove_what_may_go()

    def _control(self, job: Object) -> None:
        """One pod for each job, and none after it: backoffLimit is 0."""
        name, status = job["metadata"]["name"], job["status"]
        if status.get("succeeded") or status.get("failed"):
            return
        pods = [pod for pod in self.of("pods") if pod["metadata"]["labels"].get("job-name") == name]
        if not status:
            self._start_pod(job)
            status["active"] = 1
        elif not pods or pods[0]["status"]["phase"] == "Failed":
            job["status"] = {"failed": 1, "conditions": [_condition("Failed", "True")]}
        elif pods[0]["status"]["phase"] == "Succeeded":
            job["status"] = {"succeeded": 1, "conditions": [_condition("Complete", "True")]}

    def _start_pod(self, job: Object) -> None:
        template = copy.deepcopy(job["spec"]["template"])
        name = f"{job['metadata']['name']}-{uuid.uuid4().hex[:5]}"
        metadata = template.get("metadata", {})
        metadata["labels"] = metadata.get("labels", {}) | {"job-name": job["metadata"]["name"]}
        metadata["name"] = name
        pod = {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending"}}
        self.create("pods", job["metadata"]["namespace"], pod)

    def _schedule(self, pod: Object) -> None:
        """Bind a pod to the first node that fits, and its claim to that node's volume."""
        reasons: Counter[str] = Counter()
        for node in self.of("nodes"):
            reason = self._misfit(pod, node)
            if reason is None:
                pod["spec"]["nodeName"] = node["metadata"]["name"]
                pod["status"]["conditions"] = [_condition("PodScheduled", "True")]
                for claim in self._claims(pod):
                    if claim is not None and "volumeName" not in claim["spec"]:
                        self._bind(claim, node)
                return
            reasons[reason] += 1
        missing = [
            name for name, claim in zip(_claim_names(pod), self._claims(pod), strict=True) if not claim
        ]
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        message = (
            f'persistentvolumeclaim "{missing[0]}" not found'
            if missing
            else f"0/{len(self.of('nodes'))} nodes are available: {told}."
        )
        pod["status"]["conditions"] = [_condition("PodScheduled", "False", "Unschedulable", message)]

    def _misfit(self, pod: Object, node: Object) -> str | None:
        """Why a pod cannot run on a node, in the scheduler's words."""
        labels = node["metadata"]["labels"]
        wanted = pod["spec"].get("nodeSelector", {})
        if not wanted.items() <= labels.items():
            return "node(s) didn't match Pod's node affinity/selector"
        tolerated = {toleration.get("key") for toleration in pod["spec"].get("tolerations", ())}
        for taint in node["spec"].get("taints", ()):
            if taint["key"] not in tolerated:
                return f"node(s) had untolerated taint {{{taint['key']}: {taint['value']}}}"
        for claim in self._claims(pod):
            if claim is None or "deletionTimestamp" in claim["metadata"]:
                return "node(s) without the claim"
            volume = claim["spec"].get("volumeName")
            if volume and volume != f"local-{node['metadata']['name']}":
                return "node(s) had volume node affinity conflict"
            if not volume and not self._free_volume(claim, node):
                return "node(s) didn't find available persistent volumes to bind"
        return self._short_of(pod, node)

    def _short_of(self, pod: Object, node: Object) -> str | None:
        there = node["status"]["allocatable"]
        here = [
            other
            for other in self.of("pods")
            if other["spec"].get("nodeName") == node["metadata"]["name"]
            and other["status"]["phase"] in ("Pending", "Running")
        ]
        for resource in ("cpu", "memory"):
            used = sum(_requested(other, resource) for other in (*here, pod))
            if used > _quantity(there[resource]):
                return f"Insufficient {resource}"
        return None

    def _claims(self, pod: Object) -> list[Object | None]:
        return [self.objects.get(("persistentvolumeclaims", name)) for name in _claim_names(pod)]

    def _free_volume(self, claim: Object, node: Object) -> Object | None:
        volume = self.objects.get(("persistentvolumes", f"local-{node['metadata']['name']}"))
        fits = (
            volume
            and "claimRef" not in volume["spec"]
            and volume["spec"]["storageClassName"] == claim["spec"]["storageClassName"]
            and _quantity(volume["spec"]["capacity"]["storage"])
            >= _quantity(claim["spec"]["resources"]["requests"]["storage"])
        )
        return volume if fits else None

    def _bind(self, claim: Object, node: Object) -> None:
        volume = self._free_volume(claim, node)
        assert volume
        volume["spec"]["claimRef"] = {"name": claim["metadata"]["name"], "uid": claim["metadata"]["uid"]}
        claim["spec"]["volumeName"] = volume["metadata"]["name"]
        claim["status"] = {"phase": "Bound"}

    def _remove_what_may_go(self) -> None:
        for (plural, name), found in list(self.objects.items()):
            if "deletionTimestamp" not in found["metadata"]:
                continue
            used = plural == "persistentvolumeclaims" and any(
                name in _claim_names(pod)
                and "nodeName" in pod["spec"]
                and pod["status"]["phase"] in ("Pending", "Running")
                for pod in self.of("pods")
            )
            if not used and name not in self.running:
                del self.objects[plural, name]

    # --- kubelet ----------------------------------------------------------------------------------

    def _watch(self, pod: Object) -> None:
        name, status = pod["metadata"]["name"], pod["status"]
        if status["phase"] == "Pending" and "nodeName" in pod["spec"]:
            if "deletionTimestamp" not in pod["metadata"]:
                self.running[name] = self._start(pod)
                status |= {"phase": "Running", "containerStatuses": [_container(pod, {"running": {}})]}
            return
        running = self.running.get(name)
        if running is None:
            return
        code = running.process.poll()
        if code is None:
            if running.kill_at and time.monotonic() > running.kill_at:
                self._kill(name)
            return
        del self.running[name]
        ended = {
            "exitCode": code if code >= 0 else 128 - code,
            "reason": "Completed" if code == 0 else running.reason,
        }
        status["phase"] = "Succeeded" if code == 0 else "Failed"
        status["containerStatuses"] = [_container(pod, {"terminated": ended})]

    def _start(self, pod: Object) -> Running:
        """Run a pod's command here; paths of its own file system are found under its root."""
        (container,) = pod["spec"]["containers"]
        root = self.root / "pods" / pod["metadata"]["name"]
        (root / IN_THE_IMAGE.lstrip("/")).mkdir(parents=True)
        for mount in container.get("volumeMounts", ()):
            inside = root / mount["mountPath"].lstrip("/")
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.symlink_to(self._source(pod, mount["name"], root))

        def found(text: str) -> str:
            inside = root / text.lstrip("/")
            return str(inside) if text.startswith("/") and inside.exists() else text

        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(root),
            "HOSTNAME": pod["metadata"]["name"],
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self.server.server_port),
            "KUBECONFIG": str(self.kubeconfig),
            **self.environment,
        }
        for variable in container.get("env", ()):
            environment[variable["name"]] = found(self._value(variable))
        log = root / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [found(argument) for argument in container["args"]],
                cwd=root,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Running(process, log)

    def _source(self, pod: Object, name: str, root: Path) -> Path:
        """What a volume of a pod is on this machine."""
        (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == name]
        if "persistentVolumeClaim" in volume:
            return self.disk(pod["spec"]["nodeName"])
        folder = root / "config-maps" / name
        folder.mkdir(parents=True)
        for key, text in self.config_maps[volume["configMap"]["name"]].items():
            (folder / key).write_text(text)
        return folder

    def _value(self, variable: Object) -> str:
        if "value" in variable:
            return str(variable["value"])
        reference = variable["valueFrom"]["secretKeyRef"]
        return self.secrets[reference["name"]][reference["key"]]

    def _kill(self, pod: str) -> None:
        if pod in self.running:
            _signal(self.running[pod].process, signal.SIGKILL)


@contextmanager
def running_cluster(root: Path, **settings: Any) -> Iterator[Cluster]:
    """A cluster that serves, and takes all its processes with it."""
    cluster = Cluster(root, **settings)
    threads = [
        threading.Thread(target=cluster.server.serve_forever),
        threading.Thread(target=cluster.work),
    ]
    for thread in threads:
        thread.start()
    try:
        yield cluster
    finally:
        cluster.stopped.set()
        cluster.server.shutdown()
        cluster.server.server_close()
        for thread in threads:
            thread.join()
        for running in cluster.running.values():
            _signal(running.process, signal.SIGKILL)
            running.process.wait()


def _handler(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _, plural, name, part = self.target()
            with cluster.lock:
                if name is None:
                    self.answer(200, {"items": self.selected(cluster.of(plural))})
                elif (plural, name) not in cluster.objects:
                    self.answer(404, {"message": f'{plural} "{name}" not found'})
                elif part == "log":
                    self.answer(200, (cluster.root / "pods" / name / "log").read_text())
                else:
                    self.answer(200, cluster.objects[plural, name])

        def do_POST(self) -> None:
            namespace, plural, _, _ = self.target()
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self.answer(201, cluster.create(plural, namespace, body))
            except jsonschema.ValidationError as error:
                self.answer(422, {"message": error.message})
            except FileExistsError as error:
                self.answer(409, {"message": str(error)})

        def do_DELETE(self) -> None:
            _, plural, name, _ = self.target()
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if (plural, name) not in cluster.objects:
                return self.answer(404, {"message": f'{plural} "{name}" not found'})
            cluster.delete(plural, name)
            return self.answer(200, {"kind": "Status", "status": "Success"})

        def target(self) -> tuple[str, str, str, str]:
            found = PATH.match(urlparse(self.path).path)
            assert found, f"the stand-in does not know {self.path}"
            namespace, plural, name, part = found.groups()
            return namespace, plural, name, part

        def selected(self, objects: list[Object]) -> list[Object]:
            selector = parse_qs(urlparse(self.path).query).get("labelSelector", [""])[0]
            wanted = {tuple(pair.split("=", 1)) for pair in selector.split(",") if pair}
            return [o for o in objects if wanted <= set(o["metadata"].get("labels", {}).items())]

        def answer(self, code: int, body: Object | str) -> None:
            text = body if isinstance(body, str) else json.dumps(body)
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def wait_until(what: Callable[[], Any], told: str, seconds: float = 180) -> Any:
    """Wait for something to be true and return it."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain until {told}"
        time.sleep(0.2)
    return found


def _volume(node: str, storage_class: str) -> Object:
    return {
        "metadata": {"name": f"local-{node}"},
        "spec": {
            "capacity": {"storage": "2900Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": storage_class,
            "local": {"path": "/mnt/disks/raid/0"},
            "nodeAffinity": {
                "required": {
                    "nodeSelectorTerms": [
                        {
                            "matchExpressions": [
                                {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
                            ]
                        }
                    ]
                }
            },
        },
    }


def _claim_names(pod: Object) -> list[str]:
    volumes = pod["spec"].get("volumes", ())
    return [v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v]


def _requested(pod: Object, resource: str) -> float:
    (container,) = pod["spec"]["containers"]
    return _quantity(container.get("resources", {}).get("requests", {}).get(resource, "0"))


def _quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi|)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"m": 1e-3, "": 1, "Mi": 2**20, "Gi": 2**30}[unit]


def _condition(kind: str, status: str, reason: str = "", message: str = "") -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def _container(pod: Object, state: Object) -> Object:
    (container,) = pod["spec"]["containers"]
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "ready": "running" in state,
        "restartCount": 0,
        "state": state,
    }


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _kubeconfig(port: int) -> str:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "stand-in",
        "clusters": [{"name": "stand-in", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "nobody", "user": {}}],
        "contexts": [
            {
                "name": "stand-in",
                "context": {"cluster": "stand-in", "user": "nobody", "namespace": "laion"},
            }
        ],
    }
    return json.dumps(config)
