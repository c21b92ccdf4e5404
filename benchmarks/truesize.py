"""What requests cost on a stand-in of LAION-5B at its true apparent size: bytes, seconds, memory.

Every measurement is a process of its own. Cold: the page cache has forgotten the index's files. The
disk's own speed is measured in the same run, by plain reads of the same bytes.

    truesize.py --quick                                  the tool itself, in two minutes
    truesize.py --only c100k open                        some measurements again, and the report of all
    truesize.py --only                                   the report alone
    truesize.py --step request --case c100k --profile    one step, and where its CPU goes

The files are in LAION_BENCH_CACHE, by default in `.cache` beside this file: 15 GB, and 10 more while
sparse staging is measured. They have a million extents: where the file system is mounted with `discard`,
removing them takes an hour. An image file that is mounted without, with direct I/O, avoids that.
What must not live here: another way to open, search or stage than users have.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import processor
from memory import PeakMemory, cpu_seconds
from ours import PHASES
from stand_in import BATCH, BUCKET, FOLDER, LAION_5B, QUICK, SCHEMA, Ids, StandIn, layout
from truesize_report import Case, report

from laion_assets.index import (
    Index,
    Metadata,
    in_place,
    nearest_centres,
    nprobe_rule,
    open_folder,
    read_table,
    transformed,
)
from laion_assets.index.faiss_index import FURTHER
from laion_assets.index.vectors import unit
from laion_assets.io.checksums import checksum_text, file_crc32c
from laion_assets.io.ranges import Ranges, members, split, total
from laion_assets.io.storage import open_storage
from laion_assets.io.tables import new_table
from laion_assets.search import probe
from laion_assets.search.retrieval import RECALL_QUERIES, Request, columns_found, retrieve
from laion_assets.search.sizing import USUAL_SHARE
from laion_assets.staging import open_staged, opening, stage
from laion_assets.staging.opening import sources_of
from laion_assets.staging.sparse.reads import PAGE_SIZE, pages_of, reads_for
from laion_assets.staging.sparse.store import READ_THREADS
from laion_assets.staging.transfer.fetch import Fetcher, TransferStats
from laion_assets.staging.transfer.files import SourceFile

REPOSITORY = Path(__file__).parents[1]
CACHE = Path(os.environ.get("LAION_BENCH_CACHE", REPOSITORY / "benchmarks" / ".cache")) / "truesize"
THRESHOLD = 0.94
OPENED_SPARSELY = ("stage", "open", "source")
ROUNDS = 3  # of opening; the one with the median ratio is reported
SEEDS = 2_000  # the mean of which is the centroid
READS = 32  # at a time, by the probe
READ_SIZE = 8 << 20  # bytes at most
SAMPLE = 200  # rows that are compared with what Arrow reads
COMPARED_QUERIES = 2  # with what faiss finds
OPENING = {"open the index": (opening, "Index"), "open the metadata": (opening, "Metadata")}
CASES = {
    "c100k": Case(0, 100_000, 1.2e9),
    "c830k": Case(0, 830_000, 8e9),
    "s200": Case(200, 830),
    "s2000": Case(2_000, 200),
}
SPARSE = ("c100k", "c830k")
PLANNED_ON, PLANNED_LISTS = "c100k", 16  # the request on whose pages and lists the disk is measured
GRAPH = {"graph's seeds": Case(200, 20), "graph's centroid": Case(0, 2_000)}


@dataclass(frozen=True)
class Bench:
    """The stand-in, what is asked of it, what a run of the graph asks, and where results are kept."""

    stand_in: StandIn
    cases: Mapping[str, Case]
    graph: Mapping[str, Case]
    states: Sequence[str] = ("cold", "warm")

    @property
    def notes(self) -> Path:
        """A folder beside the data."""
        return self.stand_in.notes

    def table(self, name: str) -> Path:
        """What a request found."""
        return self.notes / f"{name}.parquet"

    def touched(self, name: str) -> dict[str, Ids]:
        """The lists that a request probes, those that its recall check does, and the rows it takes."""
        return dict(np.load(self.notes / f"{name}.npz"))


def bench(*, quick: bool) -> Bench:
    """The bench of one size."""
    if not quick:
        return Bench(StandIn(CACHE / "full", LAION_5B), CASES, GRAPH)
    smaller = [{name: case.smaller() for name, case in cases.items()} for cases in (CASES, GRAPH)]
    return Bench(StandIn(CACHE / "quick", QUICK), *smaller)


def queries_of(case: Case, stand_in: StandIn) -> np.ndarray:
    """Its seeds, or their centroid."""
    path = stand_in.notes / "seeds.npy"
    if not path.exists():
        np.save(path, stand_in.space.seeds(SEEDS))
    seeds = np.load(path)
    return seeds[: case.seeds] if case.seeds else unit(seeds.mean(axis=0)[None])


# --- writing what requests touch ------------------------------------------------------------------


class Recorder:
    """Metadata that says what its ids say, and remembers which rows were taken."""

    columns = schema = SCHEMA

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in
        self.taken: list[Ids] = []

    def __len__(self) -> int:
        return self._stand_in.recipe.rows

    def row_bytes(self) -> int:
        """Those of a record batch, divided."""
        return layout().size // BATCH

    def covers(self, ids: Ids) -> np.ndarray:
        """All of them."""
        return np.ones(len(ids), np.bool_)

    def take(self, ids: Ids, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of some ids."""
        self.taken.append(ids)
        return self._stand_in.texts.of(ids).select(columns or SCHEMA.names)

    @contextmanager
    def reading_ahead(self, _: Sequence[str]) -> Iterator[Callable[[Ids], None]]:
        """Note rows that are read ahead too: they are read from the disk even if they are never taken."""
        yield self.taken.append


