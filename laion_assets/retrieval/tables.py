"""Tables as streams of record batches, their columns, and the provenance they carry.

What must not live here: reading and writing files, and how rows are found.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from laion_assets.retrieval.errors import InputError

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
    "embedding": "unit vector",
    "file": "seed file, relative to the folder of the seed set",
    "row": "row of that file",
    "thumbnail": "small picture, with the first rows only",
}


@dataclass(frozen=True)
class Provenance:
    """What a table was made from; it stands in the footer of the file.

    Attributes:
        seed_set: the partition.
        seeds: fingerprint of the seed files.
        index: fingerprint of the staged index; None before it plays a part.
        settings: the settings used, and where each came from.
        run: id of the Dagster run.
        written: when, ISO 8601 in UTC.
        found: the counts of a search, in a sentence.
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

    @classmethod
    def now(
        cls,
        seed_set: str,
        seeds: str,
        index: str | None,
        settings: Mapping[str, Any],
        run: str,
        own_settings: Mapping[str, Any],
    ) -> Provenance:
        """Provenance of a table that is being written now."""
        written = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(seed_set, seeds, index, dict(settings), run, written, own_settings=dict(own_settings))

    def to_footer(self) -> dict[str, str]:
        """Key-value metadata for the file's footer."""
        return {PROVENANCE_KEY: json.dumps(asdict(self), sort_keys=True)}

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
