"""Embeddings as others publish them, and an index that is built from them by the sensor and its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from helpers.project import Project, Ticks

from laion_assets.defs.build_sensor import ENCODE_JOB, PUBLISH_JOB, TRAIN_JOB

DIMENSION = 24
TOPICS = 12
LAYOUTS = ("clip-retrieval", "laion", "datacomp", "parquet")


def vectors_of(rows: int, first: int = 0) -> Any:
    """Rows around a few topics, as float16: row i is around topic i % TOPICS."""
    topics = np.random.default_rng(1).standard_normal((TOPICS, DIMENSION))
    noise = np.random.default_rng(first).standard_normal((rows, DIMENSION))
    return (topics[np.arange(first, first + rows) % TOPICS] + 0.4 * noise).astype(np.float16)


def metadata_of(rows: int, first: int = 0) -> pa.Table:
    numbers = range(first, first + rows)
    return pa.table(
        {
            "url": [f"https://example.org/{n}.jpg" for n in numbers],
            "caption": [f"topic{n % TOPICS} image number {n}" for n in numbers],
        }
    )


def names_of(layout: str, number: int) -> tuple[str, str]:
    """The file of vectors and that of metadata of one part."""
    if layout == "clip-retrieval":
        return f"img_emb/img_emb_{number}.npy", f"metadata/metadata_{number}.parquet"
    if layout == "laion":
        return f"img_emb/img_emb_{number:04}.npy", f"laion2B-en-metadata/metadata_{number:04}.parquet"
    if layout == "datacomp":
        return f"{number:032x}.npz", f"{number:032x}.parquet"
    return f"part-{number}.parquet", f"part-{number}.parquet"


def publish(folder: Path, layout: str, number: int, rows: int, first: int) -> Path:
    """Write one part, as the programs do that publish in a layout; return the file of vectors."""
    vectors, metadata = (folder / name for name in names_of(layout, number))
    for path in (vectors, metadata):
        path.parent.mkdir(parents=True, exist_ok=True)
    matrix, table = vectors_of(rows, first), metadata_of(rows, first)
    if layout == "parquet":
        flat = pa.array(matrix.ravel().astype(np.float32))
        table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, DIMENSION))
    elif layout == "datacomp":
        np.savez_compressed(
            vectors, b32_img=matrix[:, :8], b32_txt=matrix, l14_img=matrix, l14_txt=matrix
        )
    else:
        np.save(vectors, matrix)
    pq.write_table(table, metadata)
    return vectors


def publish_all(folder: Path, layout: str, sizes: tuple[int, ...] = (600, 600, 600, 600)) -> list[Path]:
    """Write parts of some sizes, whose rows follow each other."""
    starts = np.cumsum([0, *sizes]).tolist()
    return [publish(folder, layout, number, rows, starts[number]) for number, rows in enumerate(sizes)]


def write_seeds(folder: Path, topic: int = 3, seeds: int = 6) -> None:
    """A seed set: vectors around one topic."""
    folder.mkdir(parents=True)
    np.save(folder / "seeds.npy", vectors_of(seeds * TOPICS, 10**6 // TOPICS * TOPICS)[topic::TOPICS])


class Building(Ticks):
    """What Dagster's daemon does with the sensor that builds the index."""

    def __init__(self, project: Project) -> None:
        super().__init__(project)
        self.results: dict[str, dg.ExecuteInProcessResult] = {}

    def tick_build(self) -> list[dg.RunRequest]:
        """Evaluate the sensor once; return the runs that are launched."""
        seen = self.evaluate("embedding_files_sensor", self.cursor)
        self.cursor = seen.cursor or ""
        self.said = self.cursor.split("\n")[0]
        for added in seen.dynamic_partitions_requests or []:
            self.project.instance.add_dynamic_partitions("index_shards", list(added.partition_keys))
        launched = [each for each in seen.run_requests or [] if each.run_key not in self.run_keys]
        self.run_keys += [request.run_key or "" for request in launched]
        return launched

    def run(self, request: dg.RunRequest) -> dg.ExecuteInProcessResult:
        """Execute a run that was requested."""
        job = self.project.defs.resolve_job_def(request.job_name)
        return job.execute_in_process(
            partition_key=request.partition_key,
            instance=self.project.instance,
            tags={"dagster/run_key": request.run_key},
            raise_on_error=False,
        )

    def settle(self) -> list[str]:
        """Tick and run until two ticks launch nothing; return what ran: train, a shard, or publish."""
        ran: list[str] = []
        quiet = 0
        while quiet < 2:
            launched = self.tick_build()
            quiet = 0 if launched else quiet + 1
            for request in launched:
                steps = {TRAIN_JOB: "train", PUBLISH_JOB: "publish", ENCODE_JOB: request.partition_key}
                name = steps[request.job_name] or ""
                self.results[name] = self.run(request)
                ran.append(name if self.results[name].success else f"{name} failed")
        return ran
