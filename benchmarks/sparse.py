"""What sparse staging reads: of a million rows from a bucket, and of LAION-5B by its own planning.

What must not live here: another way to plan, fetch or search than users have.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import sparse_store
from generate import Recipe, generate
from numpy.typing import NDArray
from staging import LATENCY, far_away

from laion_assets.index.faiss_index import CANDIDATES_PER_RESULT, MIN_NPROBE
from laion_assets.index.inverted_lists import InvertedLists
from laion_assets.io.ranges import Ranges, members, ranges_of, total, union
from laion_assets.io.storage import open_storage
from laion_assets.search.retrieval import Request, retrieve_table
from laion_assets.staging import Manifest, StagedFile, open_staged, stage
from laion_assets.staging.opening import open_sparse_files
from laion_assets.staging.sparse.pages import allocate
from laion_assets.staging.sparse.reads import PAGE_SIZE, pages_of, reads_for

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
FOLDER = "laion"
OBJECT = "noise/pages"
BUCKET = "sparse-bench"
READS_A_SECOND = 2_000
DOLLARS_A_READ = 0.004 / 10_000
REQUESTS = {
    "1,000 around a centroid": ("centroid.npy", 1, 1_000),
    "50 around each of 5 seeds": ("seeds.npy", 5, 50),
    "100,000 around a centroid": ("centroid.npy", 1, 100_000),
    "830 around each of 1,000 seeds": ("seeds.npy", 1_000, 830),
}

# --- a million rows in a bucket -------------------------------------------------------------------


@dataclass(frozen=True)
class Took:
    """What staging and one request took."""

    bytes_read: int
    reads: int
    seconds: float
    table: pa.Table


def ask(cache: Path, queries: NDArray[np.float32], k: int) -> Took:
    """Open what is staged and ask once."""
    started = time.perf_counter()
    with open_staged(cache) as opened:
        table, _ = retrieve_table(
            opened.index, opened.metadata, queries, Request(k, 0.94), per_seed=len(queries) > 1
        )
        seconds = time.perf_counter() - started
        return Took(opened.fetched.fetched, opened.fetched.reads, seconds, table)


def measure(data: Path, url: str, folder: Path) -> list[str]:
    """Ask everything of a bucket, sparse and full, as rows of a table."""
    os.environ["STORAGE_EMULATOR_HOST"] = url
    uri = f"gs://{BUCKET}/{FOLDER}"
    full = folder / "full"
    started = time.perf_counter()
    whole = stage(uri, None, full)
    copied = time.perf_counter() - started
    lines = [
        "| request | staging | bytes read | of all | reads | seconds to the rows | asked again |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (file, count, k) in REQUESTS.items():
        queries = np.atleast_2d(np.load(data / file))[:count]
        expected = ask(full, queries, k)
        cache = folder / "sparse"
        started = time.perf_counter()
        staged = stage(uri, None, cache, sparse=True)
        seconds = time.perf_counter() - started
        cold, warm = ask(cache, queries, k), ask(cache, queries, k)
        assert cold.table == warm.table == expected.table
        assert warm.reads == 0
        read = staged.bytes_fetched + cold.bytes_read
        reads = cold.reads + 1  # and one for the index without its lists
        lines.append(
            f"| {name} | sparse | {read / 1e6:.1f} MB | {read / whole.manifest.size:.1%} | {reads:,} "
            f"| {seconds + cold.seconds:.2f} | {warm.seconds:.2f} |"
        )
        lines.append(
            f"| | full | {whole.bytes_fetched / 1e6:.1f} MB | 100% | | {copied + expected.seconds:.2f} "
            f"| {expected.seconds:.2f} |"
        )
        shutil.rmtree(cache)
        print("\n".join(lines[-2:]), file=sys.stderr)
    shutil.rmtree(full)
    return lines


def reads_a_second(url: str, folder: Path) -> str:
    """Fetch pages that lie apart, and report the rate."""
    os.environ["STORAGE_EMULATOR_HOST"] = url
    fs, path = open_storage(f"gs://{BUCKET}/{OBJECT}", "")
    told = fs.info(path)
    name = Path(OBJECT).name
    file = StagedFile(
        name, name, f"gs://{path}", told["size"], told["generation"], told["crc32c"], sparse=True
    )
    cache = folder / "pages"
    allocate(cache / name, file.size, file.checksum)
    disk = open_sparse_files(cache, Manifest("", (file,), True), 1 << 40, lambda _: None)
    starts = np.arange(0, file.size - PAGE_SIZE, 13 * PAGE_SIZE)
    started = time.perf_counter()
    with disk.hold() as held:
        held.need({cache / name: ranges_of(starts, starts + PAGE_SIZE)})
    rate = disk.stats.reads / (time.perf_counter() - started)
    disk.close()
    shutil.rmtree(cache)
    return (
        f"{disk.stats.reads:,} pages that lie apart come at {rate:,.0f} reads a second, marked and all."
    )


@contextmanager
def bucket_with(data: Path, folder: Path) -> Iterator[str]:
    """The URL of a server that holds generated data."""
    from helpers.gcs import gcs_server

    with gcs_server(folder / "objects") as url:
        os.environ["STORAGE_EMULATOR_HOST"] = url
        fs, _ = open_storage(f"gs://{BUCKET}", "")
        fs.mkdir(BUCKET)
        for part in ("image.index", "metadata"):
            fs.put(f"{data / part}/", f"{BUCKET}/{FOLDER}/{part}/", recursive=True)
        fs.pipe_file(f"{BUCKET}/{OBJECT}", os.urandom(512 << 20))
        yield url


# --- LAION-5B, planned but not read ---------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """An index of LAION-5B's size: where its lists and the columns of its metadata lie.

    Attributes:
        lists: of the index.
        rows: of the index.
        batch: rows of a record batch.
        text: mean bytes of a URL and of a caption.

    """

    lists: int = 131_072
    rows: int = 5_850_000_000
    batch: int = 65_536
    text: int = 73  # with 4 bytes of offsets for each of the two, 154 bytes a row: 900 GB
    header: int = 224

    def inverted_lists(self, random: np.random.Generator) -> InvertedLists:
        """Lists whose sizes differ as those of a trained index do: a few are several times the mean."""
        weights = random.lognormal(sigma=0.5, size=self.lists)
        sizes = np.round(weights / weights.sum() * self.rows).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes * (128 + 8))])[:-1]
        return InvertedLists(Path("merged_index.ivfdata"), starts, sizes, sizes, 128)

    @property
    def column(self) -> int:
        """Bytes of a column of a batch."""
        return (self.batch + 1) * 4 + self.batch * self.text

    @property
    def record_batch(self) -> int:
        """Bytes of a batch with its header."""
        return self.header + 2 * self.column

    @property
    def batches(self) -> int:
        """Record batches."""
        return -(-self.rows // self.batch)

    def places(self, ids: NDArray[np.int64]) -> Ranges:
        """What is needed to know where the texts of rows are."""
        number, row = np.divmod(ids, self.batch)
        starts = number * self.record_batch + self.header + row * 4
        starts = np.concatenate([starts, starts + self.column])
        return ranges_of(starts, starts + 8)

    def values(self, ids: NDArray[np.int64], random: np.random.Generator) -> Ranges:
        """Where the texts are: at the mean length, give or take a half."""
        number, row = np.divmod(ids, self.batch)
        starts = number * self.record_batch + self.header + (self.batch + 1) * 4 + row * self.text
        starts = np.concatenate([starts, starts + self.column])
        return ranges_of(
            starts, starts + random.integers(self.text // 2, self.text * 3 // 2, len(starts))
        )


class Plan:
    """Counts the pages and reads that come for what is needed, round by round, as the store does it."""

    def __init__(self) -> None:
        self._there = np.empty(0, np.int64)
        self.reads = 0
        self.bytes_read = 0

    def need(self, ranges: Ranges) -> None:
        """Plan what is absent of some ranges of a file."""
        absent = np.setdiff1d(members(pages_of(ranges)), self._there, assume_unique=True)
        reads = reads_for(absent)
        self._there = (
            members(union(reads)) if not len(self._there) else np.union1d(self._there, members(reads))
        )
        self.reads += len(reads)
        self.bytes_read += PAGE_SIZE * total(reads)


def planned(layout: Layout, lists: int, kept: int, random: np.random.Generator) -> list[Plan]:
    """Plan a request that probes so many lists and keeps so many rows: the lists', and the metadata's."""
    of_lists, of_metadata = Plan(), Plan()
    table = layout.inverted_lists(random)
    of_lists.need(table.ranges(np.sort(random.choice(layout.lists, lists, replace=False))))
    ids = np.unique(random.integers(layout.rows, size=kept))
    of_metadata.need(layout.places(ids))
    of_metadata.need(layout.values(ids, random))
    return [of_lists, of_metadata]


def simulate(layout: Layout) -> list[str]:
    """Plan requests to LAION-5B, as rows of a table."""

    def nprobe(k: int) -> int:
        return max(MIN_NPROBE, -(-CANDIDATES_PER_RESULT * k * layout.lists // layout.rows))

    cases = [
        ("100,000 around a centroid", nprobe(100_000), 36_000),
        ("830,000 around a centroid", nprobe(830_000), 300_000),
    ]
    for lists in (2_000, 8_000, 1_000 * nprobe(830)):
        shared = "no list shared" if lists == 1_000 * nprobe(830) else f"{lists:,} lists in all"
        cases.append((f"830 around each of 1,000 seeds, {shared}", lists, 300_000))
    size = layout.rows * 136 + layout.batches * layout.record_batch
    lines = [
        "| request | lists | rows kept | lists | metadata | both | of all | reads | at 2,000 a second | "
        "cost of the reads |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    headers = layout.batches * layout.header
    cost, minutes = layout.batches * DOLLARS_A_READ, layout.batches / READS_A_SECOND / 60
    lines.append(
        f"| once, when it is first opened: {layout.batches:,} headers | | | | "
        f"{headers / 1e9:.2f} GB | {headers / 1e9:.2f} GB "
        f"| {headers / size:.2%} | {layout.batches:,} | {minutes:.1f} min | ${cost:.2f} |"
    )
    random = np.random.default_rng(0)
    for name, lists, kept in cases:
        started = time.perf_counter()
        of_lists, of_metadata = planned(layout, lists, kept, random)
        seconds = time.perf_counter() - started
        bytes_read = of_lists.bytes_read + of_metadata.bytes_read
        reads = of_lists.reads + of_metadata.reads
        if "830,000" in name:
            assert bytes_read <= 15e9
            assert reads / READS_A_SECOND <= 20 * 60
        lines.append(
            f"| {name} | {lists:,} | {kept:,} | {of_lists.bytes_read / 1e9:.2f} GB "
            f"| {of_metadata.bytes_read / 1e9:.2f} GB | {bytes_read / 1e9:.2f} GB "
            f"| {bytes_read / size:.2%} | {reads:,} | {reads / READS_A_SECOND / 60:.1f} min "
            f"| ${reads * DOLLARS_A_READ:.2f} |"
        )
        print(f"{lines[-1]} (planned in {seconds:.0f} s)", file=sys.stderr)
    return lines


# --- all of it ------------------------------------------------------------------------------------


REPORT = """# Reading only what a request touches

