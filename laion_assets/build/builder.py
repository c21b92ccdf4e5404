"""The steps of a build, each of which does nothing where its result is there already."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from laion_assets.build import shards as shard_files
from laion_assets.build.answers import Answers, merged, read_answers, recall
from laion_assets.build.cost import Cost, cost_of, measured
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
from laion_assets.build.index_key import ROWS_PER_LIST
from laion_assets.build.merge import write_index
from laion_assets.build.plan import SHARD_ROWS, Part, Plan, Shard, check_planned, extended
from laion_assets.build.publish import new_index_uri, publish, put
from laion_assets.build.quantizer import index_key_for
from laion_assets.build.shards import (
    ANSWERS_FILE,
    EXACT,
    ShardRecord,
    encode_shard,
    folder_of,
    read_record,
)
from laion_assets.build.trained import (
    ANSWERS,
    KEPT,
    Record,
    Trained,
    read_trained,
    read_trained_record,
    train_index,
)
from laion_assets.build.workspace import Workspace
from laion_assets.index import (
    ID_SIZE,
    INVERTED_LISTS,
    METADATA_FOLDER,
    MODEL_RECORD,
    SINGLE_INDEX,
    ModelRecord,
    nprobe_rule,
)
from laion_assets.io.arrays import Ids
from laion_assets.io.checksums import checksum_text, crc32c
from laion_assets.io.errors import InputError
from laion_assets.io.progress import Progress, format_duration

PLAN, INPUT, PREPARED, BUILT = "plan.json", "input.json", "prepared.json", "build.json"
RECALL_AT = (1, 10, 100, 1000)
LISTS_CHECKED = 64
Log = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is to be built, and from what.

    Attributes:
        embeddings_uri: folder of the embeddings, a local path or any fsspec URL.
        index_uri: folder of the index.
        work_uri: folder for what the steps leave; beside the index by default.
        layout: of the embeddings; None to detect it.
        key: which vectors of a file with several; None for the layout's own.
        index_key: faiss factory key; None to choose it by `index_key_for`.
        bytes_per_row: for that choice.
        rows_per_centre: rows to train on that each list and each entry of a codebook needs; fewer give a
            worse index.
        shard_rows: rows of a shard, about.
        columns: of the metadata that the index keeps; None for all.
        model: which model the vectors are of, where the layout does not say.

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
    """An index that was built.

    Attributes:
        fingerprint: changes with anything that the index depends on.
        index_key: faiss factory key.
        dimension: of the vectors.
        rows: ids that it has.
        stored: rows that a search can find.
        unusable: rows without a usable vector, which have an id and metadata.
        lists: inverted lists; 0 without any.
        bytes: of the lists, or of the whole index where it is one file.
        recall: share of the best R rows by the raw vectors that is found, by nprobe and R.
        nprobe_of_a_search: lists that a search for 1,000 rows probes.

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


@dataclass(frozen=True)
class Wanted:
    """What the steps are to be made from, as fingerprints: a step that was made from another is not done.

    Attributes:
        shards: by name.
        index: of all shards.

    """

    shards: Mapping[str, str]
    index: str


@dataclass(frozen=True)
class Prepared:
    """For what the plan and the trained index are.

    Attributes:
        files: version of their listing.
        settings: see `Build.settings`.
        times: that settings other than before were prepared; it tells settings apart that come back.

    """

    files: str
    settings: str
    times: int


