"""Copy a file chunk by chunk."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laion_assets.io.checksums import PartChecksums
from laion_assets.staging.full.blocks import BLOCK, Blocks
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

    May be used by several threads.

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
        self._block = math.gcd(BLOCK, chunk)  # so that no block lies in two chunks
        self._checksums: dict[int, list[int]] = {}  # of the blocks of each complete chunk
        self._blocks: Blocks | None = None
        self._lock = threading.Lock()
        self._partial = partial_path(cache, file.name)
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self._partial, file, chunk)
        self._file = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT), "r+b", buffering=0)

    def has(self, chunk: Chunk) -> bool:
        """Return whether an earlier attempt recorded a chunk that is still intact on the disk."""
        recorded = self._journal.recorded.get(chunk.number)
        if recorded is None or recorded != self._checksums_on_disk(chunk):
            return False
        self._add(chunk, recorded)
        return True

    def write(self, chunk: Chunk, pieces: Iterable[tuple[bytes, int]]) -> None:
        """Write a chunk, make it durable and record it.

        Args:
            chunk: the chunk.
            pieces: all of its bytes in order, each piece with its offset in the file.

        """
        checksums = PartChecksums(self._block)
        for data, at in pieces:
            write_at(self._file.fileno(), data, at)
            checksums.add(data)
        os.fdatasync(self._file.fileno())
        self._journal.record(chunk.number, checksums.finish())
        self._add(chunk, checksums.finish())

    @property
    def blocks(self) -> Blocks:
        """The blocks of the file, once all chunks are complete."""
        if self._blocks is None:
            raise AssertionError(f"{self.file.url} is incomplete")
        return self._blocks

    @property
    def is_complete(self) -> bool:
        """Whether all chunks are complete."""
        return self._blocks is not None

    @property
    def differs(self) -> bool:
        """Whether the source reports another checksum than that of the complete file."""
        return self.file.checksum not in (None, self.blocks.checksum)

    def close(self) -> None:
        """Close the partial file and its journal."""
        self._file.close()
        self._journal.close()

    def discard(self) -> None:
        """Discard the copy, which differs from its checksum."""
        journal_path(self._partial).unlink()
        self._partial.unlink()

    def _add(self, chunk: Chunk, checksums: list[int]) -> None:
        with self._lock:
            if self._checksums.get(chunk.number) == checksums:
                return
            self._checksums[chunk.number] = checksums
            if len(self._checksums) == len(self.chunks):
                every = [each for c in self.chunks for each in self._checksums[c.number]]
                self._blocks = Blocks(self.file.size, self._block, np.array(every, np.uint32))

    def _checksums_on_disk(self, chunk: Chunk) -> list[int]:
        checksums = PartChecksums(self._block)
        for at in range(chunk.start, chunk.stop, READ_BACK_SIZE):
            checksums.add(os.pread(self._file.fileno(), min(READ_BACK_SIZE, chunk.stop - at), at))
        return checksums.finish()


def chunks_of(size: int, chunk: int) -> list[Chunk]:
    """Cut a file into chunks, the last one shorter; an empty file is one empty chunk."""
    starts = range(0, max(size, 1), chunk)
    return [Chunk(number, start, min(start + chunk, size)) for number, start in enumerate(starts)]
