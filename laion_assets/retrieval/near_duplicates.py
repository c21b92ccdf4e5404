"""Which rows show the same picture: connected components of the graph of near-duplicates.

Two rows are linked when the cosine of their vectors is above the threshold; of each component the
best-ranked row stays. What must not live here: where vectors come from, what a row is.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from laion_assets.retrieval.arrays import Floats, Ids

BLOCK = 2048


class Vectors(Protocol):
    """Unit vectors by row: an array, or something that decodes them on demand."""

    def __len__(self) -> int:
        """Rows."""

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Floats:
        """Return (m, d) float32 unit rows."""


def components(vectors: Vectors, threshold: float) -> Ids:
    """Label each row with the lowest row of its component.

    Args:
        vectors: (n, d) unit rows, best-ranked first; zero rows are linked to nothing.
        threshold: link rows whose cosine is strictly above it; 1.0 links none.

    Returns:
        (n,) int64; the rows to keep are those labelled with themselves.

    """
    n = len(vectors)
    labels = np.arange(n)
    if threshold >= 1:
        return labels
    limit = np.float32(threshold)
    for start in range(0, n, BLOCK):
        left = vectors[start : start + BLOCK]
        for other in range(start, n, BLOCK):
            right = left if other == start else vectors[other : other + BLOCK]
            i, j = np.nonzero(left @ right.T > limit)
            labels = joined(labels, labels[i + start], labels[j + other])
    return labels


def joined(labels: Ids, a: Ids, b: Ids) -> Ids:
    """Merge the components labelled a[i] and b[i]; the lower label stays."""
    apart = a != b
    if not apart.any():
        return labels
    n = len(labels)
    graph = coo_array((np.ones(apart.sum(), np.bool_), (a[apart], b[apart])), shape=(n, n))
    count, component = connected_components(graph, directed=False)
    lowest = np.full(count, n)
    np.minimum.at(lowest, component, np.arange(n))
    merged: Ids = lowest[component][labels]
    return merged
