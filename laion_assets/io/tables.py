"""Parquet tables on a local path or in a bucket, written batch by batch.

A table appears under its name only once it is complete. Each page has a checksum, which is verified when
the page is read. A reader that knows the checksum of the file verifies all of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from laion_assets.io.arrays import Bytes, Floats
from laion_assets.io.checksums import checksum_text, crc32c
from laion_assets.io.errors import InputError
from laion_assets.io.storage import (
    new_file,
    on_this_machine,
    open_storage,
    reaching,
    stored_crc32c,
)

SUFFIX = ".parquet"
OUTPUT = "output_uri"  # the setting that errors name, see `InputError`
MAX_FOOTER_TEXT = 1 << 30  # bytes; footers of earlier releases held more than Arrow's default of 100 MB
ATTACHMENTS_KEY = "laion_assets.attachments"

DESCRIPTIONS = {
    "id": "row of the index",
    "url": "address of the image",
    "caption": "alt text of the image",
    "similarity": "inner product of the unit query and the row as the index stores it; a compressed row "
    "may be slightly longer than 1, so the similarity may be slightly above 1",
    "rank": "rank among the rows found for the same query; 1 is the nearest",
    "seed": "row of the seed table; null if only the centroid found the image, or ranked it better than "
    "any seed",
    "strategies": "strategies that found the image or a near-duplicate of it",
    "seed_set": "seed set for which the image was found",
    "code": "the row as the index stores it; the decoder beside the table turns it into a vector",
    "embedding": "unit vector: the seed, or the mean of the seeds",
    "norm_of_mean": "length of the mean of the unit seeds; 1 if all are equal, near 0 without a style",
    "seeds": "number of seeds in the mean",
    "file": "seed file, relative to the folder of the seed set",
    "row": "row in that file; for a prompt its line, from 0",
    "kind": "kind of seed: vector, image or prompt",
    "content": "SHA-256 of the image file",
    "thumbnail": "small image, for the first rows only",
    **dict.fromkeys(("NSFW", "nsfw", "punsafe"), "how unsafe the image is, by LAION's classifier"),
    "pwatermark": "probability that the image has a watermark, by LAION's classifier",
    "LICENSE": "licence of the image, if the page named one",
    **dict.fromkeys(("LANGUAGE", "language"), "language of the caption"),
    **dict.fromkeys(("WIDTH", "width", "original_width"), "width in pixels when the image was collected"),
    **dict.fromkeys(
        ("HEIGHT", "height", "original_height"), "height in pixels when the image was collected"
    ),
    "aesthetic": "predicted aesthetic score, from 1 to 10",
    "md5": "checksum of the image when it was collected",
}


def described(schema: pa.Schema) -> pa.Schema:
    """Add a description to every known column, as metadata of the Parquet file."""
    return pa.schema(
        [
            field.with_metadata({"description": DESCRIPTIONS[field.name]})
            if field.name in DESCRIPTIONS
            else field
            for field in schema
        ]
    )


@dataclass(frozen=True)
class Written:
    """What is known of a table since it was written, see `TableWriter`."""

    seconds: float
    checksum: str


class TableWriter:
    """A table that is being written, see `new_table`.

    Attributes:
        rows: number of rows written so far.
        footer: key-value metadata, written at the end.
        seconds: time from the computation of the first row to the end.
        checksum: crc32c of the file, formatted by `checksum_text`; empty before the end.

    """

    def __init__(self, uri: str, writer: pq.ParquetWriter) -> None:
        self._uri = uri
        self._writer = writer
        self._attachments: dict[str, dict[str, str]] = {}
        self._started = time.monotonic()
        self.rows = 0
        self.footer: dict[str, str] = {}
        self.seconds = 0.0
        self.checksum = ""

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows."""
        self._writer.write_batch(batch.cast(self._writer.schema))
        self.rows += len(batch)

    def attach(self, name: str, content: bytes) -> None:
        """Write an attachment of the table to a file beside it, and name the file in the footer.

        The file's name contains its checksum, so the attachment of the previous table stays readable
        until that table is replaced.

        Args:
            name: name of the attachment, which is the suffix of its file.
            content: the whole content.

        """
        checksum = crc32c(content)
        uri = f"{self._uri.removesuffix(SUFFIX)}.{checksum:08x}.{name}"
        with new_file(uri, OUTPUT) as sink:
            sink.write(content)
        self._attachments[name] = {"file": _name_of(uri), "crc32c": checksum_text(checksum)}

    def written(self) -> Written:
        """Return what is known of the table; only after the end."""
        return Written(self.seconds, self.checksum)

    def _end(self) -> None:
        self._writer.add_key_value_metadata(
            {**self.footer, ATTACHMENTS_KEY: json.dumps(self._attachments)}
        )
        self.seconds = round(time.monotonic() - self._started, 2)


@contextmanager
def new_table(uri: str, schema: pa.Schema) -> Iterator[TableWriter]:
    """Write a table that replaces the previous one only if the block ends without an error.

    Args:
        uri: location of the Parquet file, a local path or a URL.
        schema: schema of every batch.

    Raises:
        InputError: the location is not writable.

    """
    with new_file(uri, OUTPUT) as sink:
        with pq.ParquetWriter(
            sink, described(schema), compression="zstd", write_page_checksum=True
        ) as parquet:
            writer = TableWriter(uri, parquet)
            yield writer
            writer._end()
        writer.checksum = sink.checksum
    _remove_old_attachments(uri, writer._attachments)


