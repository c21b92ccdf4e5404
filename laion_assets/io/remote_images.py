"""Images from their hosts, under strict bounds: URLs of an index come from the open web.

- Only http and https, at port 80, 443 or one from 1024 up, and without a user name.
- Only public addresses: the address that a socket is about to connect to is checked. It does not matter
  how a URL spells it, what a name resolves to, or whether it resolves to something else the next time.
- Redirects are not followed; no proxy, cookie or credential is used; nothing is decompressed.
- Size, time and the number of requests at a time are bounded.

Bytes are returned as they came. Decode them with care.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, TypeAlias

import aiohttp
from yarl import URL

from laion_assets.io.storage import first_line

MAX_URL = 4096  # characters
PORTS = (80, 443)  # below 1024; others there are never those of a web server that is meant for the public
USER_AGENT = "Mozilla/5.0 (compatible; laion_assets)"
NAT64 = IPv6Network("64:ff9b::/96")  # IPv4 addresses as hosts reach them that have IPv6 only
SPECIAL = (  # what `ipaddress` takes for public, in some releases of Python or in all
    ip_network("192.0.0.0/24"),
    ip_network("192.88.99.0/24"),
    ip_network("3fff::/20"),
    ip_network("168.63.129.16/32"),  # Azure's own services
)
NOT_PUBLIC = "is at an address that is not public"

Address: TypeAlias = IPv4Address | IPv6Address


@dataclass(frozen=True)
class Bounds:
    """What fetching images may take.

    Attributes:
        bytes: of one image.
        connect_seconds: until a host takes the connection.
        idle_seconds: without a byte.
        image_seconds: for one image, from the look-up of its host to its last byte.
        seconds: for all images together; those that are not there by then are left out.
        at_once: requests at a time.

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
        reason: a phrase that continues the URL.

    """

    reason: str


def fetch_images(
    urls: Sequence[str | None],
    bounds: Bounds = BOUNDS,
    *,
    is_allowed: Callable[[Address], bool] | None = None,
) -> list[bytes | NotFetched]:
    """Fetch images, and return each as bytes or with the reason why not, in the order of the URLs.

    Args:
        urls: n of them, from anywhere.
        bounds: what they may take.
        is_allowed: which addresses may be connected to, instead of `is_public`.

    """
    # In a thread of its own: the caller's may run an event loop, as a notebook's does.
    with ThreadPoolExecutor(1, "remote-images") as thread:
        return thread.submit(_run, urls, bounds, is_allowed or is_public).result()


def is_public(address: Address) -> bool:
    """Return whether an address is one that everybody on the internet would reach.

    Private, loopback, link-local, multicast, reserved and unspecified addresses are not. An IPv6 address
    that stands for an IPv4 address is what that is; tunnels (6to4, Teredo) are not public.
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
    """An image that is not fetched; the message is a phrase that continues the URL."""


def _run(
    urls: Sequence[str | None], bounds: Bounds, is_allowed: Callable[[Address], bool]
) -> list[bytes | NotFetched]:
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(_fetch_all(urls, bounds, is_allowed))
    finally:
        loop.close()  # unlike asyncio.run, this does not wait for names that are still looked up


async def _fetch_all(
    urls: Sequence[str | None], bounds: Bounds, is_allowed: Callable[[Address], bool]
) -> list[bytes | NotFetched]:
    turns = asyncio.Semaphore(bounds.at_once)

    async def in_turn(url: str | None) -> bytes | NotFetched:
        async with turns:
            return await _outcome(url, bounds, is_allowed)

    if not urls:
        return []
    tasks = [asyncio.ensure_future(in_turn(url)) for url in urls]
    _, late = await asyncio.wait(tasks, timeout=bounds.seconds)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    too_late = NotFetched(f"was not fetched: all together took longer than {bounds.seconds:g} s")
    return [too_late if task in late else task.result() for task in tasks]


async def _outcome(
    url: str | None, bounds: Bounds, is_allowed: Callable[[Address], bool]
) -> bytes | NotFetched:
    refused: list[Address | str] = []
    try:
        async with asyncio.timeout(bounds.image_seconds):
            return await _fetch(_checked(url), bounds, partial(_socket, is_allowed, refused))
    except _RefusedError as error:
        return NotFetched(str(error))
    except TimeoutError:
        return NotFetched(f"took longer than the {bounds.image_seconds:g} s that an image may take")
    except Exception as error:  # hosts fail in more ways than aiohttp's own errors
        reason = NOT_PUBLIC if refused else f"cannot be fetched ({_described(error)})"
        return NotFetched(reason)


def _described(error: Exception) -> str:
    """Return an error's message on one line of bounded length: parts of it may be the host's."""
    line = "".join(letter if letter.isprintable() else " " for letter in first_line(error))
    return line[:200] or type(error).__name__


def _checked(text: str | None) -> URL:
    """Parse a URL as aiohttp does, and check what it says about the host."""
    if not text:
        raise _RefusedError("is empty")
    if len(text) > MAX_URL or re.search(r"[\s\x00-\x1f\x7f]", text):
        raise _RefusedError("is no well-formed URL")
    try:
        url = URL(text)
    except ValueError as error:
        raise _RefusedError("is no well-formed URL") from error
    if url.scheme not in ("http", "https") or not url.raw_host:
        raise _RefusedError("is no http or https URL")
    if url.raw_user is not None or url.raw_password is not None:
        raise _RefusedError("holds a user name")
    if url.port not in PORTS and (url.port or 0) < 1024:
        raise _RefusedError(f"is at port {url.port}, which is not used")
    return url


def _socket(
    is_allowed: Callable[[Address], bool], refused: list[Address | str], about: tuple[Any, ...]
) -> socket.socket:
    """Make the socket for a connection to an address, unless that is not allowed.

    This is the only place that makes sockets. What is checked here is what it then connects to: a text
    that is not exactly an address, which the system would resolve in its own way, is refused.
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


async def _fetch(url: URL, bounds: Bounds, make_socket: Callable[..., socket.socket]) -> bytes:
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
    session = aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"},
        auto_decompress=False,
        trust_env=False,
    )
    async with session, session.get(url, allow_redirects=False) as response:
        _check_head(response, bounds)
        found = bytearray()
        async for part in response.content.iter_any():
            found += part
            if len(found) > bounds.bytes:
                raise _RefusedError(_too_large(bounds))
        return bytes(found)


def _check_head(response: aiohttp.ClientResponse, bounds: Bounds) -> None:
    status = response.status
    if 300 <= status < 400:
        raise _RefusedError(f"is a redirect ({status}), which is not followed")
    if status != HTTPStatus.OK:
        raise _RefusedError(f"is answered with status {status}")
    kind = response.content_type if "Content-Type" in response.headers else ""
    if kind and not kind.startswith("image/") and not kind.endswith("octet-stream"):
        raise _RefusedError(f"is {_described(ValueError(kind))}, not an image")
    if (response.content_length or 0) > bounds.bytes:
        raise _RefusedError(_too_large(bounds))


def _too_large(bounds: Bounds) -> str:
    return f"has more than the {bounds.bytes / 1e6:g} MB that an image may have"
