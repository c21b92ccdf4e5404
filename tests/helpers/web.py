"""A web server in front of a folder, as nginx would be: with pages of links, ranges and a password."""

import re
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, cast

USER, PASSWORD, SIGNATURE = "someone", "hunter2", "c0ffee"


class Plain(SimpleHTTPRequestHandler):
    """Python's own server, which returns whole files only."""

    def log_message(self, *_: Any) -> None:
        pass


class WithRanges(Plain):
    def send_head(self) -> Any:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            return super().send_head()
        start, stop, size = int(asked[1]), int(asked[2]) + 1, path.stat().st_size
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Range", f"bytes {start}-{min(stop, size) - 1}/{size}")
        self.send_header("Content-Length", str(min(stop, size) - start))
        self.end_headers()
        file = path.open("rb")
        file.seek(start)
        self.left = min(stop, size) - start
        return file

    def copyfile(self, source: Any, outputfile: Any) -> None:
        left = getattr(self, "left", -1)
        outputfile.write(cast(BinaryIO, source).read(left))
        self.left = -1


class Private(WithRanges):
    """Asks for a user, a password and a signature."""

    def send_head(self) -> Any:
        login = "Basic " + b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers["Authorization"] != login or f"sig={SIGNATURE}" not in self.path:
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        return super().send_head()


@contextmanager
def web_server(folder: Path, kind: type[Plain] = WithRanges) -> Iterator[str]:
    """Yields the host and port of a server of the files in a folder."""

    def handler(*arguments: Any) -> Plain:
        return kind(*arguments, directory=str(folder))

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
