"""How fast an object comes from a bucket to the disk: staging, and what other clients make of it.

Every measurement is a process of its own, in turns, against one server on this machine (fake-gcs-server,
its file and the copies in memory, so that clients are measured and not disks); once as it is, and once
through a relay that holds back every request for 20 ms, as a bucket far away does.
Staging does all that it does anywhere: list, read, checksum, journal, compare, rename. Others only copy.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from memory import cpu_seconds

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))  # for the server

BUCKET = "bench"
FOLDER = "laion"
OBJECT = "image.index"
CHUNK = 32 << 20
THREADS = 16
LATENCY = 0.02  # seconds
MIB = 1 << 20


# --- the clients ----------------------------------------------------------------------------------


def in_ranges(target: Path, size: int, read: Callable[[int, int], bytes]) -> None:
    """Read ranges in as many threads as staging does, and write each to its place."""
    with target.open("wb") as file, ThreadPoolExecutor(THREADS) as pool:

        def copy(start: int) -> None:
            os.pwrite(file.fileno(), read(start, min(start + CHUNK, size)), start)

        list(pool.map(copy, range(0, size, CHUNK)))


def staging(_: str, target: Path, size: int) -> Callable[[], None]:
    """Everything that `staged_laion_index` does."""
    from laion_assets.io.storage import open_storage
    from laion_assets.staging import stage

    uri = f"gs://{BUCKET}/{FOLDER}"
    open_storage(uri, "")  # makes the client, as for the others, before the clock starts

    def run() -> None:
        done = stage(uri, None, target.parent / "cache")
        assert done.bytes_fetched >= size

    return run


def obstore_ranges(url: str, target: Path, size: int) -> Callable[[], None]:
    """The client that staging uses, without its checks."""
    import obstore
    from obstore.store import GCSStore

    store = GCSStore(
        BUCKET, config={"base_url": url}, skip_signature=True, client_options={"allow_http": True}
    )

    def copy(file: int, start: int) -> None:
        found = obstore.get(
            store, f"{FOLDER}/{OBJECT}", options={"range": (start, min(start + CHUNK, size))}
        )
        for piece in found.stream(min_chunk_size=MIB):
            os.pwrite(file, piece, start)
            start += len(piece)

    def run() -> None:
        with target.open("wb") as file, ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda start: copy(file.fileno(), start), range(0, size, CHUNK)))

    return run


def gcsfs_ranges(url: str, target: Path, size: int) -> Callable[[], None]:
    """The client of fsspec, in ranges."""
    import gcsfs

    fs = gcsfs.GCSFileSystem(token="anon", endpoint_url=url)
    path = f"{BUCKET}/{FOLDER}/{OBJECT}"
    return lambda: in_ranges(target, size, lambda start, stop: fs.cat_file(path, start=start, end=stop))


def gcsfs_get_file(url: str, target: Path, _: int) -> Callable[[], None]:
    """The client of fsspec, as it copies files by itself."""
    import gcsfs

    fs = gcsfs.GCSFileSystem(token="anon", endpoint_url=url)
    return lambda: fs.get_file(f"{BUCKET}/{FOLDER}/{OBJECT}", str(target))


def pyarrow_ranges(url: str, target: Path, size: int) -> Callable[[], None]:
    """Arrow's client, in ranges."""
    from pyarrow.fs import GcsFileSystem

    fs = GcsFileSystem(anonymous=True, scheme="http", endpoint_override=url.removeprefix("http://"))

    def read(start: int, stop: int) -> bytes:
        with fs.open_input_file(f"{BUCKET}/{FOLDER}/{OBJECT}") as file:
            return file.read_at(stop - start, start)

    return lambda: in_ranges(target, size, read)


