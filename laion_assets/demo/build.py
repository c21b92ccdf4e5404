"""Build the demo: a small index of clip art in LAION's layout, and three seed sets of images.

Index and seed sets have the same layout as any others.
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
from pathlib import Path, PurePosixPath

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from laion_assets.build import Build, Built, Request
from laion_assets.index import POPULATED_INDEX, ModelRecord
from laion_assets.io.arrays import Floats, Ids, Mask
from laion_assets.io.console import silent_stdout
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import one_thread
from laion_assets.search.near_duplicates import DEDUP_THRESHOLD

BUILD_VERSION = 3
"""Part of the recorded input. Increment it if the same images should result in another index."""

DEMO_SETS = ("flower", "fruit", "house")
"""The seed sets, named after what their images show."""

DEMO_MODEL = Path(__file__).with_name("model")
"""The model that embedded the demo's images, see README.md beside this file."""

INDEX_KEY = "OPQ128_256,IVF64_HNSW32,PQ128x8"
"""faiss factory key, of LAION-5B's type but with as many lists as 3,000 rows can fill."""

ROWS_PER_CENTRE = 10
"""Training rows per codebook entry, as many as 3,000 rows allow for 256 entries."""

_CLIP_ART = Path(__file__).with_name("openclipart.parquet")
_IMAGES = Path(__file__).with_name("pictures")  # originals of some rows, in folders by subject
_MODEL_NAME = "efficientnet-lite0-openclipart"
_RECORD = "demo.json"
_METADATA_COLUMNS = ("url", "caption", "category", "thumbnail")

_SEEDS_PER_SET = 12
_VARIED = 0.8
_FILES = 2  # embedding files; each becomes a shard with a metadata file
_RECALL_AT = "10"
_SMALL_REQUEST_NPROBE = 4


