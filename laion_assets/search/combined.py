"""Combine both URL sets into one table with a row per image.

Rows belong to one image if they have the same id or URL, or are near-duplicates, directly or
transitively. The row with the lowest rank represents the image: ranks of different queries are
comparable, similarities are not. Only the two tables are needed, not the index. Memory holds the numeric
columns of all rows (21 bytes per row), the code and URL of each image once, and the text columns of the
rows that are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from laion_assets.index.decoder import Decoder
from laion_assets.index.vectors import decoded_codes
from laion_assets.io.arrays import Floats, Ids
from laion_assets.io.tables import code_bytes
from laion_assets.search.near_duplicates import components

COMBINED_ROWS = 1 << 16  # rows per batch of the combined table
DECODER = "decoder"  # attachment of a table of found rows
NOT_HANDED_OVER = ("code", "thumbnail")


class Stored(Protocol):
    """A stored table that can be read several times."""

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""

    def attachment(self, name: str) -> bytes:
        """Read a file that belongs to the table."""

    def batches(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Read the rows in order."""


@dataclass(frozen=True)
class CombinedFunnel:
    """Numbers of rows that the steps of combining two sets read, dropped and kept."""

    knn: int
    centroid: int
    repeated_ids: int
    repeated_urls: int
    near_duplicates: int
    kept: int


@dataclass(frozen=True)
class Combined:
    """The combined table in batches, and its row counts.

    Attributes:
        schema: the schema of each batch.
        batches: the rows, sorted by rank, then id; can be read only once.
        funnel: rows read, dropped and kept.

    """

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]
    funnel: CombinedFunnel


@dataclass
class _AccumulatedRows:
    """The numeric columns of all rows of both sets, knn first."""

    ids: Ids
    rank: NDArray[np.int32]
    strategy: NDArray[np.int8]
    seed: NDArray[np.int32]
    similarity: Floats


def combine(knn: Stored, centroid: Stored, threshold: float) -> Combined:
    """Combine two URL sets into one table with a row per image.

    Args:
        knn: rows found around each seed.
        centroid: rows found around the centroid.
        threshold: cosine above which two images are near-duplicates.

    Returns:
        A table with id, url, caption, similarity, rank, seed, strategies and the other metadata columns,
        without thumbnails and codes.

    """
    rows = _read_numbers(knn, centroid)
    order = np.lexsort((rows.seed, rows.ids, rows.strategy, rows.rank))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))  # lower is better; no two rows are equal

    unique_ids, image = np.unique(rows.ids, return_inverse=True)
    best = _lowest_by(image, place, len(unique_ids))  # position of the best row of each id
    by_rank = np.argsort(best)
    best, image = best[by_rank], np.argsort(by_rank)[image]
    representative = order[best]  # row of each image, best-ranked image first

    labels = _same_url(knn, centroid, representative)
    distinct_urls = len(np.unique(labels))
    if threshold < 1:  # at 1 nothing is a near-duplicate
        codes = code_bytes(_taken_in_order(knn, centroid, representative, ["code"])["code"])
        vectors = decoded_codes(codes, _decoder(knn, centroid).decode_to_compare)
        labels = _united(labels, components(vectors, threshold))

    stays = np.flatnonzero(labels == np.arange(len(labels)))
    found_by = np.zeros(len(labels), np.int8)
    np.bitwise_or.at(found_by, labels[image], np.int8(1) << rows.strategy)
    kept = representative[stays]
    final = np.lexsort((rows.ids[kept], rows.rank[kept]))
    kept, stays = kept[final], stays[final]

    funnel = CombinedFunnel(
        knn=int((rows.strategy == 0).sum()),
        centroid=int((rows.strategy == 1).sum()),
        repeated_ids=len(rows.ids) - len(unique_ids),
        repeated_urls=len(unique_ids) - distinct_urls,
        near_duplicates=distinct_urls - len(stays),
        kept=len(stays),
    )
    schema = _schema(knn.schema)
    return Combined(schema, _batches(knn, centroid, rows, kept, found_by[stays], schema), funnel)


def _read_numbers(knn: Stored, centroid: Stored) -> _AccumulatedRows:
    parts: list[tuple[NDArray[Any], ...]] = []
    for number, table in enumerate((knn, centroid)):  # ties go to knn
        names = [name for name in table.schema.names if name in ("id", "rank", "seed", "similarity")]
        for batch in table.batches(names):
            n = len(batch)
            parts.append(
                (
                    batch["id"].to_numpy(),
                    batch["rank"].to_numpy(),
                    np.full(n, number, np.int8),
                    batch["seed"].to_numpy() if "seed" in names else np.full(n, -1, np.int32),
                    batch["similarity"].to_numpy(),
                )
            )
    kinds = (np.int64, np.int32, np.int8, np.int32, np.float32)
    parts.append(tuple(np.empty(0, kind) for kind in kinds))
    columns: list[NDArray[Any]] = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return _AccumulatedRows(*columns)


