"""Intermediate results on the local disk, where they are too large for memory.

Files lie in the folder for temporary files (TMPDIR). They have no name, so nothing is left of them when
the process ends, however it ends.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from laion_assets.io.arrays import Ids
from laion_assets.io.errors import InputError

HELD_BYTES = 256 << 20  # larger arrays lie on the disk
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
SORTED_ROWS = 1 << 18  # that are sorted in memory at once


def spilled(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return an array of arbitrary content, in memory if it is small, else in a file that is mapped.

    The kernel writes the pages of the file to the disk if memory is short.

    Raises:
        InputError: the disk has no room for the array.

    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= HELD_BYTES:
        return np.empty(shape, dtype)
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        with _room():
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk would kill the process later
        mapped: Any = np.memmap(file, dtype, "r+", shape=shape)
        stack.pop_all()
    mapped.file = file  # stays open as long as the array, see `file_of`
    weakref.finalize(mapped, file.close)
    array: NDArray[Any] = mapped.view(np.ndarray)
    return array


@contextmanager
def file_of(array: NDArray[Any]) -> Iterator[IO[bytes]]:
    """Open the file that a whole array of `spilled` lies in, or a new file without a name that holds it.

    Raises:
        InputError: the disk has no room for the array.

    """
    whole: Any = array.base
    if hasattr(whole, "file") and whole.nbytes == array.nbytes and array.flags.c_contiguous:
        yield whole.file
        return
    with tempfile.TemporaryFile() as file:
        with _room():
            os.posix_fallocate(file.fileno(), 0, array.nbytes)
            file.write(np.ascontiguousarray(array).data)
            file.flush()
        yield file


def sorted_batches(
    batches: Iterable[tuple[Ids, pa.RecordBatch]], schema: pa.Schema, rows: int, at_once: int
) -> Iterator[pa.RecordBatch]:
    """Sort rows by their places: distribute them to files of adjacent places, then sort each file.

    Args:
        batches: the rows in any order, each with its place, from 0 to rows - 1.
        schema: of the batches.
        rows: number of rows.
        at_once: rows in a returned batch.

    Yields:
        The rows in order of their place.

    Raises:
        InputError: the disk has no room for the rows.

    """
    part = max(at_once, SORTED_ROWS // at_once * at_once)
    parts = -(-rows // part)
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(parts)]
        _distribute(batches, schema.append(pa.field("place", pa.int64())), files, part)
        for file in files:
            file.seek(0)
            table = pa.ipc.open_stream(file).read_all()
            by_place = np.argsort(table["place"].to_numpy())
            for start in range(0, len(table), at_once):
                some = table.select(schema.names).take(pa.array(by_place[start : start + at_once]))
                yield from some.combine_chunks().to_batches()
            file.truncate(0)


def _distribute(
    batches: Iterable[tuple[Ids, pa.RecordBatch]],
    schema: pa.Schema,
    files: Sequence[IO[bytes]],
    part: int,
) -> None:
    writers = [pa.ipc.new_stream(file, schema) for file in files]
    for places, batch in batches:
        order = np.argsort(places)
        placed = batch.append_column("place", pa.array(places)).take(pa.array(order))
        borders = np.searchsorted(places[order], part * np.arange(len(files) + 1))
        for number in np.flatnonzero(np.diff(borders)):
            first, end = int(borders[number]), int(borders[number + 1])
            with _room():
                writers[number].write_batch(placed.slice(first, end - first))
    for writer, file in zip(writers, files, strict=True):
        with _room():
            writer.close()
            file.flush()


@contextmanager
def _room() -> Iterator[None]:
    """Say what to do if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(
            f"{tempfile.gettempdir()} has no room for intermediate results: free space there, or let "
            "TMPDIR name a folder on a larger disk"
        ) from error
