"""`make bench-build`: autofaiss and we build the same index from the same .npy files.

Each side runs in turn in a process of its own, the peer in its environment. Wall time is from the files
to an index on disk; ours includes the metadata, and measuring the recall. Memory is the peak of the
process and its children together. What must not live here: how either side does its work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

RECALL_AT = (1, 10, 100, 1000)
QUERIES = 500
NPROBES = (16, 64, 256)
WANTED = {"wall": 0.8, "memory": 0.5, "recall": 0.005}


# --- the data -------------------------------------------------------------------------------------


def data(rows: int) -> Path:
    """Return a folder with `embeddings/*.npy`, `queries.npy` and their exact `nearest.npy`."""
    import faiss
    import pyarrow as pa
    import pyarrow.parquet as pq
    from generate import BLOCK, Recipe, World, blocks

    recipe = Recipe(rows=rows)
    folder = recipe.folder.with_name(f"clip-retrieval-{rows}")
    if folder.exists():
        return folder
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    for name in ("img_emb", "metadata"):
        (unfinished / "embeddings" / name).mkdir(parents=True, exist_ok=True)
    world = World(recipe)
    random, topics = world.rng(7), world.topics_in_style(slice(None))
    queries = world.images_of(topics[random.integers(len(topics), size=QUERIES)], random)
    best = np.empty((QUERIES, 0), np.float32)
    ids = np.empty((QUERIES, 0), np.int64)
    for number, block in enumerate(blocks(rows)):
        vectors = world.vectors(number)[: block.stop - block.start]
        np.save(unfinished / "embeddings" / "img_emb" / f"img_emb_{number:04}.npy", vectors)
        texts = [f"https://example.org/{number}/{row}.jpg" for row in range(len(vectors))]
        path = unfinished / "embeddings" / "metadata" / f"metadata_{number:04}.parquet"
        pq.write_table(pa.table({"url": texts, "caption": texts}), path)
        exact = faiss.IndexFlatIP(vectors.shape[1])
        exact.add(vectors)
        scores, found = exact.search(queries, min(RECALL_AT[-1], len(vectors)))
        best, ids = np.hstack([best, scores]), np.hstack([ids, found + number * BLOCK])
        order = np.argsort(-best, axis=1, kind="stable")[:, : RECALL_AT[-1]]
        best, ids = np.take_along_axis(best, order, 1), np.take_along_axis(ids, order, 1)
    np.save(unfinished / "queries.npy", queries)
    np.save(unfinished / "nearest.npy", ids)
    return unfinished.rename(folder)


# --- the two sides, each inside its own process ---------------------------------------------------


def our_build(source: Path, target: Path, key: str) -> dict[str, float]:
    """Build an index with its metadata, measure its recall, and publish it: all that a user gets."""
    from laion_assets.build import Build, Request

    build = Build(Request(str(source), str(target), work_uri=str(target) + ".work", index_key=key), say)
    build.run()
    trained = build.train().record
    shards = [build.encode(shard.number) for shard in build.stored_plan().shards]
    encoding = sum(shard.encoding_seconds for shard in shards)
    rows = sum(shard.rows for shard in shards)
    return {
        "training": trained.seconds,
        "encoding": encoding,
        "rows a second a core": rows / encoding / len(os.sched_getaffinity(0)),
    }


def their_build(source: Path, target: Path, key: str) -> dict[str, float]:
    """Build an index as the peer's users do, without looking for the best nprobe within 10 ms."""
    from autofaiss import build_index

    build_index(
        str(source / "img_emb"),
        index_path=str(target),
        index_infos_path=str(target.with_suffix(".json")),
        index_key=key,
        index_param="nprobe=64,efSearch=128,ht=2048",
        metric_type="ip",
        max_index_memory_usage="4G",
        current_memory_available="20G",
    )
    return {}


# --- measuring ------------------------------------------------------------------------------------


def measured(side: str, source: Path, target: Path, key: str) -> dict[str, float]:
    """Run one side and return its seconds, CPU seconds and peak of memory in bytes."""
    from peer import BUILDER, environment

    python = sys.executable if side == "ours" else str(environment("autofaiss", BUILDER))
    report = target.with_suffix(".report")
    command = [python, __file__, "--inside", side, str(source), str(target), key, str(report)]
    started, peak, done = time.perf_counter(), [0], threading.Event()
    before = os.times()
    process = subprocess.Popen(command, stdout=sys.stderr)
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, done))
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    after = os.times()
    if status:
        raise SystemExit(f"{side} ended with {status}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": seconds, "cpu": cpu, "memory": peak[0], **json.loads(report.read_text())}


