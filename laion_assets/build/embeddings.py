"""List and check published embeddings, vectors with their metadata, and read them in parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from laion_assets.build import parquet
from laion_assets.build.input_files import URI, BadFileError, InputFiles
from laion_assets.build.layouts import DATACOMP, DEFAULT_KEYS, PARQUET, Pair, detect_layout, pair_files
from laion_assets.build.matrices import (
    DeflatedMatrix,
    Matrix,
    matrix_rows,
    read_npy_header,
    read_npz_header,
)
from laion_assets.build.parquet import VectorColumn
from laion_assets.build.read_ahead import read_ahead
from laion_assets.build.sampling import draw_runs, draw_units, shares
from laion_assets.index.metadata import plain_type
from laion_assets.index.model_record import ModelRecord
from laion_assets.io.arrays import Floats, Ids
from laion_assets.io.checksums import fingerprint
from laion_assets.io.errors import InputError
from laion_assets.io.text import count, list_shortly
from laion_assets.staging.transfer.files import SourceFile, version_of

FILES_AT_ONCE = 16  # files whose headers or sample rows are read at a time
PROBLEMS_SHOWN = 5
PANDAS_INDEX = "__index_level_"  # columns of row numbers that pandas writes
DATACOMP_MODELS = {
    "l14": ModelRecord("openai/clip-vit-large-patch14", dimension=768),
    "b32": ModelRecord("openai/clip-vit-base-patch32", dimension=512),
}

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class EmbeddingFile:
    """A vector file and its metadata file; row i of one belongs to row i of the other.

    Attributes:
        name: name of the vector file, relative to the folder.
        vectors: the vector file.
        metadata: the Parquet file of metadata; in the layout "parquet", the same file.
        rows: number of vectors.
        stored: how the vectors are stored in their file.
        columns: schema of the metadata in the file, without the vectors.

    """

    name: str
    vectors: SourceFile
    metadata: SourceFile
    rows: int
    stored: Matrix | VectorColumn
    columns: pa.Schema

    @property
    def vector_bytes(self) -> int:
        """Size of the uncompressed vectors in bytes; as float32 for a Parquet file."""
        if isinstance(self.stored, VectorColumn):
            return 4 * self.rows * (self.stored.dimension or 0)
        return self.rows * self.stored.row_bytes


@dataclass(frozen=True)
class Listing:
    """The embeddings in a folder, known from the listing alone.

    Attributes:
        layout: one of `laion_assets.build.layouts.LAYOUTS`.
        versions: version of each vector file with its metadata, by name and in order; it changes with the
            name, size or content of either file.

    """

    layout: str
    versions: Mapping[str, str]

    @property
    def version(self) -> str:
        """A version that changes with any of the files."""
        return fingerprint((name, 0, version) for name, version in self.versions.items())


@dataclass(frozen=True)
class Embeddings:
    """The embeddings in a folder, as found by `list_embeddings`.

    Attributes:
        uri: the folder, as given.
        layout: one of `laion_assets.build.layouts.LAYOUTS`.
        key: which vectors of the files these are, see `list_embeddings`.
        dimension: dimension of the vectors.
        files: the files in natural order of their names, which is the order of the rows.
        rows: number of rows in all files.
        model: the model that embedded them, as far as it is known.

    """

    uri: str
    layout: str
    key: str
    dimension: int
    files: tuple[EmbeddingFile, ...]
    rows: int
    model: ModelRecord

    @cached_property
    def starts(self) -> Ids:
        """The number of each file's first row, then the total number of rows: (files + 1,) int64."""
        return np.cumsum([0, *(file.rows for file in self.files)], dtype=np.int64)

    @cached_property
    def version(self) -> str:
        """A version that changes with the name, size or content of any file."""
        read = {source.name: source for file in self.files for source in (file.vectors, file.metadata)}
        return version_of(read.values())


