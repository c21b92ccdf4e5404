"""Copy a file chunk by chunk, and compare it with the source's checksum."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from laion_assets.io.checksums import checksum_text, crc32c, crc32c_of_parts
from laion_assets.io.errors import InputError
from laion_assets.staging.full.journal import Journal, journal_path, partial_path
from laion_assets.staging.transfer.disk import write_at
from laion_assets.staging.transfer.files import SourceFile

READ_BACK_SIZE = 4 << 20  # bytes


@dataclass(frozen=True)
class Chunk:
    """A part of a file: the bytes from `start` to `stop`."""

    number: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


class PartialFile:
    """A file that is copied to a partial file, with a journal beside it.

    Once all chunks are complete, its checksum is compared with the source's. May be used by several
    threads.

    Args:
        file: the file from the listing.
        chunk: size of a chunk in bytes.
        cache: folder of the copy.

    Attributes:
        file: the file.
        chunks: the chunks of the file, in order.

    """

    def __init__(self, file: SourceFile, chunk: int, cache: Path) -> None:
        self.file = file
        self.chunks = chunks_of(file.size, chunk)
        self._checksums: dict[int, int] = {}
        self._lock = threading.Lock()
        self._checksum: str | None = None
        self._partial = partial_path(cache, file.name)
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self._partial, file, chunk)
        self._file = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT), "r+b", buffering=0)

    def has(self, chunk: Chunk) -> bool:
        """Return whether an earlier attempt recorded a chunk that is still intact on the disk."""
        recorded = self._journal.recorded.get(chunk.number)
        if recorded is None or recorded != self._checksum_on_disk(chunk):
            return False
        self._check(chunk, recorded)
        return True

    def write(self, data: bytes, at: int) -> None:
        """Write the bytes at an offset."""
        write_at(self._file.fileno(), data, at)

    def finish(self, chunk: Chunk, checksum: int) -> None:
        """Make a chunk durable and record it; after the last chunk, compare the checksum of the file.

        Raises:
            InputError: the checksum differs from the source's.

        """
        os.fdatasync(self._file.fileno())
        self._journal.record(chunk.number, checksum)
        self._check(chunk, checksum)

    @property
    def checksum(self) -> str:
        """The crc32c of the file in base64, once all chunks are complete."""
        if self._checksum is None:
            raise AssertionError(f"{self.file.url} is incomplete")
        return self._checksum

    def close(self) -> None:
        """Close the partial file and its journal."""
        self._file.close()
        self._journal.close()

    def _check(self, chunk: Chunk, checksum: int) -> None:
        with self._lock:
            self._checksums[chunk.number] = checksum
            if len(self._checksums) < len(self.chunks):
                return
        found = checksum_text(crc32c_of_parts((self._checksums[c.number], c.size) for c in self.chunks))
        file = self.file
        if file.checksum not in (None, found):
            self._discard()
            raise InputError(
                f"{file.url} differs from its checksum: the source reports crc32c {file.checksum}, its "
                f"{file.size:,} bytes have {found}: stage the index again, and if that does not help, "
                "upload the file to the source again",
                "staged_index",
            )
        self._checksum = found
        self.close()

    def _checksum_on_disk(self, chunk: Chunk) -> int:
        checksum = 0
        for at in range(chunk.start, chunk.stop, READ_BACK_SIZE):
            data = os.pread(self._file.fileno(), min(READ_BACK_SIZE, chunk.stop - at), at)
            checksum = crc32c(data, checksum)
        return checksum

    def _discard(self) -> None:
        """Discard the copy: one of its chunks is wrong, and it is unknown which."""
        journal_path(self._partial).unlink()
        self._partial.unlink()


def chunks_of(size: int, chunk: int) -> list[Chunk]:
    """Cut a file into chunks, the last one shorter; an empty file is one empty chunk."""
    starts = range(0, max(size, 1), chunk)
    return [Chunk(number, start, min(start + chunk, size)) for number, start in enumerate(starts)]
