"""Bytes and seconds of cold reads: opening metadata and taking scattered rows, against their pages.

The page cache forgets the file before each measurement. The limit is 1.5 times the pages that hold what
is taken. The same pages, read by bare `pread`, say what the disk gives.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from laion_assets.index.arrow_file import ArrowFile
from laion_assets.index.metadata import READS, Metadata
from laion_assets.io.ranges import WholeFiles, members, union

PAGE = 4096
BATCH_ROWS = 65_536
ROW = "{:34}{:>12}{:>10}{:>10}{:>10}"


def write(path: Path, batches: int) -> None:
    """Write metadata of LAION's shape: batches of 65,536 rows with URL and caption."""
    random = np.random.default_rng(0)
    captions = ["c" * length for length in random.integers(20, 120, BATCH_ROWS)]
    schema = pa.schema({"url": pa.string(), "caption": pa.string()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in range(batches):
            urls = [f"https://example.org/{batch}/{row}/{text}" for row, text in enumerate(captions)]
            writer.write_batch(pa.record_batch([pa.array(urls), pa.array(captions)], schema=schema))


def cold(path: Path, work: Callable[[], object]) -> tuple[int, float]:
    """Return bytes read from the disk, and seconds."""
    os.sync()
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    before, started = _read_bytes(), time.perf_counter()
    work()
    return _read_bytes() - before, time.perf_counter() - started


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def pages_of(path: Path, ids: np.ndarray) -> np.ndarray:
    """Return the numbers of the pages that hold the offsets and texts of some rows."""
    file = ArrowFile(path, WholeFiles(), None)
    batches, rows = np.divmod(np.sort(ids), BATCH_ROWS)
    spans = union(*file.needs(batches, rows, file.schema.names))
    return members(union(np.stack([spans[:, 0] // PAGE, -(-spans[:, 1] // PAGE)], axis=1)))


def preads(path: Path, pages: np.ndarray, threads: int) -> Callable[[], object]:
    """Return what reads these pages and no more."""

    def read(some: np.ndarray) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for page in some.tolist():
            os.pread(descriptor, PAGE, page * PAGE)
        os.close(descriptor)

    def work() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, np.array_split(pages, threads)))

    return work


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=150, help="of 65,536 rows (default: 2 GB)")
    parser.add_argument("--rows", type=int, default=2500, help="to take")
    given = parser.parse_args()
    cache = Path(os.environ.get("LAION_BENCH_CACHE", Path(__file__).parent / ".cache"))
    path = cache / f"cold-{given.batches}.arrow"
    if not path.exists():
        write(path, given.batches)
    ids = np.random.default_rng(1).permutation(given.batches * BATCH_ROWS)[: given.rows]
    pages = pages_of(path, ids)
    print(ROW.format("cold", "bytes", "of pages", "seconds", "limit"))

    def show(name: str, work: Callable[[], object], limit: str = "") -> None:
        read, seconds = cold(path, work)
        share = f"{read / (len(pages) * PAGE):.2f}"
        print(ROW.format(name, f"{read:,}", share, f"{seconds:.2f}", limit), flush=True)

    show("open", lambda: Metadata([path]))
    opened = [Metadata([path])]
    show(f"take {given.rows:,} rows", lambda: opened[0].take(ids), "1.50")
    opened.clear()  # mapped pages would not be forgotten
    show("pread of their pages, 1 thread", preads(path, pages, 1))
    show(f"pread of their pages, {READS} threads", preads(path, pages, READS))


if __name__ == "__main__":
    main()
