"""The seeds of a set as unit vectors, and their centroid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from laion_assets.io.arrays import Floats
from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage, reaching
from laion_assets.seeds.folder import SEEDS_URI, SeedSet
from laion_assets.seeds.readers import READERS, Columns, matrix_of
from laion_assets.seeds.seed_files import UnusableFileError, read_files, verified

PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Seeds:
    """The seeds of one set.

    Attributes:
        embeddings: (n, d) float32 unit rows.
        columns: n rows of `file` and `row`, and of `url`, `caption`, `thumbnail` where files have them.

    """

    embeddings: Floats
    columns: pa.Table

    def to_table(self) -> pa.Table:
        """Return one table with a row for each seed and its vector in `embedding`."""
        flat = pa.array(self.embeddings.ravel())
        vectors = pa.FixedSizeListArray.from_arrays(flat, self.embeddings.shape[1])
        return self.columns.append_column("embedding", vectors)


def embeddings_of(table: pa.Table) -> Floats:
    """Return the `embedding` column of a table as (n, d) float32 vectors."""
    vectors: Floats = matrix_of(table["embedding"]).astype(np.float32, copy=False)
    return vectors


def read_seeds(uri: str, seed_set: SeedSet) -> Seeds:
    """Read and check all seeds of a set, and scale them to unit length.

    Args:
        uri: the folder of the seed sets.
        seed_set: as it was listed.

    Raises:
        InputError: names every bad file and row (the first 20 of them) and the remedy.

    """
    fs, _ = open_storage(uri, SEEDS_URI)
    problems: list[str] = []
    parts: dict[str, tuple[Floats, pa.Table]] = {}
    with reaching(uri, SEEDS_URI):
        for file, content in read_files(fs, seed_set.files):
            where = f"{seed_set.name}/{file.name}"
            try:
                data = verified(content, file)
                raw, columns = READERS[PurePosixPath(file.name).suffix](data)
                parts[where] = unit_rows(raw), _with_location(columns, file.name, len(raw))
            except UnusableFileError as error:
                problems += [f"{where} {problem}" for problem in error.problems]
    problems += _differing_dimensions({where: vectors for where, (vectors, _) in parts.items()})
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        shown = problems[:PROBLEMS_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise InputError(
            f"seed set {seed_set.name!r} cannot be used; correct or remove: " + "; ".join(shown)
        )
    return Seeds(
        np.concatenate([vectors for vectors, _ in parts.values()]),
        pa.concat_tables([columns for _, columns in parts.values()], promote_options="default"),
    )


def unit_rows(raw: Any) -> Floats:
    """Check the vectors of one file and scale them to unit length.

    Args:
        raw: (n, d) of any floating-point dtype.

    Returns:
        (n, d) float32.

    Raises:
        UnusableFileError: another shape or dtype, or rows that are zero or not finite.

    """
    if raw.dtype.kind != "f":
        raise UnusableFileError(f"has dtype {raw.dtype}, not floating-point numbers")
    if raw.ndim != 2:
        raise UnusableFileError(f"has shape {raw.shape}: one vector (d,) or a matrix (n, d) is needed")
    if raw.size == 0:
        raise UnusableFileError(f"is empty (shape {raw.shape})")
    wide = raw.astype(np.float64)  # in float32, the squares of very small numbers are zero
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(wide, axis=1)
    problems = [
        f"row {row} holds NaN or infinite values" for row in np.flatnonzero(~np.isfinite(lengths))
    ]
    problems += [f"row {row} is all zeros" for row in np.flatnonzero(lengths == 0)]
    if problems:
        raise UnusableFileError(*problems)
    vectors: Floats = (wide / lengths[:, None]).astype(np.float32)
    return vectors


def centroid(embeddings: Floats) -> tuple[Floats, float]:
    """Return the unit mean of (n, d) unit rows, shape (d,), and the length of the mean.

    The length says how concentrated the seeds are: 1 when all are equal, near 0 when they point in all
    directions. It is the mean resultant length of directional statistics.

    Raises:
        InputError: the seeds cancel out and have no mean direction.

    """
    mean = embeddings.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(mean))
    if length < 1e-6:
        raise InputError("the seeds cancel out, so they have no centroid: use seeds of one style")
    return (mean / length).astype(np.float32), length


def _with_location(columns: Columns, name: str, rows: int) -> pa.Table:
    location = {"file": pa.array([name] * rows), "row": pa.array(np.arange(rows, dtype=np.int32))}
    return pa.table(location | dict(columns))


def _differing_dimensions(vectors_by_file: Mapping[str, Floats]) -> list[str]:
    first = next(iter(vectors_by_file), "")
    return [
        f"{file} has {vectors.shape[1]} dimensions, {first} has {vectors_by_file[first].shape[1]}"
        for file, vectors in vectors_by_file.items()
        if vectors.shape[1] != vectors_by_file[first].shape[1]
    ]
