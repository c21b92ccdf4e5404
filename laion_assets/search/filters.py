"""Filters drop images that are on a block list or fail a condition.

A condition compares a metadata column with a number or a quoted word. Conditions are joined by `and`:
`punsafe < 0.5 and width >= 256 and NSFW == "UNLIKELY"`. They are parsed, never evaluated as code. Null
and NaN fail every condition, because a missing safety score does not make an image safe.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from laion_assets.index.metadata import URL_COLUMNS
from laion_assets.io.arrays import Ids, Mask
from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage, reaching
from laion_assets.io.text import count

ABOUT_BLOCK_LIST = "block_list"  # the setting that errors name
ENTRIES_AT_ONCE = 1 << 16  # entries of a block list read at a time
UNREADABLE = "\N{REPLACEMENT CHARACTER}"  # replaces bytes that are not text
BLOCK_LIST_FORM = "write one id or URL per line, or give a Parquet file with a column id or url"
COMPARE: Mapping[str, Callable[..., Any]] = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}
CONDITION = re.compile(
    r"""\s*(?P<column>[A-Za-z_]\w*)\s*(?P<comparison><=|>=|==|!=|<|>)\s*
    (?P<value>-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w)|'[^']*'|"[^"]*")\s*""",
    re.VERBOSE | re.ASCII,
)
AND = re.compile(r"and\b", re.IGNORECASE)


@dataclass(frozen=True)
class Condition:
    """A comparison that a row must pass.

    Attributes:
        column: the metadata column.
        comparison: one of <, <=, >, >=, ==, !=.
        value: the value that the column is compared with.

    """

    column: str
    comparison: str
    value: float | str

    def check(self, schema: pa.Schema) -> None:
        """Check that metadata with this schema has the column, with a type that fits the value.

        Raises:
            InputError: the column does not exist or has another type.

        """
        names = [name for name in schema.names if not pa.types.is_binary(schema.field(name).type)]
        if self.column not in names:
            near = difflib.get_close_matches(self.column.lower(), [name.lower() for name in names], n=1)
            meant = next((name for name in names if [name.lower()] == near), None)
            raise InputError(
                f"filters name the column {self.column!r}, which the metadata does not have (it has "
                f"{', '.join(names)}): "
                + (f"did you mean {meant}?" if meant else "remove this condition")
            )
        kind = schema.field(self.column).type
        fits = pa.types.is_string(kind) if isinstance(self.value, str) else _is_number(kind)
        if not (fits or pa.types.is_null(kind)):
            other = "a number" if isinstance(self.value, str) else "a quoted word"
            raise InputError(
                f"filters compare {self.column} with {self.value!r}, but it holds {kind}: "
                + (
                    f"give {other}"
                    if pa.types.is_string(kind) or _is_number(kind)
                    else "remove this condition"
                )
            )

    def holds(self, rows: pa.Table) -> Mask:
        """Return which rows pass, shape (n,); rows without a value do not."""
        column = rows[self.column]
        if pa.types.is_null(column.type):
            return np.zeros(len(rows), np.bool_)
        if pa.types.is_floating(column.type):
            column = column.cast(pa.float64())
            column = pc.if_else(pc.is_nan(column), None, column)
        passed = COMPARE[self.comparison](column, pa.scalar(self.value))
        held: Mask = pc.fill_null(passed, False).to_numpy()
        return held


def conditions_in(text: str) -> tuple[Condition, ...]:
    """Parse conditions joined by `and`; an empty text has none.

    Args:
        text: the conditions.

    Raises:
        InputError: the text cannot be parsed; the message quotes it from the first error.

    """
    found: list[Condition] = []
    position = 0
    while text.strip():
        match = CONDITION.match(text, position)
        at_the_end = match is not None and match.end() == len(text)
        joined = AND.match(text, match.end()) if match else None
        if not match or not (at_the_end or joined):
            rest = text[match.end() if match else position :].strip()[:40]
            unjoined = "; only `and` joins conditions" if match else ""
            problem = f"cannot read {rest!r}{unjoined}" if rest else "the last condition is missing"
            raise InputError(
                f"{problem}: write conditions such as "
                "punsafe < 0.5 and NSFW == 'UNLIKELY', each a column, one of "
                f"{' '.join(COMPARE)}, and a number or a quoted word"
            )
        found.append(Condition(match["column"], match["comparison"], _value(match["value"])))
        if not joined:
            break
        position = joined.end()
    return tuple(found)


