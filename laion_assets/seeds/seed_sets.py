"""Seed sets: folders of embeddings, listed, fingerprinted and read.

The seam where a seed becomes a vector is `READERS`: one function per kind of file. Seeds that are images
or texts come in as further readers.
What must not live here: sensors, partitions, what is done with the vectors.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from laion_assets.io.arrays import Floats
from laion_assets.io.checksums import checksum_text
from laion_assets.io.errors import InputError
from laion_assets.io.storage import (
    Listed,
    first_line,
    is_local,
    list_files,
    open_storage,
    reaching,
)

SEEDS = "seeds_uri"
EMBEDDING_COLUMNS = ("embedding", "image_embedding", "img_emb", "vector")
CARRIED_COLUMNS = {"url": pa.string(), "caption": pa.string(), "thumbnail": pa.binary()}
CLIP_RETRIEVAL_FOLDER = "img_emb/"
BESIDE_IT = ("text_emb/", "metadata/", "stats/")  # what clip-retrieval writes into the same folder
SETTINGS_FILE = "settings.yaml"
MAX_SETTINGS_BYTES = 16 << 10
PROBLEMS_SHOWN = 20
FILES_AT_ONCE = 64
BYTES_AT_ONCE = 64 << 20


@dataclass(frozen=True, slots=True)
class SeedFile:
    """One file of a seed set.

    Attributes:
        name: relative to the folder of the set.
        path: for the file system it lies on.
        size: bytes.
        checksum: crc32c of the content, base64, as a bucket reports it.

    """

    name: str
    path: str
    size: int
    checksum: str


@dataclass(frozen=True)
class SeedSet:
    """The files of one seed set as they were when it was listed.

    Attributes:
        name: of its folder.
        files: the seeds.
        settings_files: YAML files in the folder itself; one at most, rightly named, or it cannot be used.
        ignored: names of all other files, as far as a person may take them for seeds.

    """

    name: str
    files: tuple[SeedFile, ...]
    settings_files: tuple[SeedFile, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Changes with the name, size or content of any file, and only then."""
        files = self.files + self.settings_files
        lines = sorted(f"{file.name}\t{file.size}\t{file.checksum}" for file in files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Listing:
    """What is in the folder of the seed sets.

    Attributes:
        sets: its subfolders that hold seed files.
        ignored: files that nobody reads, relative to the folder.

    """

    sets: dict[str, SeedSet]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class Seeds:
    """The seeds of one set.

    Attributes:
        embeddings: (n, d) float32 unit rows.
        columns: n rows of `file`, `row`, and `url`, `caption`, `thumbnail` where files have them.

    """

    embeddings: Floats
    columns: pa.Table

    def to_table(self) -> pa.Table:
        """All of it as one table, a row per seed."""
        flat = pa.array(self.embeddings.ravel())
        vectors = pa.FixedSizeListArray.from_arrays(flat, self.embeddings.shape[1])
        return self.columns.append_column("embedding", vectors)


def embeddings_of(table: pa.Table) -> Floats:
    """Return the (n, d) float32 vectors of a table's `embedding` column."""
    vectors: Floats = _matrix(table["embedding"]).astype(np.float32, copy=False)
    return vectors


def list_folder(uri: str) -> Listing:
    """List the folder of the seed sets.

    Raises:
        InputError: no such folder, or no access to it.

    """
    fs, root = open_storage(uri, SEEDS)
    folders: defaultdict[str, _Folder] = defaultdict(_Folder)
    with reaching(uri, SEEDS):
        for listed in list_files(fs, root):
            if not _is_hidden(listed.name):
                set_name, _, name = listed.name.partition("/")
                folders[set_name].add(fs, name, listed)
        if not folders and not fs.isdir(root):
            raise InputError(f"{uri} is not a folder: name the folder of the seed sets", SEEDS)
    found = [folder.seed_set(name) for name, folder in sorted(folders.items())]
    return Listing(
        {seed_set.name: seed_set for seed_set in found if seed_set.files},
        tuple(str(PurePosixPath(seed_set.name, file)) for seed_set in found for file in seed_set.ignored),
    )


def list_seed_sets(uri: str) -> dict[str, SeedSet]:
    """List the seed sets of a folder, as `list_folder`."""
    return list_folder(uri).sets


def find_seed_set(uri: str, name: str) -> SeedSet:
    """List the files of one seed set.

    Raises:
        InputError: an impossible name, no such set (the message suggests the nearest), or an empty one.

    """
    check_name(name)
    fs, root = open_storage(uri, SEEDS)
    folder = f"{root}/{name}"
    with reaching(uri, SEEDS):
        inside = _Folder()
        for listed in list_files(fs, folder):
            if not _is_hidden(listed.name):
                inside.add(fs, listed.name, listed)
        found = inside.seed_set(name)
        if found.files:
            return found
        if fs.isdir(folder):
            raise InputError(f"seed set {name!r} is empty: put .npy or .parquet files into {uri}/{name}")
    there = sorted(list_seed_sets(uri))
    near = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(there) or 'none'}"
    raise InputError(f"there is no seed set {name!r} in {uri}: {hint}")


