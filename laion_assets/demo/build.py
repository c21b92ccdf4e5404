"""The demo data: clip art as a small index in LAION's real layout, and three seed sets.

Everything it writes is what a user's own index and seeds look like. What must not live here: code
that reads an index or seeds; nothing else may know that the data it works on is a demo.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from laion_assets.io.console import silent_stdout
from laion_assets.io.errors import InputError

BUILD_VERSION = 1
"""Part of the recorded input: raise it when the same pictures should give another index."""

SEED_SETS = ("flower", "fruit", "house")
"""The seed sets, each named by the keyword its pictures carry."""

INDEX_KEY = "OPQ128_256,IVF64_HNSW32,PQ128x8"
"""faiss factory key: LAION-5B's shape, with as many lists as 3,000 rows can fill."""

_PICTURES = Path(__file__).with_name("openclipart.parquet")
_RECORD = "demo.json"
_LISTS_FILE = "merged_index.ivfdata"
_METADATA_COLUMNS = ("url", "caption", "category", "thumbnail")
_SEED_COLUMNS = ("embedding", "url", "caption", "thumbnail")

_SEEDS_PER_SET = 12
_FEW_KEYWORDS = 4
_VARIED = 0.8
_NEAR_DUPLICATE = 0.94
_ENGLISH_SHARE = 2 / 3
_RECORD_BATCH_ROWS = 500
_RECALL_AT = 20
_SMALL_REQUEST_NPROBE = 8

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DemoReport:
    """What the demo holds, and what its compression costs.

    Recall@20 is measured with the seeds as queries, against an exact search of the raw vectors; the
    pairs are those of index rows with a cosine above 0.94. `seconds` is what this call spent on
    building the index: 0 where it was already there.
    """

    rows: int
    seeds: dict[str, int]
    index_key: str
    recall_all_lists: float
    recall_small_request: float
    small_request_nprobe: int
    duplicate_pairs_raw: int
    duplicate_pairs_reconstructed: int
    duplicate_pairs_both: int
    seconds: float = 0.0


def build_demo(index_dir: Path, seeds_dir: Path) -> DemoReport:
    """Make the demo index and the demo seed sets where they are missing, and say what they hold.

    `index_dir` appears complete or not at all; one of an earlier build version is replaced. Under
    `seeds_dir` only missing sets are added, nothing there is changed. The same input gives the same
    bytes on one machine. Raises InputError where `index_dir` holds something else than the demo.
    """
    index_dir, seeds_dir = index_dir.absolute(), seeds_dir.absolute()
    source = _input_hash()
    report = _stored_report(index_dir, source)
    if report is not None and not _missing_sets(seeds_dir):
        return report
    index_dir.parent.mkdir(parents=True, exist_ok=True)
    with _only_builder(index_dir):
        pictures = pyarrow.parquet.read_table(_PICTURES)
        vectors = _unit_vectors(pictures)
        seeds = _choose_seeds(pictures, vectors)
        report = _stored_report(index_dir, source)
        if report is None:
            report = _build_index(index_dir, pictures, vectors, seeds, source)
        _add_seed_sets(seeds_dir, pictures, seeds)
    return report


# --- what is there already ------------------------------------------------------------------------


def _input_hash() -> str:
    digest = hashlib.sha256(_PICTURES.read_bytes())
    digest.update(f"build version {BUILD_VERSION}".encode())
    return digest.hexdigest()


