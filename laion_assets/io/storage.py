"""Where files lie: a folder on the local disk or in a bucket, and what goes wrong there, in a sentence.

Everything goes through fsspec; gs:// is gcsfs. Credentials are those that Google Cloud's clients find in
the environment; STORAGE_EMULATOR_HOST points at another server, and needs none.
What must not live here: what the files mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.core import split_protocol

from laion_assets.io.errors import InputError

# It raises what it logs as well, and an error is told once.
logging.getLogger("gcsfs").addHandler(logging.NullHandler())

BUCKETS = ("gs://", "gcs://")
LISTED_AT_ONCE = 1000  # the most that Google Cloud Storage allows
LISTED_FIELDS = "items(name,size,updated,crc32c),nextPageToken"
UPLOAD_AT_ONCE = 16 << 20  # bytes; each piece is a request
PARTIAL = ".partial"
CANNOT_WRITE = {
    errno.ENOENT,  # what a folder that takes no new files may say, such as /proc
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
}
LOG_IN = (
    "run `gcloud auth application-default login`, or on a cluster give the service account of its pods a "
    "Google account (Workload Identity)"
)


def open_storage(uri: str, about: str | None = None) -> tuple[Any, str]:
    """Return the file system that a folder or file is on, and its path there.

    Listings are never kept: others write to the same folders.

    Args:
        uri: a local path or any fsspec URL.
        about: see `InputError`.

    Raises:
        InputError: no such kind of storage, or no credentials for it.

    """
    options: dict[str, Any] = {"use_listings_cache": False}
    if uri.startswith(BUCKETS):
        if not re.match(r"gc?s://[^/]", uri):
            raise InputError(f"{uri} names no bucket: write it as gs://bucket/folder", about)
        options["token"] = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else "google_default"
        # By default gcsfs asks for the kind of each bucket first, by gRPC and with a right of its own. It
        # takes most of a minute where gRPC does not get through, as with an emulator, and what is done
        # here is the same for every kind but zonal ones; who has such a bucket sets it to true.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    elif re.match(r"gc?s(:/|//)", uri):
        raise InputError(f"{uri} is neither a path nor a URL: write it as gs://bucket/folder", about)
    with reaching(uri, about):
        try:
            fs, path = fsspec.url_to_fs(uri, **options)
        except (ValueError, ImportError) as error:  # an unknown protocol, or one that is not installed
            raise InputError(f"{uri} cannot be opened ({error}): correct it", about) from error
    return fs, path.rstrip("/") or "/"


@dataclass(frozen=True, slots=True)
class Listed:
    """A file as a listing tells of it.

    Attributes:
        name: relative to the folder that was listed.
        path: for the file system it lies on.
        size: bytes.
        written: when it was last written, in whatever form; empty where that is not told.
        checksum: crc32c of the content, base64, as a bucket reports it.

    """

    name: str
    path: str
    size: int
    written: str
    checksum: str | None


def list_files(fs: Any, root: str) -> Iterator[Listed]:
    """List all files below a folder; none where there is no such folder.

    A bucket is listed in pages of a thousand and asked for no more than is used: gcsfs's own listing
    would hold several kilobytes for each object until the end.
    """
    if not {"gs", "gcs"} & _protocols(fs):
        for path, info in fs.find(root, detail=True).items():
            name = path.removeprefix(root).lstrip("/")
            yield Listed(name, path, info["size"], str(info.get("mtime", "")), info.get("crc32c"))
        return
    bucket, _, folder = root.partition("/")
    prefix = f"{folder}/" if folder else ""
    asked = {"prefix": prefix, "maxResults": LISTED_AT_ONCE, "fields": LISTED_FIELDS}
    token = None
    while True:
        page = fs.call("GET", "b/{}/o", bucket, json_out=True, pageToken=token, **asked)
        for item in page.get("items", ()):
            name = item["name"].removeprefix(prefix)
            path = f"{bucket}/{item['name']}"
            yield Listed(name, path, int(item["size"]), item["updated"], item.get("crc32c"))
        token = page.get("nextPageToken")
        if not token:
            return


@contextlib.contextmanager
def reaching(uri: str, about: str | None = None) -> Iterator[None]:
    """Turn what a bucket refuses in this block into one sentence with the remedy.

    Raises:
        InputError: no credentials, no access, no such bucket, no connection.

    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        refusal = _refusal(uri, error) if uri.startswith(BUCKETS) else None
        if refusal is None:
            raise
        raise InputError(refusal, about) from error


def _refusal(uri: str, error: Exception) -> str | None:
    """Say what an error of a bucket means; None for one that is not the bucket's."""
    import aiohttp
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    answer = first_line(error, last=True)
    if isinstance(error, GoogleAuthError) or (isinstance(error, HttpError) and error.code == 401):
        return f"there are no valid credentials for {uri} ({answer}): {LOG_IN}"
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):
        return (
            f"access to {uri} is refused ({answer}): give the account that runs this the right to it, or "
            "correct the address"
        )
    if isinstance(error, FileNotFoundError):
        return f"there is no bucket {'/'.join(uri.split('/')[:3])}: create it, or correct the address"
    if isinstance(error, aiohttp.ClientError | RequestException | asyncio.TimeoutError | ConnectionError):
        return (
            f"{uri} cannot be reached ({answer}): check the network, and STORAGE_EMULATOR_HOST if it is "
            "set, then try again"
        )
    if isinstance(error, HttpError) and (error.code == 429 or error.code >= 500):
        return f"{uri} is busy or out of order ({answer}): try again later"
    if isinstance(error, HttpError) or (isinstance(error, ValueError) and "Bad Request" in str(error)):
        return f"{uri} cannot be used ({answer}): correct the address"
    return None


def first_line(error: Exception, *, last: bool = False) -> str:
    """Return the first line of an error's message, or the last, where servers put their answer."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if last else 0].strip()


@contextlib.contextmanager
def new_file(uri: str, about: str | None = None) -> Iterator[BinaryIO]:
    """Open a file that takes its name only if the block ends well.

    In a bucket it is one upload, which makes an object at its end or not at all.

    Args:
        uri: a local path or any fsspec URL.
        about: see `InputError`.

    Raises:
        InputError: the place cannot be written to.

    """
    fs, path = open_storage(uri, about)
    try:
        with (
            reaching(uri, about),
            _local_file(Path(path)) if is_local(fs) else _object(fs, path) as sink,
        ):
            yield sink
    except OSError as error:
        if not isinstance(error, PermissionError) and error.errno not in CANNOT_WRITE:
            raise
        raise InputError(
            f"cannot write {uri} ({error.strerror or error}): choose a folder with room "
            "that you can write to",
            about,
        ) from error


def on_this_machine(uri: str) -> bool:
    """Tell whether a URI is a path on the local disk; asks nobody."""
    return split_protocol(uri)[0] in (None, "file", "local")


def is_local(fs: Any) -> bool:
    """Tell whether a file system is the local disk."""
    return "file" in _protocols(fs)


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


@contextlib.contextmanager
def _local_file(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with temporary.open("wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed have left of this file."""
    for left in path.parent.glob(f".{path.name}.*{PARTIAL}"):
        writer = int(left.name.removesuffix(PARTIAL).rpartition(".")[2])
        if not _is_alive(writer):
            left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is, and somebody else's
        return True
    return True


@contextlib.contextmanager
def _object(fs: Any, path: str) -> Iterator[BinaryIO]:
    sink = fs.open(path, "wb", block_size=UPLOAD_AT_ONCE, autocommit=False)
    try:
        yield sink
        sink.close()
    except BaseException:
        sink.discard()
        raise
    sink.commit()
