"""Record the inputs of a table in its footer, and compare them before two tables are combined."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from laion_assets.defs.settings import ALIVE, TARGET, ResolvedSettings, Settings, changes
from laion_assets.io.errors import InputError
from laion_assets.io.tables import StoredTable

PROVENANCE_KEY = "laion_assets"
WITH_MODEL = "+"  # joins the fingerprints of files and model


def now() -> str:
    """Return the current time in UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def files_version(seeds_version: str) -> str:
    """Return the fingerprint of the files from a version of embedded seeds."""
    return seeds_version.partition(WITH_MODEL)[0]


@dataclass(frozen=True)
class Provenance:
    """The inputs of a table.

    Attributes:
        seed_set: the partition.
        seeds: fingerprint of the seed files.
        settings: the settings used, with their origins.
        run: id of the Dagster run.
        own: contents of the seed set's settings.yaml.
        index: fingerprint of the staged index; None for tables made without it.
        model: fingerprint of the model that embedded the seeds; None if the seeds are vectors.
        counts: counts of a search, from requested to kept, by name.
        block_list_matches: fields of a `BlockListMatches` of a search with a block list.
        written: time of writing in UTC, in ISO 8601.

    """

    seed_set: str
    seeds: str
    settings: ResolvedSettings
    run: str
    own: Mapping[str, Any] = field(kw_only=True)
    index: str | None = None
    model: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    block_list_matches: Mapping[str, int] = field(default_factory=dict)
    written: str = field(default_factory=now)

    @property
    def seeds_version(self) -> str:
        """The version of the embedded seeds: of their files, and of the model if it embedded them."""
        return self.seeds if self.model is None else f"{self.seeds}{WITH_MODEL}{self.model}"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "seed_set": self.seed_set,
            "seeds": self.seeds,
            "index": self.index,
            "model": self.model,
            "settings": self.settings.to_json(),
            "own": dict(self.own),
            "counts": dict(self.counts),
            "block_list_matches": dict(self.block_list_matches),
            "run": self.run,
            "written": self.written,
        }

    def to_footer(self) -> dict[str, str]:
        """Return key-value metadata for the table's footer."""
        return {PROVENANCE_KEY: json.dumps(self.to_json())}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Provenance:
        """Read the output of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: another release wrote it.

        """
        return cls(**{**stored, "settings": ResolvedSettings.from_json(stored["settings"])})

    @classmethod
    def of(cls, table: StoredTable) -> Provenance:
        """Read the provenance of a table.

        Raises:
            InputError: the table has none, or another release wrote it.

        """
        try:
            return cls.from_json(json.loads(table.footer[PROVENANCE_KEY]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{table.where} has no record of its inputs, or another release wrote it: {table.remedy}"
            ) from error


def check_same_origin(knn: StoredTable, centroid: StoredTable, seeds: StoredTable) -> Provenance:
    """Check that two sets have the same seeds, model, index, filters and block list.

    Returns:
        The provenance of the knn set, with the settings of both.

    Raises:
        InputError: they differ; the message says in what, and which to materialize again.

    """
    one, other = Provenance.of(knn), Provenance.of(centroid)
    current = Provenance.of(seeds)
    for asset, made in (("knn_urls", one), ("centroid_urls", other)):
        for what, its, now_held in (
            ("other seeds or another settings.yaml", made.seeds, current.seeds),
            ("seeds embedded with another model", made.model, current.model),
        ):
            if its != now_held:
                raise InputError(
                    f"{asset} of {made.seed_set!r} was made from {what} ({its or 'none'}) than "
                    f"seed_embeddings now holds ({now_held or 'none'}): materialize {asset} again"
                )
    older = "knn_urls" if one.written < other.written else "centroid_urls"
    for what, its, theirs in (
        ("indices", one.index, other.index),
        ("filters", one.settings.values.filters, other.settings.values.filters),
        ("block lists", one.settings.block_list, other.settings.block_list),
    ):
        if its != theirs:
            raise InputError(
                f"knn_urls and centroid_urls of {one.seed_set!r} were made with different {what} "
                f"({its or 'none'} and {theirs or 'none'}): materialize {older}, the older one, again"
            )
    return replace(one, settings=_of_both(one.settings, other.settings))


def check_continues(knn: Provenance, centroid: Provenance) -> None:
    """Check that a search around the centroid may add to what was found around the seeds.

    Raises:
        InputError: other seeds, another model or index, or other settings; the message says which.

    """
    if differs := changes(_inputs(knn), _inputs(centroid)):
        raise InputError(
            f"centroid_urls adds to knn_urls what the target of {knn.seed_set!r} still needs, but "
            f"knn_urls was made differently ({'; '.join(differs)}): materialize knn_urls again"
        )


def _inputs(made: Provenance) -> dict[str, Any]:
    """Return what both searches for a target must have in common; the lists probed may differ."""
    origin = {"seeds": made.seeds, "model": made.model, "index": made.index}
    return origin | made.settings.asked() | {"nprobe": None}


def _of_both(knn: ResolvedSettings, centroid: ResolvedSettings) -> ResolvedSettings:
    """Combine settings: each set's own count, the lower threshold, and what else is equal."""
    from_centroid = {"nb_images_centroid"}
    if centroid.values.dedup_threshold < knn.values.dedup_threshold:
        from_centroid.add("dedup_threshold")
    values, theirs = knn.values.model_dump(), centroid.values.model_dump()
    origins = dict(knn.origins)
    for name in from_centroid:
        values[name] = theirs[name]
        origins.pop(name, None)
        if name in centroid.origins:
            origins[name] = centroid.origins[name]
    for name in (TARGET, ALIVE, "nprobe"):
        if values[name] != theirs[name]:
            values[name] = None
            origins.pop(name, None)
    return replace(knn, values=Settings(**values), origins=origins)
