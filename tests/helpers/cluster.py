"""A stand-in for a Kubernetes cluster: an API server whose pods are processes on this machine.

It takes objects only if Kubernetes' strict schemas, the syntax of labels and k8s/policy.yaml allow them.
It models what placement on local disks is about: nodes with labels, taints, cores and memory, each NVMe
node with a folder of its own; required and preferred affinity; pods that stay Pending when nothing fits;
a pool that an autoscaler grows from zero; nodes that go and come back; containers that are killed above
their memory limit, or that may write only to their volumes. It has no claims, quotas, users, images,
network or RBAC.
"""

from __future__ import annotations

import copy
import itertools
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
from helpers.policy import denials
from helpers.project import REPOSITORY

VERSION = "1.34"
KINDS = {
    "jobs": ("batch/v1", "Job"),
    "pods": ("v1", "Pod"),
    "nodes": ("v1", "Node"),
    "events": ("v1", "Event"),
}
PATH = re.compile(r"^/(?:api|apis/batch)/v1(?:/namespaces/([^/]+))?/(\w+)(?:/([^/]+))?(?:/(\w+))?$")
LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
GRACE_SECONDS = 10
SCALE_UP_SECONDS = 1
GKE_16_CORES = 15.89  # what GKE leaves of 16 for pods
LOG = "log"
IN_THE_IMAGE = "/opt/dagster/dagster_home"
WORKING_FOLDER = "/home/laion"  # of the image
NVME = "laion-assets/nvme"  # label and taint of the pool's nodes, as in k8s/README.md
FOLDER = "/mnt/disks/raid/0/laion"  # k8s/disks.yaml makes it on each NVMe node
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"

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
    pool_size: int = 0  # NVMe nodes that the autoscaler may add

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.objects: dict[tuple[str, str], Object] = {}  # by plural and name: names are unique here
        self.running: dict[str, Running] = {}
        self.written: dict[str, list[str]] = {}  # by pod, what it wrote outside its volumes
        self.scaling_up_at: float | None = None
        self.scaled_up = 0
        self.stopped = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.kubeconfig = self.root / "kubeconfig"
        self.kubeconfig.write_text(_kubeconfig(self.server.server_port))

    # --- what an operator sees to -----------------------------------------------------------------

    def add_node(
        self, name: str, *, nvme: bool, cpu: float = GKE_16_CORES, memory: str = "128Gi"
    ) -> None:
        """Add a node; a node with NVMe has an empty folder for the index."""
        with self.lock:
            self.create("nodes", "", _node(name, nvme, cpu, memory))
            if nvme:
                self.disk(name).mkdir(parents=True)

    def remove_node(self, name: str) -> None:
        """Remove a node with its pods and its disk."""
        with self.lock:
            for pod in self.of("pods"):
                if pod["spec"].get("nodeName") == name:
                    self._kill(pod["metadata"]["name"])
                    self.running.pop(pod["metadata"]["name"], None)
                    del self.objects["pods", pod["metadata"]["name"]]
            del self.objects["nodes", name]
            shutil.rmtree(self.root / "nodes" / name, ignore_errors=True)

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
        """The folder of the index on a node."""
        return self.root / "nodes" / node / FOLDER.lstrip("/")

    def nodes(self) -> list[str]:
        """The names of the nodes."""
        return [node["metadata"]["name"] for node in self.of("nodes")]

    def pods_of(self, step: str, phase: str | None = None) -> list[Object]:
        """The pods of an asset's steps, or of those steps that a longer name begins, oldest first."""
        with self.lock:
            return [
                copy.deepcopy(pod)
                for pod in self.of("pods")
                if pod["metadata"]["labels"].get("dagster/op", "").startswith(step)
                and phase in (None, pod["status"]["phase"])
            ]

    # --- objects ----------------------------------------------------------------------------------

    def of(self, plural: str) -> list[Object]:
        return [made for (kind, _), made in list(self.objects.items()) if kind == plural]

    def create(self, plural: str, namespace: str, manifest: Object) -> Object:
        version, kind = KINDS[plural]
        made = copy.deepcopy({"apiVersion": version, "kind": kind} | manifest)
        kubernetes_validate.validate(made, VERSION, strict=True)
        for labels in _all_labels(made):
            for key, value in labels.items():
                if not LABEL_VALUE.fullmatch(value):
                    raise jsonschema.ValidationError(f"the label {key} is {value!r}")
        if plural == "pods" and (denied := denials(made)):
            raise PermissionError(f"ValidatingAdmissionPolicy denied request: {'; '.join(denied)}")
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
        """Delete an object, after the processes of its pod have ended."""
        with self.lock:
            found = self.objects[plural, name]
            found["metadata"]["deletionTimestamp"] = _now()
            if plural == "pods" and name in self.running:
                running = self.running[name]
                running.kill_at = running.kill_at or time.monotonic() + GRACE_SECONDS
                _signal(running.process, signal.SIGTERM)

    # --- controllers ------------------------------------------------------------------------------

    def work(self) -> None:
        for tick in itertools.count():
            if self.stopped.wait(0.1):
                return
            with self.lock:
                for job in self.of("jobs"):
                    self._control(job)
                for pod in self.of("pods"):
                    if "nodeName" not in pod["spec"]:
                        self._schedule(pod)
                    self._watch(pod)
                self._scale_up()
                if tick % 5 == 0:
                    self._end_those_out_of_memory()
                self._remove_what_may_go()

    def _control(self, job: Object) -> None:
        """One pod for each job, and none after it: backoffLimit is 0."""
        name, status = job["metadata"]["name"], job["status"]
        if status.get("succeeded") or status.get("failed"):
            return
        pods = [pod for pod in self.of("pods") if pod["metadata"]["labels"].get("job-name") == name]
        if not status:
            try:
                self._start_pod(job)
                status["active"] = 1
            except PermissionError as error:
                status["conditions"] = [_condition("FailedCreate", "True", "Forbidden", str(error))]
        elif "active" not in status:
            return  # a real controller tries again and again
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
        """Bind a pod to the node that fits it best."""
        reasons: Counter[str] = Counter()
        fitting = []
        for node in self.of("nodes"):
            reason = self._misfit(pod, node)
            if reason is None:
                fitting.append(node)
            else:
                reasons[reason] += 1
        if fitting:
            best = max(fitting, key=lambda node: self._score(pod, node))
            pod["spec"]["nodeName"] = best["metadata"]["name"]
            pod["status"]["conditions"] = [_condition("PodScheduled", "True")]
            return
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        message = f"0/{len(self.of('nodes'))} nodes are available: {told}."
        pod["status"]["conditions"] = [_condition("PodScheduled", "False", "Unschedulable", message)]

    def _misfit(self, pod: Object, node: Object) -> str | None:
        """Why a pod cannot run on a node, in the scheduler's words."""
        labels = node["metadata"]["labels"]
        wanted = pod["spec"].get("nodeSelector", {})
        affinity = pod["spec"].get("affinity", {})
        terms = affinity.get("nodeAffinity", {}).get(REQUIRED, {}).get("nodeSelectorTerms", [{}])
        if not wanted.items() <= labels.items() or not any(_selects(term, labels) for term in terms):
            return "node(s) didn't match Pod's node affinity/selector"
        for taint in node["spec"].get("taints", ()):
            if not any(_tolerates(one, taint) for one in pod["spec"].get("tolerations", ())):
                return f"node(s) had untolerated taint {{{taint['key']}: {taint['value']}}}"
        if any(not self._near(term, node) for term in affinity.get("podAffinity", {}).get(REQUIRED, ())):
            return "node(s) didn't match pod affinity rules"
        if any(self._near(term, node) for term in affinity.get("podAntiAffinity", {}).get(REQUIRED, ())):
            return "node(s) didn't match pod anti-affinity rules"
        return self._short_of(pod, node)

    def _score(self, pod: Object, node: Object) -> int:
        """How well a node suits a pod: the weights of the preferences that it meets."""
        affinity = pod["spec"].get("affinity", {})
        labels = node["metadata"]["labels"]
        nodes = affinity.get("nodeAffinity", {}).get(PREFERRED, ())
        apart = affinity.get("podAntiAffinity", {}).get(PREFERRED, ())
        met = sum(term["weight"] for term in nodes if _selects(term["preference"], labels))
        near = sum(term["weight"] for term in apart if self._near(term["podAffinityTerm"], node))
        return int(met - near)

    def _near(self, term: Object, node: Object) -> bool:
        """Whether a pod that a term selects runs on a node."""
        assert term["topologyKey"] == "kubernetes.io/hostname"
        wanted = term["labelSelector"]["matchLabels"].items()
        return any(wanted <= other["metadata"]["labels"].items() for other in self._pods_on(node))

    def _pods_on(self, node: Object) -> list[Object]:
        return [
            pod
            for pod in self.of("pods")
            if pod["spec"].get("nodeName") == node["metadata"]["name"]
            and pod["status"]["phase"] in ("Pending", "Running")
        ]

    def _short_of(self, pod: Object, node: Object) -> str | None:
        there = node["status"]["allocatable"]
        for resource in ("cpu", "memory", "ephemeral-storage"):
            used = sum(_requested(other, resource) for other in (*self._pods_on(node), pod))
            if used > _quantity(there[resource]):
                return f"Insufficient {resource}"
        return None

    def _scale_up(self) -> None:
        """Add a node to the pool if a pod that fits no node would fit a new one."""
        grown = [name for name in self.nodes() if name.startswith("pool-")]
        new = _node(f"pool-{self.scaled_up + 1}", nvme=True)
        waiting = [pod for pod in self.of("pods") if "nodeName" not in pod["spec"]]
        if len(grown) >= self.pool_size or not any(self._misfit(pod, new) is None for pod in waiting):
            self.scaling_up_at = None
        elif self.scaling_up_at is None:
            self.scaling_up_at = time.monotonic() + SCALE_UP_SECONDS
        elif time.monotonic() > self.scaling_up_at:
            self.scaling_up_at = None
            self.scaled_up += 1
            self.add_node(new["metadata"]["name"], nvme=True)

    def _remove_what_may_go(self) -> None:
        for (plural, name), found in list(self.objects.items()):
            if "deletionTimestamp" in found["metadata"] and name not in self.running:
                del self.objects[plural, name]

    # --- kubelet ----------------------------------------------------------------------------------

    def _watch(self, pod: Object) -> None:
        name, status = pod["metadata"]["name"], pod["status"]
        if status["phase"] == "Pending" and "nodeName" in pod["spec"]:
            if missing := self._missing_folder(pod):
                waiting = {"reason": "ContainerCreating", "message": f"{missing} is not a directory"}
                status["containerStatuses"] = [_container(pod, {"waiting": waiting})]
            elif "deletionTimestamp" not in pod["metadata"]:
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
        self.written[name] = _files(self.root / "pods" / name)
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
        for folder in (IN_THE_IMAGE, WORKING_FOLDER):
            (root / folder.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (root / IN_THE_IMAGE.lstrip("/")).mkdir()
        for mount in container.get("volumeMounts", ()):
            inside = root / mount["mountPath"].lstrip("/")
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.symlink_to(self._source(pod, mount["name"]))
        working = root / WORKING_FOLDER.lstrip("/")
        working.mkdir(exist_ok=True)

        def found(text: str) -> str:
            inside = root / text.lstrip("/")
            return str(inside) if text.startswith("/") and inside.exists() else text

        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),  # what the image contains
            "HOME": str(working),
            "TMPDIR": found("/tmp"),
            "HOSTNAME": pod["metadata"]["name"],
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self.server.server_port),
            "KUBECONFIG": str(self.kubeconfig),
            **self.environment,
        }
        for variable in container.get("env", ()):
            environment[variable["name"]] = found(self._value(pod, variable))
        log = root / LOG
        with log.open("wb") as file:
            process = subprocess.Popen(
                [found(argument) for argument in container["args"]],
                cwd=working,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Running(process, log)

    def _source(self, pod: Object, name: str) -> Path:
        """What a volume of a pod is on this machine."""
        volume = _volume(pod, name)
        if "hostPath" in volume:
            return self._on_node(pod, volume)
        assert "emptyDir" in volume, f"the stand-in does not know {volume}"
        folder = self.root / "volumes" / pod["metadata"]["name"] / name
        folder.mkdir(parents=True)
        return folder

    def _on_node(self, pod: Object, volume: Object) -> Path:
        path: str = volume["hostPath"]["path"]
        return self.root / "nodes" / pod["spec"]["nodeName"] / path.lstrip("/")

    def _missing_folder(self, pod: Object) -> str | None:
        """A folder that a pod mounts but its node lacks; the kubelet waits for it."""
        for volume in pod["spec"].get("volumes", ()):
            if volume.get("hostPath", {}).get("type") == "Directory":
                folder = self._on_node(pod, volume)
                if not folder.is_dir():
                    return str(volume["hostPath"]["path"])
        return None

    def _value(self, pod: Object, variable: Object) -> str:
        if "value" in variable:
            return str(variable["value"])
        if "fieldRef" in variable["valueFrom"]:
            assert variable["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"
            return str(pod["spec"]["nodeName"])
        reference = variable["valueFrom"]["secretKeyRef"]
        return self.secrets[reference["name"]][reference["key"]]

    def _end_those_out_of_memory(self) -> None:
        """Kill containers whose processes hold more memory of their own than their limit."""
        held = _held_memory()
        for name, running in self.running.items():
            pod = self.objects.get(("pods", name))
            limit = pod and _limit(pod)
            if limit and held[running.process.pid] > limit:
                running.reason = "OOMKilled"
                self._kill(name)

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
                if name is None and not all(map(LABEL_VALUE.fullmatch, self.selector().values())):
                    self.answer(400, {"message": f"unable to parse requirement: {self.selector()}"})
                elif name is None:
                    self.answer(200, {"items": self.selected(cluster.of(plural))})
                elif (plural, name) not in cluster.objects:
                    self.answer(404, {"message": f'{plural} "{name}" not found'})
                elif part == "log":
                    self.answer(200, (cluster.root / "pods" / name / LOG).read_text())
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
            except PermissionError as error:
                self.answer(403, {"message": str(error)})

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

        def selector(self) -> dict[str, str]:
            text = parse_qs(urlparse(self.path).query).get("labelSelector", [""])[0]
            pairs = [pair.partition("=") for pair in text.split(",") if pair]
            return {key: value for key, _, value in pairs}

        def selected(self, objects: list[Object]) -> list[Object]:
            wanted = self.selector().items()
            return [o for o in objects if wanted <= o["metadata"].get("labels", {}).items()]

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


def _node(name: str, nvme: bool, cpu: float = GKE_16_CORES, memory: str = "128Gi") -> Object:
    labels = {"kubernetes.io/hostname": name} | ({NVME: "true"} if nvme else {})
    taints = [{"key": NVME, "value": "true", "effect": "NoSchedule"}] if nvme else []
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"taints": taints} if taints else {},
        "status": {
            "allocatable": {"cpu": str(cpu), "memory": memory, "ephemeral-storage": str(300 * 10**9)}
        },
    }


