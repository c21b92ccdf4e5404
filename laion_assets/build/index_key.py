"""faiss factory keys: which are supported, and which suits a number of rows."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from laion_assets.index import ID_SIZE
from laion_assets.io.errors import InputError

EXAMPLE = "OPQ128_896,IVF131072_HNSW32,PQ128x8"
ROWS_PER_LIST = 39  # with fewer, centres are poor and faiss warns
CODEBOOK = 256  # entries of a codebook of PQ with 8 bits
EXACT_ROWS = 20_000
FLAT_ROWS = 1_000_000
LISTS_WITH_GRAPH = 1_000
PQ_BYTES = (256, 128, 64, 48, 32, 24, 16, 8, 4)
LAION_BYTES_PER_ROW = 136
SAMPLED_PER_LIST = 40
SAMPLED_ROWS = 65_536
_KEY = re.compile(
    r"(?:OPQ(?P<opq>\d+)(?:_(?P<width>\d+))?,)?IVF(?P<lists>\d+)(?:_HNSW(?P<graph>\d+))?,"
    r"(?:Flat|PQ(?P<pq>\d+)(?:x8)?)"
)
_NO_LISTS = re.compile(r"Flat|HNSW(?P<graph>\d+)(?:,Flat|_Flat)?")


@dataclass(frozen=True)
class IndexKey:
    """A faiss factory key in parts.

    Attributes:
        text: the key.
        lists: number of inverted lists; 0 for Flat and HNSW.
        graph: number of HNSW links per list or row; 0 without HNSW.
        opq: number of subspaces that OPQ's rotation is trained for; 0 without OPQ.
        width: dimension after OPQ; 0 if it does not change.
        pq: bytes of a PQ code; 0 if vectors are stored.

    """

    text: str
    lists: int = 0
    graph: int = 0
    opq: int = 0
    width: int = 0
    pq: int = 0

    @classmethod
    def parse(cls, text: str, dimension: int, rows: int | None = None) -> IndexKey:
        """Parse a key.

        Args:
            text: the key.
            dimension: dimension of the vectors.
            rows: number of rows, so that an error names a key that fits them.

        Raises:
            InputError: the key is not supported, or not with this dimension.

        """
        example = EXAMPLE if rows is None else index_key_for(rows, dimension)

        def refused(reason: str) -> InputError:
            return InputError(
                f'the index "{text}" {reason}: give a faiss key such as "{example}"', "index_key"
            )

        found = _KEY.fullmatch(text) or _NO_LISTS.fullmatch(text)
        if found is None:
            raise refused(
                "has a type that is not supported; supported are Flat, HNSW, IVF + Flat and IVF + PQ "
                "(8 bits), optionally with OPQ",
            )
        numbers = {name: int(number) for name, number in found.groupdict().items() if number}
        if 0 in numbers.values():
            raise refused("has a 0")
        key = cls(text, **numbers)
        if key.graph == 1:
            raise refused("has HNSW1, but HNSW needs 2 links or more")
        after = key.width or dimension
        for name, parts in (("OPQ", key.opq), ("PQ", key.pq)):
            if parts and after % parts:
                raise refused(f"has {name}{parts}, which does not divide the dimension {after}")
        return key

    def fewest_rows(self, per_centre: int = ROWS_PER_LIST) -> int:
        """Return the number of rows that training needs.

        Args:
            per_centre: rows needed per list and per codebook entry.

        """
        codes = CODEBOOK if self.pq or self.opq else 0
        return per_centre * max(self.lists if self.lists > 1 else 0, codes)

    def check_rows(self, rows: int, per_centre: int = ROWS_PER_LIST) -> None:
        """Raise InputError if there are fewer rows than training needs.

        Args:
            rows: number of rows to train on.
            per_centre: see `fewest_rows`.

        """
        needed = self.fewest_rows(per_centre)
        if rows < needed:
            raise InputError(
                f'the index "{self.text}" needs {needed:,} rows to train on, {per_centre} '
                f"per list and per codebook entry, but there are {rows:,}: choose fewer "
                'lists, or "IVF1,Flat" for a few thousand rows',
                "index_key",
            )


def check_key(text: str, dimension: int, rows: int, per_centre: int = ROWS_PER_LIST) -> IndexKey:
    """Parse a key and check that there are enough rows to train it.

    Args:
        text: the key.
        dimension: dimension of the vectors.
        rows: number of rows in the index.
        per_centre: see `IndexKey.fewest_rows`.

    Raises:
        InputError: the key is not supported, not with this dimension, or not with so few rows.

    """
    key = IndexKey.parse(text, dimension, rows)
    key.check_rows(rows, per_centre)
    return key


def index_key_for(rows: int, dimension: int, bytes_per_row: int | None = None) -> str:
    """Return the faiss factory key that suits a number of rows.

    The rule is that of autofaiss 2.18.0 for memory-mapped indices (`get_optimal_index_keys_v2`), which
    built LAION-5B's index:

    - below 1,000,000 rows, vectors in about `4 sqrt(rows)` lists, a power of two;
    - with more rows, or if `bytes_per_row` is too small for vectors, OPQ and the largest PQ code that
      fits into `bytes_per_row` together with an id of 8 bytes;
    - 16,384 lists from 1,000,000 rows, 65,536 from 10,000,000 and 131,072 from 300,000,000;
    - HNSW finds the lists if there are 1,000 or more.

    It differs in three ways. Below 20,000 rows the index has a single list and is exact; autofaiss uses
    lists from 1,000 rows and codes from 10,000. The number of lists is limited so that training has 40
    rows per list, because faiss warns of poor centres below 39. The default of `bytes_per_row` is
    LAION-5B's 136 instead of a share of the memory.

    Args:
        rows: number of rows in the index.
        dimension: dimension of the vectors.
        bytes_per_row: most bytes per row of the index; by default enough for vectors below 1,000,000
            rows, and 136 from there.

    Raises:
        InputError: no code is small enough for `bytes_per_row`.

    """
    if bytes_per_row is not None and bytes_per_row < PQ_BYTES[-1] + ID_SIZE:
        raise InputError(
            f"a row of an index needs at least {PQ_BYTES[-1] + ID_SIZE} bytes, {ID_SIZE} of them for "
            f"its id, not {bytes_per_row}",
            "bytes_per_row",
        )
    if rows < EXACT_ROWS:
        return "IVF1,Flat"
    lists = _lists(rows)
    vector_bytes = 4 * dimension + ID_SIZE
    if rows < FLAT_ROWS and (bytes_per_row is None or bytes_per_row >= vector_bytes):
        return f"IVF{lists},Flat"
    room = (LAION_BYTES_PER_ROW if bytes_per_row is None else bytes_per_row) - ID_SIZE
    pq = next((size for size in PQ_BYTES if size <= room and size < dimension), None)
    if pq is None:
        return f"IVF{lists},Flat"
    width = (min(dimension // pq, 6) + 1) * pq
    graph = "_HNSW32" if lists >= LISTS_WITH_GRAPH else ""
    return f"OPQ{pq}_{width},IVF{lists}{graph},PQ{pq}x8"


def _lists(rows: int) -> int:
    """Return autofaiss's number of lists for these rows, or as many as can be trained if fewer."""
    for fewest, lists in ((300_000_000, 131_072), (10_000_000, 65_536), (1_000_000, 16_384)):
        if rows >= fewest:
            return lists
    wanted = round(math.log2(4 * math.sqrt(rows)))
    return 1 << min(wanted, int(math.log2(rows / SAMPLED_PER_LIST)))


def training_rows(key: str, rows: int) -> int:
    """Return the useful sample size to train an index.

    Args:
        key: faiss factory key.
        rows: number of rows in the index.

    Raises:
        InputError: the key is not supported.

    """
    found = _KEY.fullmatch(key) or _NO_LISTS.fullmatch(key)
    if found is None:
        IndexKey.parse(key, 1)
        return 0
    numbers = found.groupdict()
    lists = int(numbers.get("lists") or 0)
    return min(rows, max(SAMPLED_PER_LIST * lists, SAMPLED_ROWS)) if lists else 0
