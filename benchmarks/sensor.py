"""What a tick of the sensor costs over many seed sets in a bucket: seconds, memory, requests, cursor.

The bucket is that of a real server on this machine. It looks at all objects for each page of a listing,
so that the seconds of a tick are nearly all its own: what counts is the sensor's CPU time, and a bucket's
time to answer for each of the requests. `--latency` adds that to each. Prints a table.
What must not live here: another way to list seeds than the sensor's.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import google_crc32c
import numpy as np
from memory import PeakMemory

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from gcs import describe, gcs_server

from laion_assets.assets.seeds import seed_folder
from laion_assets.definitions import build_defs
from laion_assets.observations import observation
from laion_assets.retrieval.checksums import checksum_text
from laion_assets.retrieval.seeds import list_seed_sets
from laion_assets.retrieval.storage import open_storage

BUCKET = "many-seeds"
SEEDS = f"gs://{BUCKET}/seeds"
SETTLED = "at rest, nothing new"
HEADER = "tick                            s   CPU s  requests  MiB more  cursor bytes  runs  events"
ROW = "{:26}{:7.1f}{:8.1f}{:10}{:10.0f}{:14,}{:6}{:8}"


def npy(number: int) -> bytes:
    """A seed as a file: one small vector."""
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(number).standard_normal((1, 8)).astype(np.float32))
    return buffer.getvalue()


def fill(objects: Path, sets: int, files: int) -> None:
    """Give the server many objects without uploading them: links to one file of each set."""
    fs, bucket = open_storage(f"gs://{BUCKET}", "")
    fs.mkdir(bucket)
    fs.pipe_file(f"{bucket}/model.npy", npy(0))
    for number in range(sets):
        folder = objects / BUCKET / "seeds" / f"set {number:05}"
        folder.mkdir(parents=True)
        first = folder / "00000.npy"
        first.write_bytes(npy(number))
        crc32c = checksum_text(google_crc32c.Checksum(first.read_bytes()))
        describe(first, like=objects / BUCKET / "model.npy", Crc32c=crc32c, Generation=number + 1)
        for other in range(1, files):
            os.link(first, folder / f"{other:05}.npy")


@dataclass
class Requests:
    """How many requests were made, each held up for the time of the way."""

    latency: float
    count: int = 0


@contextmanager
def counted(latency: float) -> Iterator[Requests]:
    """Count the requests of gcsfs in this block."""
    from gcsfs.core import GCSFileSystem

    requests = Requests(latency)
    request: Callable[..., Awaitable[Any]] = GCSFileSystem._request

    async def slower(self: Any, *args: Any, **kwargs: Any) -> Any:
        requests.count += 1
        await asyncio.sleep(latency)
        return await request(self, *args, **kwargs)

    GCSFileSystem._request = slower
    try:
        yield requests
    finally:
        GCSFileSystem._request = request


class Sensor:
    """The sensor and the daemon around it."""

    def __init__(self, instance: dg.DagsterInstance, latency: float) -> None:
        self.instance, self.latency = instance, latency
        self.cursor: str | None = None
        self.repository = build_defs(
            {"LAION_SEEDS_URI": SEEDS, "LAION_INDEX_URI": f"gs://{BUCKET}/none"}
        ).get_repository_def()

    def tick(self, what: str) -> None:
        """Evaluate the sensor once, do what it asks for except the runs, and print what it took."""
        context = dg.build_sensor_context(
            self.instance,
            self.cursor,
            repository_def=self.repository,
            resources={"seeds": self.repository.get_top_level_resources()["seeds"]},
        )
        with context, PeakMemory() as memory, counted(self.latency) as requests:
            started, cpu = time.perf_counter(), time.process_time()
            seen = self.repository.get_sensor_def("seed_sets_sensor")(context)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        self.cursor = seen.cursor
        for event in seen.asset_events:
            self.instance.report_runless_asset_event(event)
        runs = len(seen.run_requests or [])
        more = (memory.peak - memory.before) / 2**20
        cursor = len(self.cursor or "")
        row = (what, seconds, cpu, requests.count, more, cursor, runs, len(seen.asset_events))
        print(ROW.format(*row), flush=True)


def settle(instance: dg.DagsterInstance) -> None:
    """Let Dagster know all sets, as after they were run."""
    found = list_seed_sets(SEEDS)
    instance.add_dynamic_partitions("seed_sets", list(found))
    for name, seed_set in found.items():
        instance.report_runless_asset_event(observation(seed_folder.key, seed_set.fingerprint, name))


def measure(sets: int, files: int, latency: float, *, whole: bool) -> None:
    """Let the sensor tick, from the first sight of all sets to a change of one of them."""
    with (
        tempfile.TemporaryDirectory() as folder,
        gcs_server(Path(folder) / "objects") as url,
        dg.DagsterInstance.local_temp(folder) as instance,
    ):
        os.environ["STORAGE_EMULATOR_HOST"] = url
        fill(Path(folder) / "objects", sets, files)
        print(f"{sets:,} seed sets of {files} files, {latency} s added to each request")
        print(HEADER)
        sensor = Sensor(instance, latency)
        sensor.tick("first sight of all sets")
        if not whole:
            return
        sensor.tick("all have come to rest")
        settle(instance)
        sensor.tick("all were run")
        sensor.tick(SETTLED)
        fs, root = open_storage(SEEDS, "")
        fs.pipe_file(f"{root}/set 00000/new.npy", npy(1))
        sensor.tick("one set has a new file")
        sensor.tick("it has come to rest")
        sensor.tick("its run was requested")
        sensor.tick(SETTLED)


def main() -> None:
    """All kinds of ticks over some files, then one over many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--files", type=int, default=10, help="in each set, for all kinds of ticks")
    parser.add_argument("--many", type=int, default=100, help="in each set, for one tick")
    parser.add_argument("--latency", type=float, default=0.1, help="seconds added to each request")
    parsed = parser.parse_args()
    measure(parsed.sets, parsed.files, parsed.latency, whole=True)
    if parsed.many:
        measure(parsed.sets, parsed.many, parsed.latency, whole=False)


if __name__ == "__main__":
    main()
