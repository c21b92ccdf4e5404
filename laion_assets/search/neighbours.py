"""Cut queries in batches of neighbours, which probe mostly the same inverted lists.

Queries are clustered by a few rounds of k-means, and a walk goes from each cluster to the nearest one
that it has not seen. The batches follow the walk, so the next batch finds many of its lists in memory.

Shards of a search run on different machines and must cut all queries alike. So the arithmetic is exact:
vectors are rounded to integers, whose sums of products float32 holds, in whatever order they are added.
"""

from __future__ import annotations

import math

import numpy as np

from laion_assets.io.arrays import Floats, Ids
from laion_assets.io.parallel import slices

STEPS = 1 << 11  # that the coordinate 1 is rounded to: products of unit vectors stay below 2^24
CLUSTERS_OF_A_BATCH, MOST_CLUSTERS = 4, 4096
SAMPLE = 16  # queries for each cluster, from which its centre is found
ROUNDS = 4
AT_ONCE = 1 << 12  # queries that are compared with all centres


def batches_of_neighbours(queries: Floats, numbers: Ids, size: int) -> list[Ids]:
    """Cut queries in batches whose queries are near each other.

    Args:
        queries: (q, d) float32 unit rows.
        numbers: (n,) ascending numbers of those to cut.
        size: queries of each batch; the last has the rest.

    Returns:
        The numbers of each batch, ascending, the same on every machine. The first batch has the first
        number.

    """
    batches = slices(len(numbers), size)
    if len(batches) < 2:
        return [numbers[batch] for batch in batches]
    clusters = min(CLUSTERS_OF_A_BATCH * len(batches), MOST_CLUSTERS, len(numbers))
    centres = _centres(queries[numbers[:: max(len(numbers) // (SAMPLE * clusters), 1)]], clusters)
    cluster = np.concatenate(
        [_nearest(_whole(queries[numbers[some]]), centres) for some in slices(len(numbers), AT_ONCE)]
    )
    order = np.argsort(_walk(centres, int(cluster[0]))[cluster], kind="stable")
    return [np.sort(numbers[order[batch]]) for batch in batches]


def _centres(sample: Floats, clusters: int) -> Floats:
    """Return the centres of clusters of some vectors, rounded as these are."""
    vectors = _whole(sample)
    centres = vectors[np.arange(clusters) * len(vectors) // clusters]
    for _ in range(ROUNDS):
        cluster = _nearest(vectors, centres)
        order = np.argsort(cluster, kind="stable")
        filled, starts = np.unique(cluster[order], return_index=True)
        sums = np.add.reduceat(vectors[order].astype(np.float64), starts)
        centres[filled] = [_direction(each) for each in sums]
    return centres


def _direction(total: Floats) -> Floats:
    """Return the direction of a sum of vectors, rounded as these are."""
    small = _whole(total / max(np.abs(total).max(), 1))
    return _whole(small / math.sqrt(max(float(small @ small), 1)))


def _nearest(vectors: Floats, centres: Floats) -> Ids:
    nearest: Ids = (vectors @ centres.T).argmax(axis=1)
    return nearest


def _walk(centres: Floats, first: int) -> Ids:
    """Return the turn of each centre in a walk that goes on to the nearest one that is left."""
    nearness, turn, here = centres @ centres.T, np.empty(len(centres), np.int64), first
    for number in range(len(centres)):
        turn[here] = number
        nearness[:, here] = -np.inf
        here = int(nearness[here].argmax())
    return turn


def _whole(vectors: Floats) -> Floats:
    whole: Floats = np.rint(vectors * STEPS)
    return whole
