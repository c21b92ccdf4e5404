"""Open, list and write folders on the local disk or in a bucket, with errors in one sentence.

All access is through fsspec, with gcsfs for gs:// and `WebFiles` for https://. Credentials are Google
Cloud's application default credentials. STORAGE_EMULATOR_HOST selects another server, which is used
without credentials.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import io
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.core import split_protocol
from fsspec.spec import AbstractBufferedFile

from laion_assets.io.checksums import checksum_text, crc32c, crc32c_of
from laion_assets.io.errors import InputError
from laion_assets.io.local_files import walk
from laion_assets.io.public_urls import WEB, public, without_secrets
from laion_assets.io.timeouts import request_limits, session_arguments
from laion_assets.io.web import WebFiles

# gcsfs also logs the errors that it raises; only the caller should report them.
logging.getLogger("gcsfs").addHandler(logging.NullHandler())

BUCKETS = ("gs://", "gcs://")
PROTOCOLS = {"file", "local", "memory", "gs", "gcs", "http", "https", "hf"}
MAX_PAGE_RESULTS = 1000  # the most that Google Cloud Storage allows
LISTED_FIELDS = "items(name,size,updated,crc32c),nextPageToken"
UPLOAD_BLOCK = 8 << 20  # bytes of each upload request
PARTIAL_SUFFIX = ".partial"
ABANDONED = 60.0  # seconds since the last write
WRITE_ERRORS = {
    errno.ENOENT,  # raised by folders that accept no new files, such as /proc
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
}
LOG_IN = (
    "run `gcloud auth application-default login`, or on a cluster bind the pods' service account to a "
    "Google account (Workload Identity)"
)


def open_storage(uri: str, about: str | None = None) -> tuple[Any, str]:
    """Return the file system of a folder or file, and its path there.

    Listings are not cached, because other processes write to the same folders.

    Args:
        uri: a local path, or a URL with one of `PROTOCOLS`.
        about: see `InputError`.

    Raises:
        InputError: the kind of storage is not supported, or credentials for it are missing.

    """
    if split_protocol(uri)[0] not in (None, *PROTOCOLS):
        raise InputError(
            f"{public(uri)} is on a kind of storage that is not supported: copy it to a local folder or "
            "to a bucket of Google Cloud Storage (gs://), or mount it, for example with `rclone mount`, "
            "and name the folder",
            about,
        )
    options: dict[str, Any] = {"use_listings_cache": False}
    if uri.startswith(BUCKETS):
        if not re.match(r"gc?s://[^/]", uri):
            raise InputError(f"{uri} names no bucket: write it as gs://bucket/folder", about)
        options.update(requests_timeout=request_limits(), session_kwargs=session_arguments(whole=True))
        options["token"] = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else "google_default"
        # By default gcsfs first queries the kind of each bucket, over gRPC and with a separate
        # permission. This takes most of a minute if gRPC is blocked, as with an emulator. Only zonal
        # buckets need it; their users set the variable to true.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    elif uri.startswith(WEB):
        return WebFiles(client_kwargs=session_arguments(), **options), public(uri).rstrip("/")
    elif re.match(r"gc?s(:/|//)", uri):
        raise InputError(f"{uri} is neither a path nor a URL: write it as gs://bucket/folder", about)
    with reaching(uri, about):
        try:
            fs, path = fsspec.url_to_fs(uri, **options)
        except (ValueError, ImportError) as error:  # hf:// names no repository, or is not installed
            raise InputError(f"{uri} cannot be opened ({error}): correct it", about) from error
    return fs, path.rstrip("/") or "/"


@dataclass(frozen=True, slots=True)
class Listed:
    """A file in a listing.

    Attributes:
        name: path relative to the listed folder.
        path: path in the file system.
        size: bytes.
        written: time of the last write in the file system's own format; empty if it reports none.
        checksum: crc32c in base64; None if the storage keeps none.

    """

    name: str
    path: str
    size: int
    written: str
    checksum: str | None


def list_files(fs: Any, root: str, depth: int | None = None) -> Iterator[Listed]:
    """Yield all files below a folder, or those in its first `depth` levels; none if it does not exist.

    A bucket is listed page by page with only the needed fields, because gcsfs's own listing keeps several
    kilobytes per object in memory.
    """
    if not is_bucket(fs):
        for path, info in find_files(fs, root, depth).items():
            name = path.removeprefix(root).lstrip("/")
            yield Listed(name, path, info["size"], str(info.get("mtime", "")), info.get("crc32c"))
        return
    bucket, _, folder = root.partition("/")
    prefix = f"{folder}/" if folder else ""
    query = {"prefix": prefix, "maxResults": MAX_PAGE_RESULTS, "fields": LISTED_FIELDS}
    token = None
    while True:
        page = fs.call("GET", "b/{}/o", bucket, json_out=True, pageToken=token, **query)
        for item in page.get("items", ()):
            name = item["name"].removeprefix(prefix)
            if depth is not None and name.count("/") >= depth:
                continue
            path = f"{bucket}/{item['name']}"
            yield Listed(name, path, int(item["size"]), item["updated"], item.get("crc32c"))
        token = page.get("nextPageToken")
        if not token:
            return


def find_files(fs: Any, root: str, depth: int | None = None) -> dict[str, Mapping[str, Any]]:
    """Return the details of all files below a folder, or those in its first `depth` levels, by path.

    A file in place of the folder is returned itself.
    """
    if is_local(fs):
        paths = [root] if fs.isfile(root) else walk(root, depth)
        return {path: _local_details(fs, path) for path in paths}
    found: dict[str, Mapping[str, Any]] = fs.find(root, maxdepth=depth, detail=True)
    return found


def _local_details(fs: Any, path: str) -> Mapping[str, Any]:
    try:
        details: Mapping[str, Any] = fs.info(path)
    except OSError:  # a broken link, or a file that is gone again; reading it reports the problem
        return {"name": path, "size": 0, "type": "other"}
    return details


@contextlib.contextmanager
def reaching(uri: str, about: str | None = None) -> Iterator[None]:
    """Convert errors of a bucket or a web server in the block to one sentence with the remedy.

    Raises:
        InputError: credentials are missing, access is denied, the bucket does not exist, or the server
            cannot be reached.

    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        refusal = _refusal(uri, error) if uri.startswith((*BUCKETS, *WEB)) else None
        if refusal is None:
            raise
        raise InputError(refusal, about) from error


