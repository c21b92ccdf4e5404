"""Run each step in a pod with Dagster's executor, and fail steps whose pod never starts.

Dagster waits forever for a Pending pod and reports no reason. Here the step fails after a timeout and
reports the reason, in particular if the claim's node is gone.

Dagster's concept: https://docs.dagster.io/deployment/oss/deployment-options/kubernetes
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import dagster as dg
from dagster_k8s import k8s_job_executor
from kubernetes.client import ApiException, CoreV1Api

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
from laion_assets.defs.kubernetes.claim import what_is_wrong
from laion_assets.defs.kubernetes.placement import NvmeNode

RENEW = "kubectl create job renew-$(date +%s) -n laion --from=cronjob/renew-laion-claim"


def step_pods(node: NvmeNode) -> dg.ExecutorDefinition:
    """Return Dagster's `k8s_job_executor` with a timeout for Pending pods."""

    def create(context: dg.InitExecutorContext) -> dg.Executor:
        make = k8s_job_executor.executor_creation_fn
        made = make(context) if make else None
        if not isinstance(made, StepDelegatingExecutor):
            raise TypeError(f"k8s_job_executor returned {made!r}: dagster-k8s has changed")
        made._step_handler = PendingTimeoutStepHandler(made._step_handler, CoreV1Api(), node)
        return made

    return dg.ExecutorDefinition(
        name=k8s_job_executor.name,
        config_schema=k8s_job_executor.config_schema.as_field(),
        requirements=multiple_process_executor_requirements(),
        executor_creation_fn=create,
    )


class PendingTimeoutStepHandler(StepHandler):
    """A step handler that fails steps whose pod stays Pending."""

    def __init__(self, handler: StepHandler, core: CoreV1Api, node: NvmeNode) -> None:
        self._handler, self._core, self._node = handler, core, node

    @property
    def name(self) -> str:
        """Return the name of Dagster's handler."""
        return self._handler.name

    def launch_step(self, step_handler_context: StepHandlerContext) -> Iterator[DagsterEvent]:
        """Launch a step with Dagster's handler."""
        return self._handler.launch_step(step_handler_context)

    def terminate_step(self, step_handler_context: StepHandlerContext) -> Iterator[DagsterEvent]:
        """Terminate a step with Dagster's handler."""
        return self._handler.terminate_step(step_handler_context)

    def check_step_health(self, step_handler_context: StepHandlerContext) -> CheckStepHealthResult:
        """Check the pod of a step; fail the step if the pod has waited too long."""
        pod = self._newest_pod(step_handler_context)
        if pod is not None and self._has_waited_too_long(pod):
            self._fail_step(step_handler_context, pod)
            return (
                CheckStepHealthResult.healthy()
            )  # the failure is already reported; a second report would retry the step
        health = self._handler.check_step_health(step_handler_context)
        if health.is_healthy or pod is None:
            return health
        return CheckStepHealthResult.unhealthy(f"{health.unhealthy_reason}{_how_it_ended(pod)}")

    def _newest_pod(self, context: StepHandlerContext) -> Any:
        (step,) = context.execute_step_args.step_keys_to_execute or ()
        selector = f"dagster/run-id={context.dagster_run.run_id},dagster/op={step}"
        launcher: Any = context.instance.run_launcher
        namespace = launcher.get_container_context_for_run(context.dagster_run).namespace
        pods = self._core.list_namespaced_pod(namespace, label_selector=selector).items
        return max(pods, key=lambda pod: pod.metadata.creation_timestamp, default=None)

    def _has_waited_too_long(self, pod: Any) -> bool:
        age = (datetime.now(UTC) - pod.metadata.creation_timestamp).total_seconds()
        return bool(pod.status.phase == "Pending" and age > int(self._node.pending_seconds))

    def _fail_step(self, context: StepHandlerContext, pod: Any) -> None:
        """Fail the step without retries, and delete its pod, which could still start later."""
        (step,) = context.execute_step_args.step_keys_to_execute or ()
        sentence = why_it_cannot_start(self._core, self._node, step, pod)
        list(self.terminate_step(context))
        DagsterEvent.step_failure_event(
            context.get_step_context(step),
            StepFailureData(  # type: ignore[no-untyped-call]
                error=SerializableErrorInfo(sentence, [], None),
                user_failure_data=UserFailureData("pod-pending", sentence, {}),  # type: ignore[no-untyped-call]
            ),
        )


def why_it_cannot_start(core: CoreV1Api, node: NvmeNode, step: str, pod: Any) -> str:
    """Return a sentence with the reason why a step's pod is still Pending, and the remedy."""
    wrong = _wrong_with_the_claim(core, node, pod)
    if wrong:
        remedy = f"Renew the claim (`{RENEW}`), then re-execute from failure"
        return f"{step} cannot start: {wrong}. {remedy}"
    waited = f"its pod was Pending for {node.pending_seconds} s, {_reason(pod)}"
    remedy = "Add a node that fits, or allow more time with LAION_NVME_PENDING_SECONDS"
    return f"{step} cannot start: {waited}. {remedy}"


def _wrong_with_the_claim(core: CoreV1Api, node: NvmeNode, pod: Any) -> str | None:
    claims = [volume.persistent_volume_claim for volume in pod.spec.volumes or ()]
    if node.claim not in {claim.claim_name for claim in claims if claim}:
        return None
    try:
        return what_is_wrong(core, pod.metadata.namespace, node.claim)
    except ApiException as error:
        remedy = "apply k8s/dagster-may-look.yaml"
        return f"the claim {node.claim} cannot be read ({error.reason}: {remedy})"


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
