"""Diagnose and renew the claim on the local volume that holds the index.

A local volume is lost with its node, but the claim stays bound to it, and every pod that mounts the claim
waits for a node that will not return. `python -m laion_assets.defs.kubernetes.claim <manifest>` deletes
such a claim and recreates it from its manifest. The claim then binds to a volume on an existing node, and
the waiting pods start.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import kubernetes
import yaml
from kubernetes.client import ApiException, CoreV1Api

HOSTNAME = "kubernetes.io/hostname"
GONE_SECONDS = 300
NOT_FOUND = 404


def what_is_wrong(core: CoreV1Api, namespace: str, name: str) -> str | None:
    """Return why no pod can mount a claim; None if it is usable or not bound yet.

    Args:
        core: client of the cluster.
        namespace: namespace of the claim.
        name: name of the claim.

    """
    claim = _found(lambda: core.read_namespaced_persistent_volume_claim(name, namespace))
    if claim is None:
        return f"the claim {name} does not exist"
    if not claim.spec.volume_name:
        return None
    bound = f"the claim {name} is bound to the volume {claim.spec.volume_name}"
    volume = _found(lambda: core.read_persistent_volume(claim.spec.volume_name))
    if volume is None:
        return f"{bound}, which is gone"
    gone = sorted(host for host in _hosts(volume) if not _is_there(core, host))
    return f"{bound} on the node {', '.join(gone)}, which is gone" if gone else None


def renew(
    core: CoreV1Api, namespace: str, manifest: Mapping[str, Any], *, poll_seconds: float = 2
) -> str:
    """Recreate a claim if no pod can mount it, and return what was done.

    The data on the old volume is already lost with its node. Pods that wait for the claim need not be
    restarted; they mount the new one.
    """
    name = manifest["metadata"]["name"]
    wrong = what_is_wrong(core, namespace, name)
    if wrong is None:
        return f"the claim {name} is usable"
    claim = _found(lambda: core.read_namespaced_persistent_volume_claim(name, namespace))
    if claim is not None:
        _delete(
            lambda: core.delete_namespaced_persistent_volume_claim(name, namespace),
            lambda: core.read_namespaced_persistent_volume_claim(name, namespace),
            poll_seconds,
        )
        _delete(
            lambda: core.delete_persistent_volume(claim.spec.volume_name),
            lambda: core.read_persistent_volume(claim.spec.volume_name),
            poll_seconds,
        )
    core.create_namespaced_persistent_volume_claim(namespace, dict(manifest))
    return f"{wrong}: the claim {name} was recreated"


def main() -> None:
    """Renew the claim of a manifest, with in-cluster credentials or kubectl's configuration."""
    parser = argparse.ArgumentParser(description="Renew a claim whose node is gone.")
    parser.add_argument("manifest", type=Path, help="the claim's manifest, k8s/claim.yaml")
    manifest = yaml.safe_load(parser.parse_args().manifest.read_text())
    kubernetes.config.load_config()
    print(renew(CoreV1Api(), manifest["metadata"]["namespace"], manifest))


def _hosts(volume: Any) -> set[str]:
    """Return the hosts of a local volume, from its node affinity."""
    required = volume.spec.node_affinity and volume.spec.node_affinity.required
    return {
        host
        for term in (required.node_selector_terms if required else ())
        for expression in term.match_expressions or ()
        if expression.key == HOSTNAME
        for host in expression.values
    }


def _is_there(core: CoreV1Api, host: str) -> bool:
    return bool(core.list_node(label_selector=f"{HOSTNAME}={host}").items)


def _delete(delete: Callable[[], Any], read: Callable[[], Any], poll_seconds: float) -> None:
    """Delete an object and wait until it is gone: finalizers keep it while a pod still uses it."""
    _found(delete)
    deadline = time.monotonic() + GONE_SECONDS
    while (there := _found(read)) is not None:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{there.metadata.name} still exists after {GONE_SECONDS} s: delete the pods that use "
                "it (kubectl get pods -o wide), then renew again"
            )
        time.sleep(poll_seconds)


def _found(call: Callable[[], Any]) -> Any:
    """Return the cluster's answer, or None if the object does not exist."""
    try:
        return call()
    except ApiException as error:
        if error.status == NOT_FOUND:
            return None
        raise


if __name__ == "__main__":
    main()
