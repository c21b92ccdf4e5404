"""The steps of a build, each skipped if its result exists."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from laion_assets.build import shards as shard_files
from laion_assets.build.answers import Answers, merged, read_answers, recall
from laion_assets.build.cost import Cost, Rates, cost_of, measured
from laion_assets.build.embeddings import (
    EmbeddingFile,
    EmbeddingReader,
    Embeddings,
    Listing,
    list_embeddings,
    list_files,
    metadata_schema,
    pair_version,
)
from laion_assets.build.index_key import ROWS_PER_LIST, check_key, index_key_for
from laion_assets.build.merge import write_index
from laion_assets.build.plan import SHARD_ROWS, Part, Plan, Shard, check_planned, extended
from laion_assets.build.publish import BUILT, Destination
from laion_assets.build.shards import EXACT, ShardRecord, encode_shard, folder_of, read_record
from laion_assets.build.trained import ANSWERS, KEPT, Record, Trained, read_trained, train_index
from laion_assets.build.trained import FOLDER as TRAINED
from laion_assets.build.trained import read_record as read_trained_record
from laion_assets.build.workspace import WORK_URI, Workspace
from laion_assets.index import (
    ID_SIZE,
    INVERTED_LISTS,
    METADATA_FOLDER,
    MODEL_RECORD,
    PUBLISHED_TABLES,
    SINGLE_INDEX,
    URL_COLUMNS,
    ModelRecord,
    nprobe_rule,
    published_tables,
)
from laion_assets.io.arrays import Ids
from laion_assets.io.errors import InputError
from laion_assets.io.progress import Progress, format_duration
from laion_assets.io.text import count, list_shortly

PLAN, INPUT, PREPARED = "plan.json", "input.json", "prepared.json"
RECALL_AT = (1, 10, 100, 1000)
LISTS_CHECKED = 64
Log = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to build, and from which embeddings.

    Attributes:
        embeddings_uri: folder of the embeddings, a local path or a URL.
        index_uri: folder of the index.
        work_uri: folder for intermediate results; `<index_uri>.build` by default.
        layout: layout of the embeddings; None detects it.
        key: which vectors to use if files hold several; None takes the layout's default.
        index_key: faiss factory key; None chooses it with `index_key_for`.
        bytes_per_row: limit for that choice.
        rows_per_centre: training rows needed per list and per codebook entry; fewer result in a worse
            index.
        shard_rows: approximate number of rows per shard.
        columns: metadata columns that the index keeps; None keeps all.
        model: the model that embedded the images, if the layout does not imply it.

    """

    embeddings_uri: str
    index_uri: str
    work_uri: str = ""
    layout: str | None = None
    key: str | None = None
    index_key: str | None = None
    bytes_per_row: int | None = None
    rows_per_centre: int = ROWS_PER_LIST
    shard_rows: int = SHARD_ROWS
    columns: tuple[str, ...] | None = None
    model: ModelRecord = field(default_factory=ModelRecord)


@dataclass(frozen=True)
class Built:
    """A finished index.

    Attributes:
        fingerprint: changes with anything that the index depends on.
        index_key: faiss factory key.
        dimension: dimension of the vectors.
        rows: number of ids.
        stored: number of rows that a search can find.
        unusable: number of rows without a usable vector; they have an id and metadata.
        lists: number of inverted lists; 0 if it has none.
        bytes: size of the lists, or of the whole index if it is a single file.
        recall: share of the best R rows by the raw vectors that is found, by nprobe and R.
        nprobe_of_a_search: number of lists that a search for 1,000 rows probes.

    """

    fingerprint: str
    index_key: str
    dimension: int
    rows: int
    stored: int
    unusable: int
    lists: int
    bytes: int
    recall: Mapping[str, Mapping[str, float]]
    nprobe_of_a_search: int

    @property
    def summary(self) -> str:
        """The number of rows that a search can find, and of those that it cannot."""
        return f"{self.stored:,} of {count(self.rows, 'row')}{without_vector(self.unusable)}"


@dataclass(frozen=True)
class Wanted:
    """Fingerprints of the inputs of each step; a result with another fingerprint is out of date.

    Attributes:
        shards: fingerprints of the shards, by name.
        index: fingerprint of the whole index.

    """

    shards: Mapping[str, str]
    index: str


