"""Combine both URL sets into one table with a row per image.

Rows belong to one image if they have the same id or URL, or are near-duplicates, directly or
transitively. The row with the lowest rank represents the image: ranks of different queries are
comparable, similarities are not. Only the two tables are needed, not the index.

Memory holds numbers: some 100 bytes a row, most of them while rows are sorted. Codes, sketches and the
text columns of the rows that are kept lie on the local disk, see `spill`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from laion_assets.index.decoder import Decoder
from laion_assets.index.vectors import Coded, held
from laion_assets.io.arrays import Bytes, Floats, Ids
from laion_assets.io.spill import sorted_batches, spilled
from laion_assets.io.tables import code_bytes
from laion_assets.search.block_list import wide_hashes
from laion_assets.search.links import Forest
from laion_assets.search.near_duplicates import components
from laion_assets.search.needs import Needs

COMBINED_ROWS = 1 << 16  # rows per batch of the combined table
HELD_VECTORS = 1 << 16  # more would take more memory than `Needs` counts
WORTH_SAYING = 60  # core-seconds; what takes longer is said before
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
    beyond_target: int
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


@dataclass(frozen=True)
class Rows:
    """The numeric columns of all rows of both sets, knn first."""

    ids: Ids
    rank: NDArray[np.int32]
    strategy: NDArray[np.int8]
    seed: NDArray[np.int32]
    similarity: Floats


def combine(
    knn: Stored,
    centroid: Stored,
    threshold: float,
    most: int | None = None,
    log: Callable[[str], None] = lambda _: None,
    links: Iterable[tuple[Ids, Ids]] | None = None,
) -> Combined:
    """Combine two URL sets into one table with a row per image.

    Args:
        knn: rows found around each seed.
        centroid: rows found around the centroid.
        threshold: cosine above which two images are near-duplicates.
        most: images to keep, the first in the order of the table; None keeps all.
        log: called with what comparing the images takes, before that begins.
        links: pairs of near-duplicates that connect all of them, as `stripes` finds them; None compares
            the images here.

    Returns:
        A table with id, url, caption, similarity, rank, seed, strategies and the other metadata columns,
        without thumbnails and codes.

    Raises:
        InputError: this machine has too little memory or disk; nothing was compared yet.

    """
    rows = read_numbers(knn, centroid)
    representative, image = images_of(rows)
    compares = links is None and threshold < 1  # at 1 nothing is a near-duplicate
    if compares:
        needs = Needs.of(len(representative), len(rows.ids))
        needs.check()
        if needs.core_seconds > WORTH_SAYING:
            log(str(needs))
    urls, codes = urls_and_codes(knn, centroid, representative, with_codes=compares)
    forest = Forest(np.arange(len(representative)))
    forest.connect(*_equal_urls(urls))
    distinct_urls = forest.count()
    if compares:
        decoder = decoder_of(knn, centroid)
        labels = components(held(Coded(codes, decoder), HELD_VECTORS), threshold)
        links = [differing(np.arange(len(labels)), labels)]
    for one, other in links or ():
        forest.connect(one, other)
    labels = forest.labels()

    stays = np.flatnonzero(labels == np.arange(len(labels)))
    found_by = np.zeros(len(labels), np.int8)
    np.bitwise_or.at(found_by, labels[image], np.int8(1) << rows.strategy)
    images = len(stays)
    kept = representative[stays]
    final = np.lexsort((rows.ids[kept], rows.rank[kept]))[:most]
    kept, stays = kept[final], stays[final]

    funnel = CombinedFunnel(
        knn=int((rows.strategy == 0).sum()),
        centroid=int((rows.strategy == 1).sum()),
        repeated_ids=len(rows.ids) - len(representative),
        repeated_urls=len(representative) - distinct_urls,
        near_duplicates=distinct_urls - images,
        beyond_target=images - len(stays),
        kept=len(stays),
    )
    schema = _schema(knn.schema)
    return Combined(schema, _batches(knn, centroid, rows, kept, found_by[stays], schema), funnel)


def differing(before: Ids, after: Ids) -> tuple[Ids, Ids]:
    """Return links that turn labels of components into later ones: rows, and their new labels."""
    rows = np.flatnonzero(after != before)
    return rows, after[rows]


def read_numbers(knn: Stored, centroid: Stored) -> Rows:
    """Read the numeric columns of both sets."""
    kinds = (np.int64, np.int32, np.int8, np.int32, np.float32)
    columns: list[list[NDArray[Any]]] = [[np.empty(0, kind)] for kind in kinds]
    for number, table in enumerate((knn, centroid)):  # ties go to knn
        names = [name for name in table.schema.names if name in ("id", "rank", "seed", "similarity")]
        for batch in table.batches(names):
            n = len(batch)
            parts = (
                batch["id"].to_numpy(),
                batch["rank"].to_numpy(),
                np.full(n, number, np.int8),
                batch["seed"].to_numpy() if "seed" in names else np.full(n, -1, np.int32),
                batch["similarity"].to_numpy(),
            )
            for column, part in zip(columns, parts, strict=True):
                column.append(part)
    joined: list[NDArray[Any]] = []
    while columns:  # in sequence, so that only one exists twice
        joined.append(np.concatenate(columns.pop(0)))
    return Rows(*joined)


def images_of(rows: Rows) -> tuple[Ids, NDArray[np.int32]]:
    """Return the best row of each id, best-ranked first; and for each row, the place of its id there."""
    order = np.lexsort((rows.seed, rows.ids, rows.strategy, rows.rank))  # no two rows are equal
    _, first, image = np.unique(rows.ids[order], return_index=True, return_inverse=True)
    by_rank = np.argsort(first)
    place = np.empty(len(first), np.int32)
    place[by_rank] = np.arange(len(first), dtype=np.int32)
    image_of = np.empty(len(order), np.int32)
    image_of[order] = place[image]
    return order[first[by_rank]], image_of


def urls_and_codes(knn: Stored, centroid: Stored, rows: Ids, *, with_codes: bool) -> tuple[Ids, Bytes]:
    """Return the hashes of the URLs (n, 2) of some rows, and their codes (n, code size)."""
    size = knn.schema.field("code").type.byte_width if with_codes else 0
    urls, codes = np.empty((len(rows), 2), np.int64), spilled((len(rows), size), np.uint8)
    for places, batch in _picked(knn, centroid, rows, ["url", *(["code"] if with_codes else [])]):
        urls[places] = wide_hashes(batch["url"])
        if with_codes:
            codes[places] = code_bytes(pa.chunked_array([batch["code"]]))
    return urls, codes


def _equal_urls(urls: Ids) -> tuple[Ids, Ids]:
    """Return pairs of images that have the same URL, enough to connect all of them."""
    order = np.lexsort((urls[:, 1], urls[:, 0]))
    equal = (urls[order[1:]] == urls[order[:-1]]).all(axis=1)
    return order[:-1][equal], order[1:][equal]


def decoder_of(knn: Stored, centroid: Stored) -> Decoder:
    """Return a decoder of the codes of both sets."""
    one, other = (Decoder.from_bytes(table.attachment(DECODER)) for table in (knn, centroid))
    return one.merged(other)


def _picked(
    knn: Stored, centroid: Stored, rows: Ids, columns: list[str]
) -> Iterator[tuple[Ids, pa.RecordBatch]]:
    """Yield some rows in the order of the tables, each with its position among those requested.

    Row numbers start with the knn rows.
    """
    by_row = np.argsort(rows)
    wanted = rows[by_row]
    start = 0
    for table in (knn, centroid):
        for batch in table.batches(columns):
            low, high = np.searchsorted(wanted, [start, start + len(batch)])
            if high > low:
                picked = batch.take(pa.array(wanted[low:high] - start))
                yield by_row[low:high], picked.select(columns)
            start += len(batch)


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
    rows: Rows,
    kept: Ids,
    found_by: NDArray[np.int8],
    schema: pa.Schema,
) -> Iterator[pa.RecordBatch]:
    texts = [
        name for name in schema.names if name not in ("id", "similarity", "rank", "seed", "strategies")
    ]
    taken = sorted_batches(
        _picked(knn, centroid, kept, texts),
        pa.schema([schema.field(name) for name in texts]),
        len(kept),
        COMBINED_ROWS,
    )
    strategies = pa.array([[], ["knn"], ["centroid"], ["knn", "centroid"]], pa.list_(pa.string()))
    start = 0
    for batch in taken:
        some = slice(start, start := start + len(batch))
        seed = rows.seed[kept[some]]
        columns = {name: batch[name] for name in texts} | {
            "id": pa.array(rows.ids[kept[some]]),
            "similarity": pa.array(rows.similarity[kept[some]]),
            "rank": pa.array(rows.rank[kept[some]]),
            "seed": pa.array(seed, mask=seed < 0),
            "strategies": strategies.take(pa.array(found_by[some])),
        }
        yield pa.RecordBatch.from_pydict({name: columns[name] for name in schema.names}, schema)
