"""A file that is being read, or copied to a partial file, chunk by chunk.

What must not live here: where the bytes come from (copy), and giving the file its name (stager).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from laion_assets.io.checksums import checksum_text, crc32c, crc32c_of_parts
from laion_assets.io.errors import InputError
from laion_assets.staging.journal import Journal, journal_of, partial_of
from laion_assets.staging.manifest import STAGE_AGAIN, StagedFile
from laion_assets.staging.plan import Chunk, SourceFile, chunks_of

PIECE = 4 << 20  # read back at a time


class Unfinished:
    """A file of which every chunk has to be read; many threads may tell of chunks.

    Args:
        file: as it was listed.
        chunk: bytes of its chunks.

    Attributes:
        chunks: its parts, in order.

    """

    def __init__(self, file: SourceFile, chunk: int) -> None:
        self.file = file
        self.chunks = chunks_of(file.size, chunk)
        self._checksums: dict[int, int] = {}
        self._lock = threading.Lock()
        self._staged: StagedFile | None = None

    def has(self, chunk: Chunk) -> bool:  # noqa: ARG002
        """Whether a chunk need not be read."""
        return False

    def write(self, data: bytes, at: int) -> None:
        """Take bytes from the offset `at` on."""

    def finish(self, chunk: Chunk, checksum: int) -> None:
        """Note that a chunk was read; the last one ends with the comparison of the whole file.

        Raises:
            InputError: the file differs from the checksum that the source has of it.

        """
        with self._lock:
            self._checksums[chunk.number] = checksum
            if len(self._checksums) < len(self.chunks):
                return
        found = checksum_text(crc32c_of_parts((self._checksums[c.number], c.size) for c in self.chunks))
        file = self.file
        if file.checksum not in (None, found):
            self._discard()
            raise InputError(
                f"{file.url} differs from its own checksum: the source says crc32c {file.checksum}, its "
                f"{file.size:,} bytes have {found}: {STAGE_AGAIN}, and if it stays, upload the file to "
                "the source again"
            )
        self._staged = StagedFile(file.name, self._path, file.url, file.size, file.version, found)
        self.close()

    def staged(self) -> StagedFile:
        """The file, once it is whole."""
        if self._staged is None:
            raise AssertionError(f"{self.file.url} is not whole yet")
        return self._staged

    def close(self) -> None:
        """Close what is open."""

    @property
    def _path(self) -> str:
        return self.file.path

    def _discard(self) -> None:
        """Throw away what was read, for it is wrong and nobody knows where."""


class Partial(Unfinished):
    """A file that is copied to a partial file, with a journal beside it.

    Args:
        file: as it was listed.
        chunk: bytes of its chunks.
        cache: the folder of the copy.

    """

    def __init__(self, file: SourceFile, chunk: int, cache: Path) -> None:
        super().__init__(file, chunk)
        self._partial = partial_of(cache, file.name)
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self._partial, file, chunk)
        self._file = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT), "r+b", buffering=0)

    def has(self, chunk: Chunk) -> bool:
        """Whether a chunk is on the disk already, as an earlier attempt recorded it."""
        recorded = self._journal.recorded.get(chunk.number)
        if recorded is None or recorded != self._checksum_on_disk(chunk):
            return False
        super().finish(chunk, recorded)
        return True

    def write(self, data: bytes, at: int) -> None:
        """Write bytes at an offset."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file.fileno(), view, at)
            view, at = view[written:], at + written

    def finish(self, chunk: Chunk, checksum: int) -> None:
        """Make a chunk durable and record it, see `Unfinished.finish`."""
        os.fdatasync(self._file.fileno())
        self._journal.record(chunk.number, checksum)
        super().finish(chunk, checksum)

    def close(self) -> None:
        """Close the partial file and its journal."""
        self._file.close()
        self._journal.close()

    @property
    def _path(self) -> str:
        return self.file.name

    def _checksum_on_disk(self, chunk: Chunk) -> int:
        checksum = 0
        for at in range(chunk.start, chunk.stop, PIECE):
            data = os.pread(self._file.fileno(), min(PIECE, chunk.stop - at), at)
            checksum = crc32c(data, checksum)
        return checksum

    def _discard(self) -> None:
        journal_of(self._partial).unlink()
        self._partial.unlink()
