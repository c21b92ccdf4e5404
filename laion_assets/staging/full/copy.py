"""Copy files of a source to partial files, in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from laion_assets.io.errors import InputError
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
        self._reader = reader
        self._cache = cache
        self._options = options
        self._log = log
        self._stats = stats

    def run(self, files: Sequence[SourceFile]) -> list[str]:
        """Copy files, make them durable, and compare them with the source's checksums.

        The checksums of their blocks are kept, see `Blocks`.

        Returns:
            The crc32c of each file in base64.

        Raises:
            ChangedError: a file has changed since it was listed.
            InputError: access is denied, every retry failed, or a file differs from its checksum.
            OSError: the disk is full or not writable.

        """
        copies: list[PartialFile] = []
        try:
            self._copy(files, copies)
            for partial in copies:
                if partial.differs:
                    self._read_again(partial)
        finally:
            for partial in copies:
                partial.close()
        for partial in copies:
            partial.blocks.write(self._cache, partial.file.name, partial.blocks.checksum)
        return [partial.blocks.checksum for partial in copies]

    def _copy(self, files: Sequence[SourceFile], copies: list[PartialFile]) -> None:
        """Copy files to `copies`, except for the chunks that an earlier attempt has copied."""
        fetcher = self._fetcher()

        def jobs() -> Iterator[tuple[PartialFile, Chunk]]:
            for file in files:
                partial = PartialFile(file, self._options.chunk, self._cache)
                copies.append(partial)
                for chunk in partial.chunks:
                    yield partial, chunk

        def copy(job: tuple[PartialFile, Chunk]) -> None:
            partial, chunk = job
            if partial.has(chunk):
                self._stats.add(reused=chunk.size)
                progress.advance(chunk.size)
            else:
                pieces = fetcher.read(partial.file, chunk.start, chunk.stop)
                partial.write(chunk, counted(pieces, progress))
            if partial.is_complete and not partial.differs:
                partial.close()  # the number of open files is limited

        with Progress("staging", sum(file.size for file in files), "B", fetcher.log) as progress:
            fetcher.run(jobs(), copy)

    def _read_again(self, partial: PartialFile) -> None:
        """Read a file again that differs from its checksum, until its wrong part is replaced.

        The source reports one checksum for the whole file, so it does not tell which part is wrong.
        """
        file, fetcher = partial.file, self._fetcher()
        self._log(f"{file.url} differs from its checksum: reading it again to find the wrong part")

        def jobs() -> Iterator[Chunk]:
            for chunk in partial.chunks:
                if not partial.differs:
                    return
                yield chunk

        def copy(chunk: Chunk) -> None:
            partial.write(chunk, counted(fetcher.read(file, chunk.start, chunk.stop), progress))

        with Progress("reading again", file.size, "B", fetcher.log) as progress:
            fetcher.run(jobs(), copy)
        if partial.differs:
            partial.discard()
            raise InputError(
                f"{file.url} differs from its checksum: the source reports crc32c {file.checksum}, its "
                f"{file.size:,} bytes have {partial.blocks.checksum}, read twice: upload the file to the "
                "source again",
                "staged_index",
            )

    def _fetcher(self) -> Fetcher:
        return Fetcher(self._reader, self._options.threads, self._log, self._stats)


def counted(pieces: Iterable[tuple[bytes, int]], progress: Progress) -> Iterator[tuple[bytes, int]]:
    """Count the bytes of pieces as progress."""
    for data, at in pieces:
        yield data, at
        progress.advance(len(data))
