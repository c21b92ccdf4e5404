"""What a tick of the sensor costs over many seed sets in a bucket: seconds, memory, requests, cursor.

The bucket is that of a real server on this machine, behind a relay. The server walks all objects for each
page of a listing, which no bucket does: the relay keeps the pages until something is written, and answers
each request after the time that a bucket takes (`--latency`). The first look at new files
still pays for the server's walk; the others show what a tick takes. Prints a table.
What must not live here: another way to list seeds than the sensor's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import dagster as dg
import google_crc32c
import numpy as np
from memory import PeakMemory

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from helpers.gcs import describe, gcs_server

from laion_assets.definitions import build_defs
from laion_assets.defs.sources import seeds_version
from laion_assets.io.checksums import checksum_text
from laion_assets.io.storage import open_storage
from laion_assets.seeds import list_folder

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


class Relay(ThreadingHTTPServer):
    """Keeps what the server listed until something is written, counts, and takes its time."""

    daemon_threads = True

    def __init__(self, upstream: str, latency: float, count: Synchronized[int]) -> None:
        super().__init__(("127.0.0.1", 0), PassOn)
        self.upstream = upstream.removeprefix("http://")
        self.latency = latency
        self.count = count
        self.kept: dict[str, tuple[int, bytes]] = {}


class PassOn(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    server: Relay

    def do_GET(self) -> None:
        """Answer from what is kept, or ask the server once."""
        if self.path not in self.server.kept:
            self.server.kept[self.path] = self._asked(b"")
        self._answer(*self.server.kept[self.path])

    def do_POST(self) -> None:
        """Write; nothing that is kept holds any more."""
        answer = self._asked(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.kept.clear()
        self._answer(*answer)

    def _asked(self, body: bytes) -> tuple[int, bytes]:
        connection = HTTPConnection(self.server.upstream)
        headers = {"Host": self.server.upstream, "Content-Type": self.headers.get("Content-Type", "")}
        connection.request(self.command, self.path, body, headers)
        reply = connection.getresponse()
        with contextlib.closing(connection):
            return reply.status, reply.read()

    def _answer(self, status: int, body: bytes) -> None:
        with self.server.count.get_lock():
            self.server.count.value += 1
        time.sleep(self.server.latency)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def serve(upstream: str, latency: float, count: Synchronized[int], address: Connection) -> None:
    """Run the relay, in a process of its own."""
    relay = Relay(upstream, latency, count)
    address.send(f"http://127.0.0.1:{relay.server_port}")
    relay.serve_forever()


@contextmanager
def relay_before(upstream: str, latency: float) -> Iterator[tuple[str, Synchronized[int]]]:
    """The URL of a relay, and how many requests it has answered."""
    fresh = multiprocessing.get_context("spawn")
    count: Synchronized[int] = fresh.Value("q", 0)
    here, there = fresh.Pipe()
    process = fresh.Process(target=serve, args=(upstream, latency, count, there), daemon=True)
    process.start()
    try:
        yield here.recv(), count
    finally:
        process.kill()


class Sensor:
    """The sensor and the daemon around it."""

    def __init__(self, instance: dg.DagsterInstance, requests: Synchronized[int]) -> None:
        self.instance, self.requests = instance, requests
        self.cursor: str | None = None
        self.repository = build_defs(
            {"LAION_SEEDS_URI": SEEDS, "LAION_INDEX_URI": f"gs://{BUCKET}/none"}
        ).get_repository_def()

    def tick(self, what: str) -> None:
        """Evaluate the sensor once, do what it asks for except the runs, and print what it took."""
        sensor = self.repository.get_sensor_def("seed_sets_sensor")
        resources = self.repository.get_top_level_resources()
        context = dg.build_sensor_context(
            self.instance,
            self.cursor,
            repository_def=self.repository,
            resources={key: resources[key] for key in sensor.required_resource_keys},
        )
        with context, PeakMemory() as memory:
            before, started, cpu = self.requests.value, time.perf_counter(), time.process_time()
            seen = sensor(context)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        self.cursor = seen.cursor
        for event in seen.asset_events:
            self.instance.report_runless_asset_event(event)
        runs = len(seen.run_requests or [])
        more = (memory.peak - memory.before) / 2**20
        cursor = len(self.cursor or "")
        asked = self.requests.value - before
        row = (what, seconds, cpu, asked, more, cursor, runs, len(seen.asset_events))
        print(ROW.format(*row), flush=True)


def settle(instance: dg.DagsterInstance) -> None:
    """Let Dagster know all sets, as after they were run."""
    found = list_folder(SEEDS).sets
    instance.add_dynamic_partitions("seed_sets", list(found))
    for seed_set in found.values():
        for event in seeds_version(seed_set).events():
            instance.report_runless_asset_event(event)


def measure(sets: int, files: int, latency: float) -> None:
    """Let the sensor tick, from the first sight of all sets to a change of one of them."""
    with (
        tempfile.TemporaryDirectory() as folder,
        gcs_server(Path(folder) / "objects") as server,
        relay_before(server, latency) as (url, requests),
        dg.DagsterInstance.local_temp(folder) as instance,
    ):
        os.environ["STORAGE_EMULATOR_HOST"] = url
        fill(Path(folder) / "objects", sets, files)
        print(f"{sets:,} seed sets of {files} files, each request answered after {latency} s")
        print(HEADER)
        sensor = Sensor(instance, requests)
        sensor.tick("first sight of all sets *")
        sensor.tick("all have come to rest")
        settle(instance)
        sensor.tick("all were run")
        sensor.tick(SETTLED)
        fs, root = open_storage(SEEDS, "")
        fs.pipe_file(f"{root}/set 00000/new.npy", npy(1))
        sensor.tick("one set has a new file *")
        sensor.tick("it has come to rest")
        sensor.tick("its run was requested")
        sensor.tick(SETTLED)
        print("* with the server's walks")


def main() -> None:
    """All kinds of ticks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--files", type=int, default=100, help="in each set")
    parser.add_argument("--latency", type=float, default=0.1, help="seconds each request takes")
    parsed = parser.parse_args()
    measure(parsed.sets, parsed.files, parsed.latency)


if __name__ == "__main__":
    main()
