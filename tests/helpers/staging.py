"""Indices to stage, ways to interrupt staging, and the resulting state of the disk."""

import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import indices
from helpers.gcs import Bucket
from helpers.project import contents

from laion_assets.io import checksums
from laion_assets.staging import TransferOptions, open_staged

MIB = 1 << 20
ROWS = 40
POPULATED = "image.index/populated.index"
LISTS = "image.index/merged_index.ivfdata"
SMALL = TransferOptions(chunk=1 << 16, threads=4)
STAGE = """
import sys
from pathlib import Path
from laion_assets.staging import TransferOptions, stage
stage(sys.argv[1], None, Path(sys.argv[2]), options=TransferOptions(chunk=1 << 16, threads=4))
"""

# --- an index and its copy ------------------------------------------------------------------------


def write_source(
    folder: Path, form: str = indices.MERGED, suffix: str = indices.ARROW, files: int = 3, seed: int = 0
) -> Path:
    """Write an index of some form and its metadata; another seed gives other contents."""
    rows = indices.random_rows(np.random.default_rng(seed), ROWS)
    indices.write_index(folder, rows, form)
    urls = pa.table({"url": [f"https://example.org/{seed}/{i}.jpg" for i in range(ROWS)]})
    indices.write_files(
        folder / "metadata", np.array_split(np.arange(ROWS), files), urls, batch=7, suffix=suffix
    )
    return folder


def staged_data(cache: Path) -> dict[str, bytes]:
    """The files in a cache, except for the manifest, the locks and what is derived."""
    return {n: held for n, held in contents(cache).items() if n != "manifest.json" and n[0] != "."}


def touched(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written or replaced."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".stager")
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def is_readable(cache: Path) -> bool:
    """Whether a search finds all rows, each with its own URL."""
    with open_staged(cache) as opened:
        query = np.eye(1, indices.DIMENSION, dtype=np.float32)
        ids = opened.index.search(query, ROWS, opened.index.nlist or None).ids[0]
        urls = opened.metadata.take(ids)["url"].to_pylist()
    return sorted(ids) == list(range(ROWS)) and all(
        url.endswith(f"/{number}.jpg") for url, number in zip(urls, ids, strict=True)
    )


def crc32c_text(content: bytes) -> str:
    return checksums.checksum_text(checksums.crc32c(content))


def write_many_lists(folder: Path, rows: int, seed: int = 0) -> None:
    """Write an index with 400 lists, some of them empty."""
    made = indices.random_rows(np.random.default_rng(seed), rows)
    indices.write_merged(folder, indices.trained(indices.MANY_LISTS), made)


def write_many_chunks(bucket: Bucket, source: Path, mib: int = 8, seed: int = 0) -> bytes:
    """Enlarge the inverted lists in a bucket and in a folder: they can be copied, but not searched."""
    content = random.Random(seed).randbytes(mib * MIB)
    (source / LISTS).write_bytes(content)
    bucket.write(LISTS, content)
    return content


# --- interruptions --------------------------------------------------------------------------------


class Steps:
    """Counts calls of functions, and kills this process before one of them."""

    def __init__(self, allowed: int) -> None:
        self._left = allowed
        self._lock = threading.Lock()

    def count(self, monkeypatch: pytest.MonkeyPatch, functions: Sequence[tuple[Any, str]]) -> None:
        for owner, name in functions:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def or_killed(*args: Any, **more: Any) -> Any:
            with self._lock:
                if not self._left:
                    os.kill(os.getpid(), signal.SIGKILL)
                self._left -= 1
            return function(*args, **more)

        return or_killed


def killed_at(step: int, call: Callable[[Steps], Any]) -> bool:
    """Call a function in a forked process that is killed before a step; whether it got that far.

    The function says which calls are steps.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    try:
        call(Steps(step))
    finally:
        os._exit(0)


def kill_when(program: list[str], reached: Callable[[], bool]) -> None:
    """Run a program and kill it as soon as a condition holds."""
    with subprocess.Popen(program) as process:
        while process.poll() is None:
            try:
                if reached():
                    process.send_signal(signal.SIGKILL)
            except FileNotFoundError:  # renamed meanwhile
                continue
    assert process.returncode in (0, -signal.SIGKILL)


def bytes_in(folder: Path) -> int:
    return sum(found.st_size for found in map(os.stat, map(str, folder.rglob("*"))))


def start(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Call a function in a thread; its result is appended to the list."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    return thread, results


@contextmanager
def disk_of(mib: int, folder: Path) -> Iterator[Path]:
    """Mount a file system of some size; skips the test where that is not possible."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
