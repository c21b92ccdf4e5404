"""The folder that `clip-retrieval index` leaves works as it is, whatever kind of index autofaiss chose.

Its writer and its index command run unchanged, and its service over the same folder says what to expect.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import peer
import pyarrow.parquet as pq
import pytest
from helpers import copies, indices
from helpers.answers import Question, ask
from helpers.project import failures, new_project, reported
from helpers.same import Rows, differences

from laion_assets.index.vectors import unit

PROGRAM = Path(__file__).parent / "embed_and_index.py"
SEEDS = 5
K = 300


@dataclass(frozen=True)
class Kind:
    """How many images, how much memory autofaiss may use for the index, and what it then chooses."""

    rows: int
    memory: str
    chosen: type
    quantised: bool = False


KINDS = {
    "Flat": Kind(800, "4G", faiss.IndexFlat),
    "HNSW": Kind(4_000, "4G", faiss.IndexHNSWFlat),
    "IVF Flat": Kind(12_000, "2MB", faiss.IndexIVFFlat),
    "OPQ, IVF and PQ": Kind(10_000, "500KB", faiss.IndexIVFPQ, quantised=True),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory) -> tuple[Kind, Path]:
    """A folder with `embeddings` and `index` as clip-retrieval leaves them, and the kind of the index."""
    kind = KINDS[request.param]
    root = tmp_path_factory.mktemp("made")
    np.save(root / "vectors.npy", copies.images(np.random.default_rng(3), kind.rows))
    about = "with urls" if kind.quantised else "images alone"
    command = [peer.environment("autofaiss", peer.BUILDER), PROGRAM, root, kind.memory, about]
    paths = {"PYTHONPATH": str(Path(peer.__file__).parent)}
    subprocess.run(command, check=True, env=os.environ | paths)
    return kind, root


def index_of(folder: Path) -> faiss.Index:
    index = faiss.read_index(str(folder / "image.index"))
    return faiss.downcast_index(faiss.try_extract_index_ivf(index) or index)


def test_what_is_left_is_what_the_readme_says(made) -> None:
    kind, root = made
    index = root / "index"
    assert isinstance(index_of(index), kind.chosen)
    texts = ["text.index", "text.json"] if kind.quantised else []
    assert sorted(path.name for path in index.iterdir()) == [
        "image.index",
        "image.json",
        "metadata",
        *texts,
    ]
    names = [f"metadata_{number}.parquet" for number in range(3)]
    assert sorted(path.name for path in (index / "metadata").iterdir()) == names
    first = pq.read_schema(index / "metadata" / names[0]).names
    assert first == (["image_path", "caption", "url"] if kind.quantised else ["image_path"])


@pytest.mark.parametrize("staging", ["full", "in-place"])
def test_the_whole_graph_runs_on_it_and_finds_what_the_peer_finds(made, staging, tmp_path) -> None:
    kind, root = made
    nprobe = 16 if issubclass(kind.chosen, faiss.IndexIVF) else None
    settings = {"nprobe": nprobe} if nprobe else {}
    with new_project(tmp_path, root / "index", LAION_STAGING=staging) as project:
        embeddings = project.seeds / "mine" / "img_emb"
        embeddings.mkdir(parents=True)
        np.save(embeddings / "img_emb_0.npy", np.load(root / "embeddings/img_emb/img_emb_0.npy")[:SEEDS])
        result = project.run("mine", nb_images_knn=K, nb_images_centroid=K, **settings)
        assert failures(result) == {}
        copied = project.cache / "image.index"
        assert copied.exists() == (staging == "full")
        told = reported(result, "centroid_urls")
        assert told["requested"] == K
        assert told["without url"] == 0

        (centroid,) = pq.read_table(project.table("centroid_vector", "mine"))["embedding"].to_pylist()
        seeds = pq.read_table(project.table("seed_embeddings", "mine"))["embedding"].to_pylist()
        queries = np.array([*seeds, centroid], np.float32)
        knn = pq.read_table(project.table("knn_urls", "mine")).to_pylist()
        ours = [[row for row in knn if row["seed"] == seed] for seed in range(SEEDS)]
        ours.append(pq.read_table(project.table("centroid_urls", "mine")).to_pylist())

    vectors = unit(indices.reconstructed(root / "index"))
    answers = ask(Question(str(root / "index"), K, nprobe), queries)
    for answer, mine in zip(answers, ours, strict=True):
        assert mine
        assert differences(of(answer.rows), of(mine), Rows(*answer.received), vectors, 0.94) == []
        expected = {row["id"]: row.get("url", row["image_path"]) for row in answer.rows}
        for row in mine:
            assert row["url"] == expected.get(row["id"], row["url"])
            assert f"/{row['id']}.jpg" in row["url"]


def of(rows: list[dict]) -> Rows:
    return Rows(np.array([row["id"] for row in rows]), np.array([row["similarity"] for row in rows]))