class Build:
    """A build and its steps.

    Args:
        request: what is to be built.
        log: is told what is done.

    """

    def __init__(self, request: Request, log: Log = lambda _: None) -> None:
        self.request = request
        self._log = log
        self.workspace = Workspace(request.work_uri or f"{request.index_uri.rstrip('/')}.build")

    @cached_property
    def embeddings(self) -> Embeddings:
        """The input as it is now; only headers are read."""
        return list_embeddings(self.request.embeddings_uri, self.request.layout, self.request.key)

    def listing(self) -> Listing:
        """List the input; no file is read.

        Raises:
            InputError: no embeddings there, or files without their partner.

        """
        return list_files(self.request.embeddings_uri, self.request.layout, self.request.key)

    def prepared(self) -> Prepared | None:
        """Return for what `train` ran last; None where it has not."""
        stored = self.workspace.read_json(PREPARED)
        return Prepared(**stored) if stored else None

    def is_prepared(self, prepared: Prepared | None, listing: Listing) -> bool:
        """Return whether `train` ran for some files, by the settings of the request."""
        return prepared is not None and (prepared.files, prepared.settings) == (
            listing.version,
            self.settings,
        )

    @property
    def settings(self) -> str:
        """Changes with what is asked of the files."""
        asked = self.request
        known = asked.layout, asked.key, asked.index_key, asked.bytes_per_row, asked.columns
        return _fingerprint(known, asdict(asked.model))

    def check_planned(self, plan: Plan, listing: Listing) -> None:
        """Check that planned files are there, and those of encoded shards unchanged; no file is read.

        Raises:
            InputError: names the files.

        """
        check_planned(plan, listing.versions, self._is_encoded)

    def plan(self) -> Plan:
        """Give every row its id: files that are new follow those that were planned before.

        Raises:
            InputError: the input cannot be used, or files that were planned before are gone or changed.

        """
        parts = [_part(file) for file in self.embeddings.files]
        planned = self.stored_plan()
        plan = extended(planned, parts, self.request.shard_rows, self._is_encoded)
        known = {
            "key": self.embeddings.key,
            "dimension": self.embeddings.dimension,
            "model": asdict(self.embeddings.model),
        }
        if known != self.workspace.read_json(INPUT):
            self.workspace.write_json(INPUT, known)
        if plan != planned:
            self._write_schema()
            self.workspace.write_json(PLAN, plan.to_json())
        return plan

    def cost(self) -> Cost:
        """Return what the whole build takes; measures this machine, which takes seconds."""
        files = self.embeddings.files
        key = self.index_key()
        one_file = all(file.vectors == file.metadata for file in files)
        return cost_of(
            self.embeddings.rows,
            self.embeddings.dimension,
            key,
            measured(key, self.embeddings.dimension),
            shard_rows=self.request.shard_rows,
            metadata_bytes=None if one_file else sum(file.metadata.size for file in files),
        )

    def index_key(self) -> str:
        """Return the faiss key: that of the request, or the one that suits the rows."""
        asked, found = self.request.index_key, self.embeddings
        return asked or index_key_for(found.rows, found.dimension, self.request.bytes_per_row)

    def missing(self, plan: Plan) -> list[str]:
        """Return the names of the shards that are not encoded."""
        wanted = self.wanted(plan)
        return [
            shard.name
            for shard in plan.shards
            if wanted is None or read_record(self.workspace, shard, wanted.shards[shard.name]) is None
        ]

    def stored_plan(self) -> Plan:
        """Return the plan as it was made last; nothing of the input is read."""
        stored = self.workspace.read_json(PLAN)
        return Plan.from_json(stored) if stored else Plan()

    def wanted(self, plan: Plan) -> Wanted | None:
        """Return what the steps are to be made from; None where the index is not trained."""
        trained = read_trained_record(self.workspace)
        return None if trained is None else self._wanted(plan, trained)

    def train(self) -> Trained:
        """Plan all rows, and train the index on a sample of them where it is not trained.

        Raises:
            InputError: see `plan`; a key that is not supported, or too few rows for it.

        """
        listing = self.listing()  # before the headers are read: what comes meanwhile is planned next time
        plan = self.plan()
        trained = self._train(plan.rows)
        before = self.prepared()
        if not self.is_prepared(before, listing):
            times = before.times if before else 0
            times += before is None or before.settings != self.settings
            self.workspace.write_json(PREPARED, asdict(Prepared(listing.version, self.settings, times)))
        return trained

    def _train(self, rows: int) -> Trained:
        found = read_trained(self.workspace)
        dimension, asked = self.embeddings.dimension, self.request
        key = self.index_key()
        if asked.index_key is None and found and found.record.dimension == dimension:
            # Which key is best may change with the rows: that is no reason to start over.
            if asked.bytes_per_row is None:
                return found
            key = index_key_for(found.record.rows, dimension, asked.bytes_per_row)
        reader = EmbeddingReader(self.embeddings)

        def sample(wanted: int) -> tuple[Any, Any]:
            return reader.sample(wanted, np.random.default_rng(0))

        return train_index(
            self.workspace, key, dimension, rows, sample, self._log, self.request.rows_per_centre
        )

    def encode(self, number: int) -> ShardRecord:
        """Encode one shard.

        Raises:
            InputError: there is no such shard, the index is not trained, or the input cannot be used.

        """
        plan, trained = self.stored_plan(), self._trained()
        if number >= len(plan.shards):
            raise InputError(
                f"there is no shard {number}: {self.request.embeddings_uri} makes {len(plan.shards)}"
            )
        shard = plan.shards[number]
        made_from = self._wanted(plan, trained.record).shards[shard.name]
        if record := read_record(self.workspace, shard, made_from):
            return record
        embeddings = self._listed(shard)
        with Progress("rows", shard.rows, "", self._log) as progress:
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
        """Merge all shards, check what was written, and put the index in its place.

        Raises:
            InputError: shards are missing or damaged, or the place holds something else.

        """
        plan, trained = self.stored_plan(), self._trained()
        wanted = self._wanted(plan, trained.record)
        records = self._records(plan, wanted)
        if (done := self.published()) and done.fingerprint == wanted.index:
            return done
        new = Workspace(new_index_uri(self.request.index_uri))
        if (new.read_json(BUILT) or {}).get("fingerprint") != wanted.index:
            new.remove()
            self._write(new, plan, trained, records, wanted.index)
        publish(self.request.index_uri, BUILT)
        found = self.published()
        assert found is not None  # noqa: S101 - it was written
        return found

    def run(self) -> Built:
        """Do all steps, one after the other."""
        started = time.perf_counter()
        plan = self.plan()
        shards = f"{len(plan.shards):,} shard{'' if len(plan.shards) == 1 else 's'}"
        self._log(f"{plan.rows:,} rows in {shards}")
        self.train()
        for shard in plan.shards:
            self.encode(shard.number)
        built = self.finish()
        self._log(f"done in {format_duration(time.perf_counter() - started)}")
        return built

    def _is_encoded(self, shard: Shard) -> bool:
        return folder_of(self.workspace, shard).exists(shard_files.RECORD)

    def _listed(self, shard: Shard) -> Embeddings:
        """List the files of a shard; of the others, no header is read."""
        names = [part.name for part in shard.parts]
        listed = list_embeddings(
            self.request.embeddings_uri, self.request.layout, self.request.key, only=names
        )
        extended(
            Plan((shard,)), [_part(file) for file in listed.files]
        )  # raises where a file has changed
        return listed

    def _schema_file(self) -> str:
        return f"schema-{_fingerprint(self.request.columns)}.arrow"

    def _write_schema(self) -> None:
        """Decide which columns the metadata has, once: that of later shards is the same."""
        if not self.workspace.exists(self._schema_file()):
            schema = metadata_schema(self.embeddings, self.request.columns)
            with self.workspace.new(self._schema_file()) as sink:
                sink.write(schema.serialize().to_pybytes())

    def _schema(self) -> pa.Schema:
        if not self.workspace.exists(self._schema_file()):  # other columns were chosen meanwhile
            self._write_schema()
        return pa.ipc.read_schema(pa.py_buffer(self.workspace.read(self._schema_file())))

    def _trained(self) -> Trained:
        found = read_trained(self.workspace)
        if found is None:
            raise InputError(
                f"{self.workspace.uri} holds no trained index: train it first", "trained_index"
            )
        return found

    def _wanted(self, plan: Plan, trained: Record) -> Wanted:
        settings = trained.checksum, self.request.columns, self.request.key
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

    def published(self) -> Built | None:
        """Read what is known of the index that is in its place; None where no build wrote it."""
        stored = Workspace(self.request.index_uri).read_json(BUILT)
        return Built(**stored) if stored else None

    def _model(self) -> ModelRecord:
        known = self.workspace.read_json(INPUT) or {}
        asked, layout = self.request.model, ModelRecord(**known["model"])
        return ModelRecord(asked.name or layout.name, asked.url or layout.url, known["dimension"])

    def _write(
        self,
        new: Workspace,
        plan: Plan,
        trained: Trained,
        records: Sequence[ShardRecord],
        fingerprint: str,
    ) -> None:
        """Write all files of the index, and its record last."""
        folders = [folder_of(self.workspace, shard) for shard in plan.shards]
        self._log(f"merging the shards ({len(folders):,})")
        if trained.ivf is None:
            size = _write_one_file(new, trained, folders, records)
        else:
            size = _write_lists(new, trained, folders, records)
        for shard, folder in zip(plan.shards, folders, strict=True):
            name = f"{METADATA_FOLDER}/{shard.name}.arrow"
            put(folder, shard_files.METADATA, self.request.index_uri, name)
        new.write_json(MODEL_RECORD, {k: v for k, v in asdict(self._model()).items() if v is not None})
        lists = 0 if trained.ivf is None else trained.lists
        stored = sum(record.stored for record in records)
        built = Built(
            fingerprint,
            trained.record.index_key,
            trained.record.dimension,
            plan.rows,
            stored,
            sum(record.unusable for record in records),
            lists,
            size,
            _recall(trained, folders),
            nprobe_rule(ANSWERS, lists, stored) if lists else 0,
        )
        new.write_json(BUILT, asdict(built))


