"""Read ranges of objects in Google Cloud Storage, with obstore.

gcsfs lists the bucket and supplies the credentials; obstore reads the bytes. obstore is written in Rust
and does not hold Python's global lock, see benchmarks/staging.md. Every read names the listed generation,
so reading an overwritten object fails, and two versions are never mixed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from threading import Lock
from typing import TYPE_CHECKING, Any

import obstore
from obstore.auth.google import GoogleCredentialProvider
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import GCSStore

from laion_assets.io.errors import InputError
from laion_assets.io.timeouts import CONNECT, SILENCE
from laion_assets.staging.transfer.files import SourceFile
from laion_assets.staging.transfer.range_readers import (
    ChangedError,
    TransientError,
    access_denied,
    reason,
)

if TYPE_CHECKING:
    from obstore import ObjectMeta

STREAM_PIECE = 256 << 10  # bytes, the most that is lost if a request is cut
SILENCE_TIMEOUT = timedelta(seconds=SILENCE)  # without a byte from the server
REQUEST_TIMEOUT = timedelta(seconds=30)  # then another request reads the rest


class GcsReader:
    """Reads ranges of objects.

    Args:
        gcs: the gcsfs file system that listed them; its credentials and endpoint are used.

    """

    pins = True

    def __init__(self, gcs: Any) -> None:
        self._gcs = gcs
        self._stores: dict[str, GCSStore] = {}
        self._lock = Lock()

    def read(self, file: SourceFile, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop` of the listed generation, see `RangeReader`.

        A request that takes longer than `REQUEST_TIMEOUT` is cut. If it has brought anything, the next
        one continues from there; if it has not, the server counts as silent.
        """
        at = start
        while at < stop:
            first, began = at, time.monotonic()
            try:
                for piece in self._request(file, at, stop):
                    at += len(piece)
                    yield piece
            except TransientError:
                was_cut = time.monotonic() - began >= REQUEST_TIMEOUT.total_seconds()
                if at == first or not was_cut:
                    raise
            else:
                return

    def _request(self, file: SourceFile, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop` with one request.

        Errors are classified only by type. obstore has classes for 401, 403, 404, 409 and 412. Every
        other failure is a `GenericError`. Some are transient: a reset connection, a timeout, an
        incomplete answer, 408, 429 and 5xx. Others, 400 and 416, are not. All of them are retried a
        limited number of times.
        """
        bucket, _, key = file.path.partition("/")
        try:
            found = obstore.get(
                self._store(bucket), key, options={"range": (start, stop), "version": file.version}
            )
            _check_answer(file, found.meta)
            if stop - start <= STREAM_PIECE:
                yield bytes(found.bytes())  # a stream waits for the interpreter twice more
            else:
                yield from found.stream(min_chunk_size=STREAM_PIECE)
        except FileNotFoundError as error:  # obstore raises Python's own for 404
            raise ChangedError(file, f"generation {file.version} is gone") from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise access_denied(file.url, error) from error
        except GenericError as error:
            raise TransientError(reason(error)) from error
        except BaseError as error:
            raise InputError(f"{file.url} cannot be read: {reason(error)}") from error

    def check(self, file: SourceFile) -> None:
        """Do nothing: every read names the generation."""

    def _store(self, bucket: str) -> GCSStore:
        with self._lock:  # many threads start together, and each store has its own connections
            if bucket not in self._stores:
                self._stores[bucket] = self._new_store(bucket)
            return self._stores[bucket]

    def _new_store(self, bucket: str) -> GCSStore:
        credentials = self._gcs.credentials.credentials  # None for a public bucket
        base = self._gcs.base.removesuffix("/storage/v1/")
        return GCSStore(
            bucket,
            config={"base_url": base},
            credential_provider=credentials and GoogleCredentialProvider(credentials),
            skip_signature=credentials is None,
            client_options={
                "allow_http": base.startswith("http://"),  # else no redirect leads to a host without TLS
                "connect_timeout": timedelta(seconds=CONNECT),
                "read_timeout": SILENCE_TIMEOUT,
                "timeout": REQUEST_TIMEOUT,
            },
            retry_config={"max_retries": 0},  # `Backoff` retries, counts and logs
        )


def _check_answer(file: SourceFile, found: ObjectMeta) -> None:
    """Check that an answer is of the listed object: obstore follows redirects to any host.

    Raises:
        ChangedError: the object has another size than listed.
        InputError: the answer is not of the bucket.

    """
    if found["version"] != file.version:
        raise InputError(
            f"{file.url} was requested in generation {file.version}, but the answer is of "
            f"{found['version'] or 'none'}: it comes from another server, such as a proxy or the target "
            "of a redirect; check the connection to the bucket",
            "index_uri",
        )
    if found["size"] != file.size:
        raise ChangedError(file, f"it has {found['size']:,} bytes")