def check_name(name: str) -> None:
    """Refuse names that could leave the folder or that cannot name a partition.

    Raises:
        InputError: such a name.

    """
    if not re.fullmatch(r"\w[\w .+-]{0,99}", name) or ".." in name:
        raise InputError(
            f"{name!r} cannot name a seed set: use letters, digits, '_', '-', '.' and spaces, no '/' and "
            "no '..', at most 100 characters"
        )


def read_seeds(uri: str, seed_set: SeedSet) -> Seeds:
    """Read and check all seeds of a set, and scale them to unit length.

    Raises:
        InputError: names every bad file and row (the first 20 of them) and the remedy.

    """
    fs, _ = open_storage(uri, SEEDS)
    problems: list[str] = []
    parts: dict[str, tuple[Floats, pa.Table]] = {}
    with reaching(uri, SEEDS):
        for file, content in _contents(fs, seed_set.files):
            where = f"{seed_set.name}/{file.name}"
            try:
                data = _verified(content, file)
                raw, columns = READERS[PurePosixPath(file.name).suffix](data)
                parts[where] = _checked(raw), _labelled(columns, file.name, len(raw))
            except _BadSeedsError as bad:
                problems += [f"{where}{problem}" for problem in bad.problems]
    problems += _differing_dimensions({where: vectors for where, (vectors, _) in parts.items()})
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        listed = problems[:PROBLEMS_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise InputError(
            f"seed set {seed_set.name!r} cannot be used; mend or remove: " + "; ".join(listed)
        )
    return Seeds(
        np.concatenate([vectors for vectors, _ in parts.values()]),
        pa.concat_tables([columns for _, columns in parts.values()], promote_options="default"),
    )


def read_settings(uri: str, seed_set: SeedSet) -> dict[str, Any]:
    """Read the settings that a set brings along, as its settings.yaml has them.

    Returns:
        What stands there, by name; empty without such a file. Names and values are not checked here.

    Raises:
        InputError: a YAML file of another name, one too large, one that is not a list of `name: value`.

    """
    for file in seed_set.settings_files:
        if file.name != SETTINGS_FILE:
            raise InputError(
                f"{seed_set.name}/{file.name} is not read: settings of a seed set stand in "
                f"{SETTINGS_FILE}; rename or remove it"
            )
    return _settings_in(uri, seed_set, *seed_set.settings_files) if seed_set.settings_files else {}


def _settings_in(uri: str, seed_set: SeedSet, file: SeedFile) -> dict[str, Any]:
    where = f"{seed_set.name}/{file.name}"
    if file.size > MAX_SETTINGS_BYTES:
        raise InputError(
            f"{where} has {file.size:,} bytes, settings take {MAX_SETTINGS_BYTES:,} at most: shorten it"
        )
    fs, _ = open_storage(uri, SEEDS)
    try:
        with reaching(uri, SEEDS):
            ((_, content),) = _contents(fs, [file])
        return _parsed(_verified(content, file))
    except _BadSeedsError as bad:
        raise InputError(f"{where}{bad}") from bad


def _parsed(content: bytes) -> dict[str, Any]:
    """Read `name: value` lines; plain data only, whatever tags the YAML has."""
    try:
        values = yaml.safe_load(content)
        root = yaml.compose(content, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())[:200]
        raise _BadSeedsError(f" is not YAML ({told}): write a setting a line, as name: value") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise _BadSeedsError(" is not a list of settings: write one a line, as name: value")
    names = [key.value for key, _ in root.value]
    for name in names:
        if names.count(name) > 1:
            raise _BadSeedsError(f" has {name} twice: remove one of them")
    return values


def centroid(embeddings: Floats) -> tuple[Floats, float]:
    """Return the unit mean of (n, d) unit rows, shape (d,), and the length of the mean.

    The length tells how alike the seeds are: 1 when all are the same, near 0 when they point everywhere.
    It is the mean resultant length of directional statistics.

    Raises:
        InputError: the seeds cancel out and have no mean direction.

    """
    mean = embeddings.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(mean))
    if length < 1e-6:
        raise InputError(
            "the seeds cancel each other out, so they have no centroid: use seeds of one style"
        )
    return (mean / length).astype(np.float32), length


