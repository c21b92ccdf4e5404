"""Evaluate k8s/policy.yaml on a pod as the API server does."""

from functools import cache
from typing import Any

import cel
import yaml
from helpers.project import REPOSITORY


def denials(pod: dict[str, Any]) -> list[str]:
    """The messages of the validations that deny a pod; empty if it is admitted.

    An expression that fails denies too, because failurePolicy is Fail.
    """
    variables: dict[str, Any] = {}
    for variable in _policy()["variables"]:
        context = {"object": pod, "variables": variables}
        variables[variable["name"]] = cel.evaluate(variable["expression"], context)
    context = {"object": pod, "variables": variables}
    return [
        validation["message"]
        for validation in _policy()["validations"]
        if cel.evaluate(validation["expression"], context) is not True
    ]


@cache
def _policy() -> dict[str, Any]:
    policy, _ = yaml.safe_load_all((REPOSITORY / "k8s" / "policy.yaml").read_text())
    spec: dict[str, Any] = policy["spec"]
    assert spec["failurePolicy"] == "Fail"
    return spec
