"""Reach a target: search around the centroid until both URL sets together hold enough images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import pyarrow as pa

from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.io.arrays import Floats
from laion_assets.search.combined import Stored, combine
from laion_assets.search.retrieval import WRITTEN_ROWS, Found, Request, retrieve_table

LEAST_GROWTH = 1.25  # of the images to keep, from one search to the next


@dataclass(frozen=True)
class _InMemory:
    """A table that `combine` can read, with its decoder as the only attachment."""

    table: pa.Table
    decoder: bytes

    @property
    def schema(self) -> pa.Schema:
        return self.table.schema

    def attachment(self, name: str) -> bytes:  # noqa: ARG002  # of the protocol
        return self.decoder

    def batches(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        chosen = self.table if columns is None else self.table.select(list(columns))
        yield from chosen.to_batches()


def retrieve_the_rest(
    index: Index,
    metadata: Metadata,
    centroid: Floats,
    request: Request,
    images: int,
    knn: Stored,
    write: Callable[[pa.RecordBatch], None],
) -> Found:
    """Search around the centroid until the rows of both searches are enough different images.

    How many of its images are new is known only once they are compared with those found around the seeds.
    So the search keeps as many as the request says at first, and then more.

    Args:
        index: where to look.
        metadata: of the rows of the index.
        centroid: (1, dimension) float32 unit row.
        request: how similar, and where to start.
        images: images wanted of both searches together, at least 1.
        knn: rows found around each seed.
        write: takes the rows, see `retrieve`.

    Returns:
        What the search found. Both searches together have fewer images than wanted only where
        `Found.short` says that the index has no more.

    """
    while True:
        table, found = retrieve_table(index, metadata, centroid, request, per_seed=False)
        both = combine(knn, _InMemory(table, found.decoder), request.dedup_threshold).funnel.kept
        if both >= images or found.short:
            break
        request = _larger(request, found, images - both)
    for batch in table.to_batches(WRITTEN_ROWS):
        write(batch)
    return found


def _larger(request: Request, found: Found, missing: int) -> Request:
    """Return the next request, on the assumption that every second further image is new."""
    keep = request.keep or 1
    more = max(keep + 2 * missing, math.ceil(LEAST_GROWTH * keep))
    return replace(request, k=math.ceil(found.funnel.requested * more / keep), keep=more)
