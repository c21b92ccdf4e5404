"""Published embeddings to build indices from, builds that are killed, and what they leave."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from laion_assets.build import Build, Request, publish, trained, workspace
from laion_assets.index import ID_SIZE

DIMENSION = 8
FEW_QUERIES = 20
LISTS = "image.index/merged_index.ivfdata"
POPULATED = "image.index/populated.index"


def vectors_of(rows: int, seed: int = 0, dimension: int = DIMENSION) -> Any:
    """Rows around a few centres, of any length."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((12, dimension))
    rows_ = centres[random.integers(12, size=rows)] + 0.4 * random.standard_normal((rows, dimension))
    return rows_.astype(np.float32)


def write_part(folder: Path, number: int, vectors: Any, null: Sequence[int] = ()) -> None:
    """Write part-<number>.parquet; the vectors of some rows are null."""
    folder.mkdir(parents=True, exist_ok=True)
    lists = [None if row in null else vector.tolist() for row, vector in enumerate(vectors)]
    urls = [f"https://example.org/{number}/{row}.jpg" for row in range(len(vectors))]
    kind = pa.list_(pa.float32(), vectors.shape[1])
    table = pa.table({"url": urls, "row": np.arange(len(urls)), "embedding": pa.array(lists, kind)})
    pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=50)


def write_parts(folder: Path, sizes: Sequence[int], first: int = 0) -> None:
    """Write files of some sizes, numbered from `first`."""
    for number, size in enumerate(sizes, first):
        write_part(folder, number, vectors_of(size, seed=number))


def request(root: Path | str, **more: Any) -> Request:
    """Build from `<root>/embeddings` to `<root>/index`, in eight lists of vectors."""
    return Request(
        **{"embeddings_uri": f"{root}/embeddings", "index_uri": f"{root}/index", "index_key": "IVF8,Flat"}
        | more
    )


def index_in(folder: Path) -> tuple[dict[str, bytes], pa.Table] | None:
    """The index, and its metadata as one table: both are the same for any shards. None without one."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if not files:
        return None
    names = sorted(name for name in files if name.startswith("metadata/"))
    tables = [pa.ipc.open_file(files.pop(name)).read_all() for name in names]
    files.pop("batches.parquet")  # one entry for each shard
    built = json.loads(files.pop("build.json"))
    for name in ("fingerprint", "recall"):  # of shards, and of ties among rows
        built.pop(name)
    files["build.json"] = json.dumps(built).encode()
    return files, pa.concat_tables(tables)


def ids_in(folder: Path) -> list[np.ndarray]:
    """The ids in each list, read from the bytes of the index by what its record says."""
    import faiss

    index = faiss.read_index(str(folder / POPULATED), faiss.IO_FLAG_ONDISK_SAME_DIR)
    lists = faiss.extract_index_ivf(index).invlists
    content, at, found = (folder / LISTS).read_bytes(), 0, []
    for number in range(lists.nlist):
        rows = lists.list_size(number)
        at += rows * lists.code_size
        found.append(np.frombuffer(content, np.int64, rows, at))
        at += rows * ID_SIZE
    assert at == len(content)
    return found


class CrashError(Exception):
    """Simulates the end of a process."""


@contextmanager
def crashing(allowed: int) -> Iterator[None]:
    """Raise at one of the writes of a build: before it, or when half of a file is written."""
    left = allowed
    new_file = workspace.new_file

    @contextmanager
    def or_crash(*args: Any) -> Iterator[Any]:
        nonlocal left
        left -= 1
        if left < 0:
            raise CrashError
        with new_file(*args) as file:
            yield file
            left -= 1
            if left < 0:
                raise CrashError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "new_file", or_crash)
        yield


def run_until(step: int, request: Request, steps: Callable[[Build], object]) -> None:
    """Run steps of a build, and kill the process before one of its changes on the disk."""
    trained.QUERIES = FEW_QUERIES
    left = step

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def or_killed(*args: Any, **more: Any) -> Any:
            nonlocal left
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **more)

        return or_killed

    changes = [(os, "fsync"), (os, "link"), (os, "unlink"), (os, "rmdir"), (publish, "_exchanged")]
    for owner, name in [*changes, (Path, "replace"), (Path, "rename"), (Path, "unlink")]:
        setattr(owner, name, counted(getattr(owner, name)))
    steps(Build(request))


_processes = multiprocessing.get_context("forkserver")  # a fork of this process could not use OpenMP
_processes.set_forkserver_preload(["laion_assets.build", "pytest"])


def killed_at(step: int, request: Request, steps: Callable[[Build], object] = Build.run) -> bool:
    """Run steps of a build in a process killed before a change; return whether it got there."""
    process = _processes.Process(target=run_until, args=(step, request, steps))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0
