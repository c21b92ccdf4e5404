"""Read the headers and rows of matrices in .npy files and in members of .npz files."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laion_assets.build.input_files import STREAM_WINDOW, BadFileError, InputFiles, RangeFile
from laion_assets.io.errors import InputError
from laion_assets.io.storage import first_line
from laion_assets.io.text import list_shortly
from laion_assets.staging.transfer.files import SourceFile

HEADER_READ = 16 << 10  # bytes; numpy refuses longer headers
DIRECTORY_READ = 64 << 10  # bytes at the end of a zip file, where its directory is
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a member of a zip file
LOCAL_SIGNATURE = b"PK\3\4"
ENCRYPTED = 0x1
UNPACKED_PIECE = 8 << 20  # bytes
SAVE_AGAIN = "write it again from its source"


@dataclass(frozen=True)
class Matrix:
    """A matrix whose rows are bytes of a file.

    Attributes:
        rows: number of rows.
        dimension: numbers in each row.
        dtype: type of the numbers; float16, float32 or float64, in either byte order.
        start: offset of the first number in the file.
        checksums: CRC-32 of the bytes of a member before the first number, and of all; None in a file
            that keeps none.

    """

    rows: int
    dimension: int
    dtype: np.dtype[Any]
    start: int
    checksums: tuple[int, int] | None = field(default=None, kw_only=True)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dimension * self.dtype.itemsize


@dataclass(frozen=True)
class DeflatedMatrix(Matrix):
    """A matrix in a compressed member of an .npz file, which must be read from its first row.

    Attributes:
        start: offset of the compressed bytes in the file.
        stop: offset after the last compressed byte.
        header: number of uncompressed bytes before the first number.
        crc: CRC-32 of all uncompressed bytes.

    """

    stop: int
    header: int
    crc: int


def read_npy_header(files: InputFiles, file: SourceFile) -> Matrix:
    """Read the header of an .npy file.

    Raises:
        InputError: the file is not a complete .npy file of (n, d) floating-point numbers in C order.

    """
    start = files.read(file, 0, min(HEADER_READ, file.size)).tobytes()
    matrix = _parse_header(start, file.url)
    _check_size(matrix, file.size, file.url)
    return matrix


def read_npz_header(files: InputFiles, file: SourceFile, key: str) -> Matrix | DeflatedMatrix:
    """Read the directory of an .npz file and the header of one of its members.

    Args:
        files: reads the file.
        file: the .npz file.
        key: name of the member in `numpy.load`.

    Raises:
        InputError: the file is not a complete .npz file, or its member is missing or not a matrix of
            (n, d) floating-point numbers in C order.

    """
    where = f"{key} in {file.url}"
    member = _member(files, file, key)
    if member.flag_bits & ENCRYPTED or member.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):
        raise BadFileError(
            f"{where} is encrypted or not compressed with deflate: save it with "
            "numpy.savez or numpy.savez_compressed"
        )
    # The member's own header has no fixed length, so a generous range is read.
    at = member.header_offset
    begin = files.read(file, at, min(at + 2 * HEADER_READ, file.size)).tobytes()
    if len(begin) < LOCAL_HEADER.size or not begin.startswith(LOCAL_SIGNATURE):
        raise BadFileError(
            f"{file.url} is truncated or not an .npz file (its directory is wrong): {SAVE_AGAIN}"
        )
    *_, name_length, extra_length = LOCAL_HEADER.unpack_from(begin)
    skipped = LOCAL_HEADER.size + name_length + extra_length
    start, stop = at + skipped, at + skipped + member.compress_size
    if stop > file.size:
        raise BadFileError(f"{where} ends after the file: {SAVE_AGAIN}")
    packed = begin[skipped : skipped + member.compress_size]
    if member.compress_type == zipfile.ZIP_STORED:
        matrix = _parse_header(packed, where)
        _check_size(matrix, member.file_size, where)
        header = zlib.crc32(packed[: matrix.start])
        return replace(matrix, start=start + matrix.start, checksums=(header, member.CRC))
    try:
        unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, HEADER_READ)
    except zlib.error as error:
        raise _damaged(where, error) from error
    matrix = _parse_header(unpacked, where)
    _check_size(matrix, member.file_size, where)
    return DeflatedMatrix(
        matrix.rows, matrix.dimension, matrix.dtype, start, stop, matrix.start, member.CRC
    )


def matrix_rows(
    files: InputFiles, file: SourceFile, matrix: Matrix, start: int, stop: int
) -> Iterator[NDArray[Any]]:
    """Yield the rows from `start` to `stop` as stored, in pieces (n, d) of bounded size.

    Of an .npz file, the checksum is compared when all rows are read.

    Raises:
        InputError: the file cannot be read, has changed, or is damaged.

    """
    if isinstance(matrix, DeflatedMatrix):
        yield from _inflated_rows(files, file, matrix, start, stop)
        return
    step = max(STREAM_WINDOW // matrix.row_bytes, 1)
    crc, expected = matrix.checksums or (0, None)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        offsets = (matrix.start + row * matrix.row_bytes for row in (first, last))
        content = files.read(file, *offsets)
        if expected is not None:
            crc = zlib.crc32(content.data, crc)
        yield content.view(matrix.dtype).reshape(-1, matrix.dimension)
    if expected is not None and (start, stop) == (0, matrix.rows) and crc != expected:
        raise _damaged(file.url, ValueError("its checksum is wrong"))


def _inflated_rows(
    files: InputFiles, file: SourceFile, matrix: DeflatedMatrix, start: int, stop: int
) -> Iterator[NDArray[Any]]:
    skip = matrix.header + start * matrix.row_bytes
    left = (stop - start) * matrix.row_bytes
    rest = b""  # the beginning of a row
    for data in _inflated(files, file, matrix):
        wanted = data[skip : skip + left]
        skip = max(skip - len(data), 0)
        left -= len(wanted)
        rest += wanted
        whole = len(rest) - len(rest) % matrix.row_bytes
        if whole:
            yield np.frombuffer(rest, np.uint8, whole).view(matrix.dtype).reshape(-1, matrix.dimension)
            rest = rest[whole:]
        if not left and stop < matrix.rows:
            return  # a whole matrix is read to the end, to compare its checksum


def _inflated(files: InputFiles, file: SourceFile, matrix: DeflatedMatrix) -> Iterator[bytes]:
    """Yield the uncompressed bytes of a member, and check their number and checksum at the end."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    expected = matrix.header + matrix.rows * matrix.row_bytes
    size, crc = 0, 0
    try:
        for packed in files.stream(file, matrix.start, matrix.stop):
            waiting: Any = packed
            while len(waiting) and not inflate.eof and size <= expected:
                data = inflate.decompress(waiting, UNPACKED_PIECE)
                waiting = inflate.unconsumed_tail
                size, crc = size + len(data), zlib.crc32(data, crc)
                yield data
        data = inflate.flush()
        size, crc = size + len(data), zlib.crc32(data, crc)
        yield data
    except zlib.error as error:
        raise _damaged(file.url, error) from error
    if size != expected or crc != matrix.crc:
        raise _damaged(file.url, ValueError("its checksum is wrong"))


