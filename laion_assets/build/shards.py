"""Encode a shard: write its rows as codes sorted by list, and its metadata as an Arrow file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from laion_assets.build.answers import Answers, merged, write_answers
from laion_assets.build.embeddings import EmbeddingFile, EmbeddingReader
from laion_assets.build.encoder import encode
from laion_assets.build.plan import Shard
from laion_assets.build.trained import KEPT, Trained
from laion_assets.build.workspace import Workspace
from laion_assets.index import ID_SIZE, content_of, read_table, table_as_parquet
from laion_assets.io.arrays import Bytes, Floats, Ids, unit_rows
from laion_assets.io.storage import Sink

BLOCK_ROWS = 65_536  # rows encoded at a time
BATCH_ROWS = 65_536  # rows per record batch of metadata
CODES, IDS, SIZES = "codes.bin", "ids.bin", "sizes.npy"
ANSWERS_FILE, RECORD = "answers.npz", "shard.json"
METADATA, BATCHES = "metadata.arrow", "batches.parquet"
EXACT = "exact"  # name of the answers from the raw vectors; other names are values of nprobe
WRITTEN_AT_ONCE = 64 << 20  # bytes


@dataclass(frozen=True)
class ShardRecord:
    """The record of an encoded shard.

    Attributes:
        made_from: fingerprint of its inputs; if it differs, the shard must be encoded again.
        first_id: id of its first row.
        rows: number of ids.
        stored: number of rows with a code.
        unusable: number of rows whose vector is missing, zero or not finite; they have an id but no code.
        checksums: crc32c of its files, by name.
        bytes: size of its codes, ids and metadata.
        metadata_bytes: size of its metadata alone.
        seconds: duration of the step.
        encoding_seconds: part of the duration spent on encoding vectors.

    """

    made_from: str
    first_id: int
    rows: int
    stored: int
    unusable: int
    checksums: dict[str, str]
    bytes: int
    metadata_bytes: int
    seconds: float
    encoding_seconds: float


def folder_of(workspace: Workspace, shard: Shard) -> Workspace:
    """Return the folder of a shard."""
    return workspace / f"shards/{shard.name}"


def read_record(workspace: Workspace, shard: Shard, made_from: str) -> ShardRecord | None:
    """Read the record of a shard; None if it is not encoded, or was made from other inputs.

    Raises:
        InputError: the record is damaged.

    """
    record = folder_of(workspace, shard).read_record(RECORD, ShardRecord)
    return record if record and record.made_from == made_from else None


def encode_shard(
    workspace: Workspace,
    shard: Shard,
    made_from: str,
    trained: Trained,
    reader: EmbeddingReader,
    files: Sequence[EmbeddingFile],
    schema: pa.Schema,
    progress: Callable[[int], object] = lambda _: None,
) -> ShardRecord:
    """Encode a shard and store it.

    Memory is bounded by three times the codes of the shard plus a few blocks of its vectors.

    Args:
        workspace: workspace of the build.
        shard: the shard.
        made_from: fingerprint of everything that the result depends on.
        trained: encodes the rows.
        reader: reads the input.
        files: the shard's files, in the order of its parts.
        schema: schema of the metadata.
        progress: called with the number of rows done since the last call.

    Raises:
        InputError: there is too little space, or the input cannot be used.

    """
    started = time.perf_counter()
    folder = folder_of(workspace, shard)
    folder.check_space(_bytes_needed(shard, trained, files), f"shard {shard.name}")
    rows, seconds = _encoded(shard, trained, reader, files, progress)
    folder.discard(RECORD)  # if this is killed, the record must not describe files of two encodings
    checksums = write_rows(folder, rows.codes, rows.ids, rows.sizes)
    found = trained.search(rows.codes, rows.ids, rows.sizes)
    answers = {EXACT: rows.exact} | {str(nprobe): each for nprobe, each in found.items()}
    with folder.new(ANSWERS_FILE) as sink:
        write_answers(sink, answers)
    checksums[ANSWERS_FILE] = sink.checksum
    with folder.new(METADATA) as sink:
        write_metadata(sink, (batch for file in files for batch in reader.metadata(file, schema)), schema)
    checksums[METADATA] = sink.checksum
    metadata_bytes = folder.size(METADATA)
    with folder.new(BATCHES) as sink:
        sink.write(_batch_table(folder, metadata_bytes, checksums[METADATA]))
    checksums[BATCHES] = sink.checksum
    record = ShardRecord(
        made_from,
        shard.first_id,
        shard.rows,
        len(rows.ids),
        shard.rows - len(rows.ids),
        checksums,
        rows.codes.nbytes + rows.ids.nbytes + metadata_bytes,
        metadata_bytes,
        round(time.perf_counter() - started, 2),
        round(seconds, 2),
    )
    folder.write_json(RECORD, asdict(record))
    return record


def _bytes_needed(shard: Shard, trained: Trained, files: Sequence[EmbeddingFile]) -> int:
    """Return the size of the codes, the ids and, as far as it is known, the metadata."""
    metadata = sum(file.metadata.size for file in files if file.metadata != file.vectors)
    return shard.rows * (trained.code_size + ID_SIZE) + metadata


@dataclass(frozen=True)
class _Encoded:
    """The rows of a shard, sorted by list and then by id.

    Attributes:
        codes: (n, code size) uint8.
        ids: (n,) int64.
        sizes: (lists,) int64 number of rows in each list.
        exact: the best rows for the queries, by the raw vectors.

    """

    codes: Bytes
    ids: Ids
    sizes: Ids
    exact: Answers


def _encoded(
    shard: Shard,
    trained: Trained,
    reader: EmbeddingReader,
    files: Sequence[EmbeddingFile],
    progress: Callable[[int], object],
) -> tuple[_Encoded, float]:
    """Encode all rows; also return the seconds spent on encoding."""
    codes = np.empty((shard.rows, trained.code_size), np.uint8)
    lists = np.empty(shard.rows, np.int32)
    ids = np.empty(shard.rows, np.int64)
    exact = Answers.none(len(trained.queries))
    stored, next_id, seconds = 0, shard.first_id, 0.0
    for file in files:
        for raw in reader.blocks(file, BLOCK_ROWS):
            begun = time.perf_counter()
            vectors, usable = unit_rows(raw)
            vectors = np.ascontiguousarray(vectors[usable])
            these = slice(stored, stored + len(vectors))
            ids[these] = next_id + np.flatnonzero(usable)
            if len(vectors):
                lists[these], codes[these] = encode(trained.index, vectors)
                exact = merged([exact, _exact(trained.queries, vectors, ids[these])], KEPT)
            stored, next_id = these.stop, next_id + len(raw)
            seconds += time.perf_counter() - begun
            progress(len(raw))
    rows = in_lists(codes[:stored], ids[:stored], lists[:stored], trained.lists)
    return _Encoded(*rows, exact), seconds


def _exact(queries: Floats, vectors: Floats, ids: Ids) -> Answers:
    scores, rows = faiss.knn(queries, vectors, min(KEPT, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
    return Answers(ids[rows], scores)


def write_rows(folder: Workspace, codes: Bytes, ids: Ids, sizes: Ids) -> dict[str, str]:
    """Write the rows of a shard for `merge_lists`, and return the crc32c of each file.

    Args:
        folder: folder of the shard.
        codes: (n, code size) codes, sorted by list.
        ids: (n,) ids, sorted by list and ascending in each list.
        sizes: (lists,) number of rows in each list.

    """
    return {
        CODES: _write(folder, CODES, codes),
        IDS: _write(folder, IDS, ids.view(np.uint8)),
        SIZES: folder.write_array(SIZES, sizes),
    }


def in_lists(codes: Bytes, ids: Ids, numbers: NDArray[np.integer], lists: int) -> tuple[Bytes, Ids, Ids]:
    """Sort rows by list, and count the rows of each list.

    Args:
        codes: (n, code size) codes.
        ids: (n,) ids.
        numbers: (n,) the list of each row.
        lists: number of lists.

    """
    order = np.argsort(numbers, kind="stable")
    return codes[order], ids[order], np.bincount(numbers, minlength=lists).astype(np.int64)


def _write(folder: Workspace, name: str, content: Bytes) -> str:
    """Write bytes and return their crc32c."""
    flat = content.reshape(-1)
    with folder.new(name) as sink:
        for start in range(0, len(flat), WRITTEN_AT_ONCE):
            sink.write(flat[start : start + WRITTEN_AT_ONCE])
    return sink.checksum


def _batch_table(folder: Workspace, size: int, checksum: str) -> bytes:
    """Read back where the record batches of the metadata and their buffers are."""
    table = read_table(size, lambda start, stop: folder.read(METADATA, start, stop))
    return table_as_parquet(content_of(size, checksum), table)


def write_metadata(sink: Sink, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write an Arrow IPC file with batches of `BATCH_ROWS`; the last may be shorter.

    Args:
        sink: takes the bytes.
        batches: batches of any length, with this schema.
        schema: schema of the file.

    """
    with pa.ipc.new_file(sink, schema) as writer:
        waiting: list[pa.RecordBatch] = []
        rows = 0
        for batch in batches:
            waiting.append(batch)
            rows += len(batch)
            if rows >= BATCH_ROWS:
                table = pa.Table.from_batches(waiting, schema).combine_chunks()
                whole = rows - rows % BATCH_ROWS
                writer.write_table(table.slice(0, whole), max_chunksize=BATCH_ROWS)
                waiting = table.slice(whole).to_batches()
                rows -= whole
        if rows:
            writer.write_table(pa.Table.from_batches(waiting, schema).combine_chunks())