def _lowest_by(group: Ids, values: Ids, groups: int) -> Ids:
    lowest = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(lowest, group, values)
    return lowest


def _same_url(knn: Stored, centroid: Stored, representative: Ids) -> Ids:
    """Label each image with the first image that has the same URL."""
    urls = _taken_in_order(knn, centroid, representative, ["url"])["url"]
    codes = pc.dictionary_encode(urls).combine_chunks()
    number = codes.indices.to_numpy()
    first = _lowest_by(number, np.arange(len(number)), len(codes.dictionary))
    labels: Ids = first[number]
    return labels


def _united(a: Ids, b: Ids) -> Ids:
    """Merge two labelings: images joined by either one get the same label."""
    n, rows = len(a), np.arange(len(a))
    pairs = (np.tile(rows, 2), np.concatenate([a, b]))
    graph = coo_array((np.ones(2 * n, np.bool_), pairs), shape=(n, n))
    count, group = connected_components(graph, directed=False)
    united: Ids = _lowest_by(group, rows, count)[group]
    return united


def _decoder(knn: Stored, centroid: Stored) -> Decoder:
    one, other = (Decoder.from_bytes(table.attachment(DECODER)) for table in (knn, centroid))
    return one.merged(other)


def _taken_in_order(knn: Stored, centroid: Stored, rows: Ids, columns: list[str]) -> pa.Table:
    """Return the given rows of both sets in the order given; row numbers start with the knn rows."""
    found, place = _gathered(knn, centroid, rows, columns)
    return found.take(pa.array(place))


def _gathered(
    knn: Stored, centroid: Stored, rows: Ids, columns: list[str]
) -> tuple[pa.Table, NDArray[np.int64]]:
    """Return the given rows in the order of the tables, and the position of each among them."""
    unsorted = np.argsort(rows, kind="stable")
    wanted = rows[unsorted]
    schema = pa.schema([(name, _wide(knn.schema.field(name).type)) for name in columns])
    parts: list[pa.Table] = [schema.empty_table()]
    start = 0
    for table in (knn, centroid):
        for batch in table.batches(columns):
            low, high = np.searchsorted(wanted, [start, start + len(batch)])
            if high > low:
                picked = batch.take(pa.array(wanted[low:high] - start))
                parts.append(pa.Table.from_batches([picked]).select(columns).cast(schema))
            start += len(batch)
    return pa.concat_tables(parts).combine_chunks(), np.argsort(unsorted)


def _wide(kind: pa.DataType) -> pa.DataType:
    """Return a type whose arrays may exceed 2 GiB, as those of about 25 million URLs do."""
    wider = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    return wider.get(kind, kind)


def _schema(knn: pa.Schema) -> pa.Schema:
    given = {field.name: field.type for field in knn if field.name not in NOT_HANDED_OVER}
    first = ("id", "url", "caption", "similarity", "rank", "seed")
    return pa.schema(
        {name: given[name] for name in first}
        | {"strategies": pa.list_(pa.string())}
        | {name: kind for name, kind in given.items() if name not in first}
    )


def _batches(
    knn: Stored,
    centroid: Stored,
    rows: _AccumulatedRows,
    kept: Ids,
    found_by: NDArray[np.int8],
    schema: pa.Schema,
) -> Iterator[pa.RecordBatch]:
    texts = [
        name for name in schema.names if name not in ("id", "similarity", "rank", "seed", "strategies")
    ]
    found, place = _gathered(knn, centroid, kept, texts)
    strategies = pa.array([[], ["knn"], ["centroid"], ["knn", "centroid"]], pa.list_(pa.string()))
    for start in range(0, len(kept), COMBINED_ROWS):
        some = slice(start, start + COMBINED_ROWS)
        taken = found.take(pa.array(place[some]))
        seed = rows.seed[kept[some]]
        columns = {name: taken[name] for name in texts} | {
            "id": pa.array(rows.ids[kept[some]]),
            "similarity": pa.array(rows.similarity[kept[some]]),
            "rank": pa.array(rows.rank[kept[some]]),
            "seed": pa.array(seed, mask=seed < 0),
            "strategies": strategies.take(pa.array(found_by[some])),
        }
        table = pa.table({name: columns[name] for name in schema.names})
        yield from table.cast(schema).to_batches()
