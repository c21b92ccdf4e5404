"""Run each step in a pod with Dagster's executor, near a copy of the index.

Dagster waits forever for a Pending pod and reports no reason. Here the step fails after a timeout and
reports the reason.

Dagster's concept: https://docs.dagster.io/deployment/oss/deployment-options/kubernetes
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg
from dagster_k8s import k8s_job_executor
from dagster_k8s.utils import sanitize_k8s_label
from kubernetes.client import CoreV1Api

from laion_assets.defs.dagster_internals import (
    CheckStepHealthResult,
    DagsterEvent,
    SerializableErrorInfo,
    StepDelegatingExecutor,
    StepFailureData,
    StepHandler,
    StepHandlerContext,
    UserFailureData,
    multiple_process_executor_requirements,
)
from laion_assets.defs.history import nodes_with_a_copy
from laion_assets.defs.kubernetes.placement import COPY_LABEL, HOSTNAME, NvmeNode

CONFIG_TAG = "dagster-k8s/config"
AFFINITY_WEIGHT = 100  # the most; it outweighs a node without other pods


def step_pods(node: NvmeNode) -> dg.ExecutorDefinition:
    """Return Dagster's `k8s_job_executor` with a preference for copies and a timeout for Pending pods."""

    def create(context: dg.InitExecutorContext) -> dg.Executor:
        make = k8s_job_executor.executor_creation_fn
        made = make(context) if make else None
        if not isinstance(made, StepDelegatingExecutor):
            raise TypeError(f"k8s_job_executor returned {made!r}: dagster-k8s has changed")
        made._step_handler = IndexStepHandler(made._step_handler, CoreV1Api(), node)
        return made

    return dg.ExecutorDefinition(
        name=k8s_job_executor.name,
        config_schema=k8s_job_executor.config_schema.as_field(),
        requirements=multiple_process_executor_requirements(),
        executor_creation_fn=create,
    )


class NearCopies:
    """The context of a step to launch, whose pod prefers nodes with a copy of the index."""

    def __init__(self, context: StepHandlerContext, nodes: Sequence[str]) -> None:
        self._context, self._nodes = context, nodes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @property
    def step_tags(self) -> Mapping[str, Mapping[str, str]]:
        """Return the tags of the steps, with the preference where a step reads the copy of its node."""
        return {step: prefer_nodes(tags, self._nodes) for step, tags in self._context.step_tags.items()}


def prefer_nodes(tags: Mapping[str, str], nodes: Sequence[str]) -> Mapping[str, str]:
    """Return the tags of a step with a preference for nodes, if its copy of the index is on its node.

    Any other NVMe node remains possible: the step then stages the index there.
    """
    config = json.loads(tags.get(CONFIG_TAG, "{}"))
    labels = config.get("pod_template_spec_metadata", {}).get("labels", {})
    if not nodes or labels.get(COPY_LABEL) != "node":
        return tags
    has_copy = {"key": HOSTNAME, "operator": "In", "values": list(nodes)}
    config["pod_spec_config"]["affinity"]["node_affinity"] = {
        "preferred_during_scheduling_ignored_during_execution": [
            {"weight": AFFINITY_WEIGHT, "preference": {"match_expressions": [has_copy]}}
        ]
    }
    return {**tags, CONFIG_TAG: json.dumps(config)}


