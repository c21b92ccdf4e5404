"""Fetch images from their hosts within strict limits, because URLs of an index come from the open web.

- Only http and https are allowed, at port 80, 443 or from 1024 up, and without a user name.
- Only public addresses are allowed. The check applies to the address that a socket connects to, however
  a URL spells it and whatever a name resolves to.
- An image is not fetched through a redirect. Whether a URL works is checked through a few redirects, each
  of which must meet the same conditions.
- No proxy, cookie or credential is used; nothing is decompressed.
- Size, time and the number of parallel requests are limited.

Bytes are returned unchanged. Decode them with care.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, TypeAlias, TypeVar

import aiohttp
from yarl import URL

from laion_assets.io.storage import first_line

MAX_URL = 4096  # characters
PORTS = (80, 443)  # allowed ports below 1024; public web servers do not use others there
USER_AGENT = "Mozilla/5.0 (compatible; laion_assets)"
NAT64 = IPv6Network("64:ff9b::/96")  # IPv4 addresses as seen by hosts with only IPv6
SPECIAL = (  # networks that `ipaddress` considers public in some or all releases of Python
    ip_network("192.0.0.0/24"),
    ip_network("192.88.99.0/24"),
    ip_network("3fff::/20"),
    ip_network("168.63.129.16/32"),  # Azure's own services
)
NOT_PUBLIC = "is at an address that is not public"
REDIRECTS = 3  # most redirects of a URL that is checked
WITHOUT_HEAD = (403, 405, 501)  # statuses of hosts that do not answer HEAD

Address: TypeAlias = IPv4Address | IPv6Address
Answer = TypeVar("Answer")
MakeSocket: TypeAlias = Callable[[tuple[Any, ...]], socket.socket]


@dataclass(frozen=True)
class Bounds:
    """Limits on fetching images.

    Attributes:
        bytes: most bytes of one image.
        connect_seconds: most seconds until a host accepts the connection.
        idle_seconds: most seconds without a byte.
        image_seconds: most seconds for one image, from the look-up of its host to its last byte.
        seconds: most seconds for all images together; images that arrive later are left out.
        at_once: most parallel requests.

    """

    bytes: int = 10_000_000
    connect_seconds: float = 3
    idle_seconds: float = 4
    image_seconds: float = 10
    seconds: float = 30
    at_once: int = 12


BOUNDS = Bounds()


@dataclass(frozen=True)
class NotFetched:
    """An image that was not fetched.

    Attributes:
        reason: a phrase that follows the URL.
        late: whether the time for all images was over, which says nothing about this one.

    """

    reason: str
    late: bool = False


def fetch_images(
    urls: Sequence[str | None],
    bounds: Bounds = BOUNDS,
    *,
    is_allowed: Callable[[Address], bool] | None = None,
) -> list[bytes | NotFetched]:
    """Fetch images and return the bytes of each, or the reason for its failure, in the order of the URLs.

    Args:
        urls: n URLs, which need not be trusted.
        bounds: limits on fetching.
        is_allowed: returns whether an address may be connected to, instead of `is_public`.

    """
    return _in_a_thread(_fetch, urls, bounds, is_allowed)


def check_urls(
    urls: Sequence[str | None],
    bounds: Bounds = BOUNDS,
    *,
    is_allowed: Callable[[Address], bool] | None = None,
) -> list[bool | NotFetched]:
    """Check whether hosts still have images, without fetching them.

    Hosts are asked by HEAD requests, or by GET without reading the body where they do not answer those.

    Args:
        urls: n URLs, which need not be trusted.
        bounds: limits on requests.
        is_allowed: returns whether an address may be connected to, instead of `is_public`.

    Returns:
        True for each URL that works, or the reason why it does not, in the order of the URLs.

    """
    return _in_a_thread(_check, urls, bounds, is_allowed)


def is_public(address: Address) -> bool:
    """Return whether an address can be reached from the whole internet.

    Private, loopback, link-local, multicast, reserved and unspecified addresses are not public. An IPv6
    address that embeds an IPv4 address is judged by the latter; tunnels (6to4, Teredo) are not public.
    """
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None or address.teredo is not None or address.is_site_local:
            return False
    return address.is_global and not (
        address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
        or any(address in network for network in SPECIAL)
    )


class _RefusedError(Exception):
    """An image is not fetched. The message is a phrase that follows the URL."""


Ask: TypeAlias = Callable[[URL, Bounds, MakeSocket], Awaitable[Answer]]


def _in_a_thread(
    ask: Ask[Answer],
    urls: Sequence[str | None],
    bounds: Bounds,
    is_allowed: Callable[[Address], bool] | None,
) -> list[Answer | NotFetched]:
    """Ask all hosts in a thread of its own: the caller's may run an event loop, as in a notebook."""
    with ThreadPoolExecutor(1, "remote-images") as thread:
        return thread.submit(_run, ask, urls, bounds, is_allowed or is_public).result()


def _run(
    ask: Ask[Answer],
    urls: Sequence[str | None],
    bounds: Bounds,
    is_allowed: Callable[[Address], bool],
) -> list[Answer | NotFetched]:
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(_ask_all(ask, urls, bounds, is_allowed))
    finally:
        loop.close()  # unlike asyncio.run, this does not wait for pending name look-ups


