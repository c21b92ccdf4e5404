"""Whether what was made is what it should be: measured anew, on what was written, by other means.

Samples are drawn with a fixed seed, so that the same files give the same answer.
What must not live here: what follows from an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.index.vectors import Vectors
from laion_assets.io.arrays import Bytes, Floats, Ids, Mask
from laion_assets.io.checksums import checksum_text
from laion_assets.io.tables import code_bytes
from laion_assets.search.filters import hashes

LISTS = 64  # inverted lists that are looked into
ROWS_OF_A_LIST = 4096
ANCHORS_OF_AGREEMENT = 1024  # rows whose nearest neighbour is looked for, in all lists together
ANCHORS_AT_ONCE = 16  # compared with what is looked at of a list: without lists, with 262,144 rows
SHUFFLES = 199
PARTS = 4  # of the rows, each asked by itself
CHANCE = 0.01  # of calling captions aligned that are not
FEWEST_PAIRS = 40
ANCHORS = 256  # rows that are compared with all
ROUNDING = 1e-5  # two decoders of the same code differ by less
SOUND_OF_A_LIST = 16  # rows that are looked at for damage
WHOLE_FILES = 256 << 20  # bytes; files up to this size may be read again
READ_AGAIN = 1 << 30  # bytes of such files in all: every run does it
HIGHEST = 1.1  # a row as the index stores it may be a little longer than 1
EXAMPLES = 5
PLAIN_URL = r"^https?://[A-Za-z0-9][A-Za-z0-9.-]*(/[^\s[:cntrl:]]*)?$"


@dataclass(frozen=True)
class Agreement:
    """How much more alike captions of neighbours are than those of any two, in a quarter of the rows.

    Attributes:
        pairs: neighbours of which both have a caption.
        near: mean share of words that the captions of neighbours have in common.
        apart: the same for captions drawn by chance.
        chance: of such a difference if metadata and index had nothing to do with each other.
        silent: other quarters, with too few captions to be asked.

    """

    pairs: int
    near: float
    apart: float
    chance: float
    silent: int = 0

    @property
    def can_tell(self) -> bool:
        """Whether there were captions enough."""
        return self.pairs >= FEWEST_PAIRS

    @property
    def is_aligned(self) -> bool:
        """Whether the captions are those of the rows; True where that cannot be told."""
        return not self.can_tell or self.chance <= CHANCE


def agreement(index: Index, metadata: Metadata) -> Agreement:
    """Measure whether metadata belongs to the rows of the index, whatever the seeds.

    Images that are alike have captions that are alike, more often than any two images: so the captions
    of rows and of their nearest neighbours are compared, and as a measure of chance, the same captions
    shuffled (a permutation test). Metadata that is shifted, or in another order, fails it. A file that
    is missing shifts only what comes after it: so each quarter of the rows is asked, the worst told, and
    how many have too few captions to be asked.
    """
    rows, neighbours = _neighbours(index, metadata)
    part = rows * PARTS // max(index.rows, 1)
    words = [_words(metadata, ids) for ids in (rows, neighbours)]
    parts = [
        _agreement([pair for pair, p in zip(zip(*words, strict=True), part, strict=True) if p == number])
        for number in range(PARTS)
    ]
    telling = [part for part in parts if part.can_tell]
    worst = max(telling or parts, key=lambda part: part.chance)
    return replace(worst, silent=PARTS - len(telling)) if telling else worst


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
    """Return rows that have metadata, and of each the nearest that has."""
    found: list[tuple[Ids, Ids]] = []
    wanted = ANCHORS_OF_AGREEMENT // min(max(index.nlist, 1), LISTS)
    for ids, vectors in index.sample(LISTS, ROWS_OF_A_LIST):
        named = metadata.covers(ids)
        ids, vectors = ids[named], vectors[named]
        if len(ids) < 2:
            continue
        anchors = np.linspace(0, len(ids) - 1, min(wanted, len(ids))).astype(np.int64)
        for start in range(0, len(anchors), ANCHORS_AT_ONCE):
            some = anchors[start : start + ANCHORS_AT_ONCE]
            cosines = vectors[some] @ vectors.T
            cosines[np.arange(len(some)), some] = -np.inf
            found.append((ids[some], ids[cosines.argmax(axis=1)]))
    empty = np.empty(0, np.int64)
    rows, neighbours = zip(*found, strict=True) if found else ([empty], [empty])
    return np.concatenate(rows), np.concatenate(neighbours)


def _words(metadata: Metadata, ids: Ids) -> list[frozenset[str]]:
    captions = metadata.take(ids, ["caption"])["caption"].to_pylist()
    return [frozenset(re.findall(r"\w{3,}", (caption or "").lower())) for caption in captions]


def _common(ours: Iterable[frozenset[str]], theirs: Iterable[frozenset[str]]) -> float:
    """Mean Jaccard index of pairs of sets of words."""
    return float(np.mean([len(a & b) / len(a | b) for a, b in zip(ours, theirs, strict=True)]))


@dataclass(frozen=True)
class Soundness:
    """What is wrong with rows of a staged index.

    Attributes:
        wrong: sentences.
        rows: that were looked at.
        without_vector: of these, zero or not finite: a search finds the others.

    """

    wrong: Sequence[str]
    rows: int
    without_vector: int


def soundness(index: Index) -> Soundness:
    """Look at rows of an index from many places."""
    wrong = []
    ids, present = _rows_with_vectors(index)
    odd = ids[(ids < 0) | (ids >= index.rows)]
    if len(odd):
        wrong.append(f"rows have numbers outside of 0 to {index.rows - 1:,}, such as {odd[0]}")
    if len(ids) and not present.any():
        wrong.append(f"none of {len(ids):,} rows can be decoded to a vector")
    return Soundness(wrong, len(ids), int((~present).sum()))


def _rows_with_vectors(index: Index) -> tuple[Ids, Mask]:
    """Return rows from many places, and of which there is a vector that is neither zero nor infinite."""
    sample = [(ids, vectors.any(axis=1)) for ids, vectors in index.sample(LISTS, SOUND_OF_A_LIST)]
    ids, present = zip((np.empty(0, np.int64), np.empty(0, np.bool_)), *sample, strict=True)
    return np.concatenate(ids), np.concatenate(present)


def changed(files: Iterable[tuple[str, str, int]]) -> list[str]:
    """Read files again and say which are not what was staged.

    Args:
        files: those that `to_read_again` chose.

    """
    return [
        f"{path} is no longer what was staged: its checksum differs"
        for path, checksum, _ in files
        if _checksum(path) != checksum
    ]


def to_read_again(files: Sequence[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Choose files by chance, always the same ones: none that is large, and not too much in all.

    Args:
        files: path, checksum as it was staged (crc32c in base64) and size of each.

    """
    chosen: list[tuple[str, str, int]] = []
    room = READ_AGAIN
    for number in np.random.default_rng(0).permutation(len(files)):
        size = files[number][2]
        if size <= min(WHOLE_FILES, room):
            chosen.append(files[number])
            room -= size
    return chosen


