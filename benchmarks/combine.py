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
from contextlib import suppress
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
from duplicates import copies_of, in_a_cone
from generate import DIMENSION, Matrix
from memory import PeakMemory

from laion_assets.index.decoder import Decoder
from laion_assets.io import spill
from laion_assets.io.tables import StoredTable, fixed_size_binary, new_table
from laion_assets.search.combined import DECODER, combine
from laion_assets.search.near_duplicates import DEDUP_THRESHOLD

REPORT = """# Combining

Time and memory of combining two URL sets: images of {dimension} dimensions with a cosine of about 0.6,
half of them copies of others, as codes of {code} bytes. Reading and writing the tables is included.
Measured on a machine with {cores} cores{busy}; one run each, in a process of its own. *Core seconds* is
the time of the processor, *memory* the peak that no file backs, *disk* the peak of intermediate files.
All arrays that may lie on the disk do, as those of a large request. `make bench-combine` measures again.

| images | cores | kept | seconds | core seconds | memory | disk |
|---|---|---|---|---|---|---|
{lines}

The laws through the runs with {cores} cores, for n million images:

- core seconds: {linear:.0f} n + {quadratic:.0f} n²
- memory: {constant:.2f} GB + {memory:.0f} bytes an image
- disk: {disk:.0f} bytes an image

What they mean for more images, where all cores have nothing else to do:

| images | memory | disk | core hours | with 2 cores | with 16 cores |
|---|---|---|---|---|---|
{predicted}
"""
PREDICTED = (1_000_000, 6_000_000, 30_000_000)
ROWS = (1_000_000, 2_000_000, 4_000_000)
BLOCK = 50_000
CENTRES, SUBQUANTIZERS = 256, 128
URL = "https://images.example.com/a/folder/of/usual/length/{:012d}/an-image-of-something.jpg"


def images(block: int) -> Matrix:
    """A block of images, of which half are copies of others."""
    random = np.random.default_rng(block)
    originals = in_a_cone(BLOCK // 2, np.random.default_rng([0, block]))
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
    tables = [StoredTable(str(folder / f"{name}-{rows}.parquet")) for name in ("knn", "centroid")]
    with PeakMemory() as memory, PeakDisk() as disk:
        used, started = time.process_time(), time.monotonic()
        combined = combine(*tables, DEDUP_THRESHOLD)
        with new_table(str(folder / "combined.parquet"), combined.schema) as table:
            for batch in combined.batches:
                table.write(batch)
        seconds, core_seconds = time.monotonic() - started, time.process_time() - used
    return {
        "rows": rows,
        "cores": faiss.omp_get_max_threads(),
        "kept": combined.funnel.kept,
        "seconds": seconds,
        "core_seconds": core_seconds,
        "memory": memory.peak - memory.before,
        "disk": disk.peak,
    }


def unnamed_bytes() -> int:
    """The size of the files without a name that this process has open; mapped ones stay open."""
    size = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if str(descriptor.readlink()).endswith("(deleted)"):
                size += descriptor.stat().st_size
    return size


class PeakDisk(PeakMemory):
    """The peak of intermediate files instead of memory."""

    measured = staticmethod(unnamed_bytes)


def in_process(folder: Path, rows: int, cores: int) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--one", str(folder), "--rows", str(rows)]
    environment = os.environ | {"OMP_NUM_THREADS": str(cores)}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def report(runs: list[dict[str, float]], busy: str) -> str:
    """The page, with the laws through the runs."""
    cores = max(run["cores"] for run in runs)
    n, seconds, memory, disk = np.array(
        [
            (run["rows"] / 1e6, run["core_seconds"], run["memory"] / 1e9, run["disk"] / 1e9)
            for run in runs
            if run["cores"] == cores
        ]
    ).T
    # Each run counts by its relative error.
    (linear, quadratic), *_ = np.linalg.lstsq(
        np.column_stack([n, n**2]) / seconds[:, None], np.ones(len(n))
    )
    slope, constant = np.polyfit(n, memory, 1)
    of_disk = float((disk / n).max())

    def predicted(images: int) -> str:
        m = images / 1e6
        hours = (linear * m + quadratic * m**2) / 3600
        return (
            f"| {images:,} | {constant + slope * m:.1f} GB | {of_disk * m:.1f} GB | {hours:.1f} "
            f"| {hours / 2:.1f} h | {hours / 16:.1f} h |"
        )

    return REPORT.format(
        dimension=DIMENSION,
        code=SUBQUANTIZERS + 1,
        cores=int(cores),
        busy=busy,
        lines="\n".join(
            f"| {run['rows']:,} | {run['cores']} | {run['kept']:,} | {run['seconds']:.0f} "
            f"| {run['core_seconds']:.0f} | {run['memory'] / 1e6:.0f} MB | {run['disk'] / 1e6:.0f} MB |"
            for run in runs
        ),
        linear=linear,
        quadratic=quadratic,
        constant=constant,
        memory=slope * 1e3,
        disk=of_disk * 1e3,
        predicted="\n".join(map(predicted, PREDICTED)),
    )


def main() -> None:
    """Measure everything, or what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--busy", default="", help="what to say of the machine")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        json.dump(measure(asked.one, *asked.rows), sys.stdout)
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder), asked.rows)
        cores = faiss.omp_get_max_threads()
        for rows, used in [(min(asked.rows), 1), *((rows, cores) for rows in asked.rows)]:
            runs.append(in_process(Path(folder), rows, used))
            print(runs[-1], file=sys.stderr)
    asked.output.write_text(report(runs, asked.busy))


if __name__ == "__main__":
    main()
