"""Small indices of every form that a LAION-style index has, and what plain faiss reads from them."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from laion_assets.demo.build import one_thread
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


@cache
def trained(key: str, metric: int = faiss.METRIC_INNER_PRODUCT) -> Any:
    """An empty index, trained on a few rows of its own."""
    index: Any = faiss.index_factory(DIMENSION, key, metric)
    train(index, random_rows(np.random.default_rng(0), 800))
    return index


def train(index: Any, rows: np.ndarray) -> None:
    """Train quickly: a test needs no perfect index."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf = faiss.downcast_index(ivf)
        ivf.cp.min_points_per_centroid = 1
        if isinstance(ivf, faiss.IndexIVFPQ):
            ivf.pq.cp.min_points_per_centroid = 1
            ivf.pq.cp.niter = 4
            ivf.do_polysemous_training = False
    with one_thread():
        if isinstance(index, faiss.IndexPreTransform):
            rotation = faiss.downcast_VectorTransform(index.chain.at(0))
            rotation.niter, rotation.niter_pq, rotation.niter_pq_0 = 1, 2, 2
            codes = faiss.ProductQuantizer(rotation.d_out, rotation.M, 8)
            codes.cp.min_points_per_centroid = 1
            rotation.pq = codes
            rotation.train(rows)
            rotation.pq = None  # faiss does not own it
        index.train(rows)


def write_index(folder: Path, rows: np.ndarray, form: str) -> None:
    """Write `rows` as an index of this form to `<folder>/image.index`."""
    index = faiss.clone_index(trained(FORMS.get(form, form)))
    if form != MERGED:
        folder.mkdir(parents=True, exist_ok=True)
        index.add(rows)
        faiss.write_index(index, str(folder / "image.index"))
        return
    write_merged(folder, index, rows)


def write_merged(folder: Path, index: Any, rows: np.ndarray) -> None:
    """Write `rows` to `<folder>/image.index` as two files, with lists merged on disk."""
    target = folder / "image.index"
    target.mkdir(parents=True)
    half = len(rows) // 2
    blocks = [faiss.clone_index(index) for _ in range(2)]
    for block, start, stop in zip(blocks, (0, half), (half, len(rows)), strict=True):
        block.add_with_ids(rows[start:stop], np.arange(start, stop))
    ivf = faiss.extract_index_ivf(index)
    lists = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, str(target / "merged_index.ivfdata"))
    parts = faiss.InvertedListsPtrVector()
    for block in blocks:
        parts.push_back(faiss.extract_index_ivf(block).invlists)
    with silent_stdout():
        index.ntotal = ivf.ntotal = lists.merge_from_multiple(parts.data(), parts.size(), False)
    ivf.replace_invlists(lists, True)
    lists.this.disown()
    lists.filename = "merged_index.ivfdata"
    faiss.write_index(index, str(target / "populated.index"))


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
