"""Ranges of objects in Google Cloud Storage, read with obstore.

fsspec's client (gcsfs) lists the bucket and signs in; the bytes come through obstore, which is written in
Rust and leaves Python's one lock alone: see benchmarks/staging.md. Every read names the generation that
was listed, so that an object overwritten meanwhile is not found rather than mixed.
What must not live here: listing, retrying, the local disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from threading import Lock
from typing import Any

import obstore
from obstore.auth.google import GoogleCredentialProvider
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import GCSStore

from laion_assets.io.errors import InputError
from laion_assets.staging.plan import SourceFile
from laion_assets.staging.transfer.errors import ChangedError, TransientError, not_allowed

PIECE = 1 << 20
SILENCE = timedelta(seconds=30)  # from the server, before a read counts as failed
SLOWEST = timedelta(minutes=10)  # for one range
PASSING = {408, 429}  # of the statuses from 400 to 499


class BucketReader:
    """Reads ranges of objects.

    Args:
        gcs: the gcsfs file system that listed them: its credentials and endpoint are used.

    """

    pins = True

    def __init__(self, gcs: Any) -> None:
        self._gcs = gcs
        self._stores: dict[str, GCSStore] = {}
        self._making = Lock()

    def read(self, file: SourceFile, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop` of the generation that was listed.

        Raises:
            TransientError: a reset connection, 408, 429, 5xx, or silence.
            ChangedError: that generation is no longer there.
            InputError: no right to read it, or a request that the bucket refuses for good.

        """
        bucket, _, key = file.path.partition("/")
        try:
            found = obstore.get(
                self._store(bucket), key, options={"range": (start, stop), "version": file.version}
            )
            yield from found.stream(min_chunk_size=PIECE)
        except FileNotFoundError as error:
            raise ChangedError(file, f"generation {file.version} is gone") from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise not_allowed(file.url, error) from error
        except BaseError as error:
            reason = str(error).splitlines()[0]
            status = re.search(r"status code: (\d+)", reason)
            if status and status[1].startswith("4") and int(status[1]) not in PASSING:
                raise InputError(f"{file.url} cannot be read: {reason}") from error
            raise TransientError(reason) from error

    def check(self, file: SourceFile) -> None:
        """Do nothing: every read names the generation."""

    def _store(self, bucket: str) -> GCSStore:
        with self._making:  # many threads begin at once, and each client has connections of its own
            if bucket not in self._stores:
                self._stores[bucket] = self._new_store(bucket)
            return self._stores[bucket]

    def _new_store(self, bucket: str) -> GCSStore:
        credentials = self._gcs.credentials.credentials  # None for a public bucket
        return GCSStore(
            bucket,
            config={"base_url": self._gcs.base.removesuffix("/storage/v1/")},
            credential_provider=credentials and GoogleCredentialProvider(credentials),
            skip_signature=credentials is None,
            client_options={"allow_http": True, "read_timeout": SILENCE, "timeout": SLOWEST},
            retry_config={"max_retries": 0},  # we count them
        )
