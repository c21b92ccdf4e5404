"""LAION-like data of any size: an index of vectors with metadata, and seeds; seeded and cached.

Images belong to topics, topics to styles, and most images have near-copies, a few have thousands.
What must not live here: anything that searches or measures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from laion_assets.build import Build, Request

DIMENSION = 768
BLOCK = 65_536
SHARD_ROWS = 500_000
TOPICS_PER_STYLE = 50
ROWS_PER_TOPIC = 250
# How alike two images are: what every image, every style and every topic shares (squares of shares
# sum to one with what is the image's own).
SHARED_BY_ALL, SHARED_BY_STYLE, SHARED_BY_TOPIC = 0.55, 0.35, 0.40
# The cosine of a copy to its original, and of a variant (the same thing in another colour, which may
# or may not count as a near-duplicate) to its model, is 1 - c, with log(c) uniform between these.
COPY_DISTANCES, COPIES_EXPONENT = (1e-3, 2e-2), 1.25
VARIANT_DISTANCES, VARIANTS = (2e-2, 3e-1), 0.3

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Recipe:
    """Everything the data follows from."""

    rows: int = 1_000_000
    lists: int = 1024
    seeds: int = 20_000
    random_seed: int = 0

    @property
    def index_key(self) -> str:
        """The faiss factory key: LAION-5B's, with as many lists as the rows deserve."""
        return f"OPQ128_896,IVF{self.lists}_HNSW32,PQ128x8"

    @property
    def folder(self) -> Path:
        """Where the data is cached."""
        cache = os.environ.get("LAION_BENCH_CACHE", Path(__file__).parent / ".cache")
        name = "-".join(f"{key}{value}" for key, value in asdict(self).items())
        return Path(cache) / name


