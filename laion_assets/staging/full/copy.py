"""Copy files of a source to partial files, in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from laion_assets.io.checksums import crc32c
from laion_assets.io.progress import Progress
from laion_assets.staging.full.partial import Chunk, PartialFile
from laion_assets.staging.transfer.fetch import Fetcher, TransferOptions, TransferStats
from laion_assets.staging.transfer.files import SourceFile
from laion_assets.staging.transfer.range_readers import RangeReader


class FullCopy:
    """Copies files in threads.

    Args:
        reader: reads the source.
        cache: folder of the copy.
        options: options for reading.
        log: called with lines about progress and retries, in the thread that calls `run`.
        stats: statistics of the reads.

    """

    def __init__(
        self,
        reader: RangeReader,
        cache: Path,
        options: TransferOptions,
        log: Callable[[str], None],
        stats: TransferStats,
    ) -> None:
        self._fetcher = Fetcher(reader, options.threads, log, stats)
        self._cache = cache
        self._chunk = options.chunk
        self._stats = stats

    def run(self, files: Sequence[SourceFile]) -> list[str]:
        """Copy files, make them durable, and compare them with the source's checksums.

        Returns:
            The crc32c of each file in base64.

        Raises:
            ChangedError: a file has changed since it was listed.
            InputError: access is denied, every retry failed, or a file differs from its checksum.
            OSError: the disk is full or not writable.

        """
        opened: list[PartialFile] = []
        with Progress("staging", sum(file.size for file in files), "B", self._fetcher.log) as progress:
            try:
                self._fetcher.run(self._jobs(files, opened), lambda job: self._copy_chunk(*job, progress))
            finally:
                for partial in opened:
                    partial.close()
        return [partial.checksum for partial in opened]

    def _jobs(
        self, files: Sequence[SourceFile], opened: list[PartialFile]
    ) -> Iterator[tuple[PartialFile, Chunk]]:
        for file in files:
            partial = PartialFile(file, self._chunk, self._cache)
            opened.append(partial)
            for chunk in partial.chunks:
                yield partial, chunk

    def _copy_chunk(self, partial: PartialFile, chunk: Chunk, progress: Progress) -> None:
        if partial.has(chunk):
            self._stats.add(reused=chunk.size)
            progress.advance(chunk.size)
            return
        checksum = 0
        for data, at in self._fetcher.read(partial.file, chunk.start, chunk.stop):
            partial.write(data, at)
            checksum = crc32c(data, checksum)
            progress.advance(len(data))
        partial.finish(chunk, checksum)
