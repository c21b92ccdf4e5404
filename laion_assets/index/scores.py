"""Scores of the rows of some inverted lists, as faiss computes them."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from laion_assets.io.arrays import Floats, Ids

NONE = np.finfo(np.float32).min  # the similarity of no row, as faiss fills it in
ROW = 0xFFFFFFFF  # of a list, in a location


def fill_in_best(
    ivf: Any, queries: Floats, lists: Ids, nearness: Floats, similarity: Floats, locations: Ids
) -> None:
    """Fill in the rows of some lists nearest to each query, in the calling thread.

    Args:
        ivf: an IVF index.
        queries: (q, d) float32, transformed.
        lists: (q, n) numbers of lists; -1 for none.
        nearness: (q, n) float32, of the lists.
        similarity: (q, k) float32, to be filled.
        locations: (q, k) list << 32 | row of the list, likewise; -1 for none.

    """
    ivf.search_preassigned_c(  # the call without a wrapper returns locations
        len(queries), faiss.swig_ptr(queries), similarity.shape[1], faiss.swig_ptr(lists),
        faiss.swig_ptr(nearness), faiss.swig_ptr(similarity), faiss.swig_ptr(locations), True,
        faiss.SearchParametersIVF(nprobe=lists.shape[1]),
    )  # fmt: skip


def rows_above(
    ivf: Any, query: Floats, lists: Ids, nearness: Floats, score: float, *, locations: bool
) -> tuple[Floats, Ids]:
    """Return the rows of some lists whose similarity is above a score, in the calling thread.

    Args:
        ivf: an IVF index.
        query: (d,) float32, transformed.
        lists: (n,) numbers of lists; -1 for none.
        nearness: (n,) float32, of the lists.
        score: the similarity that is too low.
        locations: whether to return locations, list << 32 | row of the list, instead of ids.

    Returns:
        Similarity, and location or id.

    """
    found = faiss.RangeSearchResult(1)
    ivf.range_search_preassigned_c(
        1, faiss.swig_ptr(query), float(score), faiss.swig_ptr(lists), faiss.swig_ptr(nearness),
        found, locations, faiss.SearchParametersIVF(nprobe=len(lists)),
    )  # fmt: skip
    count = int(faiss.rev_swig_ptr(found.lims, 2)[1])
    similarity, labels = (
        faiss.rev_swig_ptr(values, count).copy() for values in (found.distances, found.labels)
    )
    return similarity, labels