def _stored_report(index_dir: Path, source: str) -> DemoReport | None:
    """Return the report of a complete index of this very input, or None."""
    try:
        record = json.loads((index_dir / _RECORD).read_text())
        if record["input"] != source:
            return None
        present = _file_sizes(index_dir)
        if any(present.get(name) != size for name, size in record["files"].items()):
            return None
        return DemoReport(**record["report"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_replaceable(index_dir: Path) -> None:
    """Refuse to build over files that no earlier build recorded as its own.

    Somebody may have put an index of their own here: that must not be deleted.
    """
    try:
        ours = json.loads((index_dir / _RECORD).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        ours = {}
    foreign = [name for name, size in _file_sizes(index_dir).items() if ours.get(name) != size]
    if foreign:
        raise InputError(
            f"{index_dir} holds {foreign[0]}, which is not of the demo index and is not touched: "
            "choose another folder for the demo, or empty this one"
        )


def _file_sizes(index_dir: Path) -> dict[str, int]:
    """Return the size of each file by its relative path, without the record itself."""
    files = (path for path in sorted(index_dir.rglob("*")) if not path.is_dir())
    sizes = {path.relative_to(index_dir).as_posix(): path.lstat().st_size for path in files}
    sizes.pop(_RECORD, None)
    return sizes


def _missing_sets(seeds_dir: Path) -> list[str]:
    return [name for name in SEED_SETS if not os.path.lexists(seeds_dir / name)]


@contextmanager
def _only_builder(index_dir: Path) -> Iterator[None]:
    """Hold the lock that keeps two processes from building one index at the same time."""
    with (index_dir.parent / f".{index_dir.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- which pictures are seeds ---------------------------------------------------------------------


def _unit_vectors(pictures: pa.Table) -> Vectors:
    """Return the embeddings, (n, 256) float32, normalised again: they are stored as float16."""
    column = pictures["embedding"].combine_chunks()
    raw = column.values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    vectors: Vectors = raw.astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _choose_seeds(pictures: pa.Table, vectors: Vectors) -> dict[str, Rows]:
    """Return the rows of each seed set, most typical first."""
    keywords = pictures["keywords"].to_pylist()
    taken = np.zeros(len(vectors), dtype=bool)
    chosen = {}
    for name in SEED_SETS:
        # A picture with many keywords shows many things: a turkey with fruit is no fruit.
        tagged = [
            row
            for row, words in enumerate(keywords)
            if name in words and len(words) <= _FEW_KEYWORDS and not taken[row]
        ]
        varied = _varied(tagged, vectors)
        mean = vectors[varied].mean(axis=0)
        typical = varied[np.argsort(-(vectors[varied] @ mean), kind="stable")]
        # Every second one: the others stay in the index, or nothing good would be left to find.
        chosen[name] = typical[: 2 * _SEEDS_PER_SET : 2]
        taken |= _held_out(vectors, chosen[name])
    return chosen


def _varied(rows: Sequence[int], vectors: Vectors) -> Rows:
    """Return those rows which are not alike any row before them."""
    varied: list[int] = []
    for row in rows:
        if not varied or float((vectors[varied] @ vectors[row]).max()) <= _VARIED:
            varied.append(row)
    return np.array(varied, dtype=np.int64)


def _held_out(vectors: Vectors, seeds: Rows) -> npt.NDArray[np.bool_]:
    """Mark the seeds and their near-duplicates: the library holds copies of many pictures."""
    alike = (vectors @ vectors[seeds].T).max(axis=1)
    mask: npt.NDArray[np.bool_] = alike >= _NEAR_DUPLICATE
    return mask


# --- the index ------------------------------------------------------------------------------------


def _build_index(
    index_dir: Path, pictures: pa.Table, vectors: Vectors, seeds: dict[str, Rows], source: str
) -> DemoReport:
    started = time.perf_counter()
    _check_replaceable(index_dir)
    queries = np.concatenate(list(seeds.values()))
    rows = np.flatnonzero(~_held_out(vectors, queries))
    english = int(len(rows) * _ENGLISH_SHARE)
    building = index_dir.with_name(f".{index_dir.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    (building / "image.index").mkdir(parents=True)
    (building / "metadata").mkdir()
    _write_metadata(building / "metadata" / "0_en.arrow", pictures.take(rows[:english]))
    _write_metadata(building / "metadata" / "1_multi.arrow", pictures.take(rows[english:]))
    with _one_thread():
        index = _trained(vectors[rows])
        blocks = [_block(index, vectors[rows], 0, english)]
        blocks += [_block(index, vectors[rows], english, len(rows))]
        lists = _merge(index, blocks, building / "image.index" / _LISTS_FILE)
        report = _measured(index, vectors[rows], vectors[queries])
    # A bare name: the folder can be moved, the reader looks for the lists beside the index.
    lists.filename = _LISTS_FILE
    faiss.write_index(index, str(building / "image.index" / "populated.index"))
    report = replace(report, seeds={name: len(chosen) for name, chosen in seeds.items()})
    # Without the seconds, so that two builds are the same in every byte.
    stored = {name: value for name, value in asdict(report).items() if name != "seconds"}
    record = {"input": source, "report": stored, "files": _file_sizes(building)}
    (building / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
    _put_in_place(building, index_dir)
    return replace(report, seconds=time.perf_counter() - started)


def _write_metadata(path: Path, rows: pa.Table) -> None:
    table = rows.select(_METADATA_COLUMNS).combine_chunks()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=_RECORD_BATCH_ROWS)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run faiss on one thread: sums in another order would give another index."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _trained(vectors: Vectors) -> Any:
    """Return an empty index, trained on (n, 256) float32.

    faiss's defaults are meant for millions of rows: here they would take minutes, and it would
    print a warning for every quantizer that it has few points.
    """
    index: Any = faiss.index_factory(vectors.shape[1], INDEX_KEY, faiss.METRIC_INNER_PRODUCT)
    ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    rotation: Any = faiss.downcast_VectorTransform(index.chain.at(0))
    rotation_codes = faiss.ProductQuantizer(vectors.shape[1], ivf.pq.M, ivf.pq.nbits)
    for clustering in (ivf.cp, ivf.pq.cp, rotation_codes.cp):
        clustering.min_points_per_centroid = 1
    ivf.pq.cp.niter = 4
    ivf.do_polysemous_training = False
    rotation.niter, rotation.niter_pq, rotation.niter_pq_0 = 1, 2, 2
    rotation.pq = rotation_codes
    rotation.train(vectors)
    # faiss does not own it, and must not look at it after this function.
    rotation.pq = None
    index.train(vectors)
    return index


def _block(trained: Any, vectors: Vectors, start: int, stop: int) -> Any:
    """Return one of the parts in which a large index is built: rows start..stop, with their ids."""
    block = faiss.clone_index(trained)
    block.add_with_ids(vectors[start:stop], np.arange(start, stop))
    return block


def _merge(index: Any, blocks: Sequence[Any], lists_path: Path) -> Any:
    """Put the blocks' inverted lists into one file on disk and let the empty index use it.

    What faiss.contrib.ondisk.merge_ondisk does, from blocks that are still in memory.
    """
    ivf = faiss.extract_index_ivf(index)
    lists: Any = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, str(lists_path))
    parts = faiss.InvertedListsPtrVector()
    for block in blocks:
        parts.push_back(faiss.extract_index_ivf(block).invlists)
    with silent_stdout():
        total = lists.merge_from_multiple(parts.data(), parts.size(), False)
    index.ntotal = ivf.ntotal = total
    ivf.replace_invlists(lists, True)
    lists.this.disown()
    return lists


def _put_in_place(building: Path, index_dir: Path) -> None:
    """Rename the finished folder to where an earlier demo index, an empty folder or nothing is."""
    outdated = index_dir.with_name(f".{index_dir.name}.outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if index_dir.exists():
        index_dir.rename(outdated)
    building.rename(index_dir)
    shutil.rmtree(outdated, ignore_errors=True)


# --- what compression costs -----------------------------------------------------------------------


def _measured(index: Any, vectors: Vectors, queries: Vectors) -> DemoReport:
    ivf = faiss.extract_index_ivf(index)
    stored_nprobe = ivf.nprobe
    recall = {}
    for nprobe in (_SMALL_REQUEST_NPROBE, ivf.nlist):
        ivf.nprobe = nprobe
        recall[nprobe] = _recall(index, vectors, queries)
    ivf.nprobe = stored_nprobe
    raw = _near_duplicates(vectors)
    reconstructed = _near_duplicates(index.reconstruct_n(0, index.ntotal))
    return DemoReport(
        rows=int(index.ntotal),
        seeds={},
        index_key=INDEX_KEY,
        recall_all_lists=recall[ivf.nlist],
        recall_small_request=recall[_SMALL_REQUEST_NPROBE],
        small_request_nprobe=_SMALL_REQUEST_NPROBE,
        duplicate_pairs_raw=int(raw.sum()),
        duplicate_pairs_reconstructed=int(reconstructed.sum()),
        duplicate_pairs_both=int((raw & reconstructed).sum()),
    )


def _recall(index: Any, vectors: Vectors, queries: Vectors) -> float:
    """Return the share of the best 20 that the index finds; copies of a picture count as it."""
    exact = queries @ vectors.T
    worst = np.sort(exact, axis=1)[:, -_RECALL_AT, None]
    _, ids = index.search(queries, _RECALL_AT)
    found = np.take_along_axis(exact, np.maximum(ids, 0), axis=1)
    return round(float(((ids >= 0) & (found >= worst - 1e-6)).mean()), 4)


def _near_duplicates(vectors: Vectors) -> npt.NDArray[np.bool_]:
    """Return an (n, n) mask: true for each pair, named once, with a cosine above 0.94."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.triu(unit @ unit.T > _NEAR_DUPLICATE, k=1)


# --- the seed sets --------------------------------------------------------------------------------


def _add_seed_sets(seeds_dir: Path, pictures: pa.Table, seeds: dict[str, Rows]) -> None:
    """Write the missing sets, each by one rename: who watches the folder sees no half of one."""
    seeds_dir.mkdir(parents=True, exist_ok=True)
    # Beside the folder, not in it: every folder in there is a seed set to those who list it.
    building = seeds_dir.with_name(f".{seeds_dir.name}.building")
    for name in _missing_sets(seeds_dir):
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        table = pictures.take(seeds[name]).select(_SEED_COLUMNS).combine_chunks()
        pyarrow.parquet.write_table(table, building / "seeds.parquet")
        building.rename(seeds_dir / name)