def fill(bench: Bench, name: str) -> dict[str, Any]:
    """Write the lists that a request probes, then the texts of the rows that it takes."""
    stand_in, case = bench.stand_in, (bench.cases | bench.graph)[name]
    queries = queries_of(case, stand_in)
    probed, further = lists_probed(stand_in, queries, case.k)
    lists = stand_in.write_lists(np.union1d(probed, further))
    recorder = Recorder(stand_in)
    index, request = Index(stand_in.index, stand_in.ivfdata), Request(case.k, THRESHOLD)
    retrieve(index, recorder, queries, request, lambda _: None, per_seed=case.seeds > 0)
    taken = np.unique(np.concatenate(recorder.taken))
    rows = stand_in.write_rows(taken)
    np.savez(bench.notes / f"{name}.npz", probed=probed, further=further, taken=taken)
    return {"lists": lists, "rows": rows}


def lists_probed(stand_in: StandIn, queries: np.ndarray, k: int) -> tuple[Ids, Ids]:
    """The lists that a search probes, and those that its recall check does."""
    index = faiss.read_index(str(stand_in.index), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    nprobe = nprobe_rule(k, ivf.nlist, index.ntotal)
    rotated = transformed(index, queries)
    found = []
    for sample, depth in ((rotated, nprobe), (rotated[:RECALL_QUERIES], FURTHER * nprobe)):
        numbers = np.unique(nearest_centres(ivf, sample, depth)[1])
        found.append(numbers[numbers >= 0])
    return found[0], found[1]


def build(bench: Bench, measured: Iterable[str]) -> None:
    """Write what is missing of the stand-in for some measurements."""
    started = time.perf_counter()
    bench.stand_in.create()
    log(f"frames of all files after {time.perf_counter() - started:.0f} s")
    for name, case in (bench.cases | bench.graph).items():
        users = {name, "sparse" if name in SPARSE else "", "graph" if name in bench.graph else ""}
        users |= {"plan"} if name == PLANNED_ON else set()
        if not users.isdisjoint(measured) and not (bench.notes / f"{name}.npz").exists():
            told = child(bench, "fill", name)
            log(f"wrote {told['lists']:,} lists and {told['rows']:,} rows for {case.title}")
    written = sum(path.stat().st_blocks * 512 for path in bench.stand_in.paths)
    log(f"{written / 1e9:.1f} GB written, after {time.perf_counter() - started:.0f} s")


# --- measuring ------------------------------------------------------------------------------------


class Meter:
    """Seconds, bytes read and memory of a piece of work, and of the phases within it.

    What other threads do meanwhile, such as reading metadata ahead, counts for the phase of the main one.
    """

    def __init__(self, phases: Mapping[str, tuple[Any, str]]) -> None:
        self._phases = {n: (o, f) for n, (o, f) in phases.items() if hasattr(o, f)}
        self.phases = {name: [0.0, 0] for name in phases}

    def run(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the work tells, and what it took."""
        plain = {name: getattr(owner, function) for name, (owner, function) in self._phases.items()}
        for name, (owner, function) in self._phases.items():
            setattr(owner, function, self._timed(name, plain[name]))
        usage, cpu, read = resource.getrusage(resource.RUSAGE_SELF), cpu_seconds(), bytes_read("self")
        started = time.perf_counter()
        with PeakMemory() as memory:
            told = work()
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_SELF)
        for name, (owner, function) in self._phases.items():
            setattr(owner, function, plain[name])
        return {
            "seconds": seconds,
            "cpu": cpu_seconds() - cpu,
            "system": after.ru_stime - usage.ru_stime,
            "read": bytes_read("self") - read,
            "faults": after.ru_majflt - usage.ru_majflt,
            "anonymous": memory.peak,
            "resident": after.ru_maxrss << 10,
            "load": os.getloadavg()[0],
            "phases": self.phases,
            **told,
        }

    def _timed(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return plain(*arguments, **named)
            started, read = time.perf_counter(), bytes_read("self")
            try:
                return plain(*arguments, **named)
            finally:
                self.phases[name][0] += time.perf_counter() - started
                self.phases[name][1] += bytes_read("self") - read

        return call


def bytes_read(process: int | str) -> int:
    """Bytes that a process has had read from disks."""
    found = re.search(r"^read_bytes: (\d+)", Path(f"/proc/{process}/io").read_text(), re.M)
    assert found
    return int(found[1])


def measure_folder(bench: Bench, _: str) -> dict[str, Any]:
    """Open the folder of the index as a script does."""
    kept = []

    def work() -> dict[str, Any]:
        kept.append(open_folder(bench.stand_in.folder))
        return {}

    return Meter({name: (in_place, what) for name, (_, what) in OPENING.items()}).run(work)


def measure_stage(bench: Bench, kind: str) -> dict[str, Any]:
    """Stage in place, or sparse from a bucket to an empty cache."""
    in_place = kind == "in-place"
    uri = str(bench.stand_in.folder) if in_place else f"gs://{BUCKET}/{FOLDER}"

    def work() -> dict[str, Any]:
        done = stage(uri, None, bench.notes / kind, in_place=in_place, sparse=not in_place)
        return {"fetched": done.bytes_fetched}

    return Meter({}).run(work)


def measure_open(bench: Bench, kind: str) -> dict[str, Any]:
    """Open what is staged, as every step of a run does."""

    def work() -> dict[str, Any]:
        with open_staged(bench.notes / kind) as opened:
            return {"fetched": opened.fetched.fetched, "reads": opened.fetched.reads}

    return Meter(OPENING).run(work)


def measure_request(bench: Bench, name: str, kind: str = "in-place") -> dict[str, Any]:
    """Open what is staged, and ask."""

    def work() -> dict[str, Any]:
        with open_staged(bench.notes / kind) as opened:
            told = ask(opened.index, opened.metadata, bench, name)
            return {"fetched": opened.fetched.fetched, "reads": opened.fetched.reads, **told}

    return Meter(OPENING | PHASES).run(work)


def ask(index: Index, metadata: Metadata, bench: Bench, name: str) -> dict[str, Any]:
    """Ask, and write the table."""
    case = bench.cases[name]
    per_seed = case.seeds > 0
    queries = queries_of(case, bench.stand_in)
    request = Request(case.k, THRESHOLD)
    with new_table(str(bench.table(name)), columns_found(index, metadata, per_seed=per_seed)) as table:
        found = retrieve(index, metadata, queries, request, table.write, per_seed=per_seed)
    return {"funnel": vars(found.funnel), "nprobe": found.nprobe, "recall": found.recall}


def measure_disk(bench: Bench, name: str) -> dict[str, Any]:
    """Read what a request needs, and nothing else, in many threads."""
    jobs = [
        (path, start, stop - start)
        for path, pages in needed(bench, name).items()
        for start, stop in (split(pages, READ_SIZE // PAGE_SIZE) * PAGE_SIZE).tolist()
    ]

    def work() -> dict[str, Any]:
        with ThreadPoolExecutor(READS) as pool:
            parts = [jobs[number::READS] for number in range(READS)]
            list(pool.map(read_all, parts))
        return {"reads": len(jobs), "planned": sum(length for _, _, length in jobs)}

    return Meter({}).run(work)


def read_all(jobs: Sequence[tuple[Path, int, int]]) -> None:
    """Read some parts of files, without what the kernel would read ahead."""
    files = {path: os.open(path, os.O_RDONLY) for path in {job[0] for job in jobs}}
    for descriptor in files.values():
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    for path, start, length in jobs:
        os.pread(files[path], length, start)
    for descriptor in files.values():
        os.close(descriptor)


def needed(bench: Bench, name: str) -> dict[Path, Ranges]:
    """The pages of the lists that a request probes and of the rows that it takes."""
    stand_in, touched = bench.stand_in, bench.touched(name)
    found = {stand_in.ivfdata: pages_of(stand_in.list_ranges(touched["probed"]))}
    for number, path in enumerate(stand_in.metadata):
        found[path] = pages_of(stand_in.texts.ranges(touched["taken"], number))
    return found


# --- what is planned -----------------------------------------------------------------------------


def measure_plan(bench: Bench, _: str) -> dict[str, Any]:
    """Measure this machine as `laion-assets plan` does, and estimate all requests, as their steps do.

    The machine is measured where the stand-in has data: random lists and pages of it are holes.
    """
    from laion_assets.defs.estimate import Machine  # and Dagster, which takes memory

    cache = bench.notes / "in-place"
    rows = bench.touched(PLANNED_ON)["taken"]
    written = {
        "_rows_as_queries": queries_of(Case(probe.QUERIES, 1), bench.stand_in),
        "_disk_rates": disk_rates(bench),
        "_scattered_ids": np.random.default_rng(0).permutation(rows)[: probe.SCATTERED],
        "_run_of_ids": rows[: probe.DENSE],
    }
    with ExitStack() as patches:
        for name, value in written.items():
            patches.enter_context(mock.patch.object(probe, name, return_value=value))
        opened = patches.enter_context(open_staged(cache))
        rates = probe.measured_rates(partial(open_staged, cache), cache)
        machine = Machine(probe.shape_of(opened, cache), rates)
        found = {
            name: asdict(
                machine.search(opened.index, queries_of(case, bench.stand_in), case.k, None, USUAL_SHARE)
            )
            for name, case in bench.cases.items()
        }
    return {"requests": found, "rates": asdict(rates)}


def disk_rates(bench: Bench) -> tuple[float, float]:
    """The seconds of a page that holds texts, and of a byte of a list; see `probe`."""
    wanted = needed(bench, PLANNED_ON)
    lists = wanted.pop(bench.stand_in.ivfdata)[:PLANNED_LISTS] * PAGE_SIZE
    path, pages = max(wanted.items(), key=lambda item: total(item[1]))
    some = np.random.default_rng(0).permutation(members(pages))[: probe.PAGES] * PAGE_SIZE
    descriptor = os.open(path, os.O_RDONLY)
    of_pages = probe._page_seconds(descriptor, some)
    os.close(descriptor)
    descriptor = os.open(bench.stand_in.ivfdata, os.O_RDONLY)
    of_lists = sum(
        probe._run_seconds(descriptor, bench.stand_in.ivfdata, start, stop - start)
        for start, stop in lists.tolist()
    )
    os.close(descriptor)
    return of_pages / len(some), of_lists / total(lists)


# --- sparse, from a bucket ------------------------------------------------------------------------


def measure_source(bench: Bench, kind: str) -> dict[str, Any]:
    """Read again from the bucket what is read to open, in as many threads, and do nothing with it."""
    with open_staged(bench.notes / kind) as opened:
        reader, files = sources_of([file for file in opened.manifest.files if file.sparse])
    local = {path.name: path for path in bench.stand_in.paths}
    jobs = [
        (source, *edges)
        for source in files
        if source.name.endswith(".arrow")
        for edges in headers_of(local[Path(source.name).name])
    ]
    stats = TransferStats()
    fetcher = Fetcher(reader, READ_THREADS, log, stats)

    def read(job: tuple[SourceFile, int, int]) -> None:
        for _ in fetcher.read(*job):
            pass

    def work() -> dict[str, Any]:
        fetcher.run(iter(jobs), read)
        return {"fetched": stats.fetched, "reads": stats.reads}

    return Meter({}).run(work)


def headers_of(path: Path) -> list[tuple[int, int]]:
    """Where a file's footer and the headers of its record batches are."""
    found = []
    with path.open("rb") as file:

        def read(start: int, stop: int) -> bytes:
            found.append((start, stop))
            return os.pread(file.fileno(), stop - start, start)

        read_table(path.stat().st_size, read)
    return found


@contextmanager
def served(stand_in: StandIn) -> Iterator[int]:
    """Serve the data as a bucket, without copying it; yields the process that does."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from helpers.gcs import gcs_server

    root = stand_in.buckets
    with gcs_server(root) as url:
        os.environ["STORAGE_EMULATOR_HOST"] = url
        describe_objects(stand_in, root)
        yield server_of(url)


def server_of(url: str) -> int:
    """The process that serves an address: a child of this one."""
    port = url.rpartition(":")[2]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return next(int(n) for n in children if port in Path(f"/proc/{n}/cmdline").read_text())


def describe_objects(stand_in: StandIn, root: Path) -> None:
    """Say of each file that it is an object, as the server itself would."""
    fs, _ = open_storage("gs://like", "")
    if not (root / "like").exists():
        fs.mkdir("like")
    fs.pipe_file("like/object", b"x")
    like = json.loads(os.getxattr(root / "like" / "object", "user.metadata"))
    for number, path in enumerate(stand_in.paths):
        if "user.metadata" in os.listxattr(path):
            continue
        # Of sparse files the checksum only says which content it is; that of others is compared.
        checksum = file_crc32c(path) if path == stand_in.index else checksum_text(number)
        told = {"Crc32c": checksum, "Generation": like["Generation"], "Md5Hash": "", "Etag": ""}
        os.setxattr(path, "user.metadata", json.dumps(like | told).encode())


def planned_reads(bench: Bench, name: str) -> dict[str, int]:
    """The reads that a request needs by the rule of sparse staging, where nothing is there yet."""
    reads = [reads_for(members(pages)) for pages in needed(bench, name).values()]
    return {"planned": PAGE_SIZE * sum(map(total, reads)), "planned_reads": sum(map(len, reads))}


# --- the whole graph ------------------------------------------------------------------------------


def measure_graph(bench: Bench) -> dict[str, Any]:
    """Materialize all assets of one seed set, from a bucket, in an empty project."""
    around_seeds, around_centroid = bench.graph.values()
    with tempfile.TemporaryDirectory(dir=bench.notes) as folder:
        seeds = Path(folder) / "data" / "seeds" / "style"
        seeds.mkdir(parents=True)
        np.save(seeds / "seeds.npy", queries_of(around_seeds, bench.stand_in))
        command = [str(Path(sys.executable).with_name("laion-assets")), "materialize", "style"]
        command += [
            "--nb-images-knn",
            str(around_seeds.k),
            "--nb-images-centroid",
            str(around_centroid.k),
        ]
        places = {"LAION_INDEX_URI": f"gs://{BUCKET}/{FOLDER}", "LAION_STAGING": "sparse"}
        return followed(command, Path(folder), os.environ | places, bench.notes / "graph.log")


def followed(
    command: list[str], folder: Path, environment: Mapping[str, str], logged: Path
) -> dict[str, Any]:
    """Run a command that says which asset it makes, and when each was last mentioned."""
    started = time.perf_counter()
    last: dict[str, float] = {}
    told = []
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told.append(line)
            if found := re.match(r"(\w+): ", line):
                last[found[1]] = time.perf_counter() - started
    logged.write_text("".join(told))
    if process.returncode:
        sys.exit(f"the graph failed: see {logged}")
    return {"seconds": time.perf_counter() - started, "last": last, "told": told[-4:]}


# --- checks ---------------------------------------------------------------------------------------


def check(bench: Bench, name: str) -> dict[str, Any]:
    """Compare a sample of a written table with what the ids say, plain Arrow, and plain faiss."""
    table = pq.read_table(bench.table(name))
    some = table.take(np.random.default_rng(0).permutation(len(table))[:SAMPLE])
    ids = some["id"].to_numpy()
    every = table["id"].to_numpy()
    texts = table.select(SCHEMA.names).cast(SCHEMA)
    assert texts.equals(bench.stand_in.texts.of(every)), f"{name}: texts are not what their ids say"
    assert some.select(SCHEMA.names).cast(SCHEMA).equals(plain_arrow(bench.stand_in, ids)), name
    return {
        "texts": len(every),
        "above 2^32": float((every > 2**32).mean()),
        "difference": plain_faiss(bench, name, table),
    }


def plain_arrow(stand_in: StandIn, ids: Ids) -> pa.Table:
    """What Arrow's own memory map says of some rows."""
    readers = [pa.ipc.open_file(pa.memory_map(str(path))) for path in stand_in.metadata]
    first = np.cumsum([0, *(reader.num_record_batches for reader in readers)])
    rows = []
    for number in ids.tolist():
        batch, row = divmod(number, BATCH)
        file = int(np.searchsorted(first, batch, side="right")) - 1
        rows.append(readers[file].get_batch(batch - int(first[file])).slice(row, 1))
    return pa.Table.from_batches(rows).take(pa.array(range(len(rows))))


def plain_faiss(bench: Bench, name: str, table: pa.Table) -> float:
    """The greatest difference of similarity and of rank to what faiss itself finds for a few queries."""
    case, stand_in = bench.cases[name], bench.stand_in
    index = faiss.read_index(str(stand_in.index), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    ivf.nprobe = nprobe_rule(case.k, ivf.nlist, index.ntotal)
    faiss.downcast_index(ivf.quantizer).hnsw.efSearch = 2 * ivf.nprobe  # as our search sets it
    found, numbers = index.search(queries_of(case, stand_in)[:COMPARED_QUERIES], case.k)
    worst = 0.0
    for query, (similarity, ids) in enumerate(zip(found, numbers, strict=True)):
        ours = table.filter(pa.compute.equal(table["seed"], query)) if case.seeds else table
        order = np.argsort(ids)
        our_ids, similar = ours["id"].to_numpy(), ours["similarity"].to_numpy()
        place = order[np.minimum(np.searchsorted(ids[order], our_ids), len(ids) - 1)]
        same = ids[place] == our_ids
        # Of rows as similar as the last one, any may be found.
        assert (same | (similar < similarity[-1] + 1e-6)).all(), "faiss finds other rows"
        worst = max(worst, float(np.abs(similarity[place] - similar)[same].max()))
        worst = max(worst, float(np.abs(similarity[ours["rank"].to_numpy() - 1] - similar).max()))
    assert worst < 1e-6, f"similarity differs by {worst}"
    return worst


# --- all of it ------------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Bench, str], dict[str, Any]]] = {
    "fill": fill,
    "folder": measure_folder,
    "stage": measure_stage,
    "open": measure_open,
    "request": measure_request,
    "disk": measure_disk,
    "plan": measure_plan,
    "source": measure_source,
    "sparse": partial(measure_request, kind="sparse"),
    "check": check,
}


def child(bench: Bench, step: str, name: str = "") -> dict[str, Any]:
    """Run a step in a process of its own."""
    command = [sys.executable, __file__, "--step", step, "--case", name]
    command += ["--quick"] if bench.stand_in.recipe == QUICK else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{step} {name} failed")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def forget(stand_in: StandIn) -> None:
    """Let the page cache forget the index's files, which it does not while a process has them mapped."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process has ended
            if str(stand_in.buckets) in maps.read_text():
                sys.exit(f"process {maps.parent.name} has files of {stand_in.buckets} mapped: end it")
    os.sync()
    for path in stand_in.paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run_in_place(bench: Bench, name: str) -> dict[str, Any]:
    """The disk alone, then the request cold and warm, then what it found."""
    child(bench, "stage", "in-place")
    found = {}
    forget(bench.stand_in)
    found["disk"] = child(bench, "disk", name)
    forget(bench.stand_in)
    for state in bench.states:
        found[state] = child(bench, "request", name)
        log(summary(f"{bench.cases[name].title}, {state}", found[state]))
    found["check"] = child(bench, "check", name)
    return found


def run_open(bench: Bench, _: str) -> dict[str, Any]:
    """Stage in place, and open cold and warm, as steps do and as scripts do."""
    shutil.rmtree(bench.notes / "in-place", ignore_errors=True)
    found = {}
    for title, step, cold in (
        ("stage in place", "stage", True),
        ("open for the first time, cold", "open", True),
        ("open, cold", "open", True),
        ("open, warm", "open", False),
        ("`open_folder`, cold", "folder", True),
        ("`open_folder`, warm", "folder", False),
    ):
        if cold:
            forget(bench.stand_in)
        found[title] = child(bench, step, "in-place")
        log(summary(title, found[title]))
    return found


def run_plan(bench: Bench, _: str) -> dict[str, Any]:
    """The plans of all requests."""
    child(bench, "stage", "in-place")
    return child(bench, "plan")


def run_sparse(bench: Bench, _: str) -> dict[str, Any]:
    """Stage from a bucket and open, several times, then ask, all with the same cache."""
    with served(bench.stand_in) as server:

        def run(step: str, name: str) -> dict[str, Any]:
            before = bytes_read(server)
            took = child(bench, step, name)
            took["served"] = bytes_read(server) - before
            log(summary(f"{step} {name}", took))
            return took

        rounds = []
        for _ in range(1 + ROUNDS):  # in the first, the server reads the headers into memory
            shutil.rmtree(bench.notes / "sparse", ignore_errors=True)
            rounds.append({f"{step} sparse": run(step, "sparse") for step in OPENED_SPARSELY})
        found = sorted(rounds[1:], key=opening_ratio)[ROUNDS // 2]
        ratios = ", ".join(f"{opening_ratio(one):.2f}" for one in rounds[1:])
        log(f"to open sparsely, against the source alone: {ratios}")
        for name in SPARSE:
            for again in ("", " again"):
                found[f"sparse {name}{again}"] = run("sparse", name)
    for name in SPARSE:
        found[f"sparse {name}"] |= planned_reads(bench, name)
    shutil.rmtree(bench.notes / "sparse")
    return found


def opening_ratio(round_: Mapping[str, Any]) -> float:
    """Time to open sparsely, divided by that of the source alone."""
    return float(round_["open sparse"]["seconds"] / round_["source sparse"]["seconds"])


def run_graph(bench: Bench, _: str) -> dict[str, Any]:
    """The graph, from a bucket."""
    with served(bench.stand_in):
        return measure_graph(bench)


def measurements(bench: Bench) -> dict[str, Callable[[Bench, str], dict[str, Any]]]:
    """All of them, by name."""
    return (
        {"open": run_open}
        | dict.fromkeys(bench.cases, run_in_place)
        | {"plan": run_plan, "sparse": run_sparse, "graph": run_graph}
    )


def summary(name: str, took: Mapping[str, Any]) -> str:
    """One line."""
    phases = ", ".join(
        f"{phase} {seconds:.1f}"
        for phase, (seconds, _) in took.get("phases", {}).items()
        if seconds > 0.05
    )
    return (
        f"{name}: {took['seconds']:.1f} s ({took.get('cpu', 0):.1f} of CPU), "
        f"{took.get('read', 0) / 1e9:.2f} GB, {took.get('faults', 0):,} faults, "
        f"{took.get('anonymous', 0) / 1e6:.0f} MB: {phases}"
    )


def log(line: str) -> None:
    """Say what goes on."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def measure(bench: Bench, only: Sequence[str], output: Path) -> None:
    """Measure everything or some of it, and write the report of all that was ever measured."""
    results = {}
    for name, run in measurements(bench).items():
        path = bench.notes / f"{name}.json"
        if name in only:
            path.write_text(json.dumps(run(bench, name), indent=1, default=float))
        if path.exists():
            results[name] = json.loads(path.read_text())
    output.write_text(report(about(bench.stand_in), bench.cases, results))


def about(stand_in: StandIn) -> dict[str, Any]:
    """The machine and the stand-in, as the report names them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "processor": processor(),
        "memory": memory / 2**30,
        "rows": stand_in.recipe.rows,
        "lists": stand_in.recipe.lists,
        "batches": stand_in.recipe.batches,
        "apparent": sum(path.stat().st_size for path in stand_in.paths),
        "written": sum(path.stat().st_blocks * 512 for path in stand_in.paths) / 1e9,
        "reads": READS,
    }


def main() -> None:
    """Build what is missing, measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1/64 of the rows, in lists 1/8 as long")
    parser.add_argument(
        "--only", nargs="*", help="measurements: open, plan, sparse, graph, " + ", ".join(CASES)
    )
    parser.add_argument("--build", action="store_true", help="only build what is missing")
    parser.add_argument("--refill", action="store_true", help="find anew which rows requests take")
    parser.add_argument("--output", type=Path, help="of the report; benchmarks/truesize.md if not quick")
    parser.add_argument("--cold", action="store_true", help="ask only once, cold")
    parser.add_argument("--step", choices=STEPS, help="one step, in this process")
    parser.add_argument("--case", default="", help="of the step")
    parser.add_argument("--profile", action="store_true", help="of the step: where its CPU goes")
    asked = parser.parse_args()
    one = bench(quick=asked.quick)
    if asked.cold:
        one = replace(one, states=("cold",))
    if asked.step:
        run_step(one, asked.step, asked.case, profile=asked.profile)
        return
    if asked.refill:
        for path in one.notes.glob("*.npz"):
            path.unlink()
    only = list(measurements(one)) if asked.only is None else asked.only
    build(one, only)
    if not asked.build:
        usual = one.notes if asked.quick else REPOSITORY / "benchmarks"
        measure(one, only, asked.output or usual / "truesize.md")


def run_step(bench: Bench, step: str, case: str, *, profile: bool) -> None:
    """Run one step and print what it tells."""
    run = partial(STEPS[step], bench, case)
    if profile:
        profiler = cProfile.Profile()
        told = profiler.runcall(run)
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumulative").print_stats(40)
    else:
        told = run()
    print(json.dumps(told, default=float))


if __name__ == "__main__":
    main()
