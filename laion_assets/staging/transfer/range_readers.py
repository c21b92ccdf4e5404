"""Read ranges of source files: the interface, its errors, and the reader for fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import aiohttp

from laion_assets.io.errors import InputError
from laion_assets.io.public_urls import without_secrets
from laion_assets.staging.transfer.files import SourceFile, file_version

FSSPEC_READ_SIZE = 8 << 20  # bytes; fsspec does not return partial reads


class TransientError(Exception):
    """A read failed, but a retry may succeed: a reset connection, 429, 5xx, a timeout."""


class ChangedError(Exception):
    """A file at the source has changed since it was listed."""

    def __init__(self, file: SourceFile, reason: str) -> None:
        super().__init__(reason)
        self.file = file


class RangeReader(Protocol):
    """Reads ranges of files.

    Attributes:
        pins: whether every read either returns the listed version or fails.

    """

    pins: bool

    def read(self, file: SourceFile, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop` in pieces of a few MiB.

        The bytes only end early without an error if the file does.

        Raises:
            TransientError: a retry may succeed.
            ChangedError: the file has changed since it was listed.
            InputError: access is denied, or the request is refused permanently.

        """

    def check(self, file: SourceFile) -> None:
        """Check that the file has not changed since it was listed.

        Raises:
            ChangedError: the file may have changed.

        """


class FsspecReader:
    """Reads ranges through fsspec, which does not pin the version of a file."""

    pins = False

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def read(self, file: SourceFile, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, see `RangeReader`."""
        for at in range(start, stop, FSSPEC_READ_SIZE):
            try:
                piece = self._fs.cat_file(file.path, start=at, end=min(at + FSSPEC_READ_SIZE, stop))
            except FileNotFoundError as error:
                raise ChangedError(file, "it is gone") from error
            except PermissionError as error:
                raise access_denied(file.url, error) from error
            except (OSError, aiohttp.ClientError) as error:  # timeouts are OSErrors
                raise TransientError(reason(error)) from error
            yield piece

    def check(self, file: SourceFile) -> None:
        """Compare the version with the current one, see `RangeReader`."""
        try:
            version = file_version(self._fs.info(file.path))
        except FileNotFoundError as error:
            raise ChangedError(file, "it is gone") from error
        if version != file.version:
            raise ChangedError(file, "it was overwritten")


def access_denied(url: str, error: Exception) -> InputError:
    """Return the error for a file without read permission."""
    return InputError(
        f"no permission to read {url} ({reason(error)}): grant the account that runs this read "
        "access (in Google Cloud Storage the role Storage Object Viewer), and check its credentials"
    )


def reason(error: Exception) -> str:
    """Return an error's message on one line, without obstore's debug output."""
    message, _, _ = str(error).partition("\n\nDebug source:")
    return without_secrets(" ".join(message.split()) or repr(error))
