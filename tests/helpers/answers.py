"""Queries clip-retrieval's KnnService in its own environment, and returns its full answers.

Started as a program it runs inside that environment. Its code is unchanged; the threshold, which it never
passes on, is passed on for it.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import peer


@dataclass(frozen=True)
class Question:
    """One request for each of some queries; no nprobe means the one stored in the index."""

    folder: str
    k: int
    nprobe: int | None = None
    threshold: float = 0.94


@dataclass(frozen=True)
class Answer:
    """The peer's answer to one query.

    Attributes:
        rows: what it returns, in order: dictionaries of id, similarity and columns of the metadata.
        received: ids and similarities, in order, before near-duplicates are removed.
        groups: its connected components, as places in what it received.
        vectors: the vectors it compared.

    """

    rows: list[dict[str, Any]]
    received: tuple[np.ndarray, np.ndarray]
    groups: list[list[int]]
    vectors: np.ndarray


def ask(question: Question, queries: np.ndarray) -> list[Answer]:
    """Ask the peer."""
    with TemporaryDirectory() as folder:
        np.save(Path(folder) / "queries.npy", queries)
        command = [peer.environment(), __file__, json.dumps(asdict(question)), folder]
        paths = {"PYTHONPATH": str(Path(peer.__file__).parent)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | paths)
        told = json.loads((Path(folder) / "answers.json").read_text())
        vectors = np.load(Path(folder) / "vectors.npy")
    ends = np.cumsum([len(each["received"]) for each in told])
    answers = []
    for each, part in zip(told, np.split(vectors, ends[:-1]), strict=True):
        ids, scores = np.array(each["received"]).reshape(-1, 2).T
        answers.append(Answer(each["rows"], (ids.astype(np.int64), scores), each["groups"], part))
    return answers


def main() -> None:
    """Answer, inside the peer's environment."""
    question, folder = Question(**json.loads(sys.argv[1])), Path(sys.argv[2])
    module = peer.part("clip_back")

    class Told(module.KnnService):  # type: ignore[misc]
        """The service, with a record of what it compared and connected."""

        groups: list[list[int]] = []  # noqa: RUF012
        vectors = np.empty((0, 0), np.float32)

        def get_non_uniques(self, embeddings: Any, threshold: float = question.threshold) -> Any:
            self.vectors = embeddings
            return super().get_non_uniques(embeddings, threshold)

        def connected_components(self, neighbors: Any) -> Any:
            self.groups = super().connected_components(neighbors)
            return self.groups

    resource = peer.resource(module, Path(question.folder), question.nprobe)
    knn = Told(clip_resources={"laion": resource})
    told, vectors = [], []
    for query in np.load(folder / "queries.npy"):
        asked = {"embedding_input": query, "num_result_ids": question.k}
        received = knn.query(**asked, num_images=1, deduplicate=False)
        rows = knn.query(**asked, num_images=question.k, deduplicate=True)
        pairs = [(row["id"], row["similarity"]) for row in received]
        told.append({"rows": rows, "received": pairs, "groups": knn.groups if rows else []})
        vectors.append(knn.vectors if rows else np.empty((0, len(query)), np.float32))
    (folder / "answers.json").write_text(json.dumps(told))
    np.save(folder / "vectors.npy", np.concatenate(vectors))


if __name__ == "__main__":
    main()
