"""Both URL sets as one: a row per image.

Rows are one image when they have the same id, the same URL, or are near-duplicates, directly or through
others. Of each group the row with the lowest rank stays: similarities to different queries do not
compare, ranks do. Works from the two tables alone, without the index: the numbers of all rows are held
in memory (21 bytes a row), codes and URLs of each image once, other texts only of the rows that stay.
What must not live here: how tables are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from laion_assets.index.faiss_index import Decoder
from laion_assets.index.vectors import decoded
from laion_assets.io.arrays import Floats, Ids
from laion_assets.io.errors import InputError
from laion_assets.io.tables import Provenance, Table, code_bytes, decoder_bytes
from laion_assets.search.near_duplicates import components

ROWS_AT_ONCE = 1 << 16  # in one batch of the combined table


class Stored(Protocol):
    """A table that was written, to be read as often as needed."""

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""

    @property
    def footer(self) -> Mapping[str, str]:
        """Key-value metadata."""

    @property
    def where(self) -> str:
        """Location, for error messages."""

    def batches(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Read the rows in order."""


@dataclass
class CombinedFunnel:
    """Where the rows of both sets went."""

    knn: int
    centroid: int
    repeated_ids: int
    repeated_urls: int
    near_duplicates: int
    kept: int


@dataclass
class Combined:
    """The combined table and its figures."""

    table: Table
    funnel: CombinedFunnel


@dataclass
class _Rows:
    """The numbers of all rows of both sets, knn first."""

    ids: Ids
    rank: NDArray[np.int32]
    strategy: NDArray[np.int8]
    seed: NDArray[np.int32]
    similarity: Floats


def check_same_origin(knn: Stored, centroid: Stored, seeds: Stored) -> Provenance:
    """Refuse two sets that were not made from the same index and these seeds, with the same filters.

    Returns:
        The provenance of the knn set, with the settings of both, used and asked for.

    Raises:
        InputError: says on what they disagree and which to materialize again.

    """
    one = Provenance.from_footer(knn.footer, knn.where)
    other = Provenance.from_footer(centroid.footer, centroid.where)
    current = Provenance.from_footer(seeds.footer, seeds.where).seeds
    for asset, made in (("knn_urls", one), ("centroid_urls", other)):
        if made.seeds != current:
            raise InputError(
                f"{asset} of {made.seed_set!r} was made from other seeds or another settings.yaml "
                f"({made.seeds}) than seed_embeddings now holds ({current}): materialize {asset} again"
            )
        if not made.asked:
            raise InputError(
                f"{asset} of {made.seed_set!r} does not say what it was asked for, as it is of an older "
                f"version: materialize {asset} again"
            )
    older = "knn_urls" if one.written < other.written else "centroid_urls"
    if one.index != other.index:
        raise InputError(
            f"knn_urls and centroid_urls of {one.seed_set!r} were made from different indices "
            f"({one.index} and {other.index}): materialize {older} again, it is the older one"
        )
    for name in ("filters", "block_list"):
        if one.settings.get(name) != other.settings.get(name):
            raise InputError(
                f"knn_urls and centroid_urls of {one.seed_set!r} were made with different "
                f"{name.replace('_', ' ')} ({one.settings.get(name) or 'none'} and "
                f"{other.settings.get(name) or 'none'}): materialize {older} again, it is the older one"
            )
    return replace(
        one,
        settings=_settings_of_both(one.settings, other.settings),
        asked=_settings_of_both(one.asked, other.asked),
    )


def _settings_of_both(knn: Mapping[str, Any], centroid: Mapping[str, Any]) -> dict[str, Any]:
    """Take each number from its own set, the lower threshold, and a target and nprobe that both had."""
    of_centroid = ["nb_images_centroid"]
    if centroid["dedup_threshold"] < knn["dedup_threshold"]:
        of_centroid.append("dedup_threshold")
    values = {**knn} | {name: centroid[name] for name in of_centroid}
    origins = {name: origin for name, origin in knn["origins"].items() if name not in of_centroid}
    origins |= {name: o for name, o in centroid["origins"].items() if name in of_centroid}
    for name in ("target_images", "nprobe"):
        if centroid[name] != knn[name]:
            values[name] = None
            origins.pop(name, None)
    return values | {"origins": origins}


