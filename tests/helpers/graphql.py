"""What a page of Dagster's UI asks its webserver, without the page."""

import json
import urllib.request
from typing import Any


def ask(webserver: str, query: str, **variables: Any) -> dict[str, Any]:
    """Ask a webserver by its GraphQL; what it answers with an error fails the test."""
    request = urllib.request.Request(
        f"{webserver}/graphql",
        json.dumps({"query": query, "variables": variables}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        told = json.load(answer)
    assert "errors" not in told, told["errors"]
    return told["data"]