class _BadSeedsError(Exception):
    """Problems of one file, each a phrase that follows the file's name."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def _contents(fs: Any, files: Sequence[SeedFile]) -> Iterator[tuple[SeedFile, bytes | OSError]]:
    """Read files, many at a time where they are far away; an error stands for one that is unreadable."""
    unreadable = OSError if is_local(fs) else FileNotFoundError
    for batch in _batches(files):
        for file, content in zip(batch, fs.cat_ranges([f.path for f in batch], None, None), strict=True):
            if isinstance(content, Exception) and not isinstance(content, unreadable):
                raise content
            yield file, content


def _batches(files: Sequence[SeedFile]) -> Iterator[list[SeedFile]]:
    batch: list[SeedFile] = []
    for file in files:
        batch.append(file)
        if len(batch) == FILES_AT_ONCE or sum(f.size for f in batch) >= BYTES_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _verified(content: bytes | OSError, file: SeedFile) -> bytes:
    if isinstance(content, FileNotFoundError):
        raise _BadSeedsError(" cannot be read (it is gone)") from content
    if isinstance(content, OSError):
        raise _BadSeedsError(f" cannot be read ({first_line(content)})") from content
    if checksum_text(google_crc32c.Checksum(content)) != file.checksum:
        raise _BadSeedsError(" changed while it was read; run again once it is whole")
    return content


def _read_npy(data: bytes) -> tuple[Any, dict[str, pa.ChunkedArray]]:
    """Read one vector or a matrix of them; pickled objects are never loaded."""
    try:
        vectors = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a broken header raises whatever Python's tokenizer does
        if "Object arrays" in str(error):
            raise _BadSeedsError(
                " holds pickled objects, which are never loaded: save a plain array of numbers"
            ) from error
        raise _BadSeedsError(f" is not a whole .npy file ({first_line(error)})") from error
    return (vectors[None] if vectors.ndim == 1 else vectors), {}


def _read_parquet(data: bytes) -> tuple[Any, dict[str, pa.ChunkedArray]]:
    """Read a column of embeddings and the columns that are carried along."""
    try:
        table = pq.read_table(io.BytesIO(data))
        names = table.column_names
    except (pa.ArrowException, ValueError, OSError) as error:
        raise _BadSeedsError(f" is not a whole Parquet file ({first_line(error)})") from error
    column = next((name for name in EMBEDDING_COLUMNS if name in names), None)
    if column is None:
        raise _BadSeedsError(
            f" has no embedding column (looked for {', '.join(EMBEDDING_COLUMNS)}; found "
            f"{', '.join(names)})"
        )
    carried = {
        name: _cast(table[name], name, kind) for name, kind in CARRIED_COLUMNS.items() if name in names
    }
    return _matrix(table[column]), carried


def _cast(column: pa.ChunkedArray, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    try:
        return column.cast(kind)
    except pa.ArrowException as error:
        raise _BadSeedsError(f" has a column {name!r} of type {column.type}, not {kind}") from error


Reader = Callable[[bytes], tuple[Any, dict[str, pa.ChunkedArray]]]
READERS: Mapping[str, Reader] = {".npy": _read_npy, ".parquet": _read_parquet}


def _matrix(column: pa.ChunkedArray) -> Any:
    """Return a list column as a matrix (n, d) of its own dtype."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise _BadSeedsError(f" has embeddings of type {kind}, not lists of numbers")
    if not pa.types.is_floating(kind.value_type):
        raise _BadSeedsError(f" has embeddings of {kind.value_type}, not of floating-point numbers")
    values = column.combine_chunks()
    missing = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
    if len(missing):
        raise _BadSeedsError(*(f" row {row} has no embedding" for row in missing))
    lengths = values.value_lengths().to_numpy(zero_copy_only=False)
    odd = np.flatnonzero(lengths != lengths[:1])
    if len(odd):
        raise _BadSeedsError(
            *(f" row {row} has {lengths[row]} dimensions, row 0 has {lengths[0]}" for row in odd)
        )
    flat = values.flatten()
    if flat.null_count:
        flat = flat.fill_null(float("nan"))
    return flat.to_numpy(zero_copy_only=False).reshape(len(values), lengths[0] if len(values) else 0)