def list_files(uri: str, layout: str | None = None, key: str | None = None) -> Listing:
    """List the embeddings in a folder and pair them with their metadata, without reading any file.

    Args:
        uri: the folder, see `list_embeddings`.
        layout: the layout, see `list_embeddings`; detected by default.
        key: which vectors to use, see `list_embeddings`.

    Raises:
        InputError: the folder does not exist or holds no embeddings; files have several layouts; a file
            lacks its partner.

    """
    files = InputFiles(uri)
    found = files.names()
    layout = layout or detect_layout(found, uri, key)
    pairs = pair_files(layout, found, uri, key)
    source = files.file
    return Listing(
        layout,
        {pair.vectors: pair_version(source(pair.vectors), source(pair.metadata)) for pair in pairs},
    )


def pair_version(vectors: SourceFile, metadata: SourceFile) -> str:
    """Return a version that changes with a vector file or its metadata."""
    return version_of([vectors, metadata])


def list_embeddings(
    uri: str,
    layout: str | None = None,
    key: str | None = None,
    log: Callable[[str], None] | None = None,
    only: Collection[str] | None = None,
    dimension: int | None = None,
) -> Embeddings:
    """List the embeddings in a folder, pair them with their metadata, and check both.

    Only headers and footers are read.

    Args:
        uri: a folder or one Parquet file, a local path or a URL.
        layout: "clip-retrieval", "laion", "datacomp" or "parquet"; detected from the file names by
            default. With a named layout, files that are not part of it are ignored.
        key: which vectors to use. This is the prefix of .npy file names (by default "img_emb"), the
            member of .npz files ("l14_img"), or the column of Parquet files (the only column of lists of
            floats).
        log: called with a line about each retry, from any thread; by default Python's logging.
        only: names of the vector files to list; other files are not read.
        dimension: dimension of the vectors, if known; the files may then be empty.

    Raises:
        InputError: the folder does not exist or holds no embeddings; files have several layouts; a file
            lacks its partner, or the two differ in their number of rows; vectors are not floating-point
            numbers in C order, or differ in dimension; a file is damaged, changes, or cannot be read;
            there are no rows.

    """
    files = InputFiles(uri, log)
    found = files.names()
    layout = layout or detect_layout(found, uri, key)
    pairs = pair_files(layout, found, uri, key)
    if only is not None:
        pairs = [pair for pair in pairs if pair.vectors in only]
    key = key or DEFAULT_KEYS[layout]
    if layout == PARQUET and pairs:
        first = files.file(pairs[0].vectors)
        key = parquet.choose_column(parquet.read_footer(files, first)[0], first.url, key)
    schemas: dict[bytes, pa.Schema] = {}  # each stored once, because most files have the same columns

    def read(pair: Pair) -> EmbeddingFile | BadFileError:
        try:
            return _read_headers(files, pair, str(key), schemas)
        except BadFileError as error:
            return error

    read_files = _in_threads(read, pairs)
    _raise_all(uri, [file for file in read_files if isinstance(file, BadFileError)])
    listed = tuple(file for file in read_files if isinstance(file, EmbeddingFile))
    rows = sum(file.rows for file in listed)
    if not rows and dimension is None:
        raise InputError(
            f"{uri} holds no rows, in {count(len(listed), 'file')}: name another folder",
            URI,
        )
    dimension = _common_dimension(listed, uri, dimension)
    return Embeddings(uri, layout, str(key), dimension, listed, rows, _model(layout, str(key), dimension))


def metadata_schema(embeddings: Embeddings, columns: Sequence[str] | None = None) -> pa.Schema:
    """Return one schema that fits the metadata of all files.

    Integers and floats get the widest type of any file. Text and binary columns are plain, whatever
    their encoding. In files that lack a column, it is null.

    Args:
        embeddings: the embeddings.
        columns: column names, in the order of the schema; by default all columns that are not nested,
            without the row numbers that pandas writes.

    Raises:
        InputError: a column is missing in all files, holds the vectors, or has types that cannot be
            unified.

    """
    common = pa.schema([])
    for schema in {id(file.columns): file.columns for file in embeddings.files}.values():
        named = [
            field
            for field in schema
            if (field.name in columns if columns is not None else _is_usual(field))
        ]
        plain = pa.schema([(field.name, plain_type(field.type)) for field in named])
        try:
            common = pa.unify_schemas([common, plain], promote_options="permissive")
        except pa.ArrowException as error:
            url = next(file.metadata.url for file in embeddings.files if file.columns is schema)
            raise InputError(
                f"{url} has column types that do not match the files before it ({error}): write "
                "the metadata with the same types, or select columns without this one",
                "columns",
            ) from error
    if columns is None:
        return common
    missing = [name for name in columns if name not in common.names]
    if missing:
        found = list(dict.fromkeys(name for file in embeddings.files for name in file.columns.names))
        raise InputError(
            f"the metadata in {embeddings.uri} has no column {missing[0]!r} (found "
            f"{list_shortly(found, limit=20)}): select one of these",
            "columns",
        )
    return pa.schema([common.field(name) for name in columns])


