"""Merge the shards into one file of inverted lists, k-way by list number.

Reads and writes are sequential. Memory holds about seven times the lists that are merged at a time, and
the list sizes of each shard; it does not grow with the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from laion_assets.build.shards import CODES, IDS, SIZES
from laion_assets.build.workspace import Workspace
from laion_assets.index import ID_SIZE, INVERTED_LISTS, POPULATED_INDEX
from laion_assets.io.arrays import Bytes, Ids
from laion_assets.io.checksums import checksum_text, crc32c
from laion_assets.io.storage import Sink

MERGED_AT_ONCE = 128 << 20  # bytes of lists; a single long list may be larger
READERS = 32  # threads; with many shards, reads are small and a bucket's latency dominates


@dataclass(frozen=True)
class _Piece:
    """Some consecutive lists of one shard.

    Attributes:
        codes: (n, code size) uint8, in the order of the lists.
        ids: (n,) int64.
        lists: (n,) the list of each row.

    """

    codes: Bytes
    ids: Ids
    lists: Ids


class _ShardFiles:
    """Reads the lists of a shard in order and verifies the files' checksums at the end."""

    def __init__(self, folder: Workspace, code_size: int, checksums: dict[str, str]) -> None:
        self._folder, self._code_size, self._checksums = folder, code_size, checksums
        self._read = {CODES: 0, IDS: 0}  # crc32c
        self._row = 0
        self.sizes: Ids = folder.read_array(SIZES, checksums[SIZES])

    def lists(self, first: int, stop: int) -> _Piece:
        """Read the next lists, which must follow the previous ones."""
        sizes = self.sizes[first:stop]
        rows = int(sizes.sum())
        codes = self._next(CODES, self._code_size, rows)
        ids = self._next(IDS, ID_SIZE, rows)
        self._row += rows
        return _Piece(
            np.frombuffer(codes, np.uint8).reshape(rows, self._code_size),
            np.frombuffer(ids, np.int64),
            np.repeat(np.arange(first, stop), sizes),
        )

    def _next(self, name: str, width: int, rows: int) -> bytes:
        start = self._row * width
        data = self._folder.read(name, start, start + rows * width) if rows else b""
        self._read[name] = crc32c(data, self._read[name])
        return data

    def check(self) -> None:
        """Verify the checksums of the files.

        Raises:
            InputError: a file of the shard is damaged.

        """
        for name, checksum in self._read.items():
            if checksum_text(checksum) != self._checksums[name]:
                raise self._folder.damaged(name, "differs from what was written")


def write_index(folder: Workspace, index: Any, shards: Sequence[tuple[Workspace, dict[str, str]]]) -> Ids:
    """Write an index in two files: the faiss file and the merged lists.

    Args:
        folder: folder of the index.
        index: trained IVF index without rows.
        shards: see `merge_lists`.

    Returns:
        (lists,) number of rows in each list.

    Raises:
        InputError: a shard is missing or damaged.

    """
    ivf = faiss.extract_index_ivf(index)
    with folder.new(INVERTED_LISTS) as sink:
        sizes = merge_lists(shards, ivf.code_size, ivf.nlist, sink)
    lists_name = INVERTED_LISTS.rpartition("/")[2]
    made = with_lists_on_disk(index, sizes, ivf.code_size, lists_name)
    with folder.new(POPULATED_INDEX) as sink:
        sink.write(faiss.serialize_index(made))
    return sizes


def merge_lists(
    shards: Sequence[tuple[Workspace, dict[str, str]]], code_size: int, lists: int, sink: Sink
) -> Ids:
    """Write all lists in order: the codes of a list, then its ids, ascending.

    Args:
        shards: folder and checksums of each shard, in the order of their ids.
        code_size: bytes of a code.
        lists: number of lists.
        sink: takes the bytes.

    Returns:
        (lists,) number of rows in each list.

    Raises:
        InputError: a shard is missing or damaged.

    """
    files = [_ShardFiles(folder, code_size, checksums) for folder, checksums in shards]
    sizes = np.zeros(lists, np.int64)
    for each in files:
        sizes += each.sizes
    for first, stop, pieces in _read_ahead(files, _groups(sizes, code_size + ID_SIZE, lists)):
        _write_lists(pieces, sizes[first:stop], code_size, sink)
    for each in files:
        each.check()
    return sizes


def _groups(sizes: Ids, row_bytes: int, lists: int) -> Iterator[tuple[int, int]]:
    """Cut the lists into groups of at most `MERGED_AT_ONCE` bytes."""
    first, size = 0, 0
    for number, rows in enumerate(sizes.tolist()):
        if size and size + rows * row_bytes > MERGED_AT_ONCE:
            yield first, number
            first, size = number, 0
        size += rows * row_bytes
    yield first, lists


def _read_ahead(
    files: Sequence[_ShardFiles], groups: Iterator[tuple[int, int]]
) -> Iterator[tuple[int, int, list[_Piece]]]:
    """Read the next group from all shards while the previous one is written."""
    with ThreadPoolExecutor(READERS) as pool:
        pending = None
        for first, stop in groups:
            reads = [pool.submit(each.lists, first, stop) for each in files]
            if pending:
                yield pending[0], pending[1], [read.result() for read in pending[2]]
            for read in reads:  # each shard must be read in order
                read.exception()
            pending = first, stop, reads
        if pending:
            yield pending[0], pending[1], [read.result() for read in pending[2]]


def _write_lists(pieces: Sequence[_Piece], sizes: Ids, code_size: int, sink: Sink) -> None:
    order = np.argsort(np.concatenate([piece.lists for piece in pieces]), kind="stable")
    codes = np.concatenate([piece.codes for piece in pieces])[order].reshape(-1)
    ids = np.concatenate([piece.ids for piece in pieces])[order].view(np.uint8)
    out = np.empty(len(codes) + len(ids), np.uint8)
    row = 0
    for rows in sizes.tolist():
        at = row * (code_size + ID_SIZE)
        middle = at + rows * code_size
        out[at:middle] = codes[row * code_size : (row + rows) * code_size]
        out[middle : middle + rows * ID_SIZE] = ids[row * ID_SIZE : (row + rows) * ID_SIZE]
        row += rows
    sink.write(out.data)


def with_lists_on_disk(index: Any, sizes: Ids, code_size: int, file_name: str) -> Any:
    """Return an index that refers to the lists in a file written by `merge_lists`.

    To search it, write it to the folder of that file and read it from there.

    Args:
        index: IVF index without rows.
        sizes: (lists,) number of rows in each list.
        code_size: bytes of a code.
        file_name: file name without a folder; faiss looks for it in the folder of the index.

    """
    made = faiss.clone_index(index)
    ivf = faiss.downcast_index(faiss.extract_index_ivf(made))
    lists = faiss.OnDiskInvertedLists()
    lists.nlist, lists.code_size = len(sizes), code_size
    lists.filename, lists.read_only = file_name, True
    offset = 0
    for rows in sizes.tolist():
        one = faiss.OnDiskOneList()
        one.offset, one.size, one.capacity = offset, rows, rows
        lists.lists.push_back(one)
        offset += rows * (code_size + ID_SIZE)
    lists.totsize = offset
    ivf.replace_invlists(lists, True)
    lists.this.disown()
    made.ntotal = ivf.ntotal = int(sizes.sum())
    return made
