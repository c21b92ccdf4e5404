"""Checksums of the blocks of a copied file: damage is found, and mended, a block at a time.

They are kept in `.checksums/`, in a file named after the copied file and its checksum, so those of an old
and a new version lie side by side. A file of checksums is only used if its own checksum is right.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from laion_assets.io.checksums import PartChecksums, checksum_text, crc32c, crc32c_of_parts
from laion_assets.io.derived import keep
from laion_assets.io.parallel import slices

CHECKSUMS = ".checksums"  # folder in the cache directory
BLOCK = 1 << 20  # bytes
READ_AT_ONCE = 16  # blocks, by one thread
READS = 8  # threads: one alone waits for the disk most of the time
HEADER = struct.Struct("<Iq")  # crc32c of everything after it, bytes of a block


@dataclass(frozen=True)
class Blocks:
    """The blocks of a file.

    Attributes:
        size: bytes of the file.
        block: bytes of a block; the last one may be shorter.
        checksums: (n,) crc32c of each block.

    """

    size: int
    block: int
    checksums: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.checksums)

    @cached_property
    def checksum(self) -> str:
        """The crc32c of the file in base64."""
        ends = (self.ends(number) for number in range(len(self)))
        parts = zip(self.checksums.tolist(), (stop - start for start, stop in ends), strict=True)
        return checksum_text(crc32c_of_parts(parts))

    def ends(self, number: int) -> tuple[int, int]:
        """Return the offsets of the first byte of a block, and after its last."""
        start = number * self.block
        return start, min(start + self.block, self.size)

    def damaged(
        self, path: Path, numbers: Sequence[int], advance: Callable[[int], object] = lambda _: None
    ) -> list[int]:
        """Return which blocks of a file differ from their checksums, or cannot be read.

        Args:
            path: the file.
            numbers: the blocks to read.
            advance: called, in any thread, with the bytes read since the last call.

        """

        def damaged(some: Sequence[int]) -> list[int]:
            wrong = [n for n in some if self.checksums[n] != _checksum_at(file.fileno(), *self.ends(n))]
            advance(sum(stop - start for start, stop in map(self.ends, some)))
            return wrong

        groups = [numbers[some] for some in slices(len(numbers), READ_AT_ONCE)]
        with path.open("rb") as file:
            if len(groups) < 2:
                return [number for some in groups for number in damaged(some)]
            with ThreadPoolExecutor(READS, "verify") as pool:
                return [number for some in pool.map(damaged, groups) for number in some]

    @classmethod
    def of_file(cls, path: Path, advance: Callable[[int], object] = lambda _: None) -> Blocks:
        """Read a file and compute the checksums of its blocks.

        Args:
            path: the file.
            advance: called with the bytes read since the last call.

        """
        found = PartChecksums(BLOCK)
        with path.open("rb") as file:
            while data := file.read(BLOCK):
                found.add(data)
                advance(len(data))
        return cls(path.stat().st_size, BLOCK, np.array(found.finish(), np.uint32))

    @classmethod
    def read(cls, cache: Path, name: str, size: int, checksum: str) -> Blocks | None:
        """Read the kept checksums of a file; None if there are none, or they are damaged.

        Args:
            cache: the cache directory.
            name: name of the file in the staged index.
            size: its size in bytes.
            checksum: its crc32c in base64.

        """
        try:
            kept = _kept(cache, name, checksum).read_bytes()
        except FileNotFoundError:
            return None
        if len(kept) < HEADER.size or crc32c(kept[4:]) != HEADER.unpack_from(kept)[0]:
            return None
        block = HEADER.unpack_from(kept)[1]
        found = np.frombuffer(kept, "<u4", offset=HEADER.size).astype(np.uint32)
        return cls(size, block, found) if len(found) == -(-size // block) else None

    def write(self, cache: Path, name: str, checksum: str) -> None:
        """Keep the checksums of a file, see `read`; a folder that is read-only or full does without."""
        body = HEADER.pack(0, self.block)[4:] + self.checksums.astype("<u4").tobytes()
        keep(_kept(cache, name, checksum), struct.pack("<I", crc32c(body)) + body)


def remove_other_checksums(cache: Path, files: Sequence[tuple[str, str]]) -> None:
    """Remove the kept checksums of all but some files, given by name and crc32c."""
    kept = {_kept(cache, *file) for file in files}
    for path in (cache / CHECKSUMS).rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()


def _kept(cache: Path, name: str, checksum: str) -> Path:
    return cache / CHECKSUMS / f"{name}.{checksum.replace('/', '_')}"


def _checksum_at(descriptor: int, start: int, stop: int) -> int:
    """Return the checksum of a part of a file; -1 if it ends early, or the disk cannot read it."""
    try:
        data = os.pread(descriptor, stop - start, start)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return -1
    return crc32c(data) if len(data) == stop - start else -1
