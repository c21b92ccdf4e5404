"""Read a faiss index whose inverted lists are a file of their own, without reading its centres.

The coarse quantizer of LAION-5B holds 131,072 centres, 470 MB. faiss can leave them in a mapping of the
file, but not together with IO_FLAG_ONDISK_SAME_DIR, by which it looks for the lists beside the index. So
the quantizer is read from a mapping by itself, and the rest from a small copy with an empty quantizer in
its place.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from laion_assets.io.arrays import Bytes

TRANSFORMS = b"IxPT"
# `write_index_header` of faiss: d, ntotal, two unused numbers, is_trained, metric type.
HEADER = struct.Struct("<4siqqq?i")
COUNT = struct.Struct("<i")
SIZE = struct.Struct("<Q")
MAX_NAME = 4096  # bytes of a path
LISTS_AND_NPROBE = 16  # bytes of both, before the quantizer
MEASURES = (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2)  # the others have an argument in the header
LISTS_BESIDE = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY


def read_with_lists_beside(path: Path, lists: str) -> Any:
    """Return an index whose on-disk lists lie in the same folder, its quantizer memory-mapped.

    Args:
        path: the faiss file.
        lists: name of the file of lists; the index may state another, from where it was built.

    An index that does not begin with transforms and inverted lists is read as a whole, and must state
    the right name.

    Raises:
        RuntimeError: the file is not a complete faiss index.

    """
    if path.stat().st_size < HEADER.size:
        return faiss.read_index(str(path), LISTS_BESIDE)
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapped = np.frombuffer(pages, np.uint8)
    reader = faiss.ZeroCopyIOReader(faiss.swig_ptr(mapped), mapped.size)
    start = _start_of_quantizer(mapped, reader)
    if start is None:
        return faiss.read_index(str(path), LISTS_BESIDE)
    reader.rp_ = start
    quantizer = faiss.read_index(reader, faiss.IO_FLAG_MMAP_IFC)
    empty = faiss.serialize_index(faiss.IndexFlat(quantizer.d, quantizer.metric_type))
    rest = _with_lists_named(mapped[reader.rp_ :].tobytes(), lists.encode())
    index = _read_copy(path, np.concatenate([mapped[:start], empty, np.frombuffer(rest, np.uint8)]))
    ivf = faiss.extract_index_ivf(index)
    ivf.quantizer.this.own(True)  # the empty one is deleted with its last reference, here
    ivf.quantizer, ivf.own_fields = quantizer, False
    index.referenced_objects = (quantizer, mapped)
    pages.madvise(mmap.MADV_RANDOM)  # from here on: a search visits centres all over the file
    return index


def _start_of_quantizer(mapped: Bytes, reader: Any) -> int | None:
    """Return where the quantizer begins; None if the index is not inverted lists after any transforms."""
    at = 0
    if mapped[:4].tobytes() == TRANSFORMS and mapped.size > HEADER.size + COUNT.size:
        (transforms,) = COUNT.unpack_from(mapped.data, HEADER.size)
        reader.rp_ = HEADER.size + COUNT.size
        for _ in range(transforms):
            faiss.read_VectorTransform(reader)
        at = reader.rp_
    if mapped.size < at + HEADER.size:
        return None
    kind, *_, metric = HEADER.unpack_from(mapped.data, at)
    if kind not in (b"IwPQ", b"IwFl") or metric not in MEASURES:
        return None
    return at + HEADER.size + LISTS_AND_NPROBE


def _with_lists_named(end: bytes, name: bytes) -> bytes:
    """Replace the name of the file of lists in the end of an index, which is: name, size of that file.

    Before the name is its length, before that the table of lists.
    """
    last = len(end) - SIZE.size
    for length in range(1, min(MAX_NAME, last - SIZE.size) + 1):
        start = last - length
        if SIZE.unpack_from(end, start - SIZE.size) == (length,):
            return end[: start - SIZE.size] + SIZE.pack(len(name)) + name + end[last:]
    return end


def _read_copy(path: Path, content: Bytes) -> Any:
    """Read an index from memory, as if it lay at a path.

    Tables that speed up L2 distances are left out: they would be computed from the quantizer.
    """
    descriptor = os.memfd_create(path.name)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content.data)
        file.flush()
        reader = faiss.FileIOReader(f"/proc/self/fd/{descriptor}")
        reader.name = str(path)
        return faiss.read_index(reader, LISTS_BESIDE | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