@dataclass(frozen=True)
class DemoReport:
    """The contents of the demo, and the cost of its compression.

    The build measures recall@10 with 200 rows as queries, against an exact search of the raw vectors.
    Pairs are index rows with a cosine above 0.94. `seconds` is the time this call spent on building the
    index, 0 if it already existed.
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
    """Build the demo index and the demo seed sets if they are missing, and report their contents.

    The index appears only once it is complete. An index of an earlier release is replaced, together with
    its seed sets. Otherwise only missing sets are added. On one machine, the same input gives the same
    bytes.

    Args:
        index_dir: folder of the index.
        seeds_dir: folder of the seed sets.

    Raises:
        InputError: `index_dir` holds something other than a demo index.

    """
    index_dir, seeds_dir = index_dir.absolute(), seeds_dir.absolute()
    source = _input_hash()
    report = _stored_report(index_dir, source)
    if report is not None and not _missing_sets(seeds_dir):
        return report
    index_dir.parent.mkdir(parents=True, exist_ok=True)
    with _only_builder(index_dir):
        clip_art = pq.read_table(_CLIP_ART)
        vectors = _unit_vectors(clip_art)
        seeds = _choose_seeds(clip_art, vectors)
        report = _stored_report(index_dir, source)
        if report is None:
            report = _build_index(index_dir, clip_art, vectors, seeds, source)
            _remove_sets_of_vectors(seeds_dir)
        _add_seed_sets(seeds_dir, clip_art, seeds)
    return report


def is_demo(index_uri: str) -> bool:
    """Return whether a folder holds a demo index, of this or an earlier release."""
    return (Path(index_uri) / _RECORD).is_file()


# --- the existing demo ----------------------------------------------------------------------------


def _input_hash() -> str:
    digest = hashlib.sha256(_CLIP_ART.read_bytes())
    digest.update(f"build version {BUILD_VERSION}".encode())
    return digest.hexdigest()


def _stored_report(index_dir: Path, source: str) -> DemoReport | None:
    """Return the report of a complete index with this input; None if there is none."""
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
    """Raise an error if there are files that no earlier build recorded, such as a user's own index."""
    try:
        ours = json.loads((index_dir / _RECORD).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        ours = {}
    foreign = [name for name, size in _file_sizes(index_dir).items() if ours.get(name) != size]
    if foreign:
        raise InputError(
            f"{index_dir} holds {foreign[0]}, which is not part of the demo index: choose another folder "
            "for the demo, or empty this one"
        )


def _file_sizes(index_dir: Path) -> dict[str, int]:
    """Return the size of each file by relative path, without the record itself."""
    files = (path for path in sorted(index_dir.rglob("*")) if not path.is_dir())
    sizes = {path.relative_to(index_dir).as_posix(): path.lstat().st_size for path in files}
    sizes.pop(_RECORD, None)
    return sizes


def _missing_sets(seeds_dir: Path) -> list[str]:
    return [name for name in DEMO_SETS if not os.path.lexists(seeds_dir / name)]


@contextmanager
def _only_builder(index_dir: Path) -> Iterator[None]:
    """Hold a lock so that only one process at a time builds the index."""
    with (index_dir.parent / f".{index_dir.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- the choice of seeds --------------------------------------------------------------------------


def _unit_vectors(clip_art: pa.Table) -> Floats:
    """Return the embeddings, (n, 256) float32, normalised again because they are stored as float16."""
    column = clip_art["embedding"].combine_chunks()
    raw = column.values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    vectors: Floats = raw.astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _stems(clip_art: pa.Table) -> list[str]:
    """Return the name of each row's image file, without its suffix."""
    return [PurePosixPath(url).stem for url in clip_art["url"].to_pylist()]


def _choose_seeds(clip_art: pa.Table, vectors: Floats) -> dict[str, Ids]:
    """Return the rows of each seed set, most typical first."""
    row_of = {stem: row for row, stem in enumerate(_stems(clip_art))}
    chosen = {}
    for name in DEMO_SETS:
        shown = [row_of[path.stem] for path in sorted((_IMAGES / name).iterdir())]
        varied = _varied(shown, vectors)
        mean = vectors[varied].mean(axis=0)
        typical = varied[np.argsort(-(vectors[varied] @ mean), kind="stable")]
        # Every second one; the others stay in the index, so that a search has good results.
        chosen[name] = typical[: 2 * _SEEDS_PER_SET : 2]
    return chosen


def _varied(rows: Sequence[int], vectors: Floats) -> Ids:
    """Return the rows that are not similar to any row before them."""
    varied: list[int] = []
    for row in rows:
        if not varied or float((vectors[varied] @ vectors[row]).max()) <= _VARIED:
            varied.append(row)
    return np.array(varied, dtype=np.int64)


def _held_out(vectors: Floats, seeds: Ids) -> Mask:
    """Mark the seeds and their near-duplicates: the clip art has copies of many images."""
    alike = (vectors @ vectors[seeds].T).max(axis=1)
    mask: Mask = alike >= DEDUP_THRESHOLD
    return mask


# --- the index ------------------------------------------------------------------------------------


def _build_index(
    index_dir: Path, clip_art: pa.Table, vectors: Floats, seeds: dict[str, Ids], source: str
) -> DemoReport:
    started = time.perf_counter()
    _check_replaceable(index_dir)
    rows = np.flatnonzero(~_held_out(vectors, np.concatenate(list(seeds.values()))))
    building = index_dir.with_name(f".{index_dir.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    built = _built(building, clip_art.take(rows))
    raw = _near_duplicates(vectors[rows])
    reconstructed = _near_duplicates(_reconstructed(building / "index"))
    report = DemoReport(
        rows=built.rows,
        seeds={name: len(chosen) for name, chosen in seeds.items()},
        index_key=built.index_key,
        recall_all_lists=built.recall[str(built.lists)][_RECALL_AT],
        recall_small_request=built.recall[str(_SMALL_REQUEST_NPROBE)][_RECALL_AT],
        small_request_nprobe=_SMALL_REQUEST_NPROBE,
        duplicate_pairs_raw=int(raw.sum()),
        duplicate_pairs_reconstructed=int(reconstructed.sum()),
        duplicate_pairs_both=int((raw & reconstructed).sum()),
    )
    # Without the duration, so that two builds are equal in every byte.
    stored = {name: value for name, value in asdict(report).items() if name != "seconds"}
    record = {"input": source, "report": stored, "files": _file_sizes(building / "index")}
    (building / "index" / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
    _put_in_place(building / "index", index_dir)
    shutil.rmtree(building)
    return replace(report, seconds=time.perf_counter() - started)


def _built(building: Path, images: pa.Table) -> Built:
    """Build `<building>/index` from embeddings beside it."""
    embeddings = building / "embeddings"
    embeddings.mkdir(parents=True)
    rows = -(-len(images) // _FILES)
    for number in range(_FILES):
        path = embeddings / f"{number}.parquet"
        pq.write_table(images.slice(number * rows, rows), path)
        os.utime(path, (1, 1))  # the time is part of the version that the index records
    request = Request(
        str(embeddings),
        str(building / "index"),
        str(building / "work"),
        index_key=INDEX_KEY,
        rows_per_centre=ROWS_PER_CENTRE,
        shard_rows=rows,
        columns=_METADATA_COLUMNS,
        model=ModelRecord(_MODEL_NAME),
    )
    with one_thread():
        return Build(request).run()


def _put_in_place(building: Path, index_dir: Path) -> None:
    """Rename the finished folder into place, over an earlier demo index or an empty folder."""
    outdated = index_dir.with_name(f".{index_dir.name}.outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if index_dir.exists():
        index_dir.rename(outdated)
    building.rename(index_dir)
    shutil.rmtree(outdated, ignore_errors=True)


# --- the cost of compression ----------------------------------------------------------------------


def _reconstructed(index_dir: Path) -> Floats:
    """Return the (n, 256) rows as the index stores them, in order of id."""
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
    with silent_stdout():
        index = faiss.read_index(str(index_dir / POPULATED_INDEX), flags)
    rows: Floats = index.reconstruct_n(0, index.ntotal)
    return rows


def _near_duplicates(vectors: Floats) -> Mask:
    """Return an (n, n) mask that is true once for each pair with a cosine above 0.94."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.triu(unit @ unit.T > DEDUP_THRESHOLD, k=1)


# --- the seed sets --------------------------------------------------------------------------------


def _add_seed_sets(seeds_dir: Path, clip_art: pa.Table, seeds: dict[str, Ids]) -> None:
    """Write the missing sets, each by one rename, so that a sensor never lists an incomplete set."""
    seeds_dir.mkdir(parents=True, exist_ok=True)
    stems = _stems(clip_art)
    # Beside the folder, because every subfolder is a seed set.
    building = seeds_dir.with_name(f".{seeds_dir.name}.building")
    for name in _missing_sets(seeds_dir):
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for row in seeds[name]:
            shutil.copyfile(_image(name, stems[row]), building / _image(name, stems[row]).name)
        building.rename(seeds_dir / name)


def _image(seed_set: str, stem: str) -> Path:
    return _IMAGES / seed_set / f"{stem}.webp"


def _remove_sets_of_vectors(seeds_dir: Path) -> None:
    """Remove sets written by an earlier release, which hold vectors of another model."""
    for name in DEMO_SETS:
        found = [path.name for path in (seeds_dir / name).glob("*")]
        if found == ["seeds.parquet"]:
            shutil.rmtree(seeds_dir / name)
