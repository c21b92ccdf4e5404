"""A small index of LAION-5B's form with many near-copies, beside metadata in several Arrow files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from helpers import indices

from laion_assets.build import Build, Request

DIMENSION = 32
LAION_FORM = "OPQ8_40,IVF64_HNSW32,PQ8x8"  # as with LAION, OPQ widens
ROWS_PER_STYLE = 400
LARGEST_GROUP = 300


def images(random: np.random.Generator, n: int) -> np.ndarray:
    """Unit rows of a few styles; most are copies of another, near or exact, some hundreds of one."""
    sizes = np.minimum(random.pareto(1.2, n) + 1, LARGEST_GROUP).astype(int)
    original = random.permutation(np.repeat(np.arange(n), sizes)[:n])
    styles = random.standard_normal((n // ROWS_PER_STYLE + 1, DIMENSION))
    originals = styles[random.integers(len(styles), size=original.max() + 1)]
    originals = scaled(originals) + 0.9 * scaled(random.standard_normal(originals.shape))
    change = random.choice([0, 0.05, 0.15, 0.3, 0.45], size=(n, 1))
    copies = scaled(originals)[original] + change * scaled(random.standard_normal((n, DIMENSION)))
    return scaled(copies + 0.5 * scaled(np.ones(DIMENSION))).astype(np.float32)


def scaled(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def write_two_files(folder: Path, rows: np.ndarray, key: str = LAION_FORM) -> None:
    """Write the index as LAION publishes it: its lists in a file of their own."""
    indices.write_merged(folder, indices.train(key, rows[:8000]), rows)


def write_one_file(folder: Path, rows: np.ndarray, key: str) -> None:
    """Write the index as one plain file."""
    indices.write_one_file(folder, indices.train(key, rows[:8000]), rows)


def write_metadata(folder: Path, rows: int) -> None:
    """Write three Arrow files, from whose texts one sees which row they belong to."""
    table = {
        "url": [url_of(row) for row in range(rows)],
        "caption": [caption_of(row) for row in range(rows)],
        "NSFW": ["UNLIKELY"] * rows,
    }
    indices.write_metadata(folder, pa.table(table), files=3, batch=997)


def build(folder: Path, rows: np.ndarray, key: str) -> None:
    """Build the index and its metadata from embeddings as clip-retrieval's inference leaves them."""
    embeddings = folder.with_name(f"{folder.name}-embeddings")
    for part in ("img_emb", "metadata"):
        (embeddings / part).mkdir(parents=True)
    for number, ids in enumerate(np.array_split(np.arange(len(rows)), 3)):
        np.save(embeddings / "img_emb" / f"img_emb_{number}.npy", rows[ids])
        texts = {"url": [url_of(row) for row in ids], "caption": [caption_of(row) for row in ids]}
        pq.write_table(pa.table(texts), embeddings / "metadata" / f"metadata_{number}.parquet")
    built = Build(Request(str(embeddings), str(folder), index_key=key, shard_rows=len(rows) // 2)).run()
    assert built.stored == len(rows)


def url_of(row: int) -> str:
    return f"https://example.org/{row}.jpg"


def caption_of(row: int) -> str:
    return f"the picture in row {row}"
