"""Audit an index and result tables: measure the written files, independently of the search.

Samples are drawn with a fixed seed, so the same files give the same result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.index.vectors import Vectors
from laion_assets.io.arrays import Bytes, Floats, Ids, Mask
from laion_assets.io.tables import code_bytes
from laion_assets.search.block_list import hashes

SAMPLED_LISTS = 64  # inverted lists
ROWS_OF_A_LIST = 4096
NEIGHBOURED_ROWS = 1024  # rows in total whose nearest neighbour is searched
NEIGHBOURED_AT_ONCE = 16  # rows compared at a time with a list's sample (262,144 rows without lists)
SHUFFLES = 199
PARTS = 4  # equal parts of the rows, each tested separately
CHANCE = 0.01  # probability of calling unrelated captions aligned
FEWEST_PAIRS = 40
ANCHORS = 256  # rows compared with all others
COSINE_ROUNDING = 1e-5  # cosines from two decoders of the same codes differ by less
SOUND_ROWS_OF_A_LIST = 16  # rows per list checked for damage
HIGHEST = 1.1  # a decoded row may be a little longer than 1
EXAMPLES = 5
PLAIN_URL = r"^https?://[A-Za-z0-9][A-Za-z0-9.-]*(/[^\s[:cntrl:]]*)?$"


@dataclass(frozen=True)
class Agreement:
    """Similarity of neighbours' captions, compared with random pairs, in one quarter of the rows.

    Attributes:
        pairs: pairs of neighbours that both have a caption.
        near: mean share of words that the captions of neighbours have in common.
        apart: the same share for random pairs of these captions.
        chance: probability of such a difference if the metadata were unrelated to the index.
        silent: number of quarters with too few captions for the test.

    """

    pairs: int
    near: float
    apart: float
    chance: float
    silent: int = 0

    @property
    def is_decidable(self) -> bool:
        """Whether there were enough captions for the test."""
        return self.pairs >= FEWEST_PAIRS

    @property
    def is_aligned(self) -> bool:
        """Whether captions belong to their rows; True if there are too few to decide."""
        return not self.is_decidable or self.chance <= CHANCE


def agreement(index: Index, metadata: Metadata) -> Agreement:
    """Measure whether the metadata belongs to the rows of the index.

    Similar images have similar captions more often than random pairs do. A permutation test compares the
    captions of rows with those of their nearest neighbours, and with the same captions shuffled. Metadata
    that is shifted or in another order fails. A missing file shifts only the rows after it, so each
    quarter of the rows is tested separately.

    Returns:
        The result of the worst quarter.

    """
    rows, neighbours = _neighbours(index, metadata)
    part = rows * PARTS // max(index.rows, 1)
    words = [_words(metadata, ids) for ids in (rows, neighbours)]
    parts = [
        _agreement([pair for pair, p in zip(zip(*words, strict=True), part, strict=True) if p == number])
        for number in range(PARTS)
    ]
    decided = [part for part in parts if part.is_decidable]
    worst = max(decided or parts, key=lambda part: part.chance)
    return replace(worst, silent=PARTS - len(decided)) if decided else worst


def _agreement(pairs: Sequence[tuple[frozenset[str], frozenset[str]]]) -> Agreement:
    pairs = [(one, other) for one, other in pairs if one and other]
    if len(pairs) < FEWEST_PAIRS:
        return Agreement(len(pairs), 0.0, 0.0, 1.0)
    ours, theirs = zip(*pairs, strict=True)
    near = _common(ours, theirs)
    random = np.random.default_rng(0)
    by_chance = [
        _common(ours, [theirs[i] for i in random.permutation(len(theirs))]) for _ in range(SHUFFLES)
    ]
    chance = (1 + sum(value >= near for value in by_chance)) / (1 + SHUFFLES)
    return Agreement(len(pairs), near, float(np.mean(by_chance)), chance)


def _neighbours(index: Index, metadata: Metadata) -> tuple[Ids, Ids]:
    """Return rows with metadata, and the nearest other row with metadata for each."""
    found: list[tuple[Ids, Ids]] = []
    wanted = NEIGHBOURED_ROWS // min(max(index.nlist, 1), SAMPLED_LISTS)
    for ids, vectors in index.sample(SAMPLED_LISTS, ROWS_OF_A_LIST):
        covered = metadata.covers(ids)
        ids, vectors = ids[covered], vectors[covered]
        if len(ids) < 2:
            continue
        anchors = np.linspace(0, len(ids) - 1, min(wanted, len(ids))).astype(np.int64)
        for start in range(0, len(anchors), NEIGHBOURED_AT_ONCE):
            batch = anchors[start : start + NEIGHBOURED_AT_ONCE]
            cosines = vectors[batch] @ vectors.T
            cosines[np.arange(len(batch)), batch] = -np.inf
            found.append((ids[batch], ids[cosines.argmax(axis=1)]))
    empty = np.empty(0, np.int64)
    rows, neighbours = zip(*found, strict=True) if found else ([empty], [empty])
    return np.concatenate(rows), np.concatenate(neighbours)


def _words(metadata: Metadata, ids: Ids) -> list[frozenset[str]]:
    captions = metadata.take(ids, ["caption"])["caption"].to_pylist()
    return [frozenset(re.findall(r"\w{3,}", (caption or "").lower())) for caption in captions]


def _common(ours: Iterable[frozenset[str]], theirs: Iterable[frozenset[str]]) -> float:
    """Return the mean Jaccard index of pairs of word sets."""
    return float(np.mean([len(a & b) / len(a | b) for a, b in zip(ours, theirs, strict=True)]))


ENOUGH_IDS = 64  # of which one is in the upper half, except with probability 2^-64


@dataclass(frozen=True)
class Soundness:
    """The problems found in a sample of an index's rows.

    Attributes:
        wrong: one sentence per problem.
        rows: number of rows in the sample.
        without_vector: number of rows whose vector is zero or not finite; a search never finds them.

    """

    wrong: Sequence[str]
    rows: int
    without_vector: int


def soundness(index: Index) -> Soundness:
    """Check a sample of rows from many inverted lists for damage."""
    wrong = []
    unshifted = "the parts of the index were merged without shifting their ids; merge them again"
    ids, present = _rows_with_vectors(index)
    odd = ids[(ids < 0) | (ids >= index.rows)]
    distinct, times = np.unique(ids, return_counts=True)
    if len(odd):
        wrong.append(f"rows have ids outside 0 to {index.rows - 1:,}, such as {odd[0]}")
    elif len(distinct) < len(ids):
        wrong.append(f"id {distinct[times.argmax()]} belongs to several rows: {unshifted}")
    elif len(ids) >= ENOUGH_IDS and ids.max() < index.rows // 2:
        wrong.append(f"all ids are below {ids.max() + 1:,}, of {index.rows:,} rows: {unshifted}")
    if len(ids) and not present.any():
        wrong.append(f"none of {len(ids):,} rows can be decoded to a vector")
    return Soundness(wrong, len(ids), int((~present).sum()))


def _rows_with_vectors(index: Index) -> tuple[Ids, Mask]:
    """Return the ids of rows from many lists, and whether each has a non-zero, finite vector."""
    sample = [
        (ids, vectors.any(axis=1)) for ids, vectors in index.sample(SAMPLED_LISTS, SOUND_ROWS_OF_A_LIST)
    ]
    ids, present = zip((np.empty(0, np.int64), np.empty(0, np.bool_)), *sample, strict=True)
    return np.concatenate(ids), np.concatenate(present)


@dataclass(frozen=True)
class Ranking:
    """Whether the similarities and ranks of a table are consistent.

    Attributes:
        out_of_order: number of rows that are more similar than the row before, or not ranked after it.
        out_of_range: number of rows whose similarity is NaN or not a possible inner product of unit
            vectors.
        similarities: similarities of all rows, in order.

    """

    out_of_order: int
    out_of_range: int
    similarities: Floats


def ranking(rows: pa.Table) -> Ranking:
    """Check that similarity falls as rank rises, within each query of a table.

    Args:
        rows: columns rank, similarity, and seed if there are several queries, in the table's order.

    """
    similarity, rank = rows["similarity"].to_numpy(), rows["rank"].to_numpy()
    seed = rows["seed"].to_numpy() if "seed" in rows.column_names else np.zeros(len(rows))
    same = np.diff(seed) == 0
    wrong = same & ((np.diff(rank) <= 0) | ~(np.diff(similarity) <= 0))
    odd = ~(np.abs(similarity) <= HIGHEST)
    return Ranking(int(wrong.sum()), int(odd.sum()), similarity)


def near_duplicates_left(vectors: Vectors, groups: Ids, threshold: float) -> int:
    """Count the rows of a sample that have a near-duplicate in their group.

    Args:
        vectors: (n, d) unit rows.
        groups: (n,) group of each row; near-duplicates in different groups are allowed.
        threshold: cosine above which two rows are near-duplicates.

    """
    anchors = np.sort(np.random.default_rng(0).permutation(len(vectors))[:ANCHORS])
    left = 0
    for group in np.unique(groups[anchors]):
        members, ours = np.flatnonzero(groups == group), anchors[groups[anchors] == group]
        cosines = vectors[ours] @ vectors[members].T
        near = cosines > threshold + COSINE_ROUNDING
        near &= ours[:, None] != members
        left += int(near.any(axis=1).sum())
    return left


def codes_of(batches: Iterable[pa.RecordBatch], schema: pa.Schema, ids: Ids) -> Bytes:
    """Return the code of each given id, in order of id; missing ids are skipped.

    Args:
        batches: columns id and code; an id may occur more than once.
        schema: the schema of the batches.
        ids: the ids, ascending.

    """
    wanted = [batch.filter(pa.array(np.isin(batch["id"].to_numpy(), ids))) for batch in batches]
    found = pa.Table.from_batches(wanted, schema)
    _, first = np.unique(found["id"].to_numpy(), return_index=True)
    return code_bytes(found["code"].take(pa.array(first)))


@dataclass(frozen=True)
class Images:
    """The ids and URLs of a table, and its URLs that no downloader can fetch.

    Attributes:
        ids: (n,) ids in the table's order.
        urls: (n,) 64-bit hashes of the URLs; the probability that two of ten million URLs share one is
            3e-6.
        not_web: number of rows whose URL is not a well-formed web address.
        examples: a few of these URLs.

    """

    ids: Ids
    urls: Ids
    not_web: int
    examples: Sequence[str]


def images(batches: Iterable[pa.RecordBatch]) -> Images:
    """Read all rows of a table, keeping 16 bytes per row.

    Args:
        batches: columns id and url.

    """
    ids, urls = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    wrong, examples = 0, list[str]()
    for batch in batches:
        ids.append(batch["id"].to_numpy())
        urls.append(hashes(batch["url"]))
        count, some = not_web(batch["url"])
        wrong, examples = wrong + count, [*examples, *some][:EXAMPLES]
    return Images(np.concatenate(ids), np.concatenate(urls), wrong, examples)


def repeated(values: Ids) -> int:
    """Count the values that repeat an earlier one."""
    return len(values) - len(np.unique(values))


def not_web(urls: pa.Array) -> tuple[int, list[str]]:
    """Count the URLs that are not well-formed http(s) URLs, and return some of them."""
    plain = pc.fill_null(
        pc.match_substring_regex(urls, PLAIN_URL), False
    )  # a fast test that nearly all URLs pass
    wrong = [url for url in urls.filter(pc.invert(plain)).to_pylist() if not is_web(url)]
    return len(wrong), [str(url)[:120] for url in wrong[:EXAMPLES]]


def is_web(url: str | None) -> bool:
    """Return whether this is a well-formed http or https URL."""
    if not url or re.search(r"[\s\x00-\x1f\x7f]", url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid host or port
        return False
