"""What the webserver refuses, by real requests over HTTP; tests/ui has Dagster's own behind it."""

import threading
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
import uvicorn
from starlette.responses import PlainTextResponse

from laion_assets.defs.webserver import LOCAL_HOSTS, SameOrigin

OWN = {"Host": "localhost:3000"}
PUBLIC = "dagster.example.org"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    guarded = SameOrigin(PlainTextResponse("passed"), {*LOCAL_HOSTS, PUBLIC})
    server = uvicorn.Server(uvicorn.Config(guarded, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def asked(port: int, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    told = answer.status, answer.read().decode()
    connection.close()
    return told


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        pytest.param("GET", "/runs", OWN, id="a page"),
        pytest.param("GET", "/graphql", OWN, id="the playground"),
        pytest.param("POST", "/graphql", OWN, id="a program"),
        pytest.param("POST", "/graphql", OWN | {"Origin": "http://localhost:3000"}, id="our page"),
        pytest.param("POST", "/graphql", {"Host": "[::1]:3000"}, id="IPv6"),
        pytest.param("POST", "/graphql", {"Host": PUBLIC, "Origin": f"https://{PUBLIC}"}, id="TLS"),
        pytest.param("GET", "/server_info", {"Host": "10.0.0.7"}, id="a health check"),
    ],
)
def test_requests_of_programs_and_of_its_own_pages_pass(port, method, path, headers) -> None:
    assert asked(port, method, path, headers) == (200, "passed")


@pytest.mark.parametrize(
    ("method", "path", "headers", "fact"),
    [
        ("GET", "/graphql?query=mutation{x}", OWN, "POST"),
        ("GET", "/prefix/graphql?a=b&query=%7Bx%7D", OWN, "POST"),
        ("POST", "/graphql", OWN | {"Origin": "http://elsewhere.example"}, "http://elsewhere.example"),
        ("POST", "/graphql", OWN | {"Origin": "http://localhost:8000"}, "http://localhost:8000"),
        ("POST", "/graphql", OWN | {"Origin": "null"}, "null"),
        ("POST", "/report_asset_materialization/a", OWN | {"Origin": "http://b.example"}, "b.example"),
        ("POST", "/graphql", {"Host": "rebound.example:3000"}, "LAION_UI_HOSTS"),
        ("GET", "/", {"Host": "localhost.rebound.example"}, "LAION_UI_HOSTS"),
        ("GET", "/", {"Host": "[::1"}, "LAION_UI_HOSTS"),
        ("GET", "/", {"Host": ""}, "LAION_UI_HOSTS"),
    ],
)
def test_what_a_page_of_another_site_can_send_is_refused(port, method, path, headers, fact) -> None:
    status, told = asked(port, method, path, headers)
    assert status == 403
    assert fact in told


def test_a_websocket_of_another_site_is_refused(port) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    foreign = OWN | upgrade | key | {"Origin": "http://elsewhere.example"}
    assert asked(port, "GET", "/graphql", foreign)[0] == 403