def _checked(raw: Any) -> Floats:
    """Return (n, d) float32 unit rows; rows without a direction are problems, not vectors."""
    if raw.dtype.kind != "f":
        raise _BadSeedsError(f" has dtype {raw.dtype}, not floating-point numbers")
    if raw.ndim != 2:
        raise _BadSeedsError(f" has shape {raw.shape}: one vector (d,) or a matrix (n, d) is needed")
    if raw.size == 0:
        raise _BadSeedsError(f" is empty (shape {raw.shape})")
    wide = raw.astype(np.float64)  # as float32 the squares of very small numbers would be zero
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(wide, axis=1)
    problems = [
        f" row {row} holds NaN or infinite values" for row in np.flatnonzero(~np.isfinite(lengths))
    ]
    problems += [f" row {row} is all zeros" for row in np.flatnonzero(lengths == 0)]
    if problems:
        raise _BadSeedsError(*problems)
    vectors: Floats = (wide / lengths[:, None]).astype(np.float32)
    return vectors


def _labelled(columns: Mapping[str, pa.ChunkedArray], name: str, rows: int) -> pa.Table:
    where = {"file": pa.array([name] * rows), "row": pa.array(np.arange(rows, dtype=np.int32))}
    return pa.table(where | dict(columns))


def _differing_dimensions(vectors_by_file: Mapping[str, Floats]) -> list[str]:
    first = next(iter(vectors_by_file), "")
    return [
        f"{file} has {vectors.shape[1]} dimensions, {first} has {vectors_by_file[first].shape[1]}"
        for file, vectors in vectors_by_file.items()
        if vectors.shape[1] != vectors_by_file[first].shape[1]
    ]


def _is_hidden(name: str) -> bool:
    """Tell what tools keep to themselves, and what some put into a bucket for a folder."""
    return not name or name.endswith("/") or any(part[:1] in (".", "_") for part in name.split("/"))


def _is_seed_file(name: str) -> bool:
    return PurePosixPath(name).suffix in READERS


def _holds_settings(name: str) -> bool:
    """Tell YAML files in the folder itself; one with a wrong name would else be overlooked."""
    return "/" not in name and PurePosixPath(name).suffix in (".yaml", ".yml")


class _Folder:
    """The files of one folder while it is listed: only those that may be used are looked at."""

    def __init__(self) -> None:
        self._seeds: list[SeedFile] = []
        self._settings: list[SeedFile] = []
        self._others: list[str] = []

    def add(self, fs: Any, name: str, listed: Listed) -> None:
        """Add a file, by its name in this folder."""
        if _is_seed_file(name):
            self._seeds.append(_seed_file(fs, name, listed))
        elif _holds_settings(name):
            self._settings.append(_seed_file(fs, name, listed))
        else:
            self._others.append(name)

    def seed_set(self, name: str) -> SeedSet:
        """Sort them out; in an output folder of clip-retrieval only the image embeddings are seeds."""
        seeds, ignored = self._seeds, self._others
        images = [file for file in seeds if file.name.startswith(CLIP_RETRIEVAL_FOLDER)]
        if images:
            beside = [file.name for file in seeds if not file.name.startswith(CLIP_RETRIEVAL_FOLDER)]
            ignored = [file for file in ignored + beside if not file.startswith(BESIDE_IT)]
            seeds = images
        return SeedSet(name, _in_order(seeds), _in_order(self._settings), tuple(sorted(ignored)))


def _in_order(files: Sequence[SeedFile]) -> tuple[SeedFile, ...]:
    return tuple(sorted(files, key=lambda file: file.name))


def _seed_file(fs: Any, name: str, listed: Listed) -> SeedFile:
    return SeedFile(name, listed.path, listed.size, _checksum(fs, listed))


def _checksum(fs: Any, listed: Listed) -> str:
    """Return the bucket's crc32c, or compute it; a local file is read again only when it changed."""
    if listed.checksum:
        return listed.checksum
    try:
        return _computed_checksum(fs, listed.path, listed.size, listed.written)
    except OSError as error:  # one bad file holds up no other set: reading the seeds will name it
        return f"unreadable: {first_line(error)}"


@lru_cache(maxsize=1 << 18)
def _computed_checksum(fs: Any, path: str, size: int, written: str) -> str:  # noqa: ARG001
    return checksum_text(google_crc32c.Checksum(fs.cat_file(path)))