def _part(file: EmbeddingFile) -> Part:
    return Part(file.name, file.rows, pair_version(file.vectors, file.metadata))


def _fingerprint(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _write_lists(
    new: Workspace, trained: Trained, folders: Sequence[Workspace], records: Sequence[ShardRecord]
) -> int:
    """Write an index in two files, check it, and return the bytes of its lists."""
    checksums = [record.checksums for record in records]
    sizes = write_index(new, trained.index, list(zip(folders, checksums, strict=True)))
    _check(new, folders, trained.code_size, sizes)
    return new.size(INVERTED_LISTS)


def _write_one_file(
    new: Workspace, trained: Trained, folders: Sequence[Workspace], records: Sequence[ShardRecord]
) -> int:
    """Write an index without lists (Flat, HNSW), whose ids are the places of its rows."""
    if unusable := sum(record.unusable for record in records):
        raise InputError(
            f"{unusable:,} rows have no usable vector, and {trained.record.index_key} has a place for "
            "each row: leave the rows out, or choose a kind with lists, such as IVF1,Flat",
            "index_key",
        )
    index = faiss.clone_index(trained.index)
    for folder, record in zip(folders, records, strict=True):
        content = folder.read(shard_files.CODES)
        if checksum_text(crc32c(content)) != record.checksums[shard_files.CODES]:
            raise folder.damaged(shard_files.CODES, "is not what was written")
        index.add(np.frombuffer(content, np.float32).reshape(-1, trained.record.dimension))
    content = faiss.serialize_index(index).tobytes()
    with new.new(SINGLE_INDEX) as sink:
        sink.write(content)
    return len(content)


def _check(new: Workspace, folders: Sequence[Workspace], code_size: int, sizes: Ids) -> None:
    """Read some lists of the merged file back, and compare them with what the shards hold.

    Raises:
        InputError: they differ.

    """
    ends = np.cumsum(sizes)
    offsets = (ends - sizes) * (code_size + ID_SIZE)
    of_shards = [folder.read_array(shard_files.SIZES) for folder in folders]
    starts = [np.cumsum(each) - each for each in of_shards]
    filled = np.flatnonzero(sizes)
    for number in np.random.default_rng(0).permutation(filled)[:LISTS_CHECKED].tolist():
        expected = b"".join(
            folder.read(name, int(first[number]) * width, int(first[number] + each[number]) * width)
            for name, width in ((shard_files.CODES, code_size), (shard_files.IDS, ID_SIZE))
            for folder, first, each in zip(folders, starts, of_shards, strict=True)
            if each[number]
        )
        start = int(offsets[number])
        if new.read(INVERTED_LISTS, start, start + len(expected)) != expected:
            raise new.damaged(INVERTED_LISTS, f"does not hold list {number} as the shards do")


def _recall(trained: Trained, folders: Sequence[Workspace]) -> dict[str, dict[str, float]]:
    """Compare what the index finds with the best rows by the raw vectors, for each nprobe."""
    of_shards = [_answers(folder) for folder in folders]

    def best(search: str) -> Answers:
        return merged((answers[search] for answers in of_shards), KEPT).without(trained.query_ids)

    exact = best(EXACT)
    shares = {str(n): recall(best(str(n)), exact, RECALL_AT) for n in trained.record.nprobes}
    return {n: {str(at): round(share, 4) for at, share in each.items()} for n, each in shares.items()}


def _answers(folder: Workspace) -> Mapping[str, Answers]:
    try:
        return read_answers(folder.read(ANSWERS_FILE))
    except (ValueError, zipfile.BadZipFile) as error:
        raise folder.damaged(ANSWERS_FILE, f"cannot be read ({error})") from error
