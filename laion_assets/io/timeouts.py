"""Time limits on requests. Without them, a server that accepts and never answers holds a step forever.

gcsfs and fsspec's HTTP file system both send their requests with aiohttp, and set no limits of their own.
`session_arguments` returns the arguments of an aiohttp session that limits every request:

- A connection takes at most `CONNECT`.
- A read whose answer does not begin within `SILENCE` is sent again, and fails after `READ_TRIES` tries. A
  write may take `SERVER_WORK` longer than its upload at `SLOWEST_UPLOAD`, and is not sent again, because
  the server may still be working on it.
- An answer that brings fewer than `TRICKLE` bytes in `SILENCE` counts as silent, and is requested again
  likewise if answers are read whole.
- No request takes longer than `LONGEST`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

import aiohttp

CONNECT = 10.0  # seconds
SILENCE = 20.0  # seconds
READ_TRIES = 3
SERVER_WORK = 60.0  # seconds; Google Cloud Storage copies for up to 30 s before it answers
SLOWEST_UPLOAD = 128 << 10  # bytes a second
TRICKLE = 64 << 10  # bytes
LONGEST = 600.0  # seconds


async def _answer(
    request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType, *, whole: bool
) -> aiohttp.ClientResponse:
    """Send a request and wait for the beginning of its answer, or for all of it; a middleware of aiohttp.

    Raises:
        TimeoutError: there is none in time. gcsfs does not retry after this error.
        ConnectionError: it is a web page. gcsfs would take it for the content of an object.

    """
    tries, limit = READ_TRIES, SILENCE
    if request.method not in ("GET", "HEAD"):
        tries, limit = 1, SERVER_WORK + _size(request) / SLOWEST_UPLOAD
    for _ in range(tries):
        try:
            async with asyncio.timeout(limit):
                answer = await send(request)
            if whole:
                await answer.read()
                answer.content.set_exception(RuntimeError("answers are read whole: use cat_file"))
                _check_origin(answer)
            return answer
        except TimeoutError:
            continue
    raise TimeoutError(f"no answer in {tries * limit:.0f} s")


def _check_origin(answer: aiohttp.ClientResponse) -> None:
    if answer.ok and answer.content_type == "text/html":
        raise ConnectionError(
            f"{answer.host} returns a web page, perhaps of a network that asks to log in, or of a proxy"
        )


def _size(request: aiohttp.ClientRequest) -> int:
    return int(request.headers.get("Content-Length", 0))


class _Response(aiohttp.ClientResponse):
    async def read(self) -> bytes:
        """Read the whole answer.

        Raises:
            SocketTimeoutError: it came to a halt.

        """
        reading = asyncio.ensure_future(super().read())
        try:
            arrived = 0
            while not (await asyncio.wait([reading], timeout=SILENCE))[0]:
                before, arrived = arrived, self.content.total_bytes
                if arrived - before < TRICKLE:
                    raise aiohttp.SocketTimeoutError(f"{arrived - before:,} bytes in {SILENCE:.0f} s")
            return await reading
        finally:
            reading.cancel()


def request_limits() -> aiohttp.ClientTimeout:
    """Return the limits of one request that aiohttp itself enforces."""
    return aiohttp.ClientTimeout(total=LONGEST, sock_connect=CONNECT, sock_read=SERVER_WORK)


def session_arguments(*, whole: bool = False) -> Mapping[str, Any]:
    """Return the arguments of an aiohttp session.

    Args:
        whole: whether every answer is read whole, as gcsfs does, and is never a stream or a web page.

    """
    answer = partial(_answer, whole=whole)
    return {"timeout": request_limits(), "middlewares": (answer,), "response_class": _Response}