def _member(files: InputFiles, file: SourceFile, key: str) -> zipfile.ZipInfo:
    try:
        with zipfile.ZipFile(RangeFile(files, file, DIRECTORY_READ)) as archive:
            members = {member.filename: member for member in archive.infolist()}
    except InputError:
        raise
    except (zipfile.BadZipFile, struct.error, ValueError, OSError, NotImplementedError) as error:
        raise BadFileError(f"{file.url} is truncated or not an .npz file: {SAVE_AGAIN}") from error
    member = members.get(f"{key}.npy") or members.get(key)
    if member is None:
        keys = [name.removesuffix(".npy") for name in members]
        raise BadFileError(
            f"{file.url} has no {key!r} (found {list_shortly(keys, limit=20)}): name one of these",
            "key",
        )
    return member


def _parse_header(content: bytes, where: str) -> Matrix:
    """Parse numpy's header.

    Args:
        content: the first bytes of the array's file.
        where: location of the array, for messages.

    """
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"format version {version[0]}.{version[1]} does not hold plain numbers")
        shape, fortran, dtype = read(stream)
    except Exception as error:  # a broken header raises whatever Python's tokenizer raises
        raise BadFileError(
            f"{where} is not a complete .npy file ({first_line(error)}): {SAVE_AGAIN}"
        ) from error
    if dtype.hasobject:
        raise BadFileError(
            f"{where} holds Python objects, which are never loaded: save an array of float16 or float32"
        )
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise BadFileError(
            f"{where} holds numbers of type {dtype}: save them as float16, float32 or float64"
        )
    if len(shape) != 2 or min(shape) < 0 or (shape[0] and not shape[1]):
        raise BadFileError(
            f"{where} has the shape {shape}: save one vector per row, as (rows, dimensions)"
        )
    if fortran:
        raise BadFileError(
            f"{where} is in Fortran order, so single rows cannot be read: save "
            "numpy.ascontiguousarray(vectors)"
        )
    return Matrix(shape[0], shape[1], dtype, stream.tell())


def _check_size(matrix: Matrix, size: int, where: str) -> None:
    expected = matrix.start + matrix.rows * matrix.row_bytes
    if size != expected:
        problem = "is truncated" if size < expected else "has bytes after its last row"
        raise BadFileError(
            f"{where} {problem}: its header declares {matrix.rows:,} rows, which end at byte "
            f"{expected:,} of {size:,}: {SAVE_AGAIN}"
        )


def _damaged(where: str, error: Exception) -> BadFileError:
    return BadFileError(f"{where} is damaged ({first_line(error)}): {SAVE_AGAIN}")
