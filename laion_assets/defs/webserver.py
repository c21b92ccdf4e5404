"""Dagster's webserver, which refuses what pages of other sites make a browser send.

The UI has no login, and anyone who can reach it may launch runs. A browser can always reach it: a page of
any site may send requests to 127.0.0.1, and DNS rebinding lets it read the answers too.

Dagster's concept: https://docs.dagster.io/deployment/oss/oss-deployment-architecture
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from dagster_webserver import app, cli
from dagster_webserver.webserver import DagsterWebserver
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from laion_assets.defs.places import Places

LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
HEALTH = "/server_info"  # load balancers and Kubernetes ask for it by address
GRAPHQL = "/graphql"
POLICY_VIOLATION = 1008  # of a WebSocket


def refusal(connection: HTTPConnection, hosts: Collection[str]) -> str | None:
    """Return why a request is refused; None if it is not.

    - `Host` must be a name of this server: another one means DNS rebinding.
    - `Origin`, if any, must be this server: browsers send it with every POST and WebSocket.
    - GraphQL needs POST: an image or a link sends a GET without an `Origin`, which could be a mutation.

    Args:
        connection: the HTTP request or WebSocket.
        hosts: names of this server, without ports.

    """
    host, path = connection.headers.get("host", ""), connection.scope["path"]
    if _name(host) not in hosts and path != HEALTH:
        return f"this server is not known as {host}: add the name to LAION_UI_HOSTS if it is its own"
    origin = connection.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        return f"a page of {origin} may not use this server"
    is_get = connection.scope.get("method") in ("GET", "HEAD")
    if path.endswith(GRAPHQL) and is_get and "query" in connection.query_params:
        return "send GraphQL by POST"
    return None


def _name(host: str) -> str | None:
    """Return a host without its port; None if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class SameOrigin:
    """ASGI middleware that answers refused requests with 403 and the reason."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        connection = scope["type"] in ("http", "websocket") and HTTPConnection(scope)
        reason = refusal(connection, self._hosts) if connection else None
        answer: ASGIApp = self._app
        if reason and scope["type"] == "websocket":
            answer = WebSocketClose(POLICY_VIOLATION, reason)
        elif reason:
            answer = PlainTextResponse(f"{reason}\n", status_code=403)
        await answer(scope, receive, send)


class Webserver(DagsterWebserver[Any, Any]):
    """Dagster's webserver with `SameOrigin` in front."""

    def build_middleware(self) -> list[Middleware]:
        """Return the middleware, the outermost first."""
        hosts = LOCAL_HOSTS | {*Places.from_environment(os.environ).ui_hosts}
        return [Middleware(SameOrigin, hosts=hosts), *super().build_middleware()]


def main() -> None:
    """Run `dagster-webserver` with its own arguments."""
    vars(app)["DagsterWebserver"] = Webserver  # the command looks it up under this name
    cli.cli(auto_envvar_prefix="DAGSTER_WEBSERVER")


if __name__ == "__main__":
    main()