def combine(knn: Stored, centroid: Stored, threshold: float, pictures: int) -> Combined:
    """Unite the two sets.

    Args:
        knn: table of `knn_urls`.
        centroid: table of `centroid_urls`.
        threshold: cosine above which two images are near-duplicates.
        pictures: rows, from the top, that keep their thumbnails.

    Returns:
        A table with id, url, caption, similarity, rank, seed, strategies and what else travels, in
        order of rank, then id.

    """
    rows = _read_numbers(knn, centroid)
    order = np.lexsort((rows.seed, rows.ids, rows.strategy, rows.rank))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))  # the lower, the better; no two rows are equal

    unique_ids, image = np.unique(rows.ids, return_inverse=True)
    best = _lowest_by(image, place, len(unique_ids))  # place of the best row of each id
    by_rank = np.argsort(best)
    best, image = best[by_rank], np.argsort(by_rank)[image]
    representative = order[best]  # row of each image, best-ranked image first

    labels = _same_url(knn, centroid, representative)
    distinct_urls = len(np.unique(labels))
    if threshold < 1:  # where it is 1 there are no near-duplicates, and nothing to compare
        codes = code_bytes(_taken_in_order(knn, centroid, representative, ["code"])["code"])
        vectors = decoded(codes, _decoder(knn, centroid).decode_to_compare)
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
    batches = _written_out(knn, centroid, rows, kept, found_by[stays], schema, pictures)
    return Combined(Table(schema, batches), funnel)


def _read_numbers(knn: Stored, centroid: Stored) -> _Rows:
    parts: list[tuple[NDArray[Any], ...]] = []
    for number, table in enumerate((knn, centroid)):  # the order in which ties are settled
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
    return _Rows(*columns)


def _lowest_by(group: Ids, values: Ids, groups: int) -> Ids:
    lowest = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(lowest, group, values)
    return lowest


def _same_url(knn: Stored, centroid: Stored, representative: Ids) -> Ids:
    """Label each image with the first image that has exactly its URL."""
    urls = _taken_in_order(knn, centroid, representative, ["url"])["url"]
    codes = pc.dictionary_encode(urls).combine_chunks()
    number = codes.indices.to_numpy()
    first = _lowest_by(number, np.arange(len(number)), len(codes.dictionary))
    labels: Ids = first[number]
    return labels


def _united(a: Ids, b: Ids) -> Ids:
    """Merge two labellings of the same rows into that of both relations together."""
    n, rows = len(a), np.arange(len(a))
    pairs = (np.tile(rows, 2), np.concatenate([a, b]))
    graph = coo_array((np.ones(2 * n, np.bool_), pairs), shape=(n, n))
    count, group = connected_components(graph, directed=False)
    united: Ids = _lowest_by(group, rows, count)[group]
    return united


def _decoder(knn: Stored, centroid: Stored) -> Decoder:
    one, other = (Decoder.from_bytes(decoder_bytes(t.footer, t.where)) for t in (knn, centroid))
    return one.merged(other)


def _taken_in_order(knn: Stored, centroid: Stored, rows: Ids, columns: list[str]) -> pa.Table:
    """Return the given rows of both sets (knn rows count first), in the order given."""
    found, place = _gathered(knn, centroid, rows, columns)
    return found.take(pa.array(place))


def _gathered(
    knn: Stored, centroid: Stored, rows: Ids, columns: list[str]
) -> tuple[pa.Table, NDArray[np.int64]]:
    """Return the given rows of both sets as they lie there, and the place of each among them."""
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
    """The type of which one array may hold more than 2 GiB: some 25 million URLs are more."""
    wider = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    return wider.get(kind, kind)


def _schema(knn: pa.Schema) -> pa.Schema:
    given = {field.name: field.type for field in knn if field.name != "code"}
    first = ("id", "url", "caption", "similarity", "rank", "seed")
    return pa.schema(
        {name: given[name] for name in first}
        | {"strategies": pa.list_(pa.string())}
        | {name: kind for name, kind in given.items() if name not in first}
    )


def _written_out(
    knn: Stored,
    centroid: Stored,
    rows: _Rows,
    kept: Ids,
    found_by: NDArray[np.int8],
    schema: pa.Schema,
    pictures: int,
) -> Iterator[pa.RecordBatch]:
    texts = [
        name for name in schema.names if name not in ("id", "similarity", "rank", "seed", "strategies")
    ]
    found, place = _gathered(knn, centroid, kept, texts)
    strategies = pa.array([[], ["knn"], ["centroid"], ["knn", "centroid"]], pa.list_(pa.string()))
    for start in range(0, len(kept), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        taken = found.take(pa.array(place[some]))
        seed = rows.seed[kept[some]]
        columns = {name: taken[name] for name in texts} | {
            "id": pa.array(rows.ids[kept[some]]),
            "similarity": pa.array(rows.similarity[kept[some]]),
            "rank": pa.array(rows.rank[kept[some]]),
            "seed": pa.array(seed, mask=seed < 0),
            "strategies": strategies.take(pa.array(found_by[some])),
        }
        if "thumbnail" in columns:
            shown = np.arange(start, start + len(taken)) < pictures
            columns["thumbnail"] = pc.if_else(pa.array(shown), columns["thumbnail"], None)
        table = pa.table({name: columns[name] for name in schema.names})
        yield from table.cast(schema).to_batches()
