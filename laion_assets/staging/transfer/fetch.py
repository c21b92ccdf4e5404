"""Reading ranges of a source in threads, with retries."""

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

LOG_INTERVAL = 0.5  # seconds between emptying the queue of lines to log

FetchJob = TypeVar("FetchJob")


class StoppedError(Exception):
    """The read was told to end, since another job has failed."""


@dataclass(frozen=True)
class TransferOptions:
    """How files are read.

    Attributes:
        chunk: bytes that are read, recorded and, where necessary, read again as a unit.
        threads: chunks that are read at a time, of one file or several.

    """

    chunk: int = 32 << 20
    threads: int = 16


@dataclass
class TransferStats:
    """Counts of what was read; threads may add to it concurrently.

    Attributes:
        fetched: bytes read from the source.
        reused: bytes that an earlier attempt left on the disk, intact.
        reads: requests for bytes.
        retries: reads that failed and were tried again.

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
        log: takes lines, in the thread that calls `run`.
        stats: counts what is read.

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
        """Do all jobs; the first error stops the others and is raised."""
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
            except BaseException as error:  # the first is raised below; the others follow from it
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

    A transient error is retried from the last byte that was read.

    Args:
        reader: reads the source.
        file: a file from the listing.
        start: offset of the first byte.
        stop: offset after the last byte.
        halt: ends the read when set.
        log: takes a line about each retry, in this thread.
        stats: counts what is read.

    Raises:
        ChangedError: the file is no longer as it was listed.
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
                        f"{file.url} cannot be read in parts, since its server returns more than is "
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
    """Wait until all threads have ended, even if this thread is interrupted meanwhile.

    Callers rely on it that no thread writes any more. Joining threads is not enough: Python considers a
    thread ended when its join was interrupted.
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