def attachments_of(uri: str, name: str) -> list[str]:
    """List all attachments beside a table's location with a name, also those of previous tables."""
    fs, path = open_storage(uri, OUTPUT)
    stem = "".join(f"[{c}]" if c in "*?[" else c for c in path.removesuffix(SUFFIX))
    folder = uri.rpartition("/")[0]
    with reaching(uri, OUTPUT):
        return [f"{folder}/{_name_of(found)}" for found in fs.glob(f"{stem}.{'?' * 8}.{name}")]


def remove(uri: str) -> None:
    """Remove a file, or a folder with all in it; what is gone already is no error."""
    fs, path = open_storage(uri, OUTPUT)
    with reaching(uri, OUTPUT), suppress(FileNotFoundError):
        if on_this_machine(uri):
            fs.rm(path, recursive=True)
            return
        for found in fs.find(path) if fs.isdir(path) else [path]:
            fs.rm_file(found)  # `rm` would take brackets in a name for a pattern


def _remove_old_attachments(uri: str, current: Mapping[str, Mapping[str, str]]) -> None:
    for name, attachment in current.items():
        for found in attachments_of(uri, name):
            if _name_of(found) != attachment["file"]:
                remove(found)


def _name_of(uri: str) -> str:
    return uri.rpartition("/")[2]


class StoredTable:
    """A Parquet file, opened once. In a bucket, each column of a row group is one request.

    Args:
        uri: a local path or a URL.
        remedy: remedy for a missing or damaged file, for error messages.
        checksum: crc32c of the file when it was written, see `TableWriter`; None if it is unknown.

    Attributes:
        where: location of the file.
        size: size of the file in bytes.
        schema: schema of the table.

    Raises:
        InputError: the file is missing, not a complete Parquet file, or differs from the checksum.

    """

    def __init__(self, uri: str, remedy: str = "write it again", checksum: str | None = None) -> None:
        self.where = uri
        self.remedy = remedy
        with self._explained():
            fs, path = open_storage(uri, OUTPUT)
            if checksum is not None and stored_crc32c(fs, path) != checksum:
                raise InputError(f"{uri} differs from what was written: {remedy}")
            source = fs.open(path, "rb", cache_type="none")
            self.size = int(source.size)
            # The default would read the whole file ahead, whatever its size.
            self._file = pq.ParquetFile(
                source,
                thrift_string_size_limit=MAX_FOOTER_TEXT,
                pre_buffer=False,
                page_checksum_verification=True,
            )
        self.schema: pa.Schema = self._file.schema_arrow.remove_metadata()

    @property
    def footer(self) -> Mapping[str, str]:
        """Key-value metadata."""
        stored = self._file.metadata.metadata or {}
        return {key.decode(): value.decode() for key, value in stored.items()}

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def batches(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Read the rows in order."""
        names = None if columns is None else list(columns)
        batches = self._file.iter_batches(columns=names)
        while True:
            with self._explained():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def read(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Read all rows at once."""
        with self._explained():
            return self._file.read(columns=None if columns is None else list(columns))

    def top(self, rows: int, columns: Sequence[str]) -> pa.Table:
        """Read the first rows only."""
        with self._explained():
            first = next(self._file.iter_batches(batch_size=max(rows, 1), columns=list(columns)), None)
        empty = pa.schema([self.schema.field(name) for name in columns]).empty_table()
        return empty if first is None else pa.Table.from_batches([first])

    def attachment(self, name: str) -> bytes:
        """Read an attachment of the table, see `TableWriter.attach`.

        Raises:
            InputError: the table has no such attachment, or its file is missing or damaged.

        """
        attachments = json.loads(self.footer.get(ATTACHMENTS_KEY, "{}"))
        if name not in attachments:
            raise InputError(f"{self.where} has no {name} beside it: {self.remedy}")
        folder, recorded = self.where.rpartition("/")[0], attachments[name]
        uri = f"{folder}/{recorded['file']}"
        with self._explained(uri):
            fs, path = open_storage(uri, OUTPUT)
            content: bytes = fs.cat_file(path)
        if checksum_text(crc32c(content)) != recorded["crc32c"]:
            raise InputError(f"{uri} differs from what was written: {self.remedy}")
        return content

    @contextmanager
    def _explained(self, uri: str | None = None) -> Iterator[None]:
        """Convert errors of reads to one sentence with the remedy."""
        where = uri or self.where
        try:
            with reaching(where, OUTPUT):
                try:
                    yield
                except FileNotFoundError as error:
                    raise InputError(f"{where} is missing: {self.remedy}") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{where} cannot be read ({error}): {self.remedy}") from error


def vector_column(vectors: Floats) -> pa.Array:
    """Return (n, d) float32 vectors as a column."""
    return pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])


def code_bytes(column: pa.ChunkedArray) -> Bytes:
    """Return a fixed-size binary column as an (n, width) uint8 matrix."""
    codes, width = column.combine_chunks(), column.type.byte_width
    if not len(codes):
        return np.empty((0, width), np.uint8)
    data = np.frombuffer(codes.buffers()[1], np.uint8)
    return data[codes.offset * width : (codes.offset + len(codes)) * width].reshape(-1, width)


def fixed_size_binary(codes: Bytes) -> pa.Array:
    """Return an (n, width) uint8 matrix as a fixed-size binary column; the inverse of `code_bytes`."""
    data = pa.py_buffer(np.ascontiguousarray(codes))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(codes.shape[1]), len(codes), [None, data])