class IndexStepHandler(StepHandler):
    """A step handler that starts steps near copies, and fails steps whose pod stays Pending."""

    def __init__(self, handler: StepHandler, core: CoreV1Api, node: NvmeNode) -> None:
        self._handler, self._core, self._node = handler, core, node
        self._launched: dict[str, float] = {}  # by step without a pod so far, time of its launch

    @property
    def name(self) -> str:
        """Return the name of Dagster's handler."""
        return self._handler.name

    def launch_step(self, step_handler_context: StepHandlerContext) -> Iterator[DagsterEvent]:
        """Launch a step with Dagster's handler, near a copy if it reads one."""
        (step,) = step_handler_context.execute_step_args.step_keys_to_execute or ()
        self._launched[step] = time.time()
        nodes = nodes_with_a_copy(step_handler_context.instance)
        return self._handler.launch_step(NearCopies(step_handler_context, nodes))  # type: ignore[arg-type]

    def terminate_step(self, step_handler_context: StepHandlerContext) -> Iterator[DagsterEvent]:
        """Terminate a step with Dagster's handler."""
        return self._handler.terminate_step(step_handler_context)

    def check_step_health(self, step_handler_context: StepHandlerContext) -> CheckStepHealthResult:
        """Check the pod of a step; fail the step if the pod has waited too long."""
        pod = self._newest_pod(step_handler_context)
        health = self._handler.check_step_health(step_handler_context)
        if health.is_healthy and self._has_waited_too_long(step_handler_context, pod):
            self._fail_step(step_handler_context, pod)
            return health  # the failure is already reported; a second report would retry the step
        if health.is_healthy or pod is None:
            return health
        return CheckStepHealthResult.unhealthy(f"{health.unhealthy_reason}{_how_it_ended(pod)}")

    def _newest_pod(self, context: StepHandlerContext) -> Any:
        (step,) = context.execute_step_args.step_keys_to_execute or ()
        # The API server refuses raw step keys such as search[1]; dagster-k8s cleans its labels like this.
        labels = {"dagster/run-id": context.dagster_run.run_id, "dagster/op": step}
        selector = ",".join(f"{key}={sanitize_k8s_label(value)}" for key, value in labels.items())
        launcher: Any = context.instance.run_launcher
        namespace = launcher.get_container_context_for_run(context.dagster_run).namespace
        pods = self._core.list_namespaced_pod(namespace, label_selector=selector).items
        return max(pods, key=lambda pod: pod.metadata.creation_timestamp, default=None)

    def _has_waited_too_long(self, context: StepHandlerContext, pod: Any) -> bool:
        since = self._waiting_since(context, pod)
        return since is not None and time.time() - since > int(self._node.pending_seconds)

    def _waiting_since(self, context: StepHandlerContext, pod: Any) -> float | None:
        """Return since when a step waits for its pod; None if the pod has started."""
        (step,) = context.execute_step_args.step_keys_to_execute or ()
        if pod is None:
            return self._launched.get(step)
        self._launched.pop(step, None)  # a pod that is gone later is not one that never existed
        started: bool = pod.status.phase != "Pending"
        return None if started else float(pod.metadata.creation_timestamp.timestamp())

    def _fail_step(self, context: StepHandlerContext, pod: Any) -> None:
        """Fail the step without retries, and delete its pod, which could still start later."""
        (step,) = context.execute_step_args.step_keys_to_execute or ()
        sentence = why_it_cannot_start(self._node, step, pod)
        list(self.terminate_step(context))
        DagsterEvent.step_failure_event(
            context.get_step_context(step),
            StepFailureData(  # type: ignore[no-untyped-call]
                error=SerializableErrorInfo(sentence, [], None),
                user_failure_data=UserFailureData("pod-pending", sentence, {}),  # type: ignore[no-untyped-call]
            ),
        )


def why_it_cannot_start(node: NvmeNode, step: str, pod: Any) -> str:
    """Return a sentence with the reason why a step's pod is still Pending or missing, and the remedy."""
    if pod is None:
        waited = f"Kubernetes created no pod for its job in {node.pending_seconds} s"
        return f"{step} cannot start: {waited}. The events of the job say why (kubectl describe job)"
    waited = f"its pod was Pending for {node.pending_seconds} s, {_reason(pod)}"
    remedy = "Add a node that fits, or allow more time with LAION_NVME_PENDING_SECONDS"
    return f"{step} cannot start: {waited}. {remedy}"


def _reason(pod: Any) -> str:
    """Return what a Pending pod waits for: its container if it has a node, otherwise the scheduler."""
    waiting = [status.state.waiting for status in pod.status.container_statuses or ()]
    reasons = [f"{state.reason} {state.message or ''}".strip() for state in waiting if state]
    reasons += [c.message for c in pod.status.conditions or () if c.status == "False" and c.message]
    return reasons[0].rstrip(".") if reasons else "without a reason from Kubernetes"


def _how_it_ended(pod: Any) -> str:
    """Return how the pod's container ended, such as OOMKilled; empty if Kubernetes does not know."""
    ended = [status.state.terminated for status in pod.status.container_statuses or ()]
    reasons = [f"{state.reason}, exit code {state.exit_code}" for state in ended if state]
    reasons += [pod.status.reason] if pod.status.reason else []
    return f" ({'; '.join(reasons)})" if reasons else ""