def _refusal(uri: str, error: Exception) -> str | None:
    """Explain an error of a bucket or a web server; None for other errors."""
    import aiohttp
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    if isinstance(error, FileNotFoundError) and uri.startswith(WEB):
        # fsspec raises it for every error, of which 404 is the only one that says that nothing is there.
        why = error.__cause__
        if not isinstance(why, Exception) or _http_status(why) == HTTPStatus.NOT_FOUND:
            return None
        return _refusal(uri, why)
    in_bucket = uri.startswith(BUCKETS)
    answer = first_line(error, last=True)
    status = _http_status(error)
    if isinstance(error, GoogleAuthError) or status == HTTPStatus.UNAUTHORIZED:
        remedy = LOG_IN if in_bucket else "download it, and name the local folder"
        return f"there are no valid credentials for {uri} ({answer}): {remedy}"
    if status == HTTPStatus.FORBIDDEN:
        return (
            f"access to {uri} is denied ({answer}): grant it to the account that runs this, or correct "
            "the address"
        )
    if isinstance(error, FileNotFoundError):
        return f"there is no bucket {'/'.join(uri.split('/')[:3])}: create it, or correct the address"
    unreachable = aiohttp.ClientError | RequestException | TimeoutError | ConnectionError
    if status is None and isinstance(error, unreachable):
        emulator = ", and STORAGE_EMULATOR_HOST if it is set" if in_bucket else ""
        return f"{uri} cannot be reached ({answer}): check the network{emulator}, then try again"
    if status is None:
        return None
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"{uri} is temporarily unavailable ({answer}): try again later"
    return f"{uri} cannot be used ({answer}): correct the address"


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of gcsfs or aiohttp; None for other errors."""
    import aiohttp
    from gcsfs.retry import HttpError

    if isinstance(error, aiohttp.ClientResponseError):
        return error.status
    if isinstance(error, HttpError):
        return int(error.code) if error.code else HTTPStatus.BAD_REQUEST
    # `gcsfs.retry.validate_response` raises these two as built-in classes that only the first words of
    # the message identify. pyarrow raises the same classes for files that it cannot read.
    if type(error) is OSError and str(error).startswith("Forbidden: "):
        return HTTPStatus.FORBIDDEN
    if type(error) is ValueError and str(error).startswith("Bad Request: "):
        return HTTPStatus.BAD_REQUEST
    return None


def first_line(error: Exception, *, last: bool = False) -> str:
    """Return the first line of an error's message, or the last, which contains a server's answer."""
    text = str(error) or str(error.__cause__ or "")  # fsspec's own timeout has no message
    lines = without_secrets(text).strip().splitlines() or [type(error).__name__]
    return lines[-1 if last else 0].strip()


class Sink(io.RawIOBase):
    """Takes the bytes of a file and computes their crc32c.

    Args:
        file: takes the bytes.

    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._checksum = 0

    @property
    def checksum(self) -> str:
        """The crc32c of the bytes written so far, formatted by `checksum_text`."""
        return checksum_text(self._checksum)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Write a bytes-like object and return its size in bytes."""
        content = bytes(data)
        self._checksum = crc32c(content, self._checksum)
        self._file.write(content)
        return len(content)


@contextlib.contextmanager
def new_file(uri: str, about: str | None = None) -> Iterator[Sink]:
    """Open a file that gets its name only if the block ends without an error.

    In a bucket it is one upload, which creates the object only when it ends, and whose bytes are compared
    with the bucket's crc32c.

    Args:
        uri: a local path or a URL.
        about: see `InputError`.

    Raises:
        InputError: the location is not writable, or the upload was damaged.

    """
    fs, path = open_storage(uri, about)
    with writing(uri, about):
        with _local_file(Path(path)) if is_local(fs) else _object(fs, path) as file:
            sink = Sink(file)
            yield sink
        stored = None if is_local(fs) else fs.info(path).get("crc32c")
        if stored not in (None, sink.checksum):
            fs.rm_file(path)
            raise InputError(
                f"{uri} was damaged while it was uploaded (crc32c {stored} instead of {sink.checksum}) "
                "and is removed: try again",
                about,
            )


@contextlib.contextmanager
def writing(uri: str, about: str | None = None) -> Iterator[None]:
    """Convert errors of writes in the block to one sentence with the remedy, see `reaching`.

    Raises:
        InputError: the disk is full, the location is not writable, or the bucket fails.

    """
    try:
        with reaching(uri, about):
            yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"cannot write {uri}, because its name is too long: shorten it", about
            ) from error
        if not isinstance(error, PermissionError) and error.errno not in WRITE_ERRORS:
            raise
        raise InputError(
            f"cannot write {uri} ({error.strerror or error}): choose a folder with free space and write "
            "access",
            about,
        ) from error


def stored_crc32c(fs: Any, path: str) -> str:
    """Return the crc32c of a file, formatted by `checksum_text`.

    It is that which a bucket keeps. Elsewhere the file is read.
    """
    kept: str | None = fs.info(path).get("crc32c")
    if kept is not None:
        return kept
    with fs.open(path, "rb") as file:
        return crc32c_of(file)


def on_this_machine(uri: str) -> bool:
    """Return whether a URI is a path on the local disk, without opening it."""
    return split_protocol(uri)[0] in (None, "file", "local")


def is_local(fs: Any) -> bool:
    """Return whether a file system is the local disk."""
    return "file" in _protocols(fs)


def is_bucket(fs: Any) -> bool:
    """Return whether a file system is Google Cloud Storage."""
    return bool({"gs", "gcs"} & _protocols(fs))


def is_regular(fs: Any, path: str) -> bool:
    """Return whether a path may be read; pipes, devices and sockets may never end."""
    if not is_local(fs):
        return True
    try:
        kind = Path(path).stat().st_mode
    except OSError:
        return True  # reading it reports the problem
    return stat.S_ISREG(kind)


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


@contextlib.contextmanager
def _local_file(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL_SUFFIX}")
    try:
        with temporary.open("wb") as sink:
            with contextlib.suppress(OSError):  # a file system without locks: it is never removed
                fcntl.flock(sink, fcntl.LOCK_EX)
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary copies of this file that killed processes left behind.

    Writers hold a lock. Their process numbers say nothing: pods have the same ones.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(OSError), left.open("rb") as file:  # gone again, or without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - left.stat().st_mtime > ABANDONED:  # a new one may not be locked yet
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def _object(fs: Any, path: str) -> Iterator[BinaryIO]:
    # `new_file` compares checksums itself; gcsfs compares MD5, and not of every upload.
    options = {"consistency": "none"} if is_bucket(fs) else {}
    sink = fs.open(path, "wb", block_size=UPLOAD_BLOCK, autocommit=False, **options)
    try:
        yield sink
        sink.close()
        sink.commit()
    except BaseException as error:
        if not isinstance(error, TimeoutError):  # an upload that the server does not answer expires
            sink.discard()
        if isinstance(sink, AbstractBufferedFile):
            sink.closed = True  # otherwise its finalizer uploads the rest
        raise
