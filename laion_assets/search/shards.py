"""Search around many queries in shards, each by itself, and join what they found.

A shard is a run of whole batches of queries, see `neighbours`. So the joined rows are those of one
search, in the same order, also where each batch continues by itself until enough images are kept.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from laion_assets.index.decoder import Decoder
from laion_assets.io.arrays import Ids
from laion_assets.io.checksums import checksum_text, crc32c
from laion_assets.search.block_list import BlockList, BlockListMatches
from laion_assets.search.retrieval import (
    RESULT_BYTES,
    Found,
    Funnel,
    NotUtf8,
    Removed,
)

BATCHES = 4  # of queries in a shard, about
NOMINAL_ROW = 1024  # bytes of a result, about: shards are counted before the index is open


def shards_for(queries: int, k: int) -> int:
    """Return in how many shards to search around some queries; at least 1.

    Args:
        queries: number of queries.
        k: images requested of each at first.

    """
    return min(max(1, math.ceil(queries * k * NOMINAL_ROW / RESULT_BYTES / BATCHES)), queries)


@dataclass(frozen=True)
class Shard:
    """One of the shards of a search.

    Attributes:
        number: its number, from 0.
        of: number of all shards.

    """

    number: int
    of: int

    def share(self, batches: Sequence[Ids]) -> Sequence[Ids]:
        """Return the batches of this shard; it may have none if there are more shards than batches."""
        # Rounded up, so that the first shard has the first batch.
        first, stop = (-(-len(batches) * each // self.of) for each in (self.number, self.number + 1))
        return batches[first:stop]


ALL = Shard(0, 1)


def cut_of(batches: Iterable[Ids]) -> str:
    """Return a checksum of how queries are cut into batches.

    Shards with equal checksums search each query exactly once together.
    """
    checksum = 0
    for numbers in batches:
        checksum = crc32c(np.append(numbers, -1).tobytes(), checksum)
    return checksum_text(checksum)


def joined(parts: Sequence[Found], listed: BlockList | None) -> Found:
    """Join what the shards found, in their order.

    A row that is not UTF-8 counts once for each shard that has read it.

    Args:
        parts: of all shards.
        listed: the block list of the request.

    """
    first = parts[0]
    decoder = Decoder.from_bytes(first.decoder)
    for part in parts[1:]:
        decoder = decoder.merged(Decoder.from_bytes(part.decoder))
    counts = {name: sum(getattr(part.funnel, name) for part in parts) for name in asdict(Funnel())}
    blocked_by = np.unique(np.concatenate([part.blocked_by for part in parts]))
    sampled = [part for part in parts if part.sampled]
    recalls, queries = [part.recall for part in sampled], [part.sampled for part in sampled]
    matches = None
    if listed is not None and first.block_list is not None:
        found = listed.matches(0, blocked_by)
        matches = replace(found, ids_in_the_index=first.block_list.ids_in_the_index)
    return replace(
        first,
        funnel=Funnel(**counts),
        recall=float(np.average(recalls, weights=queries)) if sampled else math.nan,
        sampled=sum(queries),
        nprobe=max((part.nprobe for part in parts if part.nprobe is not None), default=None),
        short=sum(part.short for part in parts),
        not_utf8=NotUtf8(
            sum(part.not_utf8.urls for part in parts), sum(part.not_utf8.captions for part in parts)
        ),
        decoder=decoder.to_bytes(),
        block_list=matches,
        blocked_by=blocked_by,
    )


def to_json(found: Found) -> dict[str, Any]:
    """Return a JSON object of what a shard found, without the decoder, which lies beside its table."""
    removed = found.removed
    return asdict(replace(found, removed=None)) | {
        "decoder": None,
        "recall": None if math.isnan(found.recall) else found.recall,
        "blocked_by": found.blocked_by.tolist(),
        "removed": removed
        and {
            "removed": _packed(removed.removed),
            "representatives": _packed(removed.representatives),
            "cosine": removed.cosine.tolist(),
        },
    }


def from_json(stored: Mapping[str, Any], decoder: bytes) -> Found:
    """Return what a shard found, from the output of `to_json`."""
    removed, matches = stored["removed"], stored["block_list"]
    return Found(
        **{
            **stored,
            "funnel": Funnel(**stored["funnel"]),
            "recall": math.nan if stored["recall"] is None else stored["recall"],
            "decoder": decoder,
            "block_list": matches and BlockListMatches(**matches),
            "not_utf8": NotUtf8(**stored["not_utf8"]),
            "blocked_by": np.array(stored["blocked_by"], np.int64),
            "removed": removed
            and Removed(
                _unpacked(removed["removed"]),
                _unpacked(removed["representatives"]),
                np.array(removed["cosine"], np.float32),
            ),
        }
    )


def _packed(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return base64.b64encode(sink.getvalue()).decode("ascii")


def _unpacked(text: str) -> pa.Table:
    return pa.ipc.open_stream(base64.b64decode(text)).read_all()