def _watch(root: int, peak: list[int], done: threading.Event) -> None:
    while not done.wait(0.05):
        peak[0] = max(peak[0], _resident(root))


def _resident(root: int) -> int:
    """Bytes that a process and its descendants hold; pages that they share count for each."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def recalls(path: Path, folder: Path) -> dict[int, dict[int, float]]:
    """Return recall at each of `RECALL_AT`, by nprobe; efSearch is twice nprobe."""
    import faiss

    on_disk = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
    queries, nearest = np.load(folder / "queries.npy"), np.load(folder / "nearest.npy")
    if path.is_dir():
        index = faiss.read_index(str(path / "image.index" / "populated.index"), on_disk)
    else:
        index = faiss.read_index(str(path))
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    quantizer = faiss.downcast_index(ivf.quantizer)
    answers = {}
    for nprobe in sorted({min(n, ivf.nlist) for n in NPROBES}):
        ivf.nprobe = nprobe
        if isinstance(quantizer, faiss.IndexHNSW):
            quantizer.hnsw.efSearch = 2 * nprobe
        _, found = index.search(queries, RECALL_AT[-1])
        answers[nprobe] = {
            k: float(
                np.mean(
                    [len(np.intersect1d(a[:k], b[:k])) / k for a, b in zip(found, nearest, strict=True)]
                )
            )
            for k in RECALL_AT
        }
    return answers


def say(line: object) -> None:
    """Write a line where it is no part of the answer."""
    print(line, file=sys.stderr, flush=True)


def table(runs: dict[str, list[dict[str, Any]]], found: dict[str, dict[int, dict[int, float]]]) -> str:
    """Return the medians of both sides and their ratios, as Markdown."""

    def middle(side: str, what: str) -> float:
        return median(run[what] for run in runs[side])

    lines = ["| | ours | autofaiss | ratio | wanted |", "|---|---|---|---|---|"]
    for what, unit, name in (
        ("wall", 1, "wall, s"),
        ("cpu", 1, "CPU, s"),
        ("memory", 1e9, "peak RSS, GB"),
    ):
        ours, theirs = middle("ours", what) / unit, middle("theirs", what) / unit
        limit = f"<= {WANTED[what]}" if what in WANTED else ""
        lines.append(f"| {name} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} | {limit} |")
    for nprobe, by_k in found["ours"].items():
        for k, recall in by_k.items():
            peer = found["theirs"][nprobe][k]
            numbers = f"{recall:.4f} | {peer:.4f} | {recall - peer:+.4f} | >= -{WANTED['recall']}"
            lines.append(f"| recall@{k}, nprobe {nprobe} | {numbers} |")
    rate = middle("ours", "rows a second a core")
    lines.append(f"| encoded rows a second a core | {rate:,.0f} | | | |")
    return "\n".join(lines)


def main() -> None:
    """Compare both sides on some rows, or, inside a process of its own, be one."""
    if sys.argv[1:2] == ["--inside"]:
        side, source, target, key, report = sys.argv[2:]
        build = our_build if side == "ours" else their_build
        Path(report).write_text(json.dumps(build(Path(source), Path(target), key)))
        return
    from laion_assets.build.index_key import index_key_for

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--key", help="faiss factory key; by default ours for 136 bytes a row")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=("ours", "theirs"), default=["ours", "theirs"])
    arguments = parser.parse_args()
    key = arguments.key or index_key_for(arguments.rows, 768, 136)
    folder = data(arguments.rows)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
    found = {}
    for _ in range(arguments.repeats):
        for side in arguments.sides:
            target = folder / f"{side}.index"
            for old in folder.glob(f"{side}.index*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            runs[side].append(measured(side, folder / "embeddings", target, key))
            found[side] = recalls(target, folder)
            say(f"{side}: {runs[side][-1]}, {found[side]}")
    print(f"{arguments.rows:,} rows, {key}, load {os.getloadavg()[0]:.1f} at the end\n")
    print(table(runs, found) if len(runs) == 2 else json.dumps({"runs": runs, "recall": found}, indent=1))


if __name__ == "__main__":
    main()
