"""Thumbnails for vectors from clip-retrieval, made from the images that it embedded.

`img_emb/img_emb_0.npy` holds the vectors. Column `image_path` of `metadata/metadata_0.parquet` holds the
paths of their images, in the same order. Missing or unreadable images get no thumbnail; the vectors do
not depend on them.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from laion_assets.io.parallel import in_threads
from laion_assets.io.storage import is_local
from laion_assets.seeds.decoding import BadImageError, PixelBudget, thumbnail_of
from laion_assets.seeds.folder import SeedSet

PICTURED = 48  # seeds of a set that get thumbnails
VECTORS = re.compile(r"(.*/)?img_emb/img_emb_(\d+)\.npy")
PATHS = "image_path"
MAX_IMAGE = 256 << 20  # bytes


def with_thumbnails(fs: Any, seed_set: SeedSet, columns: pa.Table) -> pa.Table:
    """Add a column `thumbnail` with thumbnails for a set's first vectors, if their images can be read.

    Args:
        fs: the file system of the set; images are read from a local one only.
        seed_set: its listing.
        columns: `file` and other columns, in the order of the set's vector files.

    Returns:
        The columns; unchanged if they already have thumbnails, or if no image can be read.

    """
    if not is_local(fs) or "thumbnail" in columns.column_names:
        return columns
    rows = Counter(columns["file"].to_pylist())
    paths: list[Path | None] = []
    for file in seed_set.vectors:
        if room := PICTURED - len(paths):
            folder = Path(file.path.removesuffix(file.name))
            paths += _image_paths(folder, file.name, rows[file.name])[:room]
    budget = PixelBudget()
    made = in_threads(lambda path: path and _thumbnail(path, budget), paths)
    if not any(made):
        return columns
    made += [None] * (len(columns) - len(made))
    return columns.append_column("thumbnail", pa.array(made, pa.binary()))


def _image_paths(folder: Path, name: str, rows: int) -> list[Path | None]:
    """Return the image paths of the first rows of a vector file; None if unknown."""
    known: list[str | None] = []
    number = VECTORS.fullmatch(name)
    metadata = folder / f"{number[1] or ''}metadata/metadata_{number[2]}.parquet" if number else None
    try:
        if metadata is not None and metadata.is_file():
            known = _first_paths(metadata, rows)
    except (pa.ArrowException, OSError, ValueError):
        pass
    unknown = min(rows, PICTURED) - len(known)
    return [folder / path if path else None for path in known] + [None] * unknown


def _first_paths(metadata: Path, rows: int) -> list[str | None]:
    with pq.ParquetFile(metadata) as file:
        if file.metadata.num_rows != rows or PATHS not in file.schema_arrow.names:
            return []
        batch = next(file.iter_batches(PICTURED, columns=[PATHS]))
        paths: list[str | None] = batch[PATHS].cast(pa.string()).to_pylist()
        return paths


def _thumbnail(path: Path, budget: PixelBudget) -> bytes | None:
    try:
        return thumbnail_of(_content(path), budget)
    except (BadImageError, OSError, ValueError):  # ValueError: a path with a null byte
        return None


def _content(path: Path) -> bytes:
    """Read a regular file; reading anything else might block or never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_IMAGE:
            raise OSError("not a regular file, or too large")
        return file.read(MAX_IMAGE)
