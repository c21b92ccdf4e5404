"""Where things are: the index, the seed folder, the tables; from the environment, else the demo's.

What must not live here: the settings of a request, which can be changed for one run; work.
Dagster's concept: https://docs.dagster.io/guides/build/external-resources
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import dagster as dg

from laion_assets.defs.settings import DEFAULTS, variable_of
from laion_assets.io.errors import InputError
from laion_assets.io.storage import on_this_machine
from laion_assets.search.filters import BlockList, block_list_version, read_block_list
from laion_assets.seeds.seed_sets import (
    Listing,
    Seeds,
    SeedSet,
    find_seed_set,
    list_folder,
    read_seeds,
    read_settings,
)
from laion_assets.staging import (
    DEFAULT_BUDGET,
    STAGE_AGAIN,
    NotStagedError,
    OpenIndex,
    Source,
    Staged,
    open_staged,
    read_bytes,
    stage,
    verified_manifest,
    version_of,
)

DATA = Path("data")  # the one project folder; dagster.yaml keeps Dagster's own storage there too
Staging = Literal["full", "sparse", "in-place"]
LostIndex = Literal["restage", "fail"]
PLACES = (
    "LAION_INDEX_URI",
    "LAION_METADATA_URI",
    "LAION_METADATA_COLUMNS",
    "LAION_CACHE_DIR",
    "LAION_STAGING",
    "LAION_SPARSE_BUDGET",
    "LAION_LOST_INDEX",
    "LAION_BLOCK_LIST",
    "LAION_SEEDS_URI",
    "LAION_OUTPUT_URI",
    "LAION_SHOW_REMOTE_PICTURES",
)  # what is set in the environment alone
ALIKE = 0.85  # share of letters that a misspelt variable has in common with the one that was meant


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
        block_list_uri: file of the images that must not get into any table.

    """

    index_uri: str
    metadata_uri: str | None
    cache_dir: Path
    staging: str
    sparse_budget: int
    metadata_columns: Mapping[str, str]
    lost_index: str
    block_list_uri: str | None

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

    def what_is_missing(self, claimed: str | None) -> str | None:
        """Say what the local disk lacks of the index; None when all of it is there.

        Args:
            claimed: fingerprint of the index that was staged last, as far as Dagster knows.

        """
        try:
            held = verified_manifest(self.cache_dir).fingerprint
        except NotStagedError as error:
            return str(error)
        if claimed in (None, held):
            return None
        return (
            f"{self.cache_dir} holds the index {held}, and the last that Dagster knows to be staged is "
            f"{claimed}: {STAGE_AGAIN}"
        )

    def source_version(self) -> str:
        """Return the version of the source; only lists its files."""
        return version_of(Source(self.index_uri, self.metadata_uri).list())

    def block_list_version(self) -> str:
        """Return what changes when the block list is written again; empty where no list is set."""
        return block_list_version(self.block_list_uri) if self.block_list_uri else ""

    def block_list(self) -> BlockList | None:
        """Read the images that must not get into any table; None where no list is set."""
        return read_block_list(self.block_list_uri) if self.block_list_uri else None

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

    def listing(self) -> Listing:
        """List the seed sets, and the files that nobody reads."""
        return list_folder(self.uri)

    def find(self, name: str) -> SeedSet:
        """Find one seed set by name."""
        return find_seed_set(self.uri, name)

    def read(self, seed_set: SeedSet) -> Seeds:
        """Read and check its embeddings."""
        return read_seeds(self.uri, seed_set)

    def settings(self, seed_set: SeedSet) -> dict[str, Any]:
        """Read its settings.yaml; empty without one."""
        return read_settings(self.uri, seed_set)


@dataclass(frozen=True)
class Pictures:
    """What pages of the UI show where the metadata has no thumbnails.

    Attributes:
        remote: whether the browser gets pictures from the hosts that have them; else there are links.

    """

    remote: bool


def refuse_misspelt(environment: Mapping[str, str]) -> None:
    """Refuse variables that nobody reads and that look like one that is read.

    A setting that is silently none could be the one that keeps images out. Others that begin alike may
    be somebody else's, such as those that Kubernetes makes of the names of services.

    Raises:
        InputError: names the variable and the one that was meant.

    """
    known = {*PLACES, *map(variable_of, DEFAULTS)}
    for name in environment:
        if name.startswith("LAION_") and name not in known:
            for meant in difflib.get_close_matches(name, known, n=1, cutoff=ALIKE):
                raise InputError(f"{name} is set, which is no setting: did you mean {meant}?")


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
        block_list_uri=environment.get("LAION_BLOCK_LIST") or None,
    )


def seeds_from(environment: Mapping[str, str]) -> SeedFolder:
    """Where the seeds are, from the environment."""
    return SeedFolder(uri=environment.get("LAION_SEEDS_URI") or _default("seeds"))


def output_from(environment: Mapping[str, str]) -> str:
    """Where the tables go, from the environment."""
    return environment.get("LAION_OUTPUT_URI") or _default("output")


def pictures_from(environment: Mapping[str, str]) -> Pictures:
    """Whether pages show pictures from elsewhere, from the environment."""
    return Pictures(
        remote=_choice(environment, "LAION_SHOW_REMOTE_PICTURES", ("false", "true"), "false") == "true"
    )


def as_resource(value: LaionIndex | SeedFolder | Pictures) -> dg.ResourceDefinition:
    """Return a place or a choice as a resource that the UI shows: what it is, and what it is set to."""

    def provide(_: dg.InitResourceContext) -> LaionIndex | SeedFolder | Pictures:
        return value

    provide.__name__ = type(value).__name__  # as the UI calls it
    about = inspect.cleandoc(type(value).__doc__ or "").partition("\n\nAttributes")[0]
    places = "\n".join(f"- {name}: `{told}`" for name, told in asdict(value).items())
    return dg.ResourceDefinition(provide, description=f"{about}\n\n{places}")


def storage_kind(uri: str) -> str:
    """Name the kind of storage as Dagster's pages do."""
    scheme = uri.partition("://")[0] if "://" in uri else "local"
    return {"gs": "gcs", "file": "local"}.get(scheme, scheme)


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
