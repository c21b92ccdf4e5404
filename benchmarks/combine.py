"""Time, memory and disk of combining two URL sets, as the number of different images grows.

Writes a Markdown page with the measurements, the laws through them, and what they mean for more images.
Each measurement is a process of its own. Images have a cosine of about 0.6 and few copies, which is the
hardest geometry of `duplicates.py`. What must not live here: another way to combine than users have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
from duplicates import around, copies_of, different
from generate import DIMENSION, Matrix, unit
from memory import PeakMemory, cpu_seconds

from laion_assets.index.decoder import Decoder
from laion_assets.io import spill
from laion_assets.io.parallel import thread_count
from laion_assets.io.tables import StoredTable, fixed_size_binary, new_table
from laion_assets.search.combined import DECODER, combine
from laion_assets.search.links import SIZES
from laion_assets.search.near_duplicates import DEDUP_THRESHOLD
from laion_assets.search.needs import Needs, worth
from laion_assets.search.stripes import compare_stripe, links_in, write_plan

REPORT = """# Combining

Time and memory of combining two URL sets: images of {dimension} dimensions with a cosine of about 0.6,
half of them copies of others, as codes of {code} bytes. Reading and writing the tables is included.
Measured on a machine with {cores} cores{busy}; one run each, in a process of its own. *Core seconds* is
the time of the processor, *memory* the peak that no file backs, *disk* the peak of intermediate files.
All arrays that may lie on the disk do, as those of a large request. `make bench-combine` measures again.

In one step, with one core and with all:

| images | cores | kept | seconds | core seconds | memory | disk |
|---|---|---|---|---|---|---|
{whole}

In stripes, of which the first is measured: all have the same share of the work. *Plan*, *start*,
*compare* and *unite* are core seconds: to plan the comparison and hand it over, for a stripe to begin,
for a stripe to compare after that, and to unite the links and write the table. *All* adds them up for all
stripes. *Handed over* is what the plan writes and every stripe reads.

| images | stripes | plan | start | compare | unite | all | memory | disk | handed over |
|---|---|---|---|---|---|---|---|---|---|
{striped}

The laws for n million images, fitted to the runs in stripes. That of memory is also fitted to the runs
in one step that {cores} processes shared:

- core seconds: {linear:.0f} n + {quadratic:.0f} n²
- core seconds of each stripe beyond the first: {start:.0f} n
- memory: {constant:.2f} GB + {memory:.0f} bytes an image
- disk: {disk:.0f} bytes an image
- handed over: {handed:.0f} bytes an image

What they mean for more images, where all cores have nothing else to do:

