"""Small indices in every form of a LAION-style index, and reads with plain faiss."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from laion_assets.build import training
from laion_assets.build.encoder import encode
from laion_assets.build.merge import write_index as write_two_files
from laion_assets.build.shards import in_lists, write_rows
from laion_assets.build.workspace import Workspace
from laion_assets.io.console import silent_stdout

DIMENSION = 16
MERGED = "merged lists on disk"
FORMS = {
    MERGED: "OPQ8_16,IVF4_HNSW8,PQ8x8",
    "single file": "OPQ8_16,IVF4_HNSW8,PQ8x8",
    "single file, fewer dimensions": "OPQ4_8,IVF4,PQ4x8",
    "IVF PQ without rotation": "IVF4,PQ8x8",
    "one list": "IVF1,PQ8x8",
    "IVF Flat": "IVF4,Flat",
    "Flat": "Flat",
    "HNSW": "HNSW8",
}
MANY_LISTS = "IVF400_HNSW8,PQ8x8"
ARROW = ".arrow"
PARQUET = ".parquet"


def random_rows(random: np.random.Generator, n: int, alike: float = 0.15) -> np.ndarray:
    """Unit rows around a few centres, some of them equal."""
    centres = random.standard_normal((max(1, n // 4), DIMENSION))
    rows = centres[random.integers(len(centres), size=n)]
    rows += alike * random.standard_normal(rows.shape) * random.integers(0, 2, size=(n, 1))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def train(key: str, rows: np.ndarray) -> Any:
    """An empty index, trained on so few rows that it is a poor one: a test needs no better."""
    if "SQ" in key:  # read, but not built here
        index = faiss.index_factory(rows.shape[1], key, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        return index
    return training.train(key, rows.shape[1], rows, rows_per_centre=1, log=lambda _: None)


@cache
def trained(key: str) -> Any:
    """An empty index, trained on a few rows of its own."""
    return train(key, random_rows(np.random.default_rng(0), 800))


def write_index(folder: Path, rows: np.ndarray, form: str) -> None:
    """Write `rows` as an index of this form to `<folder>/image.index`."""
    index = trained(FORMS.get(form, form))
    if form == MERGED:
        write_merged(folder, index, rows)
        return
    write_one_file(folder, index, rows)


def write_one_file(folder: Path, index: Any, rows: np.ndarray) -> None:
    """Write `rows` to `<folder>/image.index` as one plain faiss file."""
    folder.mkdir(parents=True, exist_ok=True)
    index = faiss.clone_index(index)
    index.add(rows)
    faiss.write_index(index, str(folder / "image.index"))


def write_merged(folder: Path, index: Any, rows: np.ndarray) -> None:
    """Write `rows` to `<folder>/image.index` as two files, with the lists of two shards merged."""
    with TemporaryDirectory() as work:
        shards = []
        for number, ids in enumerate(np.array_split(np.arange(len(rows)), 2)):
            lists, codes = encode(index, rows[ids])
            shard = Workspace(f"{work}/{number}")
            nlist = faiss.extract_index_ivf(index).nlist
            shards.append((shard, write_rows(shard, *in_lists(codes, ids, lists, nlist))))
        write_two_files(Workspace(str(folder)), index, shards)


def index_paths(folder: Path) -> tuple[Path, Path | None]:
    """The faiss file in a folder, and its lists."""
    index = folder / "image.index"
    if index.is_dir():
        return index / "populated.index", index / "merged_index.ivfdata"
    return index, None


def read_with_faiss(folder: Path) -> Any:
    """The index as plain faiss opens it."""
    path, lists = index_paths(folder)
    with silent_stdout():
        return faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR if lists else 0)


def reconstructed(folder: Path) -> np.ndarray:
    """The (n, d) rows of the index as it stores them, in order of id."""
    index = read_with_faiss(folder)
    return index.reconstruct_n(0, index.ntotal)


def write_metadata(folder: Path, table: pa.Table, files: int = 1, batch: int = 7) -> list[Path]:
    """Write a table as `files` Arrow files in `<folder>/metadata`, in batches of `batch` rows."""
    return write_files(folder / "metadata", np.array_split(np.arange(len(table)), files), table, batch)


def write_files(
    folder: Path, parts: Sequence[np.ndarray], table: pa.Table, batch: int, suffix: str = ARROW
) -> list[Path]:
    """Write the rows of each part to a file of its own, named in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}{suffix}" for number in range(len(parts))]
    for path, rows in zip(paths, parts, strict=True):
        part = table.take(pa.array(rows, pa.int64()))
        WRITERS[suffix](path, part, batch)
    return paths


def _write_arrow(path: Path, table: pa.Table, batch: int) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=batch)


def _write_parquet(path: Path, table: pa.Table, batch: int) -> None:
    pq.write_table(table, path, row_group_size=batch)


WRITERS: dict[str, Callable[[Path, pa.Table, int], None]] = {
    ARROW: _write_arrow,
    PARQUET: _write_parquet,
}
