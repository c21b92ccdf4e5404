"""Read ranges of a source in threads, with retries."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

from laion_assets.io.errors import InputError
from laion_assets.staging.transfer.backoff import Backoff
from laion_assets.staging.transfer.files import SourceFile
from laion_assets.staging.transfer.range_readers import ChangedError, RangeReader, TransientError

LOG_INTERVAL = 0.5  # seconds between flushes of queued log lines

FetchJob = TypeVar("FetchJob")


class StoppedError(Exception):
    """The read was stopped because another job has failed."""


@dataclass(frozen=True)
class TransferOptions:
    """Options for reading files.

    Attributes:
        chunk: number of bytes that are read, recorded and, if necessary, read again as a unit.
        threads: number of chunks read in parallel, from one or several files.

    """

    chunk: int = 32 << 20
    threads: int = 16


@dataclass
class TransferStats:
    """Statistics of reads; threads may add to them concurrently.

    Attributes:
        fetched: bytes read from the source.
        reused: intact bytes on the disk from an earlier attempt.
        reads: number of read requests.
        retries: number of reads that failed and were retried.

    """

    fetched: int = 0
    reused: int = 0
    reads: int = 0
    retries: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, *, fetched: int = 0, reused: int = 0, reads: int = 0, retries: int = 0) -> None:
        """Add to the counts."""
        with self._lock:
            self.fetched += fetched
            self.reused += reused
            self.reads += reads
            self.retries += retries


class Fetcher:
    """Reads ranges in threads.

    Args:
        reader: reads the source.
        threads: number of threads.
        log: called with log lines, in the thread that calls `run`.
        stats: statistics of the reads.

    """

    def __init__(
        self, reader: RangeReader, threads: int, log: Callable[[str], None], stats: TransferStats
    ) -> None:
        self._reader = reader
        self._threads = threads
        self._log = log
        self._stats = stats
        self._stop = threading.Event()
        self._lines: SimpleQueue[str] = SimpleQueue()

    def log(self, line: str) -> None:
        """Queue a line for the log; may be called from any thread."""
        self._lines.put(line)

    def run(self, jobs: Iterator[FetchJob], work: Callable[[FetchJob], None]) -> None:
        """Run all jobs; the first error stops the others and is raised."""
        errors: list[BaseException] = []
        turn = threading.Lock()

        def do_jobs() -> None:
            try:
                while not self._stop.is_set():
                    with turn:
                        job = next(jobs, None)
                    if job is None:
                        return
                    work(job)
            except BaseException as error:  # the first error is raised below; later ones follow from it
                errors.append(error)
                self._stop.set()

        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="staging")
        workers = [pool.submit(do_jobs) for _ in range(self._threads)]
        try:
            while wait(workers, LOG_INTERVAL).not_done:
                self._flush_log()
        finally:
            self._stop.set()  # also when this thread is interrupted
            try:
                _wait_for_all(workers)
            finally:
                pool.shutdown()
                self._flush_log()
        if errors:
            raise errors[0]

    def _flush_log(self) -> None:
        while not self._lines.empty():
            self._log(self._lines.get())

    def read(self, file: SourceFile, start: int, stop: int) -> Iterator[tuple[bytes, int]]:
        """Yield the bytes from `start` to `stop` in pieces, see `read_range`; for use in a job.

        Raises:
            StoppedError: another job has failed.

        """
        return read_range(self._reader, file, start, stop, self._stop, self.log, self._stats)


def read_range(
    reader: RangeReader,
    file: SourceFile,
    start: int,
    stop: int,
    halt: threading.Event,
    log: Callable[[str], None],
    stats: TransferStats,
) -> Iterator[tuple[bytes, int]]:
    """Yield the bytes from `start` to `stop` in pieces, each with its offset.

    After a transient error, the read continues from the last byte that was read.

    Args:
        reader: reads the source.
        file: a file from the listing.
        start: offset of the first byte.
        stop: offset after the last byte.
        halt: ends the read when set.
        log: called with a line about each retry, in this thread.
        stats: statistics of the reads.

    Raises:
        ChangedError: the file has changed since it was listed.
        InputError: access is denied, or every retry failed.
        StoppedError: `halt` was set.

    """
    backoff = Backoff(file.url, halt, log)
    at = start
    while at < stop:
        stats.add(reads=1)
        try:
            for data in reader.read(file, at, stop):
                if at + len(data) > stop:
                    raise InputError(
                        f"{file.url} cannot be read in parts, because its server returns more than "
                        "requested: copy it to a local folder or a bucket"
                    )
                yield data, at
                at += len(data)
                stats.add(fetched=len(data))
                backoff.reset()
                if halt.is_set():
                    raise StoppedError
            if at < stop:
                raise ChangedError(file, f"it ends after {at:,} of {file.size:,} bytes")
        except TransientError as error:
            stats.add(retries=1)
            backoff.wait(error)
            if halt.is_set():
                raise StoppedError from error


def _wait_for_all(workers: Sequence[Future[None]]) -> None:
    """Wait until all threads have ended, even if this thread is interrupted.

    Callers rely on no thread writing any more. Joining threads is not enough, because Python considers a
    thread ended if its join was interrupted.
    """
    interrupt: BaseException | None = None
    while True:
        try:
            wait(workers)
        except BaseException as error:  # raised once all threads have ended
            interrupt = error
        else:
            break
    if interrupt is not None:
        raise interrupt
