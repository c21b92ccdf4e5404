"""Reads ranges of a source in threads, with patience; the first error ends the work.

What must not live here: which ranges (plan), and what is done with the bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

from laion_assets.io.errors import InputError
from laion_assets.staging.plan import SourceFile
from laion_assets.staging.transfer.errors import ChangedError, Patience, TransientError
from laion_assets.staging.transfer.source import RangeReader

SECONDS_BETWEEN_LOOKS = 0.5  # for lines to log

Job = TypeVar("Job")


class StoppedError(Exception):
    """Others want the work to end."""


@dataclass
class Tally:
    """Counts what reading took; many threads add to it.

    Attributes:
        fetched: bytes read from the source.
        reused: bytes of an earlier attempt that were on the disk and right.
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
        reader: of the source.
        threads: that read at a time.
        log: takes lines, in the thread that calls `run`.
        tally: is added to.

    """

    def __init__(
        self, reader: RangeReader, threads: int, log: Callable[[str], None], tally: Tally
    ) -> None:
        self._reader = reader
        self._threads = threads
        self._log = log
        self._tally = tally
        self._stop = threading.Event()
        self._lines: SimpleQueue[str] = SimpleQueue()

    def say(self, line: str) -> None:
        """Have a line logged; may be called in any thread."""
        self._lines.put(line)

    def run(self, jobs: Iterator[Job], work: Callable[[Job], None]) -> None:
        """Do all jobs; the first error of one stops the others and is raised."""
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
            except BaseException as error:  # the first one is raised below; the others follow from it
                errors.append(error)
                self._stop.set()

        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="staging")
        workers = [pool.submit(do_jobs) for _ in range(self._threads)]
        try:
            while wait(workers, SECONDS_BETWEEN_LOOKS).not_done:
                self._pass_on_lines()
        finally:
            self._stop.set()  # also when this thread is interrupted
            try:
                _wait_for_all(workers)
            finally:
                pool.shutdown()
                self._pass_on_lines()
        if errors:
            raise errors[0]

    def _pass_on_lines(self) -> None:
        while not self._lines.empty():
            self._log(self._lines.get())

    def pieces(self, file: SourceFile, start: int, stop: int) -> Iterator[tuple[bytes, int]]:
        """Yield the bytes from `start` to `stop` in pieces, each with its offset; for a job of `run`.

        Goes on where it was when reading fails in a way that passes.

        Raises:
            ChangedError: the file is no longer as it was listed.
            InputError: no right to read, or nothing comes.
            StoppedError: another job has failed.

        """
        patience = Patience(file.url, self._stop, self.say)
        at = start
        while at < stop:
            self._tally.add(reads=1)
            try:
                for data in self._reader.read(file, at, stop):
                    if at + len(data) > stop:
                        raise InputError(
                            f"{file.url} cannot be read in parts, its server sends more than it is asked "
                            "for: copy the index to a local folder or a bucket"
                        )
                    yield data, at
                    at += len(data)
                    self._tally.add(fetched=len(data))
                    patience.reset()
                    if self._stop.is_set():
                        raise StoppedError
                if at < stop:
                    raise ChangedError(file, f"it ends after {at:,} of {file.size:,} bytes")
            except TransientError as error:
                self._tally.add(retries=1)
                patience.wait(error)
                if self._stop.is_set():
                    raise StoppedError from error


def _wait_for_all(workers: Sequence[Future[None]]) -> None:
    """Wait until all threads have ended, however often this one is interrupted meanwhile.

    Whoever goes on believes that nobody writes any more. (To join a thread is not enough: Python takes
    one for ended when the joining is interrupted.)
    """
    interrupt: BaseException | None = None
    while True:
        try:
            wait(workers)
        except BaseException as error:  # told once all have ended
            interrupt = error
        else:
            break
    if interrupt is not None:
        raise interrupt
