"""Copies files of a source to partial files: chunks in parallel, each recorded when it is on the disk.

What must not live here: which files to copy (plan), and giving them their names (stager).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from laion_assets.retrieval.checksums import crc32c
from laion_assets.retrieval.progress import Progress
from laion_assets.retrieval.staging.faults import ChangedError, Patience, TransientError
from laion_assets.retrieval.staging.manifest import StagedFile
from laion_assets.retrieval.staging.partial import Partial, Unfinished
from laion_assets.retrieval.staging.plan import Chunk, SourceFile, Transfer
from laion_assets.retrieval.staging.source import RangeReader

SECONDS_BETWEEN_LOOKS = 0.5  # for lines to log


@dataclass
class Tally:
    """Counts what copying took; many threads add to it.

    Attributes:
        fetched: bytes read from the source.
        reused: bytes of an earlier attempt that were on the disk and right.
        retries: reads that failed and were tried again.

    """

    fetched: int = 0
    reused: int = 0
    retries: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, *, fetched: int = 0, reused: int = 0, retries: int = 0) -> None:
        """Add to the counts."""
        with self._lock:
            self.fetched += fetched
            self.reused += reused
            self.retries += retries


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
        self._reader = reader
        self._cache = cache
        self._transfer = transfer
        self._log = log
        self._tally = tally
        self._stop = threading.Event()
        self._lines: SimpleQueue[str] = SimpleQueue()

    def run(self, files: Sequence[SourceFile]) -> list[StagedFile]:
        """Copy the files; each is then whole, durable, and compared with the source's checksum.

        Raises:
            ChangedError: a file is no longer as it was listed.
            InputError: no right to read, nothing comes, or a file differs from its checksum.
            OSError: the disk takes no more.

        """
        what = "staging" if self._cache else "checking"
        with Progress(what, sum(file.size for file in files), "B", self._lines.put) as progress:
            return self._run(files, progress)

    def _run(self, files: Sequence[SourceFile], progress: Progress) -> list[StagedFile]:
        opened: list[Unfinished] = []
        errors: list[BaseException] = []
        jobs = self._jobs(files, opened)
        turn = threading.Lock()

        def copy_chunks() -> None:
            try:
                while not self._stop.is_set():
                    with turn:
                        job = next(jobs, None)
                    if job is None:
                        return
                    self._copy_chunk(*job, progress)
            except BaseException as error:  # the first one is raised below; the others follow from it
                errors.append(error)
                self._stop.set()

        try:
            with ThreadPoolExecutor(self._transfer.threads, thread_name_prefix="staging") as pool:
                try:
                    workers = [pool.submit(copy_chunks) for _ in range(self._transfer.threads)]
                    while wait(workers, SECONDS_BETWEEN_LOOKS).not_done:
                        self._pass_on_lines()
                finally:
                    self._stop.set()  # also when this thread is interrupted
        finally:
            for unfinished in opened:
                unfinished.close()
            self._pass_on_lines()
        if errors:
            raise errors[0]
        return [unfinished.staged() for unfinished in opened]

    def _pass_on_lines(self) -> None:
        while not self._lines.empty():
            self._log(self._lines.get())

    def _jobs(
        self, files: Sequence[SourceFile], opened: list[Unfinished]
    ) -> Iterator[tuple[Unfinished, Chunk]]:
        for file in files:
            unfinished = self._begin(file)
            opened.append(unfinished)
            for chunk in unfinished.chunks:
                yield unfinished, chunk

    def _begin(self, file: SourceFile) -> Unfinished:
        chunk = self._transfer.chunk
        return Partial(file, chunk, self._cache) if self._cache else Unfinished(file, chunk)

    def _copy_chunk(self, unfinished: Unfinished, chunk: Chunk, progress: Progress) -> None:
        if unfinished.has(chunk):
            self._tally.add(reused=chunk.size)
            progress.advance(chunk.size)
            return
        checksum = self._fetch(unfinished, chunk, progress)
        if checksum is not None:
            unfinished.finish(chunk, checksum)

    def _fetch(self, unfinished: Unfinished, chunk: Chunk, progress: Progress) -> int | None:
        """Read a chunk from the source and write it; goes on where it stopped when reading fails.

        Returns:
            Its checksum; None where others want the work to end.

        """
        file = unfinished.file
        patience = Patience(file.url, self._stop, self._lines.put)
        checksum, at = 0, chunk.start
        while at < chunk.stop:
            try:
                for data in self._reader.read(file, at, chunk.stop):
                    unfinished.write(data, at)
                    checksum = crc32c(data, checksum)
                    at += len(data)
                    self._tally.add(fetched=len(data))
                    progress.advance(len(data))
                    patience.reset()
                    if self._stop.is_set():
                        return None
                if at < chunk.stop:
                    raise ChangedError(file, f"it ends after {at:,} of {file.size:,} bytes")
            except TransientError as error:
                self._tally.add(retries=1)
                patience.wait(error)
                if self._stop.is_set():
                    return None
        return checksum
