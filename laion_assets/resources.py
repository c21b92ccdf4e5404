"""What the assets are given: the index, the seed folder, and the settings of a request.

Places come from the environment, with defaults that are the demo; only the settings of a request can be
changed for one run, in the Launchpad. What must not live here: work.
Dagster's concept: https://docs.dagster.io/guides/build/external-resources
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import dagster as dg
from pydantic import Field

from laion_assets.retrieval.errors import InputError
from laion_assets.retrieval.seeds import Seeds, SeedSet, find_seed_set, list_seed_sets, read_seeds
from laion_assets.retrieval.staging import (
    DEFAULT_BUDGET,
    NotStagedError,
    OpenIndex,
    Source,
    Staged,
    open_staged,
    read_bytes,
    stage,
    verified_manifest,
)
from laion_assets.retrieval.storage import on_this_machine

DATA = Path("data")  # the one project folder; dagster.yaml keeps Dagster's own storage there too
Staging = Literal["full", "sparse", "in-place"]
LostIndex = Literal["restage", "fail"]


@dataclass(frozen=True)
class LaionIndex:
    """The LAION index: where it comes from and where it is staged.

    Attributes:
        index_uri: folder of the index, a local path or any fsspec URL.
        metadata_uri: folder of the metadata, when it lies elsewhere or is only a part.
        cache_dir: local directory the index is staged to.
        staging: `full` copies it there, `sparse` reads only what requests touch, `in-place` uses a local
            index where it is.
        sparse_budget: bytes that what was read for requests may take.
        metadata_columns: names of the url and caption columns, when unusual.
        lost_index: what a step that needs the index does on a disk that lacks it: `restage` or `fail`.

    """

    index_uri: str
    metadata_uri: str | None
    cache_dir: Path
    staging: str
    sparse_budget: int
    metadata_columns: Mapping[str, str]
    lost_index: str

    def stage(self, log: Callable[[str], None]) -> Staged:
        """Make the index available on the local disk."""
        return stage(
            self.index_uri,
            self.metadata_uri,
            self.cache_dir,
            in_place=self.staging == "in-place",
            sparse=self.staging == "sparse",
            log=log,
        )

    def what_is_missing(self) -> str | None:
        """Say what the local disk lacks of the index; None when all of it is there."""
        try:
            verified_manifest(self.cache_dir)
        except NotStagedError as error:
            return str(error)
        return None

    def source_version(self) -> str:
        """Changes with the name, size or content of any file at the source; only lists them.

        Where a listing tells no checksums, the time of writing stands for the content.
        """
        files = Source(self.index_uri, self.metadata_uri).list()
        lines = sorted(f"{file.name}\t{file.size}\t{file.checksum or file.version}" for file in files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @contextmanager
    def open(self, log: Callable[[str], None]) -> Iterator[OpenIndex]:
        """Open the staged index after verifying it; nobody changes it until the block ends."""
        with open_staged(
            self.cache_dir, self.metadata_columns, budget=self.sparse_budget, log=log
        ) as opened:
            yield opened


@dataclass(frozen=True)
class SeedFolder:
    """The folder of the seed sets: every subfolder is one.

    Attributes:
        uri: a local path or any fsspec URL.

    """

    uri: str

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each seed set."""
        return {name: seed_set.fingerprint for name, seed_set in list_seed_sets(self.uri).items()}

    def find(self, name: str) -> SeedSet:
        """Find one seed set by name."""
        return find_seed_set(self.uri, name)

    def read(self, seed_set: SeedSet) -> Seeds:
        """Read and check its embeddings."""
        return read_seeds(self.uri, seed_set)


@dataclass(frozen=True)
class Settings:
    """The settings of one request, all known, and where each came from."""

    nb_images_knn: int
    nb_images_centroid: int
    dedup_threshold: float
    nprobe: int | None
    origins: Mapping[str, str]

    def values(self) -> dict[str, Any]:
        """The settings alone."""
        return {name: getattr(self, name) for name in DEFAULTS}


DEFAULTS: Mapping[str, Any] = {
    "nb_images_knn": 50,
    "nb_images_centroid": 500,
    "dedup_threshold": 0.94,
    "nprobe": None,
}
KINDS: Mapping[str, type] = {
    "nb_images_knn": int,
    "nb_images_centroid": int,
    "dedup_threshold": float,
    "nprobe": int,
}