class EmbeddingReader:
    """Reads listed embeddings. Its methods may be called from several threads.

    Reading raises an InputError if a file is no longer the listed version. In a bucket each read names
    the listed generation; elsewhere versions are compared after each part is read.

    Args:
        embeddings: embeddings from `list_embeddings`.
        log: called with a line about each retry, from any thread; by default Python's logging.

    Attributes:
        embeddings: the embeddings.

    Raises:
        InputError: credentials for the storage are missing.

    """

    def __init__(self, embeddings: Embeddings, log: Callable[[str], None] | None = None) -> None:
        self.embeddings = embeddings
        self._files = InputFiles(embeddings.uri, log)

    def vectors(self, file: EmbeddingFile, start: int, stop: int) -> Floats:
        """Return the vectors of some rows as stored, not normalised.

        A compressed .npz file is decompressed from its beginning, a Parquet file from the beginning of a
        row group.

        Args:
            file: one of the listed files.
            start: first row.
            stop: row after the last one.

        Returns:
            (stop - start, d) float32; a null vector in Parquet is a row of NaN.

        Raises:
            IndexError: the file does not have these rows.
            InputError: the file is damaged, changed, or cannot be read.

        """
        if not 0 <= start <= stop <= file.rows:
            raise IndexError(f"rows {start} to {stop} of {file.rows} in {file.vectors.url}")
        return next(
            self._in_blocks(file, start, stop, stop - start),
            np.empty((0, self.embeddings.dimension), np.float32),
        )

    def blocks(self, file: EmbeddingFile, rows: int) -> Iterator[Floats]:
        """Yield all vectors of a file in order; a thread reads the next block ahead.

        Args:
            file: one of the listed files.
            rows: number of rows in each block except the last, above 0.

        Returns:
            (n, d) float32 blocks, see `vectors`.

        Raises:
            InputError: the file is damaged, changed, or cannot be read.

        """
        if rows < 1:
            raise ValueError(f"blocks of {rows} rows")
        return read_ahead(self._in_blocks(file, 0, file.rows, rows))

    def metadata(self, file: EmbeddingFile, schema: pa.Schema | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the metadata of a file in order; a thread reads the next batch ahead.

        Args:
            file: one of the listed files.
            schema: columns and types of the batches; by default those of `metadata_schema`.

        Returns:
            Batches with that schema. A column that the file lacks is null.

        Raises:
            InputError: the file is damaged, changed, or cannot be read, or does not fit the schema.

        """
        if schema is None:
            schema = metadata_schema(self.embeddings)
        return read_ahead(self._metadata(file, schema))

    def sample(self, rows: int, random: np.random.Generator) -> tuple[Floats, Ids]:
        """Draw rows evenly from all files.

        From uncompressed files, runs of 64 to 1024 consecutive rows are read. From Parquet and compressed
        .npz files, whole row groups and whole files are read, about four times as many rows as needed;
        the sample is then drawn from these.

        Args:
            rows: number of rows to draw; all if there are fewer.
            random: random generator; the same generator draws the same rows.

        Returns:
            The vectors (m, d) float32 as stored, and the number (m,) of each row among the rows of all
            files, ascending.

        Raises:
            InputError: a file is damaged, changed, or cannot be read.

        """
        parts = self._draw(min(rows, self.embeddings.rows), random)
        numbers = np.concatenate(
            [self.embeddings.starts[file] + drawn for file, drawn in parts] or [np.empty(0, np.int64)]
        )
        vectors = np.empty((len(numbers), self.embeddings.dimension), np.float32)
        places = np.cumsum([0, *(len(drawn) for _, drawn in parts)])

        def fill(part: int) -> None:
            file, drawn = parts[part]
            into = vectors[places[part] : places[part + 1]]
            self._take(self.embeddings.files[file], drawn, into)

        _in_threads(fill, range(len(parts)))
        drawn_from = sorted({file for file, _ in parts})
        _in_threads(lambda file: self._files.check(self.embeddings.files[file].vectors), drawn_from)
        return vectors, numbers

    def _draw(self, rows: int, random: np.random.Generator) -> list[tuple[int, Ids]]:
        """Return groups of rows to read together: a file number and ascending row numbers in the file."""
        files = self.embeddings.files
        sizes = np.array([file.rows for file in files], np.int64)
        units = [_units(file) for file in files]
        parts: list[tuple[int, Ids]] = []
        in_units = 0
        for number, share in enumerate(shares(sizes, rows, random).tolist()):
            if units[number]:
                in_units += share
            elif share:
                runs = draw_runs(files[number].rows, share, random)
                parts += [(number, np.arange(start, stop)) for start, stop in runs.tolist()]
        for number, unit, drawn in draw_units(units, in_units, random):
            parts.append((number, sum(units[number][:unit]) + drawn))
        return sorted(parts, key=lambda part: (part[0], int(part[1][0])))

    def _take(self, file: EmbeddingFile, rows: Ids, into: Floats) -> None:
        """Read ascending rows of one file into an array (n, d), without checking the file's version."""
        at = first = int(rows[0])
        for piece in self._pieces(file, first, int(rows[-1]) + 1):
            here = slice(*np.searchsorted(rows, [at, at + len(piece)]))
            with np.errstate(over="ignore"):
                into[here] = piece[rows[here] - at]
            at += len(piece)
        _check_end(file, at, int(rows[-1]) + 1)

    def _in_blocks(self, file: EmbeddingFile, start: int, stop: int, rows: int) -> Iterator[Floats]:
        """Yield blocks of `rows` rows, each checked before it is yielded."""
        pieces = self._pieces(file, start, stop)
        piece: NDArray[Any] = np.empty((0, self.embeddings.dimension), np.float32)
        for first in range(start, stop, max(rows, 1)):
            block = np.empty((min(rows, stop - first), self.embeddings.dimension), np.float32)
            filled = 0
            while filled < len(block):
                if not len(piece):
                    following = next(pieces, None)
                    if following is None:
                        break
                    piece = following
                taken = min(len(piece), len(block) - filled)
                with np.errstate(over="ignore"):
                    block[filled : filled + taken] = piece[:taken]
                filled, piece = filled + taken, piece[taken:]
            if first + len(block) == stop:  # the checksum of a compressed file is known only now
                filled += sum(map(len, pieces))
            _check_end(file, first + filled, first + len(block))
            self._files.check(file.vectors)
            yield block

    def _pieces(self, file: EmbeddingFile, start: int, stop: int) -> Iterator[NDArray[Any]]:
        read = parquet.column_rows if isinstance(file.stored, VectorColumn) else matrix_rows
        stored: Any = file.stored
        dimension = self.embeddings.dimension
        if isinstance(stored, VectorColumn) and stored.dimension is None:  # every vector is null
            stored = VectorColumn(stored.name, dimension, stored.groups)
        return read(self._files, file.vectors, stored, start, stop)

    def _metadata(self, file: EmbeddingFile, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        present = [name for name in schema.names if name in file.columns.names]
        if not present:
            for start in range(0, file.rows, parquet.METADATA_ROWS):
                length = min(parquet.METADATA_ROWS, file.rows - start)
                nulls = [pa.nulls(length, field.type) for field in schema]
                yield pa.RecordBatch.from_arrays(nulls, schema=schema)
            return
        rows = 0
        for batch in parquet.metadata_batches(self._files, file.metadata, present):
            rows += len(batch)
            self._files.check(file.metadata)
            try:
                columns = [
                    batch.column(field.name).cast(field.type)
                    if field.name in present
                    else pa.nulls(len(batch), field.type)
                    for field in schema
                ]
            except pa.ArrowException as error:
                raise InputError(
                    f"{file.metadata.url} has values that do not match the type in the other files "
                    f"({error}): write the metadata with the same types, or select other columns",
                    "columns",
                ) from error
            yield pa.RecordBatch.from_arrays(columns, schema=schema)
        if rows != file.rows:
            raise BadFileError(
                f"{file.metadata.url} has {rows:,} rows, but its footer declares {file.rows:,}: write "
                "it again from its source"
            )


def _read_headers(
    files: InputFiles, pair: Pair, key: str, schemas: dict[bytes, pa.Schema]
) -> EmbeddingFile:
    vectors = files.file(pair.vectors)
    metadata = vectors if pair.metadata == pair.vectors else files.file(pair.metadata)
    schema, groups = parquet.read_footer(files, metadata)
    rows = sum(groups)
    stored: Matrix | VectorColumn
    if vectors.name.endswith(".parquet"):
        column = parquet.choose_column(schema, vectors.url, key)
        stored = parquet.read_column(files, vectors, schema, groups, column)
        schema = schema.remove(schema.names.index(column))
    else:
        archive = vectors.name.endswith(".npz")
        stored = read_npz_header(files, vectors, key) if archive else read_npy_header(files, vectors)
        if stored.rows != rows:
            raise BadFileError(
                f"{vectors.url} has {stored.rows:,} rows and {metadata.name} has {rows:,}, but row i of "
                "one must belong to row i of the other: write both again from their source"
            )
    for file in {vectors, metadata}:
        files.check(file)
    schema = schemas.setdefault(schema.serialize().to_pybytes(), schema)
    return EmbeddingFile(vectors.name, vectors, metadata, rows, stored, schema)


def _check_end(file: EmbeddingFile, at: int, stop: int) -> None:
    """Check that reading the rows up to `stop` ended there."""
    if at != stop:
        raise BadFileError(
            f"{file.vectors.url} has other rows than its header declares: write it again from its source"
        )


def _common_dimension(files: Sequence[EmbeddingFile], uri: str, dimension: int | None) -> int:
    known = [file for file in files if file.rows and file.stored.dimension is not None]
    if not known:
        if dimension is not None:
            return dimension
        raise InputError(f"{uri} holds no vectors: every row is null, so name another folder", URI)
    first = known[0]
    odd = [
        f"{file.name} has {file.stored.dimension}"
        for file in known
        if file.stored.dimension != first.stored.dimension
    ]
    if odd:
        raise InputError(
            f"the vectors in {uri} have different dimensions: {first.name} has {first.stored.dimension}, "
            f"{list_shortly(odd)}; keep files of one model in the folder",
            URI,
        )
    return int(first.stored.dimension or 0)


def _model(layout: str, key: str, dimension: int) -> ModelRecord:
    known = DATACOMP_MODELS.get(key.partition("_")[0]) if layout == DATACOMP else None
    return known if known and known.dimension == dimension else ModelRecord(dimension=dimension)


def _units(file: EmbeddingFile) -> tuple[int, ...]:
    """Return the row counts of the parts that must be read whole; empty if rows can be read singly."""
    if isinstance(file.stored, VectorColumn):
        return file.stored.groups
    return (file.rows,) if isinstance(file.stored, DeflatedMatrix) else ()


def _is_usual(field: pa.Field) -> bool:
    return not pa.types.is_nested(field.type) and not field.name.startswith(PANDAS_INDEX)


def _raise_all(uri: str, errors: Sequence[BadFileError]) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        shown = list_shortly([str(error) for error in errors], "; ", PROBLEMS_SHOWN)
        raise InputError(f"{len(errors):,} files in {uri} cannot be used: {shown}", errors[0].about)


def _in_threads(work: Callable[[Job], Result], jobs: Iterable[Job]) -> list[Result]:
    """Run jobs in threads and return the results in order; the first error cancels the remaining jobs."""
    pool = ThreadPoolExecutor(FILES_AT_ONCE, "embeddings")
    try:
        return list(pool.map(work, jobs))
    finally:
        pool.shutdown(cancel_futures=True)
