"""The sparse store at LAION-5B's size: reads of single pages, evictions, and waiting for room.

Files have their true apparent size and are holes but for what is fetched. It uses what old versions of
the store have too, so `--library` can compare them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[1]
PAGE_SIZE = 4096
BATCHES = 89_264  # record batches of LAION-5B
BATCH_GAP = 2_295  # pages from one to the next: a batch has 9.4 MB
SCATTERED = 1_000_000  # pages to evict
SCATTERED_GAP = 200  # pages
BUCKET, OBJECT = "sparse-store", "pages"
ROUNDS = 3
HELD = 5.0  # seconds that a request holds its pages while another waits for room


class Instant:
    """A reader whose source takes no time: each page is its number, over and over."""

    pins = True

    def read(self, _: Any, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, which are whole pages."""
        for page in range(start // PAGE_SIZE, stop // PAGE_SIZE):
            yield page.to_bytes(8, "little") * (PAGE_SIZE // 8)

    def check(self, _: Any) -> None:
        """Do nothing."""


def pages(count: int, gap: int, first: int = 0) -> Any:
    """Byte ranges of single pages that lie apart."""
    starts = (first + gap * np.arange(count)) * PAGE_SIZE
    return np.stack([starts, starts + PAGE_SIZE], axis=1)


def apparent(count: int, gap: int) -> int:
    """Bytes of a file with single pages that lie apart."""
    return count * gap * PAGE_SIZE


@contextmanager
def opened(
    cache: Path, size: int, budget: int, log: Callable[[str], None] = lambda _: None
) -> Iterator[Any]:
    """The store over one file, which is read in no time."""
    from laion_assets.staging.sparse.store import SparseFiles
    from laion_assets.staging.transfer.files import SourceFile

    file = SourceFile("metadata/0.arrow", "file:///0.arrow", "/0.arrow", size, "1", "content")
    disk = SparseFiles(cache, [file], Instant(), budget=budget, log=log, on_change=lambda: None)
    with closing(disk):
        yield disk


def need(disk: Any, cache: Path, ranges: Any) -> None:
    """Need ranges, and release them."""
    with disk.hold() as held:
        held.need({cache / "metadata/0.arrow": ranges})


def allocated(cache: Path, size: int) -> None:
    """Allocate the file."""
    from laion_assets.staging.sparse.pages import allocate

    allocate(cache / "metadata/0.arrow", size, "content")


def clocked(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of CPU."""
    started, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - cpu


# --- single pages ---------------------------------------------------------------------------------


def single_pages(folder: Path, count: int) -> dict[str, float]:
    """Read as many pages from a server, alone and through the store."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from helpers.gcs import gcs_server

    from laion_assets.io.storage import open_storage
    from laion_assets.staging import Manifest, StagedFile
    from laion_assets.staging.opening import open_sparse_files
    from laion_assets.staging.sparse.pages import allocate
    from laion_assets.staging.transfer.fetch import Fetcher, TransferStats
    from laion_assets.staging.transfer.files import SourceFile
    from laion_assets.staging.transfer.source import open_files

    wanted = pages(count, BATCH_GAP)
    size = apparent(count, BATCH_GAP)
    with gcs_server(folder / "objects") as url:
        os.environ["STORAGE_EMULATOR_HOST"] = url
        fs, path = open_storage(f"gs://{BUCKET}/{OBJECT}", "")
        fs.mkdir(BUCKET)
        fs.pipe_file(path, b"x")
        os.truncate(folder / "objects" / path, size)
        found = fs.info(path)
        file = StagedFile(
            "0.arrow", "0.arrow", f"gs://{path}", size, found["generation"], "content", True
        )
        reader, [path] = open_files([file.source])
        source = SourceFile(file.name, file.source, path, size, file.version, "content")

        def alone() -> None:
            fetcher = Fetcher(reader, 64, print, TransferStats())
            fetcher.run(iter(wanted.tolist()), lambda job: [None for _ in fetcher.read(source, *job)])

        def through_the_store() -> None:
            disk = open_sparse_files(cache, Manifest("", (file,), True), 10**12, print)
            with closing(disk), disk.hold() as held:
                held.need({cache / file.name: wanted})

        cache = folder / "cache"
        rounds = []
        for _ in range(ROUNDS):  # in turns, since what else the machine does changes
            allocate(cache / file.name, size, file.checksum)
            rounds.append((*clocked(alone), *clocked(through_the_store)))
        names = ("alone", "alone, CPU", "store", "store, CPU")
        found = dict(zip(names, np.median(rounds, axis=0).tolist(), strict=True))
        found["ratio"] = float(np.median([store / alone for alone, _, store, _ in rounds]))
        found["again"], found["again, CPU"] = clocked(through_the_store)
        found["map MB"] = on_disk(cache, "*.pages*") / 1e6
        found["data MB"] = on_disk(cache, "0.arrow") / 1e6
        return found


def on_disk(cache: Path, pattern: str) -> int:
    """Bytes that files occupy."""
    return sum(path.stat().st_blocks * 512 for path in cache.rglob(pattern))


# --- eviction -------------------------------------------------------------------------------------


def longest_wait(cache: Path, stop: Any, result: Any) -> None:
    """Take the ledger over and over, and send the longest time that it took."""
    from laion_assets.staging.transfer import locks

    longest = 0.0
    while not stop.is_set():
        started = time.perf_counter()
        with locks.ledger(cache):
            longest = max(longest, time.perf_counter() - started)
        time.sleep(0.001)
    result.send(longest)


def eviction(folder: Path, count: int) -> dict[str, float]:
    """Fetch scattered pages, then as many others that need their room."""
    cache, size = folder / "cache", apparent(count, SCATTERED_GAP)
    allocated(cache, size)
    found = {}
    with opened(cache, size, 10**12) as disk:
        wanted = pages(count, SCATTERED_GAP)
        found["fill"], found["fill, CPU"] = clocked(lambda: need(disk, cache, wanted))
    used = on_disk(cache, "*")
    found["map MB"], found["data MB"] = on_disk(cache, "*.pages*") / 1e6, on_disk(cache, "0.arrow") / 1e6
    with opened(cache, size, 10**12) as disk:
        found["read back"], found["read back, CPU"] = clocked(lambda: need(disk, cache, wanted))
    stop, (receiver, sender) = multiprocessing.Event(), multiprocessing.Pipe(duplex=False)
    waiter = multiprocessing.Process(target=longest_wait, args=(cache, stop, sender))
    waiter.start()
    room = used - count * PAGE_SIZE + PAGE_SIZE * 1024
    with opened(cache, size, max(room, 1 << 26)) as disk:
        few = pages(16, SCATTERED_GAP, first=100)
        found["evict"], found["evict, CPU"] = clocked(lambda: need(disk, cache, few))
    stop.set()
    found["longest wait"] = receiver.recv()
    waiter.join()
    found["data MB after"] = on_disk(cache, "0.arrow") / 1e6
    return found


# --- room -----------------------------------------------------------------------------------------


def waiting(folder: Path) -> dict[str, float]:
    """A small request while one holds most of the budget, and another waits for its room."""
    cache, size, budget = folder / "cache", 1 << 40, 100 << 20
    allocated(cache, size)
    large, larger, small = pages(16_000, 10), pages(16_000, 10, 1 << 20), pages(100, 10, 1 << 22)
    logged: list[str] = []

    def wait_for_room() -> None:
        with opened(cache, size, budget, logged.append) as disk:
            need(disk, cache, larger)

    with opened(cache, size, budget) as holder:
        with holder.hold() as held:
            held.need({cache / "metadata/0.arrow": large})
            waiter = threading.Thread(target=wait_for_room)
            waiter.start()
            while not any("waiting" in line for line in logged):
                time.sleep(0.01)
            release = threading.Timer(HELD, lambda: None)
            release.start()
            took: list[float] = []

            def ask() -> None:
                with opened(cache, size, budget) as disk:
                    took.append(clocked(lambda: need(disk, cache, small))[0])

            asker = threading.Thread(target=ask)
            asker.start()
            release.join()
        asker.join()
        waiter.join()
    return {"small request": took[0], "held": HELD}


# --- all of it ------------------------------------------------------------------------------------

CASES = {
    "pages": lambda folder, scale: single_pages(folder, int(BATCHES * scale)),
    "eviction": lambda folder, scale: eviction(folder, int(SCATTERED * scale)),
    "waiting": lambda folder, _: waiting(folder),
}


def measured(case: str, scale: float, folder: Path, library: Path = REPOSITORY) -> dict[str, float]:
    """Measure in a process of its own, with the library in a folder."""
    command = [sys.executable, __file__, "--one", case, "--scale", str(scale), "--folder", str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(library)}, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(folder: Path) -> list[str]:
    """Measure everything, as rows of a table."""
    of_pages, of_eviction, of_waiting = (measured(case, 1, folder) for case in CASES)
    compared = of_eviction["read back, CPU"] / SCATTERED * 1e6
    return [
        "| | |",
        "|---|---|",
        f"| {BATCHES:,} pages, read and nothing else | {of_pages['alone']:.1f} s |",
        f"| the same through the store | {of_pages['ratio']:.2f} times as long |",
        f"| their page map | {of_pages['map MB']:.1f} MB |",
        f"| {SCATTERED:,} pages that lie apart: their page map | {of_eviction['map MB']:.1f} MB |",
        f"| compared with their checksums | {compared:.1f} µs of CPU a page |",
        f"| evicted | {of_eviction['evict']:.1f} s |",
        f"| longest wait for the ledger meanwhile | {of_eviction['longest wait']:.2f} s |",
        f"| a small request while a large one waits for room | {of_waiting['small request']:.2f} s |",
    ]


def main() -> None:
    """Measure, and print figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=CASES)
    parser.add_argument("--scale", type=float, default=1, help="share of the pages")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="on the disk to measure")
    parser.add_argument(
        "--library", type=Path, action="append", help="with the store, to compare several"
    )
    asked = parser.parse_args()
    if asked.one:
        with tempfile.TemporaryDirectory(dir=asked.folder) as name:
            print(json.dumps(CASES[asked.one](Path(name), asked.scale)))
        return
    for case in CASES:
        for library in asked.library or [REPOSITORY]:
            found = measured(case, asked.scale, asked.folder, library)
            print(case, library, {name: round(value, 3) for name, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