@dataclass(frozen=True)
class World:
    """All images: which are copies of which, and what each one's vector is."""

    recipe: Recipe

    def rng(self, *purpose: int) -> np.random.Generator:
        """A generator of its own for each purpose, so that blocks can be made in any order."""
        return np.random.default_rng([self.recipe.random_seed, *purpose])

    @cached_property
    def original_of(self) -> NDArray[np.int64]:
        """For every row, the original it is a copy of; heavy-tailed, in random order."""
        rng, rows = self.rng(0), self.recipe.rows
        sizes = np.minimum(rng.pareto(COPIES_EXPONENT, rows) + 1, max(10, rows // 200)).astype(int)
        originals = np.repeat(np.arange(rows), sizes)[:rows]
        return rng.permutation(originals)

    @cached_property
    def originals(self) -> Matrix:
        """One vector for every original."""
        count = int(self.original_of.max()) + 1
        topics = self.topics_in_style(slice(None))
        vectors = np.empty((count, DIMENSION), np.float32)
        for number, rows in enumerate(blocks(count)):
            rng = self.rng(1, number)
            size = rows.stop - rows.start
            images = self.images_of(topics[rng.integers(len(topics), size=size)], rng)
            variants, models = rng.integers(size, size=(2, int(VARIANTS * size)))
            images[variants] = self.altered(images[models], VARIANT_DISTANCES, rng)
            vectors[rows] = images
        return vectors

    @cached_property
    def spread(self) -> Matrix:
        """Directions in which images differ: a few matter much, many a little, as with CLIP."""
        rng = self.rng(2)
        rotation = np.linalg.qr(rng.standard_normal((DIMENSION, DIMENSION)))[0]
        scale = np.arange(1, DIMENSION + 1) ** -0.5
        return (rotation * (scale / np.linalg.norm(scale))).T.astype(np.float32)

    @cached_property
    def topics(self) -> NDArray[np.float32]:
        """What the images of a topic have in common: (styles, topics, dimension)."""
        count = max(2, self.recipe.rows // (TOPICS_PER_STYLE * ROWS_PER_TOPIC))
        rng = self.rng(3)
        everything = unit(rng.standard_normal((1, 1, DIMENSION)))
        styles = unit(self.differences(count, rng))[:, None]
        topics = unit(self.differences(count * TOPICS_PER_STYLE, rng))
        topics = topics.reshape(count, TOPICS_PER_STYLE, DIMENSION)
        shared = SHARED_BY_ALL * everything + SHARED_BY_STYLE * styles + SHARED_BY_TOPIC * topics
        return shared.astype(np.float32)

    def topics_in_style(self, style: int | slice) -> Matrix:
        """The topics of one style, or of all."""
        return self.topics[style].reshape(-1, DIMENSION)

    def differences(self, count: int, rng: np.random.Generator) -> Matrix:
        """Random differences between images, of length one on average."""
        return rng.standard_normal((count, DIMENSION), np.float32) @ self.spread

    def images_of(self, topics: Matrix, rng: np.random.Generator) -> Matrix:
        """A new image for each of the given topics."""
        own = np.sqrt(1 - SHARED_BY_ALL**2 - SHARED_BY_STYLE**2 - SHARED_BY_TOPIC**2)
        return unit(topics + np.float32(own) * self.differences(len(topics), rng))

    def altered(self, images: Matrix, distances: tuple[float, float], rng: np.random.Generator) -> Matrix:
        """An image near each of the given ones."""
        distance = np.exp(rng.uniform(*np.log(distances), size=(len(images), 1)))
        change = np.sqrt(2 * distance).astype(np.float32)
        return unit(images + change * self.differences(len(images), rng))

    def vectors(self, block: int) -> Matrix:
        """The vectors of one block of rows."""
        originals = self.originals[self.original_of[block * BLOCK : (block + 1) * BLOCK]]
        return self.altered(originals, COPY_DISTANCES, self.rng(4, block))

    def seeds(self) -> Matrix:
        """Images that are not in the index, all of one style."""
        rng = self.rng(5)
        topics = self.topics_in_style(0)
        return self.images_of(topics[rng.integers(len(topics), size=self.recipe.seeds)], rng)


def unit(vectors: NDArray[np.floating]) -> Matrix:
    """The vectors at length one."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / lengths).astype(np.float32, copy=False)


def blocks(rows: int) -> list[slice]:
    """The slices that cover so many rows."""
    return [slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]


def write_embeddings(world: World, folder: Path) -> None:
    """Write the vectors and their metadata as clip-retrieval does: a pair of files for each block."""
    for part in ("img_emb", "metadata"):
        (folder / part).mkdir(parents=True)
    for number, rows in enumerate(blocks(world.recipe.rows)):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", world.vectors(number))
        pq.write_table(metadata(world, number, rows), folder / "metadata" / f"metadata_{number}.parquet")


def metadata(world: World, block: int, rows: slice) -> pa.Table:
    """Url, caption and safety tag of one block of rows."""
    rng = world.rng(6, block)
    ids, originals = range(rows.start, rows.stop), world.original_of[rows]
    hosts = rng.integers(5_000, size=len(ids))
    urls = [
        f"https://img{host}.example.com/photos/{original:07}/{row:010}.jpg"
        for row, host, original in zip(ids, hosts, originals, strict=True)
    ]
    captions = [f"Picture {original} " + "of a thing " * (original % 9) for original in originals]
    nsfw = np.where(rng.random(len(ids)) < 0.97, "UNLIKELY", "UNSURE")
    return pa.table({"url": urls, "caption": captions, "NSFW": pa.array(nsfw, pa.string())})


def write_seeds(world: World, folder: Path) -> None:
    """The seeds, and the average seed."""
    seeds = world.seeds()
    np.save(folder / "seeds.npy", seeds)
    np.save(folder / "centroid.npy", unit(seeds[:1000].mean(axis=0)))


def generate(recipe: Recipe) -> Path:
    """The folder of the data: made now, or found in the cache."""
    folder = recipe.folder
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    world = World(recipe)
    with TemporaryDirectory(dir=unfinished.parent) as work:
        write_embeddings(world, Path(work) / "embeddings")
        request = Request(
            f"{work}/embeddings",
            str(unfinished),
            f"{work}/build",
            index_key=recipe.index_key,
            rows_per_centre=1,  # any recipe: a benchmark needs no perfect index
            shard_rows=SHARD_ROWS,
        )
        Build(request, print).run()
    write_seeds(world, unfinished)
    about = {**asdict(recipe), "seconds": time.perf_counter() - started}
    (unfinished / "recipe.json").write_text(json.dumps(about, indent=1))
    return unfinished.rename(folder)


def main() -> None:
    """Make the data the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    print(generate(Recipe(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
