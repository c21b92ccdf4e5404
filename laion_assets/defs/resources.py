"""Resources of assets and sensors: the index, the seed folder, the tables, the environment's settings.

Dagster's concept: https://docs.dagster.io/guides/build/external-resources
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import dagster as dg

from laion_assets.build import Build, Request
from laion_assets.defs.bounds import Bounds
from laion_assets.defs.io_manager import HandoverIOManager, ParquetIOManager, Tables
from laion_assets.defs.kubernetes.placement import NODE_VARIABLE
from laion_assets.defs.places import Places
from laion_assets.defs.settings import Defaults, RetrievalConfig
from laion_assets.demo import DEMO_MODEL, is_demo
from laion_assets.index import MODEL_RECORD, ModelRecord, read_model_record
from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage, reaching
from laion_assets.search.block_list import BlockList
from laion_assets.search.block_list_file import block_list_version, read_block_list
from laion_assets.seeds import (
    Listing,
    Model,
    SeedSet,
    find_seed_set,
    list_folder,
    read_settings,
    stage_model,
)
from laion_assets.staging import (
    NotStagedError,
    OpenIndex,
    Scrubbed,
    Source,
    Staged,
    open_staged,
    scrub,
    stage,
    verified_manifest,
    version_of,
)

EMBEDDINGS = "embeddings_uri"
NAMES = {  # from the library's parameters, which errors of a build name, to fields of `Places`
    "uri": EMBEDDINGS,
    "layout": "embeddings_layout",
    "key": "embeddings_key",
    "columns": "embeddings_columns",
}


@dataclass(frozen=True)
class LaionIndex:
    """The LAION index: its source and its staged copy.

    Attributes:
        index_uri: folder of the index, a local path or a URL.
        metadata_uri: folder of the metadata, if it is elsewhere or only a part.
        cache_dir: local directory for the staged index.
        staging: `full`, `sparse` or `in-place`.
        sparse_budget: bytes of disk that sparse staging may use.
        metadata_columns: names of the url and caption columns, if they are unusual.
        lost_index: what a step does on a disk that lacks the index: `restage` or `fail`.
        block_list_uri: file of images to exclude from every table.
        node: node of the cluster whose disk holds the copy; None elsewhere.

    """

    index_uri: str
    metadata_uri: str | None
    cache_dir: Path
    staging: str
    sparse_budget: int
    metadata_columns: Mapping[str, str]
    lost_index: str
    block_list_uri: str | None
    node: str | None = None

    @classmethod
    def at(cls, places: Places, node: str | None = None) -> LaionIndex:
        """Create it from the platform's locations."""
        return cls(
            index_uri=places.index_uri,
            metadata_uri=places.metadata_uri,
            cache_dir=Path(places.cache_dir).expanduser(),
            staging=places.staging_mode,
            sparse_budget=places.sparse_budget,
            metadata_columns=places.metadata_columns,
            lost_index=places.lost_index,
            block_list_uri=places.block_list,
            node=node,
        )

    def stage(self, log: Callable[[str], None], *, replace_other: bool = True) -> Staged:
        """Make the index available on the local disk, see `laion_assets.staging.stage`."""
        return stage(
            self.index_uri,
            self.metadata_uri,
            self.cache_dir,
            in_place=self.staging == "in-place",
            sparse=self.staging == "sparse",
            replace_other=replace_other,
            log=log,
        )

    def verify(self, log: Callable[[str], None], *, repair: bool) -> Scrubbed:
        """Read all of the staged index, see `laion_assets.staging.scrub`."""
        return scrub(self.cache_dir, repair=repair, budget=self.sparse_budget, log=log)

    def what_is_missing(
        self, recorded: str | None, log: Callable[[str], None] = lambda _: None
    ) -> str | None:
        """Describe what the local disk lacks of the index; None if it is complete.

        Args:
            recorded: fingerprint in the last materialization; None if there is none.
            log: called with lines about progress, if files have to be read again.

        """
        try:
            held = verified_manifest(self.cache_dir, log).fingerprint
        except NotStagedError as error:
            return str(error)
        if recorded in (None, held):
            return None
        return f"{self.cache_dir} holds the index {held}, but the last materialization is of {recorded}"

    def source_version(self) -> str:
        """Return the version of the source, which needs only a listing."""
        return version_of(Source(self.index_uri, self.metadata_uri).list())

    def model_record(self) -> ModelRecord:
        """Read the record of the model that embedded the index; empty if there is none."""
        where = f"{self.index_uri.rstrip('/')}/{MODEL_RECORD}"
        fs, path = open_storage(where, "index_uri")
        with reaching(where, "index_uri"):
            if not fs.exists(path):
                return ModelRecord()
            if not fs.isfile(path):
                raise InputError(f"{where} is not a file: remove it", "index_uri")
            return read_model_record(fs.cat_file(path), where)

    def block_list(self) -> BlockList | None:
        """Read the block list; None if none is set."""
        return read_block_list(self.block_list_uri) if self.block_list_uri else None

    def block_list_description(self) -> str | None:
        """Describe the block list as tables record it; it is only read again if its file has changed."""
        if not self.block_list_uri:
            return None
        return _described_block_list(self.block_list_uri, block_list_version(self.block_list_uri))

    @contextmanager
    def open(self, log: Callable[[str], None]) -> Iterator[OpenIndex]:
        """Verify and open the staged index, and protect it from changes until the block ends."""
        with open_staged(
            self.cache_dir, self.metadata_columns, budget=self.sparse_budget, log=log
        ) as opened:
            yield opened