def _selects(term: Object, labels: dict[str, str]) -> bool:
    """Whether a term of node affinity selects a node."""
    expressions = term.get("matchExpressions", ())
    assert all(expression["operator"] == "In" for expression in expressions)
    return all(labels.get(one["key"]) in one["values"] for one in expressions)


def _tolerates(toleration: Object, taint: Object) -> bool:
    exists = toleration.get("operator") == "Exists"
    return (
        toleration.get("key") in (None, taint["key"])
        and toleration.get("effect") in (None, taint["effect"])
        and (exists or toleration.get("value") == taint["value"])
    )


def _all_labels(made: Object) -> list[dict[str, str]]:
    template = made.get("spec", {}).get("template", {})
    return [part.get("metadata", {}).get("labels", {}) for part in (made, template)]


def _volume(pod: Object, name: str) -> Object:
    (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == name]
    found: Object = volume
    return found


def _files(root: Path) -> list[str]:
    """What there is in the root of a pod beside its log and its volumes, which are links."""
    return [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink() and path != root / LOG
    ]


def _held_memory() -> Counter[int]:
    """Bytes of anonymous memory and page tables by session, which a pod's first process leads."""
    held: Counter[int] = Counter()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            sizes = re.findall(r"^(?:RssAnon|VmPTE):\s+(\d+) kB$", status, re.MULTILINE)
            held[os.getsid(int(folder.name))] += 1024 * sum(map(int, sizes))
        except OSError:
            continue  # the process ended meanwhile
    return held


def _limit(pod: Object) -> float | None:
    (container,) = pod["spec"]["containers"]
    text = container.get("resources", {}).get("limits", {}).get("memory")
    return _quantity(text) if text else None


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
