"""Read block lists: text with an entry per line, or CSV, TSV and Parquet with named columns.

An entry that is misread blocks nothing, so a line that is not clearly an id, a URL or a host is refused.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from laion_assets.index.metadata import URL_COLUMNS, plain_type
from laion_assets.io.arrays import Ids
from laion_assets.io.errors import InputError
from laion_assets.io.public_urls import WEB, public
from laion_assets.io.storage import first_line, is_regular, open_storage, reaching
from laion_assets.io.text import decoded
from laion_assets.io.urls import comparable_host
from laion_assets.search.block_list import BlockList, hashes, listed_forms

BLOCK_LIST = "block_list"  # the setting that errors name
ENTRIES_AT_ONCE = 1 << 16
MERGED_AT = 1 << 20  # entries that are collected before repeated ones are removed
MAX_LINE = 1 << 14  # characters
EXPANSION = 100  # most bytes or rows that a byte of a list may unpack to
SMALL = 16 << 20  # bytes or rows that any list may unpack to
DECOMPRESS: Mapping[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".zst", ".lz4", ".br")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
ID, HOST = "id", "host"
COLUMNS = (ID, HOST, *URL_COLUMNS)
FORM = (
    "write one id, one URL such as https://example.org/a.jpg or one host:example.org per line, or give a "
    "CSV, TSV or Parquet file with a column id, url or host"
)
UNREADABLE = "\N{REPLACEMENT CHARACTER}"  # replaces bytes that are not text
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?P<rest>[^\s\"'<>`{}|^\\]+)")
URL_IN_TABLE = r"^[A-Za-z0-9/._-][^\x00-\x1f\x7f]*/"
ANOTHER_COLUMN = re.compile(r"\.[A-Za-z]{3,4}[,;]")  # a.jpg,abuse
BARE_DOMAIN = re.compile(r"(?:\|\||\*\.|0\.0\.0\.0 |127\.0\.0\.1 )?((?:[\w-]+\.)+[A-Za-z]{2,})(?:\^|/)?")


def block_list_version(uri: str) -> str:
    """Return a version that changes with the file's properties in its storage, without reading the file.

    Args:
        uri: the file of the block list.

    Raises:
        InputError: the file does not exist or cannot be accessed.

    """
    uri = public(uri)
    with _reading(uri):
        fs, path = open_storage(uri, BLOCK_LIST)
        details = sorted((name, str(value)) for name, value in fs.info(path).items())
    return hashlib.sha256(f"{uri} {details}".encode(errors="surrogateescape")).hexdigest()[:16]


def read_block_list(uri: str) -> BlockList:
    """Read a block list.

    Args:
        uri: a text file with one id, URL or `host:<name>` per line; or a CSV, TSV or Parquet file with
            columns `id`, `host` or one of the usual URL columns, such as a result table. Text, CSV and
            TSV may be compressed (.gz, .bz2, .xz).

    Raises:
        InputError: the file is missing, empty, damaged or unpacks to too much, or a line or column
            holds something else.

    """
    found = _Collected()
    uri = public(uri)
    with _reading(uri):
        fs, path = open_storage(uri, BLOCK_LIST)
        if not is_regular(fs, path):
            raise InputError(f"the block list {uri} is not a file: correct its address", BLOCK_LIST)
        with fs.open(path, "rb") as file:
            for entries in _File(uri, file, fs.size(path)).entries():
                found.add(entries)
    block_list = found.as_block_list(uri)
    if not (len(block_list.ids) or len(block_list.urls) or len(block_list.hosts)):
        raise InputError(f"the block list {uri} is empty: fill it, or use none", BLOCK_LIST)
    return block_list


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        with reaching(uri, BLOCK_LIST):
            yield
    except FileNotFoundError as error:
        raise InputError(
            f"the block list {uri} is missing: correct its address, or use none", BLOCK_LIST
        ) from error
    except (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:
        raise InputError(
            f"the block list {uri} cannot be read ({first_line(error)}): repair the file, or correct its "
            "address",
            BLOCK_LIST,
        ) from error


@dataclass
class _Entries:
    """Some entries of a list."""

    ids: list[int] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)

    def hashed(self) -> tuple[Ids, Ids, Ids]:
        """Return ids, and hashes of URLs and hosts."""
        urls, hosts = pa.array(self.urls, pa.large_string()), pa.array(self.hosts, pa.large_string())
        return np.array(self.ids, np.int64), hashes(listed_forms(urls)[0]), hashes(hosts)


class _Collected:
    """The distinct entries of a list: ids, and hashes of URLs and hosts."""

    def __init__(self) -> None:
        self._parts = [[np.empty(0, np.int64)] for _ in range(3)]

    def add(self, entries: _Entries) -> None:
        """Add entries; repeated ones are removed now and then, so that they take no memory."""
        for parts, some in zip(self._parts, entries.hashed(), strict=True):
            parts.append(np.unique(some))
            if sum(map(len, parts[1:])) > max(MERGED_AT, len(parts[0])):
                parts[:] = [np.unique(np.concatenate(parts))]

    def as_block_list(self, uri: str) -> BlockList:
        """Return all entries."""
        return BlockList(uri, *(np.unique(np.concatenate(parts)) for parts in self._parts))


class _File:
    """An open block list.

    Args:
        uri: its location, of which the extension gives the format.
        file: its content.
        size: its size in bytes.

    """

    def __init__(self, uri: str, file: BinaryIO, size: int) -> None:
        self._uri = uri
        self._file = file
        self._limit = max(SMALL, EXPANSION * size)
        name = PurePosixPath(uri.lower())
        self._compression = name.suffix if name.suffix in DECOMPRESS else ""
        self._format = name.with_suffix("").suffix if self._compression else name.suffix

    def entries(self) -> Iterator[_Entries]:
        """Yield the entries, some at a time.

        Raises:
            InputError: a line or column holds something else, or the file unpacks to too much.

        """
        if self._format == ".parquet" and not self._compression:
            return self._of_parquet()
        if self._format in ARCHIVES:
            raise self._refusal(f"has the extension {self._format}: unpack it, or compress it as .gz")
        if separator := SEPARATORS.get(self._format):
            return self._of_columns(separator)
        return self._of_lines()

    # --- text -------------------------------------------------------------------------------------

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Yield each line with its number; memory is limited by the longest allowed line."""
        unpack = DECOMPRESS.get(self._compression)
        file = unpack(self._file) if unpack else self._file
        encoding = "utf-16" if file.read(2) in UTF_16 else "utf-8-sig"
        file.seek(0)
        text, number, read = io.TextIOWrapper(file, encoding, errors="replace"), 0, 0
        while line := text.readline(MAX_LINE):
            number, read = number + 1, read + len(line)
            if len(line) == MAX_LINE:
                raise self._refusal_of(number, line, f"of more than {MAX_LINE:,} characters")
            if unpack and read > self._limit:
                raise self._refusal(
                    f"unpacks to more than {self._limit:,} characters, {EXPANSION} times its size: give "
                    "it uncompressed"
                )
            yield number, line.strip("\n")

    def _of_lines(self) -> Iterator[_Entries]:
        found = _Entries()
        for number, line in self._lines():
            if entry := line.strip(" \t"):
                self._add(found, number, entry)
            if number % ENTRIES_AT_ONCE == 0:
                yield found
                found = _Entries()
        yield found

    def _add(self, found: _Entries, number: int, entry: str) -> None:
        """Add the entry of a line of text."""
        if _is_id(entry):
            found.ids.append(int(entry))
        elif entry.startswith(f"{HOST}:"):
            found.hosts.append(self._host(number, entry.removeprefix(f"{HOST}:").strip()))
        elif problem := _problem(entry):
            raise self._refusal_of(number, entry, problem)
        else:
            found.urls.append(entry)

    def _of_columns(self, separator: str) -> Iterator[_Entries]:
        rows = csv.reader((line for _, line in self._lines()), delimiter=separator, strict=True)
        names = [name.strip() for name in next(rows, [])]
        kinds = [name if name in (ID, HOST) else "url" for name in names]
        wanted = [(place, kinds[place]) for place, name in enumerate(names) if name in COLUMNS]
        if not wanted:
            raise self._no_columns(names)
        found = _Entries()
        for row in rows:
            number = rows.line_num
            if row and len(row) != len(names):
                raise self._refusal_of(
                    number, separator.join(row), f"of {len(row)} columns instead of {len(names)}"
                )
            for place, kind in wanted if row else ():
                if value := row[place].strip():
                    self._add_value(found, number, kind, value)
            if number % ENTRIES_AT_ONCE == 0:
                yield found
                found = _Entries()
        yield found

    def _add_value(self, found: _Entries, number: int, kind: str, value: str) -> None:
        """Add a value of a column of text."""
        if kind == HOST:
            found.hosts.append(self._host(number, value))
        elif kind == ID:
            if not _is_id(value):
                raise self._refusal_of(number, value, "in the column id, not a whole number")
            found.ids.append(int(value))
        elif not re.search(URL_IN_TABLE, value):
            raise self._refusal_of(number, value, "not a URL")
        else:
            found.urls.append(value)

    def _host(self, number: int, name: str) -> str:
        try:
            return comparable_host(name)
        except ValueError:
            raise self._refusal_of(number, name, "not the name of a host") from None

    # --- Parquet ----------------------------------------------------------------------------------

    def _of_parquet(self) -> Iterator[_Entries]:
        # As dictionaries, repeated texts take memory only once.
        names = [name for name in pq.read_schema(self._file).names if name in COLUMNS]
        self._file.seek(0)
        table = pq.ParquetFile(
            self._file, pre_buffer=False, read_dictionary=[name for name in names if name != ID]
        )
        schema = table.schema_arrow
        types = {name: plain_type(schema.field(name).type) for name in names}
        fit = {
            name: pa.types.is_integer(kind) if name == ID else kind in (pa.string(), pa.binary())
            for name, kind in types.items()
        }
        if not names or not all(fit.values()):
            raise self._no_columns([f"{field.name} ({plain_type(field.type)})" for field in schema])
        self._check_size(table.metadata, names)
        first = 0
        for batch in table.iter_batches(ENTRIES_AT_ONCE, columns=names, use_threads=False):
            yield self._of_batch(batch, first)
            first += len(batch)

    def _of_batch(self, batch: pa.RecordBatch, first: int) -> _Entries:
        found = _Entries()
        for name in batch.schema.names:
            column = batch[name]
            if name == ID:
                found.ids += column.drop_null().cast(pa.int64()).to_pylist()
                continue
            encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
            texts = decoded(encoded.dictionary)[0]
            used = encoded.indices.drop_null().unique()
            if name == HOST:
                found.hosts += [self._host(first, value) for value in texts.take(used).to_pylist()]
                continue
            is_url = pc.match_substring_regex(texts, URL_IN_TABLE)
            wrong = used.filter(pc.invert(is_url.take(used)))
            if len(wrong):
                row = first + pc.index(encoded.indices, wrong[0]).as_py()
                raise self._refusal_of(row, texts[wrong[0].as_py()].as_py(), "not a URL", "row")
            found.urls += texts.take(used).to_pylist()
        return found

    def _check_size(self, footer: Any, names: Sequence[str]) -> None:
        """Refuse a small file that unpacks to a large one."""
        unpacked = footer.num_rows
        for group in (footer.row_group(number) for number in range(footer.num_row_groups)):
            chunks = [group.column(number) for number in range(group.num_columns)]
            unpacked += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema in names)
        if unpacked > self._limit:
            raise self._refusal(
                f"unpacks to {unpacked:,} bytes and rows, more than {EXPANSION} times its size: remove "
                "repeated rows"
            )

    # --- errors -----------------------------------------------------------------------------------

    def _refusal(self, problem: str) -> InputError:
        return InputError(f"the block list {self._uri} {problem}", BLOCK_LIST)

    def _refusal_of(self, number: int, entry: str, problem: str, unit: str = "line") -> InputError:
        return InputError(
            f"{unit} {number:,} of the block list {self._uri} is {entry[:40]!r}, {problem}: {FORM}",
            BLOCK_LIST,
        )

    def _no_columns(self, found: Sequence[str]) -> InputError:
        return self._refusal(f"has no column of ids, URLs or hosts (found {', '.join(found)}): {FORM}")


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < len(str(2**63))


def _problem(entry: str) -> str | None:
    """Return why a line of text is not a URL; None if it is one."""
    if UNREADABLE in entry:
        return "not UTF-8"
    odd = next((letter for letter in entry if not letter.isprintable()), None)
    if odd is not None:
        return f"with the invisible character U+{ord(odd):04X}"
    if domain := BARE_DOMAIN.fullmatch(entry):
        return f"neither an id nor a URL; host:{domain[1]} blocks a host"
    url = URL_IN_TEXT.fullmatch(entry)
    if not url:
        return "neither an id nor a URL"
    authority = re.split(r"[/?#]", url["rest"])[0]
    if "*" in authority or entry.endswith("*"):
        return "a URL with a wildcard, which is not supported"
    if ANOTHER_COLUMN.search(entry):
        return "a URL and another column; name the file .csv if it has columns"
    if entry.lower().startswith(WEB):
        name = re.sub(r":\d*$", "", authority.rpartition("@")[2])
        try:
            _ = name.startswith("[") or comparable_host(name)
        except ValueError:
            return "a URL without a valid host"
    return None