@lru_cache(maxsize=4)
def _described_block_list(uri: str, version: str) -> str:  # noqa: ARG001  # part of the key
    return str(read_block_list(uri))


@dataclass(frozen=True)
class SeedFolder:
    """The folder of the seed sets: every subfolder is one.

    Attributes:
        uri: a local path or a URL.

    """

    uri: str

    def listing(self, seconds: float | None = None) -> Listing:
        """List the seed sets and the ignored files, see `list_folder`."""
        return list_folder(self.uri, seconds)

    def find(self, name: str) -> SeedSet:
        """Find one seed set by name."""
        return find_seed_set(self.uri, name)

    def settings(self, seed_set: SeedSet) -> Mapping[str, Any]:
        """Return the set's settings.yaml, only read again if it has changed; empty without one."""
        return _settings_of(self.uri, seed_set)


@lru_cache(maxsize=1 << 12)
def _settings_of(uri: str, seed_set: SeedSet) -> Mapping[str, Any]:
    return read_settings(uri, seed_set)


@dataclass(frozen=True)
class Embedder:
    """The model that embeds images and prompts, which must be the model of the index.

    Attributes:
        model_uri: its folder, a local path or a URL; None if none is set.
        device: `auto`, `cpu` or `cuda`.
        cache_dir: local directory for staged models.

    """

    model_uri: str | None
    device: str
    cache_dir: Path

    @classmethod
    def at(cls, places: Places) -> Embedder:
        """Create it from the platform's locations."""
        return cls(places.model, places.embed_device, Path(places.cache_dir).expanduser() / "models")

    def open(self, index: LaionIndex, dimension: int | None, log: Callable[[str], None]) -> Model | None:
        """Stage and open the model, and compare it with the index; None if none is set.

        Args:
            index: used to choose the demo's model and to check the model.
            dimension: dimension of the staged index; None if unknown.
            log: called with lines about staging.

        Raises:
            InputError: the model is missing, unusable, or not that of the index.

        """
        uri = self.model_uri or (str(DEMO_MODEL) if is_demo(index.index_uri) else None)
        if uri is None:
            return None
        model = Model(stage_model(uri, self.cache_dir, log), self.device)
        record = index.model_record()
        replace(record, dimension=record.dimension or dimension).check(model.name, model.dimension)
        return model


