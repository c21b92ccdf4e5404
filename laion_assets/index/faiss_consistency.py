"""Check that the sizes stated in a faiss index agree: a search trusts them, and reads where they lead.

faiss checks little of what it reads. A search of a damaged index would kill the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np

from laion_assets.io.arrays import Ids


def contradictions(index: Any) -> Iterator[str]:
    """Yield what does not agree in an index, first things first: later checks rely on earlier ones."""
    yield from _of_kind(faiss.downcast_index(index))


def _of_kind(index: Any) -> Iterator[str]:
    if isinstance(index, faiss.IndexPreTransform):
        yield from _of_transforms(index)
    elif isinstance(index, faiss.IndexIVF):
        yield from _of_lists(index)
    elif isinstance(index, faiss.IndexHNSW):
        yield from _of_kind(faiss.downcast_index(index.storage))
        if (index.storage.d, index.storage.ntotal) != (index.d, index.ntotal):
            yield "its graph and its vectors have different sizes"
        else:
            yield from _of_graph(index.hnsw, index.ntotal)
    elif isinstance(index, faiss.IndexScalarQuantizer):
        if not _scalar_fits(index.sq, index.d, index.code_size):
            yield "its scalar quantizer has another size than its codes"
        elif index.codes.size() != index.code_size * index.ntotal:
            yield f"{index.ntotal:,} codes do not take {index.codes.size():,} bytes"
    elif isinstance(index, faiss.IndexFlat):
        sizes = index.code_size, index.codes.size()
        if sizes != (4 * index.d, 4 * index.d * index.ntotal):
            yield f"{index.ntotal:,} vectors of {index.d:,} dimensions do not take {sizes[1]:,} bytes"


def _of_transforms(index: Any) -> Iterator[str]:
    width = index.d
    for number in range(index.chain.size()):
        transform = faiss.downcast_VectorTransform(index.chain.at(number))
        if transform.d_in != width:
            yield f"a transform takes {transform.d_in:,} dimensions and is given {width:,}"
        width = transform.d_out
        if isinstance(transform, faiss.LinearTransform):
            sizes = transform.A.size(), transform.b.size() if transform.have_bias else width
            if sizes != (transform.d_in * width, width):
                yield "a transform's matrix has another size than its dimensions"
    if index.index.d != width:
        yield f"the index takes {index.index.d:,} dimensions and is given {width:,}"
    if index.index.ntotal != index.ntotal:
        yield "it states two numbers of rows"
    yield from _of_kind(faiss.downcast_index(index.index))


def _of_lists(ivf: Any) -> Iterator[str]:
    quantizer, stored = faiss.downcast_index(ivf.quantizer), ivf.invlists
    if (quantizer.d, quantizer.ntotal) != (ivf.d, ivf.nlist):
        yield f"{quantizer.ntotal:,} centres do not belong to {ivf.nlist:,} inverted lists"
    if (stored.nlist, stored.code_size) != (ivf.nlist, ivf.code_size):
        yield f"{ivf.nlist:,} inverted lists do not fit a table of {stored.nlist:,}"
    if isinstance(ivf, faiss.IndexIVFPQ) and not _fits(ivf.pq, ivf.d, ivf.code_size):
        yield "its product quantizer has another size than its codes"
    if isinstance(ivf, faiss.IndexIVFScalarQuantizer) and not _scalar_fits(ivf.sq, ivf.d, ivf.code_size):
        yield "its scalar quantizer has another size than its codes"
    if isinstance(ivf, faiss.IndexIVFFlat) and ivf.code_size != 4 * ivf.d:
        yield f"a code of {ivf.code_size:,} bytes is no vector of {ivf.d:,} dimensions"
    yield from _of_kind(quantizer)


def _fits(pq: Any, width: int, code_size: int) -> bool:
    return bool(
        pq.M > 0
        and pq.M * pq.dsub == width == pq.d
        and pq.ksub == 1 << pq.nbits
        and pq.centroids.size() == pq.ksub * width
        and pq.code_size == code_size == -(-pq.M * pq.nbits // 8)
    )


def _scalar_fits(sq: Any, width: int, code_size: int) -> bool:
    kind = faiss.ScalarQuantizer
    ranges = {kind.QT_8bit: 2 * width, kind.QT_6bit: 2 * width, kind.QT_4bit: 2 * width}
    ranges |= {kind.QT_8bit_uniform: 2, kind.QT_4bit_uniform: 2, kind.QT_fp16: 0, kind.QT_bf16: 0}
    return bool(
        sq.qtype in ranges
        and sq.d == width
        and sq.code_size == code_size == kind(width, sq.qtype).code_size
        and sq.trained.size() == ranges[sq.qtype]
    )


def _of_graph(graph: Any, nodes: int) -> Iterator[str]:
    """Yield what is wrong in an HNSW graph.

    The neighbours of node n lie between offsets[n] and offsets[n + 1]: first those of its lowest level,
    as far as the table of widths says, then those of the next.
    """
    levels, offsets = faiss.vector_to_array(graph.levels), faiss.vector_to_array(graph.offsets)
    ends = faiss.vector_to_array(graph.cum_nneighbor_per_level)
    if len(levels) != nodes or len(offsets) != nodes + 1 or not len(ends) or ends[0]:
        yield "its graph has another number of nodes than of vectors"
        return
    if not nodes:
        return
    if (np.diff(ends) < 0).any() or levels.min() < 1 or levels.max() >= len(ends):
        yield "its graph has a node with an impossible level"
        return
    count = graph.neighbors.size()
    if offsets[0] or offsets[-1] != count or (np.diff(offsets.astype(np.int64)) != ends[levels]).any():
        yield "its graph states another number of neighbours than it has"
        return
    neighbours = faiss.rev_swig_ptr(graph.neighbors.data(), count)
    if count and (neighbours.min() < -1 or neighbours.max() >= nodes):
        yield "its graph has an edge to a node that does not exist"
        return
    entry = graph.entry_point
    if not 0 <= entry < nodes or graph.max_level != levels[entry] - 1 or graph.max_level < 0:
        yield "its graph begins at a node that does not exist"
        return
    for level in range(1, graph.max_level + 1):
        ends_of_edges = neighbours[_edges(offsets, ends, np.flatnonzero(levels > level), level)]
        if (levels[ends_of_edges[ends_of_edges >= 0]] <= level).any():
            yield "its graph has an edge to a node that is not on its level"
            return


def _edges(offsets: Ids, ends: Ids, nodes: Ids, level: int) -> Ids:
    """Return the positions of the edges of some nodes on a level."""
    first = offsets[nodes].astype(np.int64) + ends[level]
    positions: Ids = first[:, None] + np.arange(ends[level + 1] - ends[level])
    return positions.ravel()
