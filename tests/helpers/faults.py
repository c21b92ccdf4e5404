"""A proxy in front of the tests' GCS server that fails as networks and buckets do, and counts reads."""

import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COPY_SIZE = 1 << 16  # bytes
SHUTDOWN_POLL = 0.02  # seconds
HOP_BY_HOP = {"connection", "date", "server", "transfer-encoding", "content-length"}


class ManyConnections(ThreadingHTTPServer):
    """A server that accepts as many connections at once as readers have threads."""

    daemon_threads = True
    request_queue_size = 256


class Proxy:
    """Forwards requests, except for reads of objects that a rule lets fail.

    Attributes:
        url: of the proxy.
        rule: called with the path of each read of an object. It returns the name of a failure or the
            status to answer with, or None to forward the read.
        bytes_per_second: speed of one read of an object; None if it is not limited.
        bytes_read: bytes of objects that were forwarded; listings are not counted.
        reads: number of reads of objects, failed ones included.
        authorizations: the Authorization headers of the reads.
        flips_a_bit_of_uploads: whether one bit of each upload changes on its way.

    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.rule: Callable[[str], str | int | None] = lambda _: None
        self.bytes_per_second: int | None = None
        self.bytes_read = 0
        self.reads = 0
        self.authorizations: set[str | None] = set()
        self.flips_a_bit_of_uploads = False
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each reply waits 40 ms for a delayed acknowledgement

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                proxy.answer(self)

            def do_POST(self) -> None:
                proxy.pass_on(self)

            do_DELETE = do_POST  # noqa: N815

        self._server = ManyConnections(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(SHUTDOWN_POLL,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        is_read = not request.path.startswith("/storage/")
        failure = None
        if is_read:
            with self.lock:
                self.reads += 1
                self.authorizations.add(request.headers["Authorization"])
                failure = self.rule(request.path)
        if isinstance(failure, str) and failure.startswith("http://"):  # a redirect
            request.send_response(302)
            request.send_header("Location", failure + request.path)
            request.send_header("Content-Length", "0")
            request.end_headers()
        elif isinstance(failure, int):
            body = b"refused by the proxy"
            request.send_response(failure)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)
        elif failure == "reset":
            now = struct.pack("ii", 1, 0)  # close with RST instead of FIN
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            request.connection.close()
            request.close_connection = True  # else the handler keeps the socket open
        else:
            if failure == "silence":
                time.sleep(2)
            self._forward(request, is_read, failure)

    def pass_on(self, request: BaseHTTPRequestHandler) -> None:
        """Forward a request that changes the bucket; uploads go on through the proxy."""
        body = bytearray(request.rfile.read(int(request.headers["Content-Length"] or 0)))
        if self.flips_a_bit_of_uploads and "Content-Range" in request.headers and body:
            body[len(body) // 2] ^= 1
        server = http.client.HTTPConnection(self.upstream, timeout=30)
        try:
            server.request(request.command, request.path, bytes(body), dict(request.headers.items()))
            reply = server.getresponse()
            content = reply.read()
        finally:
            server.close()
        request.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in HOP_BY_HOP:
                request.send_header(name, value.replace(f"http://{self.upstream}", self.url))
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _forward(self, request: BaseHTTPRequestHandler, is_read: bool, failure: str | int | None) -> None:
        half = failure == "half"
        server = http.client.HTTPConnection(self.upstream, timeout=30)
        try:
            headers = {name: value for name, value in request.headers.items() if name.lower() != "host"}
            server.request("GET", request.path, headers=headers)
            reply = server.getresponse()
            if reply.headers["Content-Length"] is None:  # a listing
                self._reply(request, reply, body := reply.read(), len(body))
                return
            length = int(reply.headers["Content-Length"])
            self._reply(request, reply, b"", length)
            left = length // 2 if half else length
            while piece := reply.read(min(COPY_SIZE, left)):
                if failure == "flip":
                    piece, failure = bytes([piece[0] ^ 1]) + piece[1:], None
                request.wfile.write(piece)
                left -= len(piece)
                if self.bytes_per_second:
                    time.sleep(len(piece) / self.bytes_per_second)
                if is_read and reply.status < 300:
                    with self.lock:
                        self.bytes_read += len(piece)
            if half:
                request.close_connection = True
        except OSError:  # the client was killed, or the test is over
            request.close_connection = True
        finally:
            server.close()

    def _reply(
        self, request: BaseHTTPRequestHandler, reply: http.client.HTTPResponse, body: bytes, length: int
    ) -> None:
        request.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in HOP_BY_HOP:
                request.send_header(name, value)
        request.send_header("Content-Length", str(length))
        request.end_headers()
        request.wfile.write(body)


@contextmanager
def proxy_before(upstream: str) -> Iterator[Proxy]:
    """A proxy in front of the server with this URL."""
    proxy = Proxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


def first(times: int, failure: str | int, of: str = "") -> Callable[[str], str | int | None]:
    """A rule by which the first reads of objects whose path matches a pattern fail."""
    left = [times]

    def rule(path: str) -> str | int | None:
        if left[0] and re.search(of, path):
            left[0] -= 1
            return failure
        return None

    return rule