@dataclass(frozen=True)
class _Input:
    """The input of the plan, stored so that later steps need not detect it again.

    Attributes:
        layout: layout of the embeddings.
        key: which vectors of the files are used.
        dimension: dimension of the vectors.
        model: fields of a `ModelRecord`.

    """

    layout: str
    key: str
    dimension: int
    model: Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """The files and settings for which the plan and the trained index were made.

    Attributes:
        files: version of the listing of the files.
        settings: fingerprint of the settings, see `Build.settings`.
        times: number of changes of the settings so far; distinguishes settings that return.

    """

    files: str
    settings: str
    times: int


class Build:
    """A build and its steps.

    Args:
        request: what to build.
        log: called with each log line.

    Attributes:
        request: the request.
        workspace: the folder for intermediate results.

    Raises:
        InputError: a storage cannot be used, or the workspace is in the folder of the index.

    """

    def __init__(self, request: Request, log: Log = lambda _: None) -> None:
        self.request = request
        self._log = log
        self._destination = Destination(request.index_uri)
        self.workspace = Workspace(request.work_uri or f"{request.index_uri.rstrip('/')}.build")
        if f"{self.workspace.local or self.workspace.uri}/".startswith(f"{self._destination.uri}/"):
            raise InputError(
                f"{self.workspace.uri} is in {self._destination.uri}, which is replaced as a whole: name "
                "a folder beside it",
                WORK_URI,
            )

    @cached_property
    def embeddings(self) -> Embeddings:
        """The current input; only headers are read."""
        return list_embeddings(self.request.embeddings_uri, self.request.layout, self.request.key)

    def listing(self) -> Listing:
        """List the input without reading any file.

        Raises:
            InputError: there are no embeddings, or a file lacks its partner.

        """
        return list_files(self.request.embeddings_uri, self.request.layout, self.request.key)

    def prepared(self) -> Prepared | None:
        """Return the files and settings of the last `train`; None if it has not run."""
        return self.workspace.read_record(PREPARED, Prepared)

    def is_prepared(self, prepared: Prepared | None, listing: Listing) -> bool:
        """Return whether `train` ran for these files with the request's settings."""
        return prepared is not None and (prepared.files, prepared.settings) == (
            listing.version,
            self.settings,
        )

    @property
    def settings(self) -> str:
        """A fingerprint of the settings that affect the result."""
        request = self.request
        values = request.layout, request.key, request.index_key, request.bytes_per_row, request.columns
        return _fingerprint(values, asdict(request.model))

    def check_planned(self, plan: Plan, listing: Listing) -> None:
        """Check that planned files exist and that files of encoded shards are unchanged.

        No file is read.

        Raises:
            InputError: a file is missing or has changed; the message names the files.

        """
        check_planned(plan, listing.versions, self._is_encoded)

    def plan(self) -> Plan:
        """Assign an id to every row; new files follow those planned before.

        Raises:
            InputError: the input cannot be used, planned files are gone or have changed, or the
                destination holds other files.

        """
        self._destination.check()
        _ = self.embeddings  # read before the lock, which others wait for
        with self.workspace.locked(self._log):
            planned = self.stored_plan()
            plan = self._extended(planned)
            found = _Input(
                self.embeddings.layout,
                self.embeddings.key,
                self.embeddings.dimension,
                asdict(self.embeddings.model),
            )
            if found != self.workspace.read_record(INPUT, _Input):
                self.workspace.write_json(INPUT, asdict(found))
            if not planned.shards or not self.workspace.exists(self._schema_file()):
                self._write_schema()
            if plan != planned:
                self.workspace.write_json(PLAN, plan.to_json())
        return plan

    def cost(self) -> Cost:
        """Estimate the cost of the build, or of what is left of it.

        Nothing is written. Measuring this machine takes a few seconds.

        Raises:
            InputError: the input cannot be used, planned files are gone or have changed, or the key is
                not supported or needs more rows.

        """
        found, files = self.embeddings, self.embeddings.files
        plan = self._extended(self.stored_plan())
        trained = read_trained_record(self.workspace)
        if trained is None or not self._is_trained_for_input(trained):
            trained = None
            check_key(self.index_key(), found.dimension, found.rows, self.request.rows_per_centre)
        key = trained.index_key if trained else self.index_key()
        missing = set(self.missing(plan) if trained else (shard.name for shard in plan.shards))
        left = [shard for shard in plan.shards if shard.name in missing]
        to_read = {part.name for shard in left for part in shard.parts}
        one_file = all(file.vectors == file.metadata for file in files)
        return cost_of(
            found.rows,
            found.dimension,
            key,
            measured(key, found.dimension) if left or trained is None else Rates(0.0, 0.0),
            shard_rows=self.request.shard_rows,
            vector_bytes=sum(file.vector_bytes for file in files if file.name in to_read),
            metadata_bytes=None if one_file else sum(file.metadata.size for file in files),
            encoded_rows=found.rows - sum(shard.rows for shard in left),
            shards=len(left),
            is_trained=trained is not None,
        )

    def _extended(self, planned: Plan) -> Plan:
        """Return a plan with the files of the input that it lacks as new shards."""
        parts = [_part(file) for file in self.embeddings.files]
        return extended(planned, parts, self.request.shard_rows, self._is_encoded)

    def _is_trained_for_input(self, trained: Record) -> bool:
        """Return whether a trained index is the requested one, and of the input's vectors."""
        found = self.embeddings.key, self.embeddings.dimension
        return (trained.vectors, trained.dimension) == found and self._is_wanted(trained)

    def index_key(self) -> str:
        """Return the request's faiss key, or choose one for the number of rows."""
        return self._key_for(self.embeddings.rows)

    def _key_for(self, rows: int) -> str:
        request = self.request
        return request.index_key or index_key_for(rows, self.embeddings.dimension, request.bytes_per_row)

    def missing(self, plan: Plan) -> list[str]:
        """Return the names of the shards that are not encoded yet."""
        wanted = self.wanted(plan)
        return [
            shard.name
            for shard in plan.shards
            if wanted is None or read_record(self.workspace, shard, wanted.shards[shard.name]) is None
        ]

    def stored_plan(self) -> Plan:
        """Return the stored plan without reading the input; empty before the first build.

        Raises:
            InputError: the plan is damaged.

        """
        return self.workspace.read_record(PLAN, lambda **stored: Plan.from_json(stored)) or Plan()

    def wanted(self, plan: Plan) -> Wanted | None:
        """Return the fingerprints of the steps' inputs; None if the index is not trained."""
        record = read_trained_record(self.workspace)
        return None if record is None or not self._is_wanted(record) else self._wanted(plan, record)

    def train(self) -> Trained:
        """Plan all rows, and train the index on a sample of them unless it is already trained.

        Raises:
            InputError: see `plan`; also if the key is not supported or needs more rows.

        """
        listing = self.listing()  # before headers are read: later files are planned next time
        trained = self._train(self.plan())
        before = self.prepared()
        if not self.is_prepared(before, listing):
            times = before.times if before else 0
            times += before is None or before.settings != self.settings
            self.workspace.write_json(PREPARED, asdict(Prepared(listing.version, self.settings, times)))
        return trained

    def _train(self, plan: Plan) -> Trained:
        by_name = {file.name: file for file in self.embeddings.files}
        # Files added later have higher ids than their sorted names suggest.
        files = tuple(by_name[part.name] for part in plan.parts())
        reader = EmbeddingReader(replace(self.embeddings, files=files))

        def sample(wanted: int) -> tuple[Any, Any]:
            return reader.sample(wanted, np.random.default_rng(0))

        vectors, dimension = self.embeddings.key, self.embeddings.dimension
        with (self.workspace / TRAINED).locked(self._log):
            found = read_trained_record(self.workspace)
            # The best key may change with the number of rows, but that does not justify a new start.
            if found and self._is_trained_for_input(found):
                return self._trained()
            return train_index(
                self.workspace,
                self._key_for,
                vectors,
                dimension,
                plan.rows,
                sample,
                self._log,
                self.request.rows_per_centre,
                self.request.bytes_per_row,
            )

    def encode(self, number: int) -> ShardRecord:
        """Encode one shard.

        Raises:
            InputError: the shard does not exist, the index is not trained, the input cannot be used or
                has changed since it was planned, or there is too little space.

        """
        plan, trained = self.stored_plan(), self._trained()
        if not 0 <= number < len(plan.shards):
            raise InputError(
                f"there is no shard {number}: {self.request.embeddings_uri} has {len(plan.shards)}"
            )
        shard = plan.shards[number]
        made_from = self._wanted(plan, trained.record).shards[shard.name]
        with (
            folder_of(self.workspace, shard).locked(self._log),
            Progress("rows", shard.rows, "", self._log) as progress,
        ):
            if record := read_record(self.workspace, shard, made_from):
                return record
            embeddings = self._listed(shard)
            return encode_shard(
                self.workspace,
                shard,
                made_from,
                trained,
                EmbeddingReader(embeddings),
                embeddings.files,
                self._schema(),
                progress.advance,
            )

    def finish(self) -> Built:
        """Merge all shards, check the written files, and publish the index.

        Raises:
            InputError: shards are missing or damaged, there is too little space, or the destination holds
                other files.

        """
        target, plan, trained = self._destination, self.stored_plan(), self._trained()
        if not plan.shards:
            raise InputError(f"{self.workspace.uri} holds no plan: plan the build first", WORK_URI)
        wanted = self._wanted(plan, trained.record)
        records = self._records(plan, wanted)
        with target.locked(self._log):
            target.check()
            built = target.current.read_record(BUILT, Built) if target.is_complete() else None
            if built and built.fingerprint == wanted.index:
                target.discard_new()  # left behind by a killed build
                self._log("nothing is new: the index is up to date")
                return built
            built = target.new.read_record(BUILT, Built)
            if not built or built.fingerprint != wanted.index:
                target.discard_new()
                built = self._write(plan, trained, records, wanted.index)
            target.publish()
            return built

    def published(self) -> Built | None:
        """Read the record of the published index; None if no build wrote it."""
        return self._destination.current.read_record(BUILT, Built)

    def run(self) -> Built:
        """Run all steps in order."""
        started = time.perf_counter()
        plan = self.plan()
        self._log(f"{count(plan.rows, 'row')} in {count(len(plan.shards), 'shard')}")
        self.train()
        for shard in plan.shards:
            self.encode(shard.number)
        built = self.finish()
        self._log(f"done in {format_duration(time.perf_counter() - started)}")
        return built

    def _is_encoded(self, shard: Shard) -> bool:
        return folder_of(self.workspace, shard).exists(shard_files.RECORD)

    def _listed(self, shard: Shard) -> Embeddings:
        """List the files of a shard without reading the headers of other files."""
        names, known = [part.name for part in shard.parts], self._input()
        listed = list_embeddings(
            self.request.embeddings_uri, known.layout, known.key, only=names, dimension=known.dimension
        )
        extended(Plan((shard,)), [_part(file) for file in listed.files])  # raises if a file has changed
        return listed

    def _schema_file(self) -> str:
        return f"schema-{_fingerprint(self.request.columns)}.arrow"

    def _write_schema(self) -> None:
        """Fix the metadata columns for all shards, including those of later files."""
        schema = metadata_schema(self.embeddings, self.request.columns)
        if not schema.names:
            raise InputError(
                f"the metadata in {self.request.embeddings_uri} has no column that an index can keep: "
                "add one with the URLs of the images",
                "columns",
            )
        _check_urls(schema, self.request.embeddings_uri)
        with self.workspace.new(self._schema_file()) as sink:
            sink.write(schema.serialize().to_pybytes())

    def _schema(self) -> pa.Schema:
        if not self.workspace.exists(self._schema_file()):  # the columns were changed meanwhile
            self._write_schema()
        name = self._schema_file()
        try:
            return pa.ipc.read_schema(pa.py_buffer(self.workspace.read(name)))
        except (pa.ArrowException, OSError) as error:
            raise self.workspace.damaged(name, f"is no Arrow schema ({error})") from error

    def _trained(self) -> Trained:
        found = read_trained(self.workspace)
        if found is None:
            raise InputError(
                f"{self.workspace.uri} holds no trained index: train it first", "trained_index"
            )
        if not self._is_wanted(found.record):
            raise InputError(
                f"{self.workspace.uri} holds a trained index {found.record.index_key} of "
                f"{found.record.vectors}, but another one is requested: train that one first",
                "trained_index",
            )
        return found

    def _is_wanted(self, trained: Record) -> bool:
        """Return whether a trained index is the requested one."""
        request = self.request
        if request.key not in (None, trained.vectors):
            return False
        if request.index_key is not None:
            return request.index_key == trained.index_key
        return request.bytes_per_row in (None, trained.bytes_per_row)

    def _input(self) -> _Input:
        found = self.workspace.read_record(INPUT, _Input)
        if found is None:
            raise self.workspace.damaged(INPUT, "is missing")
        return found

    def _wanted(self, plan: Plan, trained: Record) -> Wanted:
        settings = trained.checksums, self.request.columns, trained.vectors
        shards = {shard.name: _fingerprint(shard.fingerprint, *settings) for shard in plan.shards}
        model = self.request.model
        return Wanted(shards, _fingerprint(shards, model.name, model.url))

    def _records(self, plan: Plan, wanted: Wanted) -> list[ShardRecord]:
        found = {
            shard.name: read_record(self.workspace, shard, wanted.shards[shard.name])
            for shard in plan.shards
        }
        if missing := [name for name, record in found.items() if record is None]:
            raise InputError(
                f"{len(missing):,} of {len(plan.shards):,} shards are not encoded, such as "
                f"{', '.join(missing[:5])}: encode them first",
                "index_shards",
            )
        return [record for record in found.values() if record]

    def _model(self) -> ModelRecord:
        known, requested = self._input(), self.request.model
        implied = ModelRecord(**known.model)  # by the layout
        return ModelRecord(requested.name or implied.name, requested.url or implied.url, known.dimension)

    def _write(
        self, plan: Plan, trained: Trained, records: Sequence[ShardRecord], fingerprint: str
    ) -> Built:
        """Write all files of the index, its record last."""
        new = self._destination.new
        stored = sum(record.stored for record in records)
        needed = stored * (trained.code_size + ID_SIZE)
        if not self._destination.links(self.workspace):
            needed += sum(record.metadata_bytes for record in records)
        new.check_space(needed, "the index")
        folders = [folder_of(self.workspace, shard) for shard in plan.shards]
        self._log(f"merging the shards ({len(folders):,})")
        if trained.ivf is None:
            size = _write_one_file(new, trained, folders, records)
        else:
            size = _write_lists(new, trained, folders, records)
        for shard, folder, record in zip(plan.shards, folders, records, strict=True):
            if folder.size(shard_files.METADATA) != record.metadata_bytes:
                raise folder.damaged(shard_files.METADATA, "differs from what was written")
            name = f"{METADATA_FOLDER}/{shard.name}.arrow"
            self._destination.put(
                folder, shard_files.METADATA, name, record.checksums[shard_files.METADATA]
            )
        with new.new(PUBLISHED_TABLES) as sink:
            sink.write(published_tables(map(_batch_table, folders, records)))
        new.write_json(MODEL_RECORD, {k: v for k, v in asdict(self._model()).items() if v is not None})
        lists = 0 if trained.ivf is None else trained.lists
        built = Built(
            fingerprint,
            trained.record.index_key,
            trained.record.dimension,
            plan.rows,
            stored,
            sum(record.unusable for record in records),
            lists,
            size,
            _recall(trained, folders, records),
            nprobe_rule(ANSWERS, lists, stored) if lists else 0,
        )
        new.write_json(BUILT, asdict(built))
        return built


