"""Queries of Dagster's webserver, like those of the UI's pages."""

import json
import urllib.request
from typing import Any


def ask(webserver: str, query: str, **variables: Any) -> dict[str, Any]:
    """Query a webserver with GraphQL; errors in the answer fail the test."""
    request = urllib.request.Request(
        f"{webserver}/graphql",
        json.dumps({"query": query, "variables": variables}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        told = json.load(answer)
    assert "errors" not in told, told["errors"]
    return told["data"]