def transfer_manager(url: str, target: Path, _: int, worker: str) -> Callable[[], None]:
    """Google's own client, as it copies big objects by itself."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage
    from google.cloud.storage import transfer_manager as manager

    client = storage.Client(
        project="bench", credentials=AnonymousCredentials(), client_options={"api_endpoint": url}
    )
    blob = client.bucket(BUCKET).get_blob(f"{FOLDER}/{OBJECT}")
    return lambda: manager.download_chunks_concurrently(
        blob,
        str(target),
        chunk_size=CHUNK,
        worker_type=worker,
        max_workers=THREADS,
        crc32c_checksum=False,
    )


CLIENTS: dict[str, Callable[[str, Path, int], Callable[[], None]]] = {
    "staging (obstore, all checks)": staging,
    "obstore, ranges": obstore_ranges,
    "gcsfs, `cat_file` ranges": gcsfs_ranges,
    "gcsfs, `get_file`": gcsfs_get_file,
    "pyarrow, `read_at` ranges": pyarrow_ranges,
    "google-cloud-storage, transfer_manager, threads": partial(transfer_manager, worker="thread"),
    "google-cloud-storage, transfer_manager, processes": partial(transfer_manager, worker="process"),
}


def measure_one(client: str, url: str, folder: Path, size: int) -> None:
    """Run one client once and print what it took."""
    os.environ["STORAGE_EMULATOR_HOST"] = url
    target = folder / OBJECT
    run = CLIENTS[client](url, target, size)
    before, started = cpu_seconds(), time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    written = target if target.exists() else folder / "cache" / OBJECT
    assert written.stat().st_size == size
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps({"seconds": seconds, "cpu": cpu_seconds() - before, "rss": rss}))


# --- the server -----------------------------------------------------------------------------------


def put_object(url: str, root: Path, size: int) -> None:
    """Make a big object without uploading it: a file under the server's root that says it is one."""
    import gcsfs

    from laion_assets.io.checksums import checksum_text, crc32c

    fs = gcsfs.GCSFileSystem(token="anon", endpoint_url=url)
    fs.mkdir(BUCKET)
    fs.pipe_file(f"{BUCKET}/{FOLDER}/metadata/0.parquet", b"x")
    path = root / BUCKET / FOLDER / OBJECT
    noise, checksum = os.urandom(MIB), 0
    with path.open("wb") as file:
        for number in range(size // MIB):
            block = number.to_bytes(8, "little") + noise[8:]
            checksum = crc32c(block, checksum)
            file.write(block)
    text = checksum_text(checksum)
    like = json.loads(os.getxattr(root / BUCKET / FOLDER / "metadata" / "0.parquet", "user.metadata"))
    like |= {"Crc32c": text, "Generation": like["Generation"] + 1}
    like |= {"Md5Hash": "", "Etag": base64.b64encode(b"no md5").decode()}
    os.setxattr(path, "user.metadata", json.dumps(like).encode())


def relay(upstream: int, latency: float) -> None:
    """Pass connections on, each request after a while; prints the port and stays."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    port = listener.getsockname()[1]
    print(port, flush=True)

    def requests(client: socket.socket, server: socket.socket) -> None:
        while data := client.recv(1 << 16):
            time.sleep(latency)
            # The server answers only to its own name.
            server.sendall(data.replace(b":%d\r\n" % port, b":%d\r\n" % upstream))

    def replies(client: socket.socket, server: socket.socket) -> None:
        out, into = os.pipe()  # the bytes stay within the kernel
        try:
            while moved := os.splice(server.fileno(), into, MIB):
                while moved:
                    moved -= os.splice(out, client.fileno(), moved)
        finally:
            os.close(out)
            os.close(into)

    def until_closed(pass_on: Callable[..., None], client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # one side has gone
            pass_on(client, server)
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", upstream))
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for way in (requests, replies):
            threading.Thread(target=until_closed, args=(way, client, server), daemon=True).start()


@contextmanager
def far_away(url: str) -> Iterator[str]:
    """The URL of a relay before the server, in a process of its own."""
    port = url.rpartition(":")[2]
    command = [sys.executable, __file__, "--relay", port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


# --- all of it ------------------------------------------------------------------------------------


def measure(url: str, folder: Path, size: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run all clients in turns."""
    found: dict[str, list[dict[str, float]]] = {client: [] for client in CLIENTS}
    for number in range(rounds):
        for client in CLIENTS:
            target = folder / "target"
            target.mkdir()
            command = [sys.executable, __file__, "--one", client, "--url", url]
            command += ["--folder", str(target), "--mib", str(size // MIB)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{client} failed:\n{done.stderr[-3000:]}")
            found[client].append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(target)
            seconds = found[client][-1]["seconds"]
            print(f"round {number + 1}: {client}: {seconds:.2f} s", file=sys.stderr)
    return found


def table(found: dict[str, list[dict[str, float]]], size: int) -> list[str]:
    """What was found as Markdown, the fastest first."""

    def median(client: str, what: str) -> float:
        return statistics.median(run[what] for run in found[client])

    fastest = min(median(client, "seconds") for client in found)
    lines = [
        "| client | seconds (lowest to highest) | MB/s | of the fastest | CPU seconds | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for client in sorted(found, key=lambda client: median(client, "seconds")):
        runs = sorted(run["seconds"] for run in found[client])
        seconds, rss = median(client, "seconds"), median(client, "rss")
        lines.append(
            f"| {client} | {seconds:.2f} ({runs[0]:.2f} to {runs[-1]:.2f}) | {size / seconds / 1e6:.0f} "
            f"| {fastest / seconds:.2f} | {median(client, 'cpu'):.2f} | {rss / 1e6:.0f} MB |"
        )
    return lines


def checksum_cost(size: int) -> str:
    """Say what checksums take by themselves."""
    from laion_assets.io.checksums import crc32c, crc32c_of_parts

    piece = os.urandom(MIB)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        checksum = 0
        for _ in range(size // MIB):
            checksum = crc32c(piece, checksum)
        times.append(time.perf_counter() - started)
    parts = [(number, CHUNK) for number in range(25_000)]
    started = time.perf_counter()
    crc32c_of_parts(parts)
    together = time.perf_counter() - started
    return (
        f"crc32c of these {size / MIB:.0f} MiB takes {statistics.median(times):.3f} s of one core; "
        f"putting together those of the 25,000 chunks of an 800 GB file takes {together:.2f} s."
    )


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=2048, help="size of the object")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "staging.md")
    parser.add_argument("--folder", type=Path, help="where the copies go; in memory if not given")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--relay", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    size = asked.mib * MIB
    if asked.relay:
        relay(asked.relay, LATENCY)
    if asked.one:
        return measure_one(asked.one, asked.url, asked.folder, size)
    from helpers.gcs import gcs_server

    with tempfile.TemporaryDirectory(dir=asked.folder or "/dev/shm") as name:
        folder = Path(name)
        with gcs_server(folder / "objects") as url, far_away(url) as far:
            put_object(url, folder / "objects", size)
            near_by = measure(url, folder, size, asked.rounds)
            at_distance = measure(far, folder, size, asked.rounds)
    lines = [
        "# Staging from a bucket",
        "",
        f"One object of {asked.mib} MiB from a server on the same machine ({os.cpu_count()} cores) into "
        f"memory; medians of {asked.rounds} runs, each a process of its own, the clients in turns; "
        f"{THREADS} threads and ranges of {CHUNK // MIB} MiB where a client has them. Staging lists, "
        "reads, computes checksums, keeps its journal, compares and renames; the others only copy. "
        "`make bench-staging` measures again.",
        "",
        "## As it is",
        "",
        *table(near_by, size),
        "",
        f"## With {LATENCY * 1000:.0f} ms more for every request",
        "",
        *table(at_distance, size),
        "",
        "## Checksums alone",
        "",
        checksum_cost(size),
        "",
    ]
    asked.output.write_text("\n".join(lines))
    print("\n".join(lines))
    return None


if __name__ == "__main__":
    main()
