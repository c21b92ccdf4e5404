"""Bytes and seconds of cold reads: of metadata against its pages, and of the lists of many seeds.

The page cache forgets the files before each measurement. Opening metadata and taking scattered rows is
limited to 1.5 times the pages that hold what is taken. The same pages, read by bare `pread`, say what
the disk gives. Seeds of many styles are searched in batches in the order of their table, then in batches
of neighbours. The page cache forgets the lists before each batch, as if it held what one batch reads.
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
from stand_in import ROW_BYTES, Recipe, StandIn

from laion_assets.index import Index
from laion_assets.index.arrow_file import ArrowFile
from laion_assets.index.metadata import Metadata
from laion_assets.io.ranges import WholeFiles, members, union
from laion_assets.search.neighbours import batches_of_neighbours

PAGE = 4096
READS = 32  # at a time, by the probe
BATCH_ROWS = 65_536
ROW = "{:34}{:>12}{:>10}{:>10}{:>10}"
MANY_STYLES = Recipe(batches=256, lists=8_192, styles=32, files=1)  # lists 1/22 as long as LAION-5B's
SEEDS_OF_A_STYLE, BATCH_OF_SEEDS, K, NPROBE = 200, 200, 100, 64
LISTS_ROW = "{:34}{:>16}{:>10}{:>10}"


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
    file = ArrowFile(path, WholeFiles(), None, 0)
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


def compare_orders(stand_in: StandIn) -> None:
    """Search seeds of many styles, batch by batch, in two orders, and print what both read."""
    seeds = stand_in.space.seeds_of_all_styles(SEEDS_OF_A_STYLE)
    numbers = np.arange(len(seeds))
    lists = Index(stand_in.index, stand_in.ivfdata).nearest_lists(seeds, NPROBE)
    stand_in.write_lists(np.unique(lists))
    different = stand_in.lists.sizes[np.unique(lists)].sum() * ROW_BYTES
    print(f"{len(seeds):,} seeds of {stand_in.recipe.styles} styles: {different:,} bytes of lists")
    print(LISTS_ROW.format("batches of seeds", "bytes", "times", "seconds"))
    for name, batches in {
        "in the order of the table": np.split(numbers, numbers[BATCH_OF_SEEDS::BATCH_OF_SEEDS]),
        "of neighbours": batches_of_neighbours(seeds, numbers, BATCH_OF_SEEDS),
    }.items():
        read, seconds = 0, 0.0
        for batch in batches:  # each opens the index, because mapped pages would not be forgotten
            index = Index(stand_in.index, stand_in.ivfdata)
            some = cold(
                stand_in.ivfdata, lambda index=index, batch=batch: index.search(seeds[batch], K, NPROBE)
            )
            read, seconds = read + some[0], seconds + some[1]
            del index
        print(
            LISTS_ROW.format(name, f"{read:,}", f"{read / different:.1f}", f"{seconds:.0f}"), flush=True
        )


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
    print()
    many = StandIn(cache / "many-styles", MANY_STYLES)
    many.create()
    compare_orders(many)


if __name__ == "__main__":
    main()