@dataclass(frozen=True)
class IndexBuilder:
    """Builds the index from published embeddings.

    Attributes:
        request: what to build; None if LAION_EMBEDDINGS_URI is not set.
        min_recall: recall@100 below which a check warns.

    """

    request: Request | None
    min_recall: float

    @classmethod
    def at(cls, places: Places) -> IndexBuilder:
        """Create it from the platform's locations."""
        if places.embeddings_uri is None:
            return cls(None, places.min_recall)
        request = Request(
            embeddings_uri=places.embeddings_uri,
            index_uri=places.index_uri,
            work_uri=places.build_uri or "",
            layout=places.embeddings_layout,
            key=places.embeddings_key,
            index_key=places.index_key,
            bytes_per_row=places.bytes_per_row,
            shard_rows=places.shard_rows,
            columns=places.embeddings_columns,
            model=ModelRecord(places.embeddings_model),
        )
        return cls(request, places.min_recall)

    @contextmanager
    def open(self, log: Callable[[str], None]) -> Iterator[Build]:
        """Open the build; errors in the block name the platform's variables.

        Raises:
            InputError: LAION_EMBEDDINGS_URI is not set.

        """
        if self.request is None:
            raise InputError(
                "no embeddings are set to build an index from: name their folder", EMBEDDINGS
            )
        try:
            yield Build(self.request, log)
        except InputError as error:
            raise InputError(str(error), NAMES.get(error.about or "", error.about)) from error


@dataclass(frozen=True)
class Pictures:
    """How the UI shows images if the metadata has no thumbnails.

    Attributes:
        remote: whether steps fetch images from their hosts; otherwise the UI shows links.

    """

    remote: bool


def resources_from(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return all resources of the code location for an environment.

    Raises:
        InputError: a variable cannot be used or is misspelt.

    """
    places = Places.from_environment(environment)
    tables = Tables(places.output_uri)
    return {
        "laion_index": _shown(LaionIndex.at(places, environment.get(NODE_VARIABLE))),
        "seeds": _shown(SeedFolder(places.seeds_uri)),
        "embedder": _shown(Embedder.at(places)),
        "index_builder": _shown(IndexBuilder.at(places)),
        "bounds": _shown(Bounds.at(places)),
        "pictures": _shown(Pictures(remote=places.show_remote_pictures)),
        "defaults": _shown(Defaults.from_environment(environment)),
        "tables": _shown(tables),
        "retrieval_config": RetrievalConfig(),
        "io_manager": dg.IOManagerDefinition.hardcoded_io_manager(
            ParquetIOManager(tables), description="Opens tables as inputs; assets write their own."
        ),
        "handover": dg.IOManagerDefinition.hardcoded_io_manager(
            HandoverIOManager(tables), description="Passes values between the steps of an asset."
        ),
    }


def _shown(value: Any) -> dg.ResourceDefinition:
    """Return a value as a resource whose page in the UI describes it and shows its fields."""

    def provide(_: dg.InitResourceContext) -> Any:
        return value

    provide.__name__ = type(value).__name__  # the name shown in the UI
    about = inspect.cleandoc(type(value).__doc__ or "").partition("\n\nAttributes")[0]
    shown = "\n".join(f"- {name}: `{text}`" for name, text in _fields(value))
    return dg.ResourceDefinition(provide, description=f"{about}\n\n{shown}")


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(value):
        found = getattr(value, field.name)
        if is_dataclass(found):
            yield from _fields(found)
        else:
            yield field.name, found


def storage_kind(uri: str) -> str:
    """Return the kind of storage under the name that Dagster's UI uses."""
    scheme = uri.partition("://")[0] if "://" in uri else "local"
    return {"gs": "gcs", "file": "local"}.get(scheme, scheme)
