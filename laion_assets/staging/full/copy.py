"""Copying files of a source to partial files, in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from laion_assets.io.checksums import crc32c
from laion_assets.io.progress import Progress
from laion_assets.staging.full.partial import CheckedFile, Chunk, PartialFile
from laion_assets.staging.transfer.fetch import Fetcher, TransferOptions, TransferStats
from laion_assets.staging.transfer.files import SourceFile
from laion_assets.staging.transfer.range_readers import RangeReader


class FullCopy:
    """Copies files in threads, or only reads them where they are used in place.

    Args:
        reader: reads the source.
        cache: folder of the partial files; None to write nothing.
        options: how to read.
        log: takes lines about progress and retries, in the thread that calls `run`.
        stats: counts what is read.

    """

    def __init__(
        self,
        reader: RangeReader,
        cache: Path | None,
        options: TransferOptions,
        log: Callable[[str], None],
        stats: TransferStats,
    ) -> None:
        self._fetcher = Fetcher(reader, options.threads, log, stats)
        self._cache = cache
        self._chunk = options.chunk
        self._stats = stats

    def run(self, files: Sequence[SourceFile]) -> list[str]:
        """Copy files; each is then complete, durable, and compared with the source's checksum.

        Returns:
            crc32c of each file in base64.

        Raises:
            ChangedError: a file is no longer as it was listed.
            InputError: access is denied, every retry failed, or a file differs from its checksum.
            OSError: the disk is full or cannot be written to.

        """
        what = "staging" if self._cache else "checking"
        opened: list[CheckedFile] = []
        with Progress(what, sum(file.size for file in files), "B", self._fetcher.log) as progress:
            try:
                self._fetcher.run(self._jobs(files, opened), lambda job: self._copy_chunk(*job, progress))
            finally:
                for checked in opened:
                    checked.close()
        return [checked.checksum for checked in opened]

    def _jobs(
        self, files: Sequence[SourceFile], opened: list[CheckedFile]
    ) -> Iterator[tuple[CheckedFile, Chunk]]:
        for file in files:
            checked = self._open(file)
            opened.append(checked)
            for chunk in checked.chunks:
                yield checked, chunk

    def _open(self, file: SourceFile) -> CheckedFile:
        if self._cache is None:
            return CheckedFile(file, self._chunk)
        return PartialFile(file, self._chunk, self._cache)

    def _copy_chunk(self, checked: CheckedFile, chunk: Chunk, progress: Progress) -> None:
        if checked.has(chunk):
            self._stats.add(reused=chunk.size)
            progress.advance(chunk.size)
            return
        checksum = 0
        for data, at in self._fetcher.read(checked.file, chunk.start, chunk.stop):
            checked.write(data, at)
            checksum = crc32c(data, checksum)
            progress.advance(len(data))
        checked.finish(chunk, checksum)