def _value(text: str) -> float | str:
    if text[0] in "'\"":
        return text[1:-1]
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else float(text)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


@dataclass(frozen=True)
class BlockListMatches:
    """How many entries of a block list match the index, and the rows of one request.

    Attributes:
        ids: number of ids on the list.
        ids_in_the_index: number of these that are rows of the index.
        urls: number of URLs on the list.
        urls_found: number of these that blocked a row of the request.

    """

    ids: int
    ids_in_the_index: int
    urls: int
    urls_found: int

    @property
    def can_match(self) -> bool:
        """Whether any entry can block a row of the index."""
        return bool(self.urls or self.ids_in_the_index)

    def __str__(self) -> str:
        """Describe the numbers in one sentence."""
        parts = []
        if self.ids:
            parts.append(f"{self.ids_in_the_index:,} of {count(self.ids, 'listed id')} in the index")
        if self.urls:
            parts.append(f"{self.urls_found:,} of {count(self.urls, 'listed URL')} found")
        none = "" if self.can_match else "; it blocks nothing: check that its ids are of this index"
        return f"{', '.join(parts)}{none}"


@dataclass(frozen=True, eq=False)
class BlockList:
    """Images that must not appear in any table, by id or by exact URL.

    URLs are held as 64-bit hashes. A listed URL is always blocked; the probability that another URL is
    blocked by mistake is 5e-13 for a list of ten million.

    Attributes:
        uri: the file that it was read from.
        ids: blocked ids, ascending.
        urls: hashes of blocked URLs, ascending.

    """

    uri: str
    ids: Ids
    urls: Ids

    def holds(self, ids: Ids, urls: pa.ChunkedArray) -> Mask:
        """Return which images are on the list, shape (n,)."""
        return _among(ids, self.ids) | (_among(hashes(urls), self.urls) if len(self.urls) else False)

    def found_among(self, urls: pa.ChunkedArray) -> Ids:
        """Return the hashes of the listed URLs that occur among some URLs, ascending."""
        found = np.unique(hashes(urls))
        return found[_among(found, self.urls)]

    def matches(self, rows: int, urls_found: int) -> BlockListMatches:
        """Count the entries that match an index.

        Args:
            rows: number of rows of the index.
            urls_found: number of listed URLs that blocked a row.

        """
        first, last = np.searchsorted(self.ids, [0, rows])
        return BlockListMatches(len(self.ids), int(last - first), len(self.urls), urls_found)

    def __str__(self) -> str:
        """Describe the list: location, length, and a fingerprint that ignores order and file format."""
        content = google_crc32c.Checksum(self.ids.tobytes() + self.urls.tobytes()).digest().hex()
        return f"{self.uri}, {count(len(self.ids), 'id')}, {count(len(self.urls), 'URL')}, {content}"


def block_list_version(uri: str) -> str:
    """Return a version that changes with the file's properties in its storage, without reading the file.

    Args:
        uri: the file of the block list.

    Raises:
        InputError: the file does not exist or cannot be accessed.

    """
    with _reading(uri):
        fs, path = open_storage(uri, ABOUT_BLOCK_LIST)
        details = sorted((name, str(value)) for name, value in fs.info(path).items())
    return hashlib.sha256(f"{uri} {details}".encode()).hexdigest()[:16]


def read_block_list(uri: str) -> BlockList:
    """Read a block list.

    Args:
        uri: a Parquet file with a column `id`, a URL column, or both (such as a result table), or a text
            file with one id or URL per line. The extension (such as .gz) implies its compression.

    Raises:
        InputError: the file is missing or empty, or a line or column holds neither ids nor URLs.

    """
    fs, path = open_storage(uri, ABOUT_BLOCK_LIST)
    ids, urls = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    with _reading(uri), fs.open(path, "rb", compression="infer") as file:
        parts = _columns_of(file, uri) if path.endswith(".parquet") else _lines_of(file, uri)
        for more_ids, more_urls in parts:
            ids.append(more_ids)
            urls.append(hashes(more_urls))
    found = BlockList(uri, np.unique(np.concatenate(ids)), np.unique(np.concatenate(urls)))
    if not len(found.ids) and not len(found.urls):
        raise InputError(f"the block list {uri} is empty: fill it, or use none", ABOUT_BLOCK_LIST)
    return found


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        with reaching(uri, ABOUT_BLOCK_LIST):
            yield
    except FileNotFoundError as error:
        raise InputError(
            f"the block list {uri} is missing: correct its address, or use none", ABOUT_BLOCK_LIST
        ) from error
    except (pa.ArrowException, OSError, EOFError) as error:
        raise InputError(
            f"the block list {uri} cannot be read ({error}): repair the file, or correct its address",
            ABOUT_BLOCK_LIST,
        ) from error