def without_vector(rows: int) -> str:
    """Return an addition to a number of rows, of which some have no usable vector; empty if none."""
    return f" ({rows:,} without a usable vector)" if rows else ""


def _part(file: EmbeddingFile) -> Part:
    return Part(file.name, file.rows, pair_version(file.vectors, file.metadata))


def _fingerprint(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _write_lists(
    new: Workspace, trained: Trained, folders: Sequence[Workspace], records: Sequence[ShardRecord]
) -> int:
    """Write an index in two files, check it, and return the size of its lists in bytes."""
    shards = [(folder, record.checksums) for folder, record in zip(folders, records, strict=True)]
    sizes = write_index(new, trained.index, shards)
    _check(new, shards, trained.code_size, sizes)
    return new.size(INVERTED_LISTS)


def _write_one_file(
    new: Workspace, trained: Trained, folders: Sequence[Workspace], records: Sequence[ShardRecord]
) -> int:
    """Write an index without lists (Flat, HNSW), in which a row's id is its position."""
    if unusable := sum(record.unusable for record in records):
        raise InputError(
            f"{count(unusable, 'row')} without a usable vector, but {trained.record.index_key} needs one "
            "for each row: leave these rows out, or choose a key with lists, such as IVF1,Flat",
            "index_key",
        )
    index = faiss.clone_index(trained.index)
    for folder, record in zip(folders, records, strict=True):
        content = folder.read(shard_files.CODES, checksum=record.checksums[shard_files.CODES])
        index.add(np.frombuffer(content, np.float32).reshape(-1, trained.record.dimension))
    with new.new(SINGLE_INDEX) as sink:
        return sink.write(faiss.serialize_index(index))


def _check(
    new: Workspace, shards: Sequence[tuple[Workspace, Mapping[str, str]]], code_size: int, sizes: Ids
) -> None:
    """Read some lists of the merged file back and compare them with the shards.

    Raises:
        InputError: they differ.

    """
    ends = np.cumsum(sizes)
    offsets = (ends - sizes) * (code_size + ID_SIZE)
    numbers = np.random.default_rng(0).permutation(np.flatnonzero(sizes))[:LISTS_CHECKED]
    parts = []  # (first row, row after the last one) of each list in each shard
    for folder, checksums in shards:
        of_shard = folder.read_array(shard_files.SIZES, checksums[shard_files.SIZES])
        stops = np.cumsum(of_shard)[numbers]
        parts.append(np.stack([stops - of_shard[numbers], stops], axis=1).tolist())
    for at, number in enumerate(numbers.tolist()):
        expected = b"".join(
            folder.read(name, part[at][0] * width, part[at][1] * width)
            for name, width in ((shard_files.CODES, code_size), (shard_files.IDS, ID_SIZE))
            for (folder, _), part in zip(shards, parts, strict=True)
            if part[at][0] < part[at][1]
        )
        start = int(offsets[number])
        if new.read(INVERTED_LISTS, start, start + len(expected)) != expected:
            raise new.damaged(INVERTED_LISTS, f"has a list {number} that differs from the shards")


def _check_urls(schema: pa.Schema, uri: str) -> None:
    """Check that a column of the metadata can hold URLs, under whatever name.

    Raises:
        InputError: none can.

    """
    named = [name for name in URL_COLUMNS if name in schema.names][:1] or schema.names
    if not any(schema.field(name).type == pa.string() for name in named):
        found = [f"{name} of type {schema.field(name).type}" for name in named]
        raise InputError(
            f"the metadata in {uri} has no text column with URLs (found {list_shortly(found)}): add one",
            "columns",
        )


def _batch_table(folder: Workspace, record: ShardRecord) -> bytes:
    return folder.read(shard_files.BATCHES, checksum=record.checksums[shard_files.BATCHES])


def _recall(
    trained: Trained, folders: Sequence[Workspace], records: Sequence[ShardRecord]
) -> dict[str, dict[str, float]]:
    """Measure recall against the best rows by the raw vectors, for each nprobe."""
    name = shard_files.ANSWERS_FILE
    of_shards = [
        read_answers(folder.read(name, checksum=record.checksums[name]))
        for folder, record in zip(folders, records, strict=True)
    ]

    def best(search: str) -> Answers:
        return merged((answers[search] for answers in of_shards), KEPT).without(trained.query_ids)

    exact = best(EXACT)
    shares = {str(n): recall(best(str(n)), exact, RECALL_AT) for n in trained.record.nprobes}
    return {n: {str(at): round(share, 4) for at, share in each.items()} for n, each in shares.items()}