async def _ask_all(
    ask: Ask[Answer],
    urls: Sequence[str | None],
    bounds: Bounds,
    is_allowed: Callable[[Address], bool],
) -> list[Answer | NotFetched]:
    turns = asyncio.Semaphore(bounds.at_once)

    async def in_turn(url: str | None) -> Answer | NotFetched:
        async with turns:
            return await _outcome(ask, url, bounds, is_allowed)

    if not urls:
        return []
    tasks = [asyncio.ensure_future(in_turn(url)) for url in urls]
    _, late = await asyncio.wait(tasks, timeout=bounds.seconds)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    too_late = NotFetched(f"was not fetched within the {bounds.seconds:g} s for all images", late=True)
    return [too_late if task in late else task.result() for task in tasks]


async def _outcome(
    ask: Ask[Answer], url: str | None, bounds: Bounds, is_allowed: Callable[[Address], bool]
) -> Answer | NotFetched:
    refused: list[Address | str] = []
    try:
        async with asyncio.timeout(bounds.image_seconds):
            return await ask(_checked(url), bounds, partial(_socket, is_allowed, refused))
    except _RefusedError as error:
        return NotFetched(str(error))
    except TimeoutError:
        return NotFetched(f"took longer than the limit of {bounds.image_seconds:g} s per image")
    except Exception as error:  # hosts fail in more ways than aiohttp's own errors
        reason = NOT_PUBLIC if refused else f"cannot be fetched ({_described(error)})"
        return NotFetched(reason)


def _described(error: Exception) -> str:
    """Return an error's message on one line of bounded length: the host may control parts of it."""
    line = "".join(letter if letter.isprintable() else " " for letter in first_line(error))
    return line[:200] or type(error).__name__


def _checked(text: str | None) -> URL:
    """Parse a URL like aiohttp, and check its scheme, host, user and port."""
    if not text:
        raise _RefusedError("is empty")
    if len(text) > MAX_URL or re.search(r"[\s\x00-\x1f\x7f]", text):
        raise _RefusedError("is not a well-formed URL")
    try:
        url = URL(text)
    except ValueError as error:
        raise _RefusedError("is not a well-formed URL") from error
    if url.scheme not in ("http", "https") or not url.raw_host:
        raise _RefusedError("is not an http or https URL")
    if url.raw_user is not None or url.raw_password is not None:
        raise _RefusedError("contains a user name")
    if url.port not in PORTS and (url.port or 0) < 1024:
        raise _RefusedError(f"is at port {url.port}, which is not allowed")
    return url


def _socket(
    is_allowed: Callable[[Address], bool], refused: list[Address | str], about: tuple[Any, ...]
) -> socket.socket:
    """Create the socket for a connection to an address, if that is allowed.

    All sockets are created here, and the address checked here is the one that is connected to. Texts
    that are not exactly an address are refused, because the system would resolve them in its own way.
    """
    family, kind, protocol, _, (host, *_) = about
    try:
        address = ip_address(host)
    except ValueError:
        refused.append(host)
    else:
        if is_allowed(address):
            return socket.socket(family, kind, protocol)
        refused.append(address)
    raise OSError(NOT_PUBLIC)


async def _fetch(url: URL, bounds: Bounds, make_socket: MakeSocket) -> bytes:
    async with (
        _session(bounds, make_socket) as session,
        session.get(url, allow_redirects=False) as response,
    ):
        if 300 <= response.status < 400:
            raise _RefusedError(f"is a redirect ({response.status}), which is not followed")
        _check_is_image(response)
        if (response.content_length or 0) > bounds.bytes:
            raise _RefusedError(_too_large(bounds))
        found = bytearray()
        async for part in response.content.iter_any():
            found += part
            if len(found) > bounds.bytes:
                raise _RefusedError(_too_large(bounds))
        return bytes(found)


async def _check(url: URL, bounds: Bounds, make_socket: MakeSocket) -> bool:
    async with _session(bounds, make_socket) as session:
        for _ in range(REDIRECTS + 1):
            response = await _head(session, url)
            location = response.headers.get("Location")
            if not (300 <= response.status < 400 and location):
                _check_is_image(response)
                return True
            url = _checked(str(url.join(URL(location))))
    raise _RefusedError(f"has more than {REDIRECTS} redirects")


async def _head(session: aiohttp.ClientSession, url: URL) -> aiohttp.ClientResponse:
    """Return the response to a HEAD request, or to a GET request whose body is not read."""
    with suppress(aiohttp.ClientResponseError, aiohttp.ServerDisconnectedError):
        async with session.head(url, allow_redirects=False) as response:
            if response.status not in WITHOUT_HEAD:
                return response
    async with session.get(url, allow_redirects=False) as response:
        response.close()
        return response


def _session(bounds: Bounds, make_socket: MakeSocket) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(
        socket_factory=make_socket,
        resolver=aiohttp.ThreadedResolver(),
        use_dns_cache=False,
        force_close=True,
    )
    timeout = aiohttp.ClientTimeout(
        total=bounds.image_seconds,
        sock_connect=bounds.connect_seconds,
        sock_read=bounds.idle_seconds,
    )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"},
        auto_decompress=False,
        trust_env=False,
    )


def _check_is_image(response: aiohttp.ClientResponse) -> None:
    if response.status != HTTPStatus.OK:
        raise _RefusedError(f"returned status {response.status}")
    kind = response.content_type if "Content-Type" in response.headers else ""
    if kind and not kind.startswith("image/") and not kind.endswith("octet-stream"):
        raise _RefusedError(f"is {_described(ValueError(kind))}, not an image")


def _too_large(bounds: Bounds) -> str:
    return f"is larger than the limit of {bounds.bytes / 1e6:g} MB per image"
