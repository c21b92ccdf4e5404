"""A host of pictures on this machine: it has all but each fourth, and remembers the requests."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


class PictureHost(ThreadingHTTPServer):
    """Serves a red picture of row n at /n.

    Attributes:
        asked: commands and rows, in the order of the requests.

    """

    request_queue_size = 128  # connections that wait; by default only five may

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, int]] = []


class _Answer(BaseHTTPRequestHandler):
    server: PictureHost

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        row = int(self.path[1:])
        self.server.asked.append((self.command, row))
        self.send_response(404 if row % 4 == 0 else 200)
        self.end_headers()
        if self.command == "GET" and row % 4:
            Image.new("RGB", (80, 80), "red").save(self.wfile, "PNG")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def picture_host() -> Iterator[PictureHost]:
    """A running host."""
    with PictureHost() as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield host
        host.shutdown()
