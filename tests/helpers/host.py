"""A web host like those in LAION's URLs: most images exist, the others are lost in many ways."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket

PAGE = b"<!DOCTYPE html><title>This picture has moved on</title>"
MOVED_TO = "/new"
EVERY_SO_MANY = 3  # rows, one is not simply there


class Host(ThreadingHTTPServer):
    """Serves the picture of row n as /n, in the manner of that row, and keeps count of what it did."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, pictures: Sequence[bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.pictures = pictures
        self.closing = threading.Event()
        self.nobody = socket()  # a port that is taken, at which nobody listens
        self.nobody.bind(("127.0.0.1", 0))
        self.forget()

    def forget(self) -> None:
        """Reset the counts."""
        self.served: Counter[str] = Counter()  # by manner
        self.asked_for: Counter[int] = Counter()  # by row

    def url_of(self, row: int) -> str:
        """The URL of a row's image, which may be lost."""
        port = self.nobody.getsockname()[1] if manner_of(row) == REFUSED else self.server_port
        return f"http://127.0.0.1:{port}/{row}"


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Host

    def do_GET(self) -> None:
        row = int(self.path.rpartition("/")[2])
        picture = self.server.pictures[row]
        if self.path.startswith(MOVED_TO):
            self.send(picture)
        else:
            self.server.asked_for[row] += 1
            self.server.served[manner_of(row)] += 1
            MANNERS[manner_of(row)](self, picture)

    def send(self, body: bytes, kind: str = "image/webp", length: int | None = None, **more: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def stay_silent(self) -> None:
        self.server.closing.wait()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def _redirected(answer: Answer, _: bytes) -> None:
    answer.send_response(HTTPStatus.FOUND)
    answer.send_header("Location", f"{MOVED_TO}{answer.path}")
    answer.end_headers()


def _stalled(answer: Answer, picture: bytes) -> None:
    answer.send(picture[: len(picture) // 2], length=len(picture))
    answer.stay_silent()


REFUSED = "connection refused"
THERE = "there"
MANNERS: dict[str, Callable[[Answer, bytes], None]] = {
    THERE: lambda answer, picture: answer.send(picture),
    "there, but moved": _redirected,
    REFUSED: lambda *_: None,  # no request comes here
    "not found": lambda answer, _: answer.send_error(HTTPStatus.NOT_FOUND),
    "gone": lambda answer, _: answer.send_error(HTTPStatus.GONE),
    "forbidden": lambda answer, _: answer.send_error(HTTPStatus.FORBIDDEN),
    "out of order": lambda answer, _: answer.send_error(HTTPStatus.SERVICE_UNAVAILABLE),
    "hung up": lambda *_: None,
    "broken off": lambda answer, picture: answer.send(picture[: len(picture) // 3], length=len(picture)),
    "silent": lambda answer, _: answer.stay_silent(),
    "stalled": _stalled,
    "a page": lambda answer, _: answer.send(PAGE, "text/html"),
    "a page that claims to be a picture": lambda answer, _: answer.send(PAGE),
    "half a picture": lambda answer, picture: answer.send(picture[: len(picture) // 2]),
    "empty": lambda answer, _: answer.send(b""),
    "not for models": lambda answer, picture: answer.send(picture, X_Robots_Tag="noai"),
}


def manner_of(row: int) -> str:
    """The way in which a row's image is served."""
    turn, rest = divmod(row, EVERY_SO_MANY)
    return list(MANNERS)[1 + turn % (len(MANNERS) - 1)] if rest == 0 else THERE


@contextmanager
def hosting(pictures: Sequence[bytes]) -> Iterator[Host]:
    """Serve pictures until the block ends."""
    with Host(pictures) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield host
        host.closing.set()
        host.shutdown()
        host.nobody.close()