`make bench-sparse` measures and plans again.

## A million rows

The benchmark's index and metadata, {size:.0f} MB, in a bucket of a server on the same machine
({cores} cores), the caches in memory. *Seconds to the rows* begin with nothing on the disk and end with
the table; *asked again* is the same request once more. Sparse and full give the same table, compared
column by column. 100,000 rows are a tenth of this index, and the lists probed for them are all there are.
One run each: the bytes and reads are the same every time, the seconds are not.

{near_by}

## The same with {latency:.0f} ms more for every read

{at_distance}

## LAION-5B, planned

{layout.lists:,} lists with {layout.rows:,} rows of 136 bytes, and {layout.batches:,}
record batches of {layout.batch:,} rows with a URL and a caption of {layout.text} bytes on average.
Nothing is read: the functions that plan a request's reads are given the places, and rows lie at random
over all of it, as the ids in a list do. That 36 of 100 rows are kept is an assumption, and so is how many
lists seeds of one style share: 64 are probed for each seed, and the last line is the worst that can be.
Time is that of the reads alone at {rate:,} a second, cost at $0.004 for 10,000. A further text column
that travels along adds as many reads as the URL, a number half as many.

{simulated}

## The store at LAION-5B's size

The files have the apparent size of LAION-5B's metadata, in memory. A page in each record batch comes from
a server on the same machine; pages that lie 200 pages apart come from a source that takes no time.
`sparse_store.py --folder` measures on a disk, where a hole takes as long as the disk needs to discard it.

{store}
"""


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "sparse.md")
    parser.add_argument("--data", type=Path, help="of generate.py; made if not given")
    asked = parser.parse_args()
    layout = Layout()
    simulated = simulate(layout)
    data = asked.data or generate(Recipe())
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        with bucket_with(data, folder) as url, far_away(url) as far:
            near_by = [*measure(data, url, folder), "", reads_a_second(url, folder)]
            at_distance = [*measure(data, far, folder), "", reads_a_second(far, folder)]
        store = sparse_store.report(folder)
    size = sum(p.stat().st_size for part in ("image.index", "metadata") for p in (data / part).iterdir())
    report = REPORT.format(
        size=size / 1e6,
        cores=os.cpu_count(),
        latency=LATENCY * 1000,
        rate=READS_A_SECOND,
        layout=layout,
        near_by="\n".join(near_by),
        at_distance="\n".join(at_distance),
        simulated="\n".join(simulated),
        store="\n".join(store),
    )
    asked.output.write_text(report)
    print(report)


if __name__ == "__main__":
    main()