| images | stripes | memory | disk | core hours | with 2 cores | with 16 cores |
|---|---|---|---|---|---|---|
{predicted}
"""
PREDICTED = (1_000_000, 6_000_000, 30_000_000)
WHOLE = (125_000, 250_000)
ROWS = (1_000_000, 2_000_000)
OF_A_STRIPE = 250_000  # images whose comparison takes as long as a measured stripe
NOTHING = (1 << 40, 1)  # a stripe that begins after the last block
BLOCK = 50_000
CENTRES, SUBQUANTIZERS = 256, 128
URL = "https://images.example.com/a/folder/of/usual/length/{:012d}/an-image-of-something.jpg"


def images(block: int) -> Matrix:
    """A block of images, of which half are copies of others."""
    random = np.random.default_rng(block)
    shared = unit(different(1, 0, np.random.default_rng(0)))
    originals = around(shared, BLOCK // 2, np.random.default_rng([0, block]))
    copies = copies_of(originals, 0.15, random)
    return random.permutation(np.concatenate([originals, copies]))


def coder() -> faiss.IndexIVFPQ:
    """An index that codes images, trained on some."""
    quantizer = faiss.IndexFlatIP(DIMENSION)
    index = faiss.IndexIVFPQ(quantizer, DIMENSION, CENTRES, SUBQUANTIZERS, 8, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.pq.cp.niter = 4, 8
    index.train(images(0)[:20_000])
    return index


def write_tables(folder: Path, sizes: list[int]) -> None:
    """Write both sets of every size; a tenth of the images are around the centroid."""
    index = coder()
    decoder = Decoder.of_index(index, np.arange(CENTRES)).to_bytes()
    size = index.coarse_code_size() + index.code_size
    schema = pa.schema(
        {"id": pa.int64(), "url": pa.string(), "caption": pa.string(), "similarity": pa.float32()}
        | {"rank": pa.int32(), "seed": pa.int32(), "code": pa.binary(size)}
    )
    for rows in sizes:
        parts = {"knn": (0, rows * 9 // 10), "centroid": (rows * 9 // 10, rows)}
        for name, (first, stop) in parts.items():
            with new_table(str(folder / f"{name}-{rows}.parquet"), schema) as table:
                for start in range(first // BLOCK * BLOCK, stop, BLOCK):
                    block = codes_of(index, folder, start // BLOCK)
                    ids = np.arange(max(start, first), min(start + BLOCK, stop))
                    table.write(found(ids, block[ids - start], schema))
                table.attach(DECODER, decoder)


def codes_of(index: faiss.IndexIVFPQ, folder: Path, block: int) -> np.ndarray:
    """The codes of a block, which larger sizes use again."""
    kept = folder / f"{block}.npy"
    if not kept.exists():
        np.save(kept, index.sa_encode(images(block)))
    codes: np.ndarray = np.load(kept)
    return codes


def found(ids: np.ndarray, codes: np.ndarray, schema: pa.Schema) -> pa.RecordBatch:
    """Rows with a URL, a caption and a rank."""
    urls = [URL.format(number) for number in ids]
    columns = {
        "id": ids,
        "url": urls,
        "caption": [f"a caption of the usual length for image number {number}" for number in ids],
        "similarity": np.zeros(len(ids), np.float32),
        "rank": (ids * 7919 % 830 + 1).astype(np.int32),
        "seed": (ids // 830).astype(np.int32),
        "code": fixed_size_binary(codes),
    }
    return pa.RecordBatch.from_pydict(columns, schema)


def measure(folder: Path, rows: int) -> dict[str, float]:
    """Combine once, and write the table."""
    spill.HELD_BYTES = 0
    with PeakMemory() as memory, PeakDisk() as disk:
        took = Took()
        kept = write_combined(folder, rows)
        seconds, core_seconds = took.so_far()
    return {
        "rows": rows,
        "cores": thread_count(),
        "kept": kept,
        "seconds": seconds,
        "core_seconds": core_seconds,
        "memory": memory.peak - memory.before,
        "disk": disk.peak,
    }


def measure_in_stripes(folder: Path, rows: int) -> dict[str, float]:
    """Plan, compare no stripe, then one, and write the table with its links only."""
    spill.HELD_BYTES = 0
    of = max(1, round((rows / OF_A_STRIPE) ** 2))
    steps = {}
    with tempfile.TemporaryDirectory(dir=folder) as work, PeakMemory() as memory, PeakDisk() as disk:
        plan, links = f"{work}/plan.parquet", f"{work}/links.parquet"
        took = Took()
        knn, centroid = tables(folder, rows)
        write_plan(knn, centroid, DEDUP_THRESHOLD, plan, lambda _: None)
        _, steps["plan"] = took.so_far()
        handed = sum(file.stat().st_size for file in Path(work).iterdir())
        took = Took()
        compare_stripe(StoredTable(plan), DEDUP_THRESHOLD, NOTHING, links)
        _, steps["start"] = took.so_far()
        took = Took()
        compare_stripe(StoredTable(plan), DEDUP_THRESHOLD, (0, of), links)
        _, compared = took.so_far()
        steps["compare"] = compared - steps["start"]
        took = Took()
        write_combined(folder, rows, links_in([StoredTable(links)]))
        _, steps["unite"] = took.so_far()
    return steps | {
        "rows": rows,
        "stripes": of,
        "cores": thread_count(),
        "memory": memory.peak - memory.before,
        "disk": disk.peak,
        "handed": handed,
    }


class Took:
    """The time of a step from here."""

    def __init__(self) -> None:
        self.used, self.started = cpu_seconds(), time.monotonic()

    def so_far(self) -> tuple[float, float]:
        """Seconds, and core seconds."""
        return time.monotonic() - self.started, cpu_seconds() - self.used


def tables(folder: Path, rows: int) -> list[StoredTable]:
    """Both sets of a size."""
    return [StoredTable(str(folder / f"{name}-{rows}.parquet")) for name in ("knn", "centroid")]


def write_combined(
    folder: Path, rows: int, links: Iterable[tuple[np.ndarray, np.ndarray]] | None = None
) -> int:
    """Combine, and return the images kept."""
    knn, centroid = tables(folder, rows)
    combined = combine(knn, centroid, DEDUP_THRESHOLD, links=links)
    with new_table(str(folder / "combined.parquet"), combined.schema) as table:
        for batch in combined.batches:
            table.write(batch)
    return combined.funnel.kept


def unnamed_bytes() -> int:
    """The size of the files without a name that this process has open; mapped ones stay open."""
    sizes = {}  # by file: an array and its mapping have a descriptor each
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if str(descriptor.readlink()).endswith("(deleted)"):
                file = descriptor.stat()
                sizes[file.st_dev, file.st_ino] = file.st_size
    return sum(sizes.values())


class PeakDisk(PeakMemory):
    """The peak of intermediate files instead of memory."""

    measured = staticmethod(unnamed_bytes)


def in_process(folder: Path, rows: int, cores: int, *, in_stripes: bool = False) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--one", str(folder), "--rows", str(rows)]
    command += ["--in-stripes"] if in_stripes else []
    environment = os.environ | {"OMP_NUM_THREADS": str(cores)}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout)
    print(measured, file=sys.stderr, flush=True)
    return measured


def report(whole: list[dict[str, float]], striped: list[dict[str, float]], busy: str) -> str:
    """The page, with the laws through the runs in stripes."""
    runs = {name: np.array([run[name] for run in striped], float) for name in striped[0]}
    n = runs["rows"] / 1e6
    once = runs["plan"] + runs["start"] + runs["unite"]
    linear = float((once / n).mean())
    quadratic = float((runs["stripes"] * runs["compare"] / n**2).mean())
    in_all = once + runs["stripes"] * (runs["start"] + runs["compare"]) - runs["start"]
    start = float((runs["start"] / n).mean())
    shared = [run for run in whole if run["rows"] > SIZES.shared and run["cores"] == striped[0]["cores"]]
    held = [*striped, *shared]
    slope, constant = np.polyfit(
        [run["rows"] / 1e6 for run in held], [run["memory"] / 1e9 for run in held], 1
    )
    of_disk, handed = (float((runs[name] / runs["rows"]).max()) for name in ("disk", "handed"))

    def predicted(images: int) -> str:
        m, stripes = images / 1e6, Needs.of(images).stripes
        hours = (linear * m + quadratic * m**2 + start * m * (stripes - 1)) / 3600
        return (
            f"| {images:,} | {stripes} | {constant + slope * m:.1f} GB | {of_disk * m / 1e3:.1f} GB "
            f"| {hours:.1f} | {hours / 2:.1f} h | {hours / worth(16):.2f} h |"
        )

    return REPORT.format(
        dimension=DIMENSION,
        code=SUBQUANTIZERS + 1,
        cores=int(max(run["cores"] for run in striped)),
        busy=busy,
        whole="\n".join(
            f"| {run['rows']:,} | {run['cores']} | {run['kept']:,} | {run['seconds']:.0f} "
            f"| {run['core_seconds']:.0f} | {run['memory'] / 1e6:.0f} MB | {run['disk'] / 1e6:.0f} MB |"
            for run in whole
        ),
        striped="\n".join(
            f"| {run['rows']:,} | {run['stripes']} | {run['plan']:.0f} | {run['start']:.0f} "
            f"| {run['compare']:.0f} | {run['unite']:.0f} | {all_stripes:,.0f} "
            f"| {run['memory'] / 1e6:.0f} MB | {run['disk'] / 1e6:.0f} MB "
            f"| {run['handed'] / 1e6:.0f} MB |"
            for run, all_stripes in zip(striped, in_all, strict=True)
        ),
        linear=linear,
        quadratic=quadratic,
        start=start,
        constant=constant,
        memory=slope * 1e3,
        disk=of_disk,
        handed=handed,
        predicted="\n".join(map(predicted, PREDICTED)),
    )


def main() -> None:
    """Measure everything, or what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of the runs in stripes")
    parser.add_argument("--whole", type=int, nargs="+", default=WHOLE, help="of the runs in one step")
    parser.add_argument("--busy", default="", help="what to say of the machine")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--in-stripes", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        json.dump(
            (measure_in_stripes if asked.in_stripes else measure)(asked.one, *asked.rows), sys.stdout
        )
        return
    with tempfile.TemporaryDirectory() as name:
        folder, every = Path(name), thread_count()
        write_tables(folder, [*asked.whole, *asked.rows])
        whole = [in_process(folder, rows, cores) for rows in asked.whole for cores in {1, every}]
        striped = [in_process(folder, rows, every, in_stripes=True) for rows in asked.rows]
    asked.output.write_text(report(whole, striped, asked.busy))


if __name__ == "__main__":
    main()
