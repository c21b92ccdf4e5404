"""Servers that accept connections and lie: they are silent, send a byte at a time, or another page."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

BODY = 1 << 20  # bytes that every answer promises
Send = Callable[[bytes], None]


def silent(_: str, __: Send) -> None:
    """Never answers."""
    time.sleep(600)


def silent_after_the_head(request: str, send: Send) -> None:
    send(_head(request))
    time.sleep(600)


def trickling(request: str, send: Send, pause: float) -> None:
    """Sends the head of an answer, and then one byte at a time."""
    send(_head(request))
    while True:
        send(b"{")
        time.sleep(pause)


def trickling_the_head(request: str, send: Send, pause: float) -> None:
    for byte in _head(request):
        send(bytes([byte]))
        time.sleep(pause)


def captive_portal(_: str, send: Send) -> None:
    """Answers every request with a page where users log in to a network."""
    page = b"<!DOCTYPE html>\n<html><title>Log in to the network</title></html>\n"
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(page)}\r\n\r\n"
    send(head.encode() + page)


def silent_after_the_upload_begins(request: str, send: Send) -> None:
    if request.startswith("POST") and "uploadType=resumable" in request and "upload_id" not in request:
        host = re.search(r"(?i)^host: (.*)\r$", request, re.MULTILINE)
        location = f"http://{host[1] if host else ''}/upload?uploadType=resumable&upload_id=1"
        send(f"HTTP/1.1 200 OK\r\nLocation: {location}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    else:
        time.sleep(600)


def _head(request: str) -> bytes:
    asked = re.search(r"(?i)^range: bytes=(\d+)-", request, re.MULTILINE)
    start = int(asked[1]) if asked else 0
    lines = [
        "HTTP/1.1 206 Partial Content" if asked else "HTTP/1.1 200 OK",
        "Content-Type: application/json",
        f"Content-Length: {BODY}",
        f"Content-Range: bytes {start}-{start + BODY - 1}/{start + BODY}",
        "ETag: one",
        "Last-Modified: Thu, 26 Nov 2026 12:00:00 GMT",
        "\r\n",
    ]
    return "\r\n".join(lines).encode()


@contextmanager
def lying_server(answer: Callable[[str, Send], None]) -> Iterator[str]:
    """A server whose answers to requests are sent by a function; yields its URL."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while request := connection.recv(1 << 16).decode("latin-1"):
                answer(request, connection.sendall)

    def accept() -> None:
        with suppress(OSError):  # it is closed
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
