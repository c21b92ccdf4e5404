"""Images that must not appear in any table, by id, URL or host."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.io.arrays import Ids, Mask
from laion_assets.io.text import count, decoded
from laion_assets.io.urls import comparable, hosts, with_parents

HASHED_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class BlockListMatches:
    """How many entries of a block list match the index, and the rows of one request.

    Attributes:
        ids: number of ids on the list.
        ids_in_the_index: number of these that are rows of the index.
        urls: number of URLs on the list.
        urls_found: number of these that blocked a row of the request.
        hosts: number of hosts on the list.
        hosts_found: number of these that blocked a row of the request.

    """

    ids: int
    ids_in_the_index: int
    urls: int
    urls_found: int
    hosts: int = 0
    hosts_found: int = 0

    @property
    def matching(self) -> int:
        """Number of entries that match."""
        return self.ids_in_the_index + self.urls_found + self.hosts_found

    def __str__(self) -> str:
        """Describe the numbers in one sentence."""
        parts = []
        if self.ids:
            parts.append(f"{self.ids_in_the_index:,} of {count(self.ids, 'listed id')} in the index")
        if self.urls:
            parts.append(f"{self.urls_found:,} of {count(self.urls, 'listed URL')} found")
        if self.hosts:
            parts.append(f"{self.hosts_found:,} of {count(self.hosts, 'listed host')} found")
        return ", ".join(parts)


def _no_entries() -> Ids:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class BlockList:
    """Images that must not appear in any table, by id, by URL or by host.

    URLs are compared as browsers do, see `laion_assets.io.urls.comparable`; a host includes its
    subdomains. Both are held as 64-bit hashes. A listed URL is always blocked; the probability that
    another URL is blocked by mistake is 5e-13 for a list of ten million.

    Attributes:
        uri: the file that it was read from.
        ids: blocked ids, ascending.
        urls: hashes of blocked URLs, ascending.
        hosts: hashes of blocked hosts, ascending.

    """

    uri: str
    ids: Ids = field(default_factory=_no_entries)
    urls: Ids = field(default_factory=_no_entries)
    hosts: Ids = field(default_factory=_no_entries)

    def holds(self, ids: Ids, urls: pa.ChunkedArray) -> Mask:
        """Return which images are on the list, shape (n,)."""
        blocked = _among(ids, self.ids)
        if len(self.urls) or len(self.hosts):
            here = [self._in_lists(*listed_forms(chunk)) for chunk in urls.chunks]
            blocked |= np.concatenate([*here, np.zeros(0, np.bool_)])
        return blocked

    def found_among(self, urls: pa.ChunkedArray) -> Ids:
        """Return the hashes of the listed URLs and hosts that some URLs match, ascending."""
        found = [np.empty(0, np.int64)]
        for chunk in urls.chunks:
            texts, names = listed_forms(chunk)
            found.append(np.intersect1d(hashes(texts), self.urls))
            domains = {
                domain for name in names.unique().to_pylist() if name for domain in with_parents(name)
            }
            found.append(np.intersect1d(hashes(pa.array(sorted(domains), pa.large_string())), self.hosts))
        return np.unique(np.concatenate(found))

    def matches(self, rows: int, found: Ids) -> BlockListMatches:
        """Count the entries that match an index and a request.

        Args:
            rows: number of rows of the index.
            found: what `found_among` returned for the blocked rows of the request, ascending.

        """
        first, last = np.searchsorted(self.ids, [0, rows])
        return BlockListMatches(
            ids=len(self.ids),
            ids_in_the_index=int(last - first),
            urls=len(self.urls),
            urls_found=int(_among(found, self.urls).sum()),
            hosts=len(self.hosts),
            hosts_found=int(_among(found, self.hosts).sum()),
        )

    def __str__(self) -> str:
        """Describe the list: location, length, and a fingerprint that ignores order and file format."""
        hashed = google_crc32c.Checksum(self.ids.tobytes() + self.urls.tobytes() + self.hosts.tobytes())
        entries = [count(len(self.ids), "id"), count(len(self.urls), "URL")]
        entries += [count(len(self.hosts), "host")] if len(self.hosts) else []
        return f"{self.uri}, {', '.join(entries)}, {hashed.digest().hex()}"

    def _in_lists(self, texts: pa.Array, names: pa.Array) -> Mask:
        """Return which URLs are listed, or have a listed host."""
        listed = _among(hashes(texts), self.urls)
        if len(self.hosts):
            encoded = names.dictionary_encode()
            is_blocked = [self._blocks_host(name) for name in encoded.dictionary.to_pylist()]
            blocked = pa.array([*is_blocked, False]).take(pc.fill_null(encoded.indices, len(is_blocked)))
            listed |= blocked.to_numpy(zero_copy_only=False)
        return listed

    def _blocks_host(self, name: str) -> bool:
        return bool(_among(hashes(pa.array(list(with_parents(name)))), self.hosts).any())


def listed_forms(urls: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return URLs and their hosts in the forms in which they are compared, shape (n,) each."""
    texts = comparable(decoded(urls)[0])
    return texts, hosts(texts)


def hashes(texts: pa.Array | pa.ChunkedArray) -> Ids:
    """Return a 64-bit hash of each text, shape (n,); null has the hash of the empty text."""
    return np.frombuffer(b"".join(_digests(texts, 8)), np.int64)


def wide_hashes(texts: pa.Array | pa.ChunkedArray) -> Ids:
    """Return a 128-bit hash of each text, shape (n, 2); null has the hash of the empty text."""
    return np.frombuffer(b"".join(_digests(texts, 16)), np.int64).reshape(-1, 2)


def _digests(texts: pa.Array | pa.ChunkedArray, size: int) -> Iterator[bytes]:
    for start in range(0, len(texts), HASHED_AT_ONCE):
        for text in texts.slice(start, HASHED_AT_ONCE).cast(pa.large_binary()).to_pylist():
            yield hashlib.blake2b(text or b"", digest_size=size).digest()


def _among(values: Ids, ascending: Ids) -> Mask:
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    position = np.searchsorted(ascending, values).clip(max=len(ascending) - 1)
    found: Mask = ascending[position] == values
    return found
