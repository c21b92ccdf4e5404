"""Images from untrusted hosts: local servers that only an injected rule allows."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address

import pytest

from laion_assets.io.remote_images import (
    Bounds,
    NotFetched,
    check_urls,
    fetch_images,
    is_public,
)

PICTURE = b"\x89PNG and more"
QUICK = Bounds(bytes=1000, connect_seconds=1, idle_seconds=0.5, image_seconds=1, seconds=5, at_once=4)


def anywhere(_: object) -> bool:
    return True


def head(*lines: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]).encode()


ANSWERS: dict[str, Callable[[socket.socket], None]] = {}


def answer(path: str) -> Callable[[Callable[[socket.socket], None]], Callable[[socket.socket], None]]:
    def register(function: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
        ANSWERS[path] = function
        return function

    return register


def redirect(location: str, status: str = "302 Found") -> bytes:
    return f"HTTP/1.1 {status}\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


@answer("/image")
def _(client: socket.socket) -> None:
    client.sendall(head("Content-Type: image/png", f"Content-Length: {len(PICTURE)}") + PICTURE)


@answer("/slow-image")
def _(client: socket.socket) -> None:
    time.sleep(0.3)
    client.sendall(head(f"Content-Length: {len(PICTURE)}") + PICTURE)


@answer("/missing")
def _(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


@answer("/redirect")
def _(client: socket.socket) -> None:
    client.sendall(redirect("http://127.0.0.1:1/"))


@answer("/there")
def _(client: socket.socket) -> None:
    client.sendall(head("Content-Type: image/png", "Content-Length: 5"))


@answer("/moved")
def _(client: socket.socket) -> None:
    client.sendall(redirect("/there", "301 Moved"))


@answer("/circle")
def _(client: socket.socket) -> None:
    client.sendall(redirect("/circle"))


@answer("/to-a-file")
def _(client: socket.socket) -> None:
    client.sendall(redirect("file:///etc/passwd"))


@answer("/page")
def _(client: socket.socket) -> None:
    client.sendall(head("Content-Type: text/html", "Content-Length: 5") + b"hello")


@answer("/huge")
def _(client: socket.socket) -> None:
    client.sendall(head("Content-Type: image/png", "Content-Length: 5000000000"))
    time.sleep(0.2)


@answer("/endless")
def _(client: socket.socket) -> None:
    client.sendall(head("Content-Type: image/png"))
    while True:
        client.sendall(b"x" * 500)


@answer("/endless-head")
def _(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        client.sendall(b"X-More: and more\r\n" * 100)


@answer("/trickle")
def _(client: socket.socket) -> None:
    client.sendall(head("Content-Type: image/png", "Content-Length: 500"))
    while True:
        client.sendall(b"x")
        time.sleep(0.1)


@answer("/silent")
def _(client: socket.socket) -> None:
    client.recv(1)


@answer("/bomb")
def _(client: socket.socket) -> None:
    client.sendall(head("Content-Encoding: gzip", "Content-Length: 3") + b"\x1f\x8b\x08")


@answer("/cut")
def _(client: socket.socket) -> None:
    client.sendall(head("Content-Type: image/png", "Content-Length: 500") + b"x")


@answer("/nonsense")
def _(client: socket.socket) -> None:
    client.sendall(b"\x00\x1b[31m\r\n\r\n")


@contextmanager
def serving(address: str = "127.0.0.1") -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers according to the path; its URL and the requests it received."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)
    requests: list[bytes] = []

    def talk(client: socket.socket) -> None:
        with client:
            request = client.recv(1 << 16)
            requests.append(request)
            with suppress(OSError):  # the client left
                ANSWERS[request.split()[1].decode()](client)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    host = f"[{address}]" if ":" in address else address
    try:
        yield f"http://{host}:{listener.getsockname()[1]}", requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes]]]:
    with serving() as made:
        yield made


def test_images_come_in_the_order_of_their_urls_each_problem_with_its_reason(server) -> None:
    url, _ = server
    paths = ["/slow-image", "/missing", "/image", "/slow-image"]
    found = fetch_images([url + path for path in paths], QUICK, is_allowed=anywhere)
    assert [found[0], found[2], found[3]] == [PICTURE] * 3
    assert found[1] == NotFetched("returned status 404")
    assert fetch_images([]) == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/redirect", "redirect (302), which is not followed"),
        ("/page", "text/html, not an image"),
        ("/huge", "larger than the limit of 0.001 MB"),
        ("/endless", "larger than the limit of 0.001 MB"),
        ("/endless-head", ""),
        ("/trickle", "longer than the limit of 1 s"),
        ("/silent", ""),
        ("/cut", "cannot be fetched"),
        ("/nonsense", "cannot be fetched"),
    ],
)
def test_a_host_that_misbehaves_costs_its_own_image_and_little_time(server, path, reason) -> None:
    url, requests = server
    started = time.monotonic()
    bad, good = fetch_images([url + path, url + "/image"], QUICK, is_allowed=anywhere)
    assert time.monotonic() - started < 3
    assert isinstance(bad, NotFetched)
    assert reason in bad.reason
    assert bad.reason.isprintable()
    assert good == PICTURE
    assert len(requests) == 2  # nothing was followed or tried again


def test_nothing_is_decompressed(server) -> None:
    url, requests = server
    assert fetch_images([f"{url}/bomb"], QUICK, is_allowed=anywhere) == [b"\x1f\x8b\x08"]
    assert b"Accept-Encoding: identity" in requests[0]


def test_all_images_together_have_a_bound_of_time(server) -> None:
    url, _ = server
    bounds = Bounds(seconds=0.5, at_once=2)
    started = time.monotonic()
    found = fetch_images([f"{url}/image", *[f"{url}/silent"] * 20], bounds, is_allowed=anywhere)
    assert time.monotonic() - started < 2
    assert found[0] == PICTURE
    assert {type(image) for image in found[1:]} == {NotFetched}
    assert "not fetched within the 0.5 s" in str(found[-1])


def test_a_name_that_is_looked_up_for_long_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    started = time.monotonic()
    (found,) = fetch_images(["http://host.example/1.png"], Bounds(image_seconds=0.3))
    assert time.monotonic() - started < 2
    assert "longer than the limit of 0.3 s" in str(found)


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelt",
    ["127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "localhost", "localhost.",
     "127。0。0。1", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"],
)  # fmt: skip
def test_a_server_of_this_machine_is_not_connected_to_however_it_is_spelt(server, spelt) -> None:
    url, requests = server
    (found,) = fetch_images([url.replace("127.0.0.1", spelt) + "/image"], QUICK)
    assert isinstance(found, NotFetched)
    assert re.search("not public|not a canonical|not known", found.reason)  # aiohttp refuses some itself
    assert requests == []


def test_nor_is_one_at_its_ipv6_address() -> None:
    with serving("::1") as (url, requests):
        (found,) = fetch_images([f"{url}/image"], QUICK)
        assert found == NotFetched("is at an address that is not public")
        assert requests == []
        assert fetch_images([f"{url}/image"], QUICK, is_allowed=anywhere) == [PICTURE]


@pytest.mark.parametrize("address", ["10.0.0.7", "169.254.169.254", "192.168.1.1", "fd00:ec2::254"])
def test_a_name_that_leads_to_a_private_address_is_not_connected_to(monkeypatch, address) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    answered = [(family, socket.SOCK_STREAM, 6, "", (address, 80) + (0, 0) * (":" in address))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered)
    connected = []
    monkeypatch.setattr(socket.socket, "connect", lambda *to: connected.append(to))
    (found,) = fetch_images(["http://innocent.example/1.png"], QUICK)
    assert found == NotFetched("is at an address that is not public")
    assert connected == []


def test_the_address_that_is_checked_is_the_one_connected_to(server, monkeypatch) -> None:
    """A name that is public when it is checked and private when it is used gains nothing."""
    url, requests = server
    port = int(url.rpartition(":")[2])
    look_ups: list[object] = []

    def changing(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        look_ups.append(host)
        address = "127.0.0.1" if len(look_ups) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    checked: list[str] = []

    def first_only(address: object) -> bool:
        checked.append(str(address))
        return str(address) == "127.0.0.1"

    (found,) = fetch_images([f"http://changing.example:{port}/image"], QUICK, is_allowed=first_only)
    assert found == PICTURE
    assert (len(look_ups), checked, len(requests)) == (1, ["127.0.0.1"], 1)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.0.1", "100.64.0.1",
     "100.100.100.200", "169.254.169.254", "168.63.129.16", "192.0.0.8", "192.88.99.1", "192.0.2.1",
     "198.18.0.1", "203.0.113.9", "224.0.0.1", "240.0.0.1", "255.255.255.255",
     "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
     "64:ff9b::10.0.0.1", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1", "3fff::1",
     "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%1", "fec0::1", "ff02::1", "100::1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8"])
def test_addresses_that_are_public(address) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (None, "empty"),
        ("", "empty"),
        ("file:///etc/hostname", "not an http"),
        ("/etc/hostname", "not an http"),
        ("ftp://host.example/1.png", "not an http"),
        ("data:image/png;base64,AAAA", "not an http"),
        ("http:///1.png", "not an http"),
        ("http://host.example:99999/", "well-formed"),
        ("http://host.example/a b", "well-formed"),
        ("http://host.exa\nmple/", "well-formed"),
        ("http://[::1/", "well-formed"),
        ("http://host.example/" + "x" * 5000, "well-formed"),
        ("http://user:secret@host.example/", "user name"),
        ("http://host.example:22/", "port 22"),
        ("http://host.example:0/", "port 0"),
    ],
)
def test_what_is_no_address_of_an_image_is_not_even_looked_up(monkeypatch, url, reason) -> None:
    def not_called(*_: object, **__: object) -> None:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(socket, "getaddrinfo", not_called)
    (found,) = fetch_images([url], QUICK, is_allowed=anywhere)
    assert isinstance(found, NotFetched)
    assert reason in found.reason


# --- whether URLs work ----------------------------------------------------------------------------


def test_urls_are_checked_without_fetching_images_and_through_redirects(server) -> None:
    url, requests = server
    paths = ("/there", "/moved", "/image", "/missing", "/page", "/circle", "/to-a-file", "/silent")
    found = check_urls([url + path for path in paths], QUICK, is_allowed=anywhere)
    assert found[:3] == [True, True, True]
    reasons = [each.reason for each in found[3:] if isinstance(each, NotFetched)]
    for reason, expected in zip(
        reasons,
        (
            "status 404",
            "not an image",
            "more than 3 redirects",
            "not an http or https URL",
            "took|cannot",
        ),
        strict=True,
    ):
        assert re.search(expected, reason)
    asked = [request.split()[:2] for request in requests]
    assert [b"GET", b"/there"] not in asked
    assert [b"GET", b"/image"] in asked  # it answered HEAD with a body


def test_a_host_that_answers_no_head_request_is_asked_by_get(monkeypatch) -> None:
    def talk(client: socket.socket) -> None:
        answer = answers.pop(0)  # before it is sent: the next request may follow at once
        client.sendall(answer)

    answers = [b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n", head()]
    monkeypatch.setitem(ANSWERS, "/get", talk)
    with serving() as (url, requests):
        assert check_urls([f"{url}/get"], QUICK, is_allowed=anywhere) == [True]
    assert [request.split()[0] for request in requests] == [b"HEAD", b"GET"]


def test_a_redirect_to_an_address_that_is_not_public_is_not_followed(server) -> None:
    url, requests = server
    with serving("::1") as (other, never):
        ANSWERS["/inside"] = lambda client: client.sendall(redirect(f"{other}/image"))
        (found,) = check_urls([f"{url}/inside"], QUICK, is_allowed=lambda a: a.version == 4)
    assert found == NotFetched("is at an address that is not public")
    assert (len(requests), never) == (1, [])


def test_what_is_not_reached_in_time_says_nothing(server) -> None:
    url, _ = server
    bounds = Bounds(idle_seconds=5, image_seconds=5, seconds=0.3, at_once=1)
    first, last = check_urls([f"{url}/there", f"{url}/silent"], bounds, is_allowed=anywhere)
    assert first is True
    assert isinstance(last, NotFetched)
    assert last.late
