"""Copies files of a source to partial files: chunks in parallel, each recorded when it is on the disk.

What must not live here: which files to copy (plan), and giving them their names (stager).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from laion_assets.io.checksums import crc32c
from laion_assets.io.progress import Progress
from laion_assets.staging.manifest import StagedFile
from laion_assets.staging.partial import Partial, Unfinished
from laion_assets.staging.plan import Chunk, SourceFile, Transfer
from laion_assets.staging.transfer.fetch import Fetcher, Tally
from laion_assets.staging.transfer.source import RangeReader


class Copy:
    """Copies files in threads, or only reads them through where they are used in place.

    Args:
        reader: of the source.
        cache: where the partial files go; None where nothing is to be written.
        transfer: how to read.
        log: takes lines about the progress and about tries that failed, in the thread that calls `run`.
        tally: is added to.

    """

    def __init__(
        self,
        reader: RangeReader,
        cache: Path | None,
        transfer: Transfer,
        log: Callable[[str], None],
        tally: Tally,
    ) -> None:
        self._fetcher = Fetcher(reader, transfer.threads, log, tally)
        self._cache = cache
        self._chunk = transfer.chunk
        self._tally = tally

    def run(self, files: Sequence[SourceFile]) -> list[StagedFile]:
        """Copy the files; each is then whole, durable, and compared with the source's checksum.

        Raises:
            ChangedError: a file is no longer as it was listed.
            InputError: no right to read, nothing comes, or a file differs from its checksum.
            OSError: the disk takes no more.

        """
        what = "staging" if self._cache else "checking"
        opened: list[Unfinished] = []
        with Progress(what, sum(file.size for file in files), "B", self._fetcher.say) as progress:
            try:
                self._fetcher.run(self._jobs(files, opened), lambda job: self._copy_chunk(*job, progress))
            finally:
                for unfinished in opened:
                    unfinished.close()
        return [unfinished.staged() for unfinished in opened]

    def _jobs(
        self, files: Sequence[SourceFile], opened: list[Unfinished]
    ) -> Iterator[tuple[Unfinished, Chunk]]:
        for file in files:
            unfinished = self._begin(file)
            opened.append(unfinished)
            for chunk in unfinished.chunks:
                yield unfinished, chunk

    def _begin(self, file: SourceFile) -> Unfinished:
        return Partial(file, self._chunk, self._cache) if self._cache else Unfinished(file, self._chunk)

    def _copy_chunk(self, unfinished: Unfinished, chunk: Chunk, progress: Progress) -> None:
        if unfinished.has(chunk):
            self._tally.add(reused=chunk.size)
            progress.advance(chunk.size)
            return
        checksum = 0
        for data, at in self._fetcher.pieces(unfinished.file, chunk.start, chunk.stop):
            unfinished.write(data, at)
            checksum = crc32c(data, checksum)
            progress.advance(len(data))
        unfinished.finish(chunk, checksum)
