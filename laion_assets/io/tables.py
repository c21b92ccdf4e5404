"""Tables as streams of record batches, their columns, and the provenance they carry.

What must not live here: reading and writing files, and how rows are found.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from laion_assets.io.arrays import Bytes
from laion_assets.io.errors import InputError

PROVENANCE_KEY = "laion_assets"
DECODER_KEY = "laion_assets.decoder"

DESCRIPTIONS = {
    "id": "row of the LAION index",
    "url": "where the image is",
    "caption": "its alt text",
    "similarity": "inner product of the unit query and the row as the index stores it",
    "rank": "place among the rows found for the same query, 1 is the nearest",
    "seed": "row of seed_embeddings this was found for; null where only the centroid found it",
    "strategies": "which strategies found the image or a near-duplicate of it",
    "code": "the row as the index stores it; the decoder in the file's footer makes it a vector",
    "embedding": "unit vector: the seed, or the mean of the seeds",
    "norm_of_mean": "length of the mean of the seeds: 1 when all are the same, near 0 without a style",
    "seeds": "how many seeds the mean is of",
    "file": "seed file, relative to the folder of the seed set",
    "row": "row of that file",
    "thumbnail": "small picture, with the first rows only",
    **dict.fromkeys(("NSFW", "nsfw", "punsafe"), "how unsafe the image is, as LAION's classifier says"),
    "pwatermark": "how likely it has a watermark, as LAION's classifier says",
    "LICENSE": "of the image, where the page named one",
    **dict.fromkeys(("LANGUAGE", "language"), "of the caption"),
    **dict.fromkeys(("WIDTH", "width", "original_width"), "of the image when it was collected, pixels"),
    **dict.fromkeys(
        ("HEIGHT", "height", "original_height"), "of the image when it was collected, pixels"
    ),
    "aesthetic": "how pleasing the image is, as a model predicts, from 1 to 10",
    "md5": "of the image when it was collected",
}


@dataclass(frozen=True)
class Provenance:
    """What a table was made from; it stands in the footer of the file.

    Attributes:
        seed_set: the partition.
        seeds: fingerprint of the seed files.
        index: fingerprint of the staged index; None before it plays a part.
        settings: the settings used, and where each came from.
        asked: those that were asked for, from which the used ones follow, likewise.
        run: id of the Dagster run.
        written: when, ISO 8601 in UTC.
        found: the counts of a search in a sentence.
        counts: the same and all others, by name.
        own_settings: what the seed set's settings.yaml said when the seeds were read; it travels with
            what was made from them, so that all of it is made with the same.

    """

    seed_set: str
    seeds: str
    index: str | None
    settings: Mapping[str, Any]
    run: str
    written: str
    found: str = ""
    own_settings: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def now(
        cls,
        seed_set: str,
        seeds: str,
        index: str | None,
        settings: Mapping[str, Any],
        run: str,
        own_settings: Mapping[str, Any],
        asked: Mapping[str, Any] = MappingProxyType({}),
    ) -> Provenance:
        """Provenance of a table that is being written now."""
        written = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(
            seed_set,
            seeds,
            index,
            dict(settings),
            run,
            written,
            own_settings=dict(own_settings),
            asked=dict(asked),
        )

    def to_footer(self) -> dict[str, str]:
        """Key-value metadata for the file's footer."""
        return {PROVENANCE_KEY: json.dumps(asdict(self))}

    @classmethod
    def from_footer(cls, footer: Mapping[str, str], where: str) -> Provenance:
        """Read it back.

        Raises:
            InputError: the file was not written by this platform.

        """
        if PROVENANCE_KEY not in footer:
            raise InputError(
                f"{where} does not say what it was made from: it was not written here; "
                "materialize it again"
            )
        return cls(**json.loads(footer[PROVENANCE_KEY]))


@dataclass
class Table:
    """A table on its way to a file: read its batches once, then ask for the footer.

    Attributes:
        schema: of every batch.
        batches: the rows.
        footer: key-value metadata, complete once all batches were read.

    """

    schema: pa.Schema
    batches: Iterable[pa.RecordBatch]
    footer: Callable[[], Mapping[str, str]] = dict


def code_bytes(column: pa.ChunkedArray) -> Bytes:
    """Return the codes of a table, (n, code size), without copying more than one column needs."""
    codes, wide = column.combine_chunks(), column.type.byte_width
    if not len(codes):
        return np.empty((0, wide), np.uint8)
    data = np.frombuffer(codes.buffers()[1], np.uint8)
    return data[codes.offset * wide : (codes.offset + len(codes)) * wide].reshape(-1, wide)


def decoder_footer(data: bytes) -> dict[str, str]:
    """Footer entry that carries a serialised decoder; text, as other Parquet readers expect."""
    return {DECODER_KEY: base64.b64encode(data).decode("ascii")}


def decoder_bytes(footer: Mapping[str, str], where: str) -> bytes:
    """Read what `decoder_footer` wrote.

    Raises:
        InputError: the footer has none.

    """
    if DECODER_KEY not in footer:
        raise InputError(f"{where} carries no decoder for its codes: materialize it again")
    return base64.b64decode(footer[DECODER_KEY])