def _lines_of(file: Any, uri: str) -> Iterator[tuple[Ids, pa.Array]]:
    lines = enumerate(io.TextIOWrapper(file, "utf-8-sig", errors="replace"), start=1)
    while batch := list(islice(lines, ENTRIES_AT_ONCE)):
        ids: list[int] = []
        urls: list[str] = []
        for number, line in batch:
            entry = line.strip()
            if entry.isascii() and entry.isdecimal() and len(entry) < len(str(2**63)):
                ids.append(int(entry))
            elif ("/" in entry or "." in entry) and UNREADABLE not in entry:
                urls.append(entry)
            elif entry:
                raise InputError(
                    f"line {number:,} of the block list {uri} is {entry[:40]!r}, neither an id nor a URL"
                    f": {BLOCK_LIST_FORM}"
                )
        yield np.array(ids, np.int64), pa.array(urls, pa.string())


def _columns_of(file: Any, uri: str) -> Iterator[tuple[Ids, pa.Array]]:
    table = pq.ParquetFile(file, pre_buffer=False)
    schema = table.schema_arrow
    wanted = [name for name in ("id", *URL_COLUMNS) if name in schema.names]
    if not wanted or ("id" in wanted and not pa.types.is_integer(schema.field("id").type)):
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise InputError(
            f"the block list {uri} has no column of ids or URLs (found {found}): {BLOCK_LIST_FORM}"
        )
    for batch in table.iter_batches(ENTRIES_AT_ONCE, columns=wanted):
        ids = batch["id"].drop_null() if "id" in wanted else pa.array([], pa.int64())
        texts = [batch[name].cast(pa.string()).drop_null() for name in wanted if name != "id"]
        yield ids.cast(pa.int64()).to_numpy(), pa.concat_arrays(texts or [pa.array([], pa.string())])


def hashes(texts: pa.Array | pa.ChunkedArray) -> Ids:
    """Return a 64-bit hash of each text, shape (n,); null has the hash of the empty text."""
    digests = b"".join(_digests(texts))
    return np.frombuffer(digests, np.int64)


def _digests(texts: pa.Array | pa.ChunkedArray) -> Iterator[bytes]:
    for start in range(0, len(texts), ENTRIES_AT_ONCE):
        for text in texts.slice(start, ENTRIES_AT_ONCE).cast(pa.large_binary()).to_pylist():
            yield hashlib.blake2b(text or b"", digest_size=8).digest()


def _among(values: Ids, ascending: Ids) -> Mask:
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    position = np.searchsorted(ascending, values).clip(max=len(ascending) - 1)
    found: Mask = ascending[position] == values
    return found


@dataclass(frozen=True)
class Filters:
    """The conditions and the block list of a search.

    Attributes:
        conditions: conditions that a row must all pass.
        block_list: images that must not appear.

    """

    conditions: Sequence[Condition] = ()
    block_list: BlockList | None = None

    @property
    def columns(self) -> list[str]:
        """Metadata columns that the filters need."""
        return list(dict.fromkeys(["url", *(condition.column for condition in self.conditions)]))

    def check(self, schema: pa.Schema) -> None:
        """Check all conditions against the schema of the metadata, see `Condition.check`."""
        for condition in self.conditions:
            condition.check(schema)

    def blocked(self, ids: Ids, rows: pa.Table) -> Mask:
        """Return which rows are on the block list, shape (n,)."""
        if self.block_list is None:
            return np.zeros(len(ids), np.bool_)
        return self.block_list.holds(ids, rows["url"])

    def failed(self, rows: pa.Table) -> Mask:
        """Return which rows fail a condition, shape (n,)."""
        failed = np.zeros(len(rows), np.bool_)
        for condition in self.conditions:
            failed |= ~condition.holds(rows)
        return failed


NO_FILTERS = Filters()
