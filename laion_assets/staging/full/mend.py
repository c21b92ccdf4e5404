"""Mend a copied file: fetch only its damaged blocks again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from laion_assets.io.checksums import crc32c
from laion_assets.io.errors import InputError
from laion_assets.staging.full.blocks import Blocks
from laion_assets.staging.transfer.disk import write_at
from laion_assets.staging.transfer.fetch import Fetcher, TransferStats
from laion_assets.staging.transfer.files import SourceFile
from laion_assets.staging.transfer.range_readers import RangeReader

THREADS = 16


def mend(
    path: Path,
    blocks: Blocks,
    damaged: Sequence[int],
    file: SourceFile,
    reader: RangeReader,
    log: Callable[[str], None],
    stats: TransferStats,
) -> None:
    """Fetch damaged blocks of a file, and write those that have the right checksum, durably.

    Args:
        path: the file, which nobody reads meanwhile.
        blocks: its checksums.
        damaged: numbers of the blocks.
        file: the file at the source.
        reader: reads the source.
        log: called with lines about retries.
        stats: statistics of the reads.

    Raises:
        ChangedError: the file has changed since it was listed.
        InputError: the source cannot be read, or returns other bytes than were staged.

    """
    fetcher = Fetcher(reader, min(THREADS, len(damaged)), log, stats)
    with path.open("r+b") as target:

        def fetch(number: int) -> None:
            start, stop = blocks.ends(number)
            data = b"".join(piece for piece, _ in fetcher.read(file, start, stop))
            if crc32c(data) != blocks.checksums[number]:
                raise InputError(
                    f"{file.url} returns other bytes from {start:,} to {stop:,} than were staged: try "
                    "again, and if that does not help, upload the file to the source again",
                    "staged_index",
                )
            write_at(target.fileno(), data, start)

        fetcher.run(iter(damaged), fetch)
        os.fsync(target.fileno())