class RetrievalConfig(dg.ConfigurableResource[None]):
    """How many images to ask for, and how alike two may be.

    What is left empty comes from the environment (LAION_NB_IMAGES_KNN and so on), then the default.
    """

    nb_images_knn: int | None = Field(
        default=None, description="Images wanted for each seed, at least 1 (default 50)"
    )
    nb_images_centroid: int | None = Field(
        default=None,
        description="Images wanted around the mean of the seeds, at least 1 (default 500)",
    )
    dedup_threshold: float | None = Field(
        default=None,
        description="Cosine above which two images are near-duplicates, over 0 up to 1 (default 0.94); "
        "1 keeps all",
    )
    nprobe: int | None = Field(
        default=None,
        description="Inverted lists to probe, at least 1 (default: chosen from the number of images)",
    )

    def resolve(self, environment: Mapping[str, str]) -> Settings:
        """Settle every setting: Launchpad, then environment, then default.

        Raises:
            InputError: names the setting, its value, where it came from, and what is allowed.

        """
        chosen: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for name, default in DEFAULTS.items():
            variable = f"LAION_{name.upper()}"
            if getattr(self, name) is not None:
                chosen[name], origins[name] = getattr(self, name), "Launchpad or command line"
            elif environment.get(variable):
                chosen[name], origins[name] = (
                    _number(environment[variable], name, variable),
                    variable,
                )
            else:
                chosen[name], origins[name] = default, "default"
            _check(name, chosen[name], origins[name])
        return Settings(**chosen, origins=origins)


def _number(text: str, name: str, variable: str) -> Any:
    try:
        return KINDS[name](text)
    except ValueError as error:
        raise InputError(f"{variable} is {text!r}, which is not a number: correct or unset it") from error


def _check(name: str, value: Any, origin: str) -> None:
    if value is None:
        return
    if name == "dedup_threshold":
        if not 0 < value <= 1:
            raise InputError(
                f"dedup_threshold is {value} (from {origin}): give a cosine over 0 and up to 1, "
                "where 1 keeps all"
            )
    elif value < 1:
        raise InputError(f"{name} is {value} (from {origin}): give 1 or more")


def index_from(environment: Mapping[str, str]) -> LaionIndex:
    """Where the index is, from the environment; the demo's when nothing is set.

    To copy a folder of this machine costs little, to copy a bucket's terabytes a lot: of those, only what
    requests touch is read unless it is said otherwise.
    """
    index_uri = environment.get("LAION_INDEX_URI") or _default("index")
    usual = "full" if on_this_machine(index_uri) else "sparse"
    budget = environment.get("LAION_SPARSE_BUDGET")
    return LaionIndex(
        index_uri=index_uri,
        metadata_uri=environment.get("LAION_METADATA_URI") or None,
        cache_dir=Path(environment.get("LAION_CACHE_DIR") or _default("cache")),
        staging=_choice(environment, "LAION_STAGING", get_args(Staging), usual),
        sparse_budget=read_bytes(budget, "LAION_SPARSE_BUDGET") if budget else DEFAULT_BUDGET,
        metadata_columns=_columns(environment.get("LAION_METADATA_COLUMNS", "")),
        lost_index=_choice(environment, "LAION_LOST_INDEX", get_args(LostIndex), "restage"),
    )


def seeds_from(environment: Mapping[str, str]) -> SeedFolder:
    """Where the seeds are, from the environment."""
    return SeedFolder(uri=environment.get("LAION_SEEDS_URI") or _default("seeds"))


def output_from(environment: Mapping[str, str]) -> str:
    """Where the tables go, from the environment."""
    return environment.get("LAION_OUTPUT_URI") or _default("output")


def _choice(environment: Mapping[str, str], variable: str, allowed: Sequence[str], default: str) -> str:
    """One of a few words."""
    chosen = environment.get(variable) or default
    if chosen not in allowed:
        *most, last = allowed
        raise InputError(f"{variable} is {chosen!r}: set it to {', '.join(most)} or {last}")
    return chosen


def _default(name: str) -> str:
    return str((DATA / name).absolute())


def _columns(text: str) -> dict[str, str]:
    """Read `url=image_link,caption=alt_text`."""
    pairs = [pair.split("=", 1) for pair in text.split(",") if pair.strip()]
    for pair in pairs:
        if len(pair) != 2 or pair[0].strip() not in ("url", "caption"):
            raise InputError(
                f"LAION_METADATA_COLUMNS is {text!r}: write it as url=<column>,caption=<column>"
            )
    return {ours.strip(): theirs.strip() for ours, theirs in pairs}