def _checksum(path: str) -> str:
    checksum = google_crc32c.Checksum()
    with open(path, "rb") as file:  # noqa: PTH123
        for _ in checksum.consume(file, 1 << 20):
            pass
    return checksum_text(checksum)


@dataclass(frozen=True)
class Ranking:
    """What is odd about similarities and ranks.

    Attributes:
        out_of_order: rows that are more similar than the row before them, or not ranked behind it.
        out_of_range: rows whose similarity is no number or no inner product of unit vectors.
        similarities: all of them, in order.

    """

    out_of_order: int
    out_of_range: int
    similarities: Floats


def ranking(rows: pa.Table) -> Ranking:
    """Look at all rows of a table: within a query, similarity falls as rank rises.

    Args:
        rows: rank, similarity, and seed where there are many queries; in the table's order.

    """
    similarity, rank = rows["similarity"].to_numpy(), rows["rank"].to_numpy()
    seed = rows["seed"].to_numpy() if "seed" in rows.column_names else np.zeros(len(rows))
    same = np.diff(seed) == 0
    wrong = same & ((np.diff(rank) <= 0) | ~(np.diff(similarity) <= 0))
    odd = ~(np.abs(similarity) <= HIGHEST)
    return Ranking(int(wrong.sum()), int(odd.sum()), similarity)


def near_duplicates_left(vectors: Vectors, groups: Ids, threshold: float) -> int:
    """Count rows that should have been united with another: a sample, each compared with all.

    Args:
        vectors: (n, d) unit rows.
        groups: (n,) each row is compared with all of its group; rows of different groups may be alike.
        threshold: cosine above which two rows are near-duplicates.

    """
    anchors = np.sort(np.random.default_rng(0).permutation(len(vectors))[:ANCHORS])
    left = 0
    for group in np.unique(groups[anchors]):
        members, ours = np.flatnonzero(groups == group), anchors[groups[anchors] == group]
        cosines = vectors[ours] @ vectors[members].T
        alike = cosines > threshold + ROUNDING
        alike &= ours[:, None] != members
        left += int(alike.any(axis=1).sum())
    return left


def codes_of(batches: Iterable[pa.RecordBatch], schema: pa.Schema, ids: Ids) -> Bytes:
    """Look up the codes of some ids, each once; one that is not there is left out.

    Args:
        batches: id and code; an id may stand there more than once.
        schema: of the batches.
        ids: ascending.

    """
    wanted = [batch.filter(pa.array(np.isin(batch["id"].to_numpy(), ids))) for batch in batches]
    found = pa.Table.from_batches(wanted, schema)
    _, first = np.unique(found["id"].to_numpy(), return_index=True)
    return code_bytes(found["code"].take(pa.array(first)))


@dataclass(frozen=True)
class Images:
    """What tells the images of a table apart, and which of them no downloader can fetch.

    Attributes:
        ids: (n,) in the table's order.
        urls: (n,) hashes of 64 bits: of ten million URLs two share one with a chance of 3e-6.
        not_web: rows whose URL is not one of the web.
        examples: a few of these URLs.

    """

    ids: Ids
    urls: Ids
    not_web: int
    examples: Sequence[str]


def images(batches: Iterable[pa.RecordBatch]) -> Images:
    """Look at all rows of a table, holding 16 bytes of each.

    Args:
        batches: id and url.

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
    """Count the rows whose value stands in a row before."""
    return len(values) - len(np.unique(values))


def not_web(urls: pa.Array) -> tuple[int, list[str]]:
    """Count what no downloader can fetch, and give a few examples: http(s), a host, no white space."""
    plain = pc.fill_null(pc.match_substring_regex(urls, PLAIN_URL), False)  # nearly all, and fast
    wrong = [url for url in urls.filter(pc.invert(plain)).to_pylist() if not is_web(url)]
    return len(wrong), [str(url)[:120] for url in wrong[:EXAMPLES]]


def is_web(url: str | None) -> bool:
    """Tell whether this is a well-formed http or https URL."""
    if not url or re.search(r"[\s\x00-\x1f\x7f]", url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a host or port that is none
        return False
