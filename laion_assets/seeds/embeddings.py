"""Read or embed the seeds of a set as unit vectors, and compute their centroid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.io.arrays import Floats
from laion_assets.io.errors import InputError
from laion_assets.io.storage import first_line, open_storage, reaching
from laion_assets.io.tables import vector_column
from laion_assets.io.text import count
from laion_assets.seeds.clip_retrieval import with_thumbnails
from laion_assets.seeds.folder import SEEDS_URI, SeedSet
from laion_assets.seeds.images import BadImage, EmbeddedImage, ImageFile, embed_images
from laion_assets.seeds.model import Model
from laion_assets.seeds.model_folder import MODEL
from laion_assets.seeds.prompts import PROMPTS_FILE, CutPrompt, Prompt, embed_prompts, read_prompts
from laion_assets.seeds.readers import MAX_UNPACKED, READERS, VectorFile, matrix_of
from laion_assets.seeds.seed_files import SeedFile, UnusableFileError, read_files, verified

PROBLEMS_SHOWN = 20
BAD_IMAGES_SHOWN = 10
VECTOR, IMAGE, PROMPT = "vector", "image", "prompt"  # kinds of seeds


@dataclass(frozen=True)
class Seeds:
    """The seeds of one set.

    Attributes:
        embeddings: (n, d) float32 unit rows.
        columns: n rows of `file`, `row` and `kind`; also `url`, `caption` and `thumbnail` if the set has
            them, and `content`, the SHA-256 of the image file, if images were embedded.
        bad_images: images that could not be embedded.
        cut_prompts: prompts that are longer than the model reads.
        reused: number of images whose vectors were already known.
        notes: values that were left out or replaced, each with its file.

    """

    embeddings: Floats
    columns: pa.Table
    bad_images: tuple[BadImage, ...] = ()
    cut_prompts: tuple[CutPrompt, ...] = ()
    reused: int = 0
    notes: tuple[str, ...] = ()

    def to_table(self) -> pa.Table:
        """Return a table with one row per seed and its vector in `embedding`."""
        return self.columns.append_column("embedding", vector_column(self.embeddings))


@dataclass(frozen=True)
class KnownImages:
    """Images that the same model embedded before.

    Attributes:
        vectors: (d,) vectors, by SHA-256 of the file.
        thumbnails: WebP thumbnails, by SHA-256 of the file.

    """

    vectors: Mapping[str, Floats] = field(default_factory=dict)
    thumbnails: Mapping[str, bytes | None] = field(default_factory=dict)

    @classmethod
    def of(cls, *tables: pa.Table) -> KnownImages:
        """Collect the images in tables of seeds."""
        with_images = [table for table in tables if "content" in table.column_names]
        if not with_images:
            return cls()
        rows = pa.concat_tables(with_images, promote_options="default")
        images = rows.filter(pc.is_valid(rows["content"]))
        contents = images["content"].to_pylist()
        return cls(
            dict(zip(contents, embeddings_of(images), strict=True)),
            dict(zip(contents, images["thumbnail"].to_pylist(), strict=True)),
        )


def embeddings_of(table: pa.Table) -> Floats:
    """Return the `embedding` column of a table as (n, d) float32 vectors."""
    vectors: Floats = matrix_of(table["embedding"]).astype(np.float32, copy=False)
    return vectors


def read_seeds(
    uri: str,
    seed_set: SeedSet,
    model: Model | None = None,
    *,
    known: KnownImages | None = None,
    max_bad_images: float = 0.05,
    progress: Callable[[int], object] = lambda _: None,
    keep: Callable[[EmbeddedImage], object] = lambda _: None,
) -> Seeds:
    """Read the vectors of a set or embed its images, and embed its prompts.

    Args:
        uri: the folder of the seed sets.
        seed_set: the listing of the set.
        model: embeds images and prompts; other sets need none.
        known: images that need not be embedded again.
        max_bad_images: share of the images that may be unusable.
        progress: called with the number of images done since the last call.
        keep: called with every image that was embedded, such as `UnfinishedImages.keep`.

    Raises:
        InputError: bad files or rows (the message names the first 20 and the remedy), no model, or more
            unusable images than allowed.

    """
    if seed_set.needs_model and model is None:
        raise InputError(
            f"seed set {seed_set.name!r} holds {seed_set.contents()}, and no model is set to embed "
            "them: name the index's model",
            MODEL,
        )
    parts = [_with_thumbnails(uri, seed_set, _read_vectors(uri, seed_set))] if seed_set.vectors else []
    # Prompts come last in the table but are embedded first: a bad prompt fails before hours of images.
    prompts = [_embed_prompts(uri, seed_set, model)] if model and seed_set.prompts else []
    if model is not None and seed_set.images:
        parts.append(
            _embed_images(uri, seed_set, model, known or KnownImages(), max_bad_images, progress, keep)
        )
    parts += prompts
    widths = {part.embeddings.shape[1] for part in parts}
    if len(widths) > 1:
        raise InputError(
            f"seed set {seed_set.name!r} mixes vectors of {' and '.join(map(str, sorted(widths)))} "
            "dimensions: use one model for all of them"
        )
    return Seeds(
        _joined([part.embeddings for part in parts]),
        pa.concat_tables([part.columns for part in parts], promote_options="default"),
        tuple(bad for part in parts for bad in part.bad_images),
        tuple(cut for part in parts for cut in part.cut_prompts),
        sum(part.reused for part in parts),
        tuple(note for part in parts for note in part.notes),
    )


def count_seeds(uri: str, seed_set: SeedSet) -> int:
    """Return the number of seeds in a set, without embedding any.

    Args:
        uri: the folder of the seed sets.
        seed_set: the listing of the set.

    Raises:
        InputError: a file that cannot be read.

    """
    vectors = len(_read_vectors(uri, seed_set).embeddings) if seed_set.vectors else 0
    return vectors + len(seed_set.images) + len(_prompts_of(uri, seed_set))


def _read_vectors(uri: str, seed_set: SeedSet) -> Seeds:
    fs, _ = open_storage(uri, SEEDS_URI)
    problems: list[str] = []
    more = unpacked = 0
    parts: dict[str, tuple[Floats, pa.Table]] = {}
    notes: list[str] = []
    with reaching(uri, SEEDS_URI):
        for file, content in read_files(fs, seed_set.vectors):
            where = f"{seed_set.name}/{file.name}"
            try:
                found = READERS[PurePosixPath(file.name).suffix.lower()](verified(content, file))
            except UnusableFileError as error:
                problems += [f"{where} {problem}" for problem in error.problems]
                more += error.more
                continue
            parts[where] = found.vectors, _with_location(found, file.name)
            notes += [f"{where} {note}" for note in found.notes]
            unpacked += found.vectors.nbytes
            if unpacked > MAX_UNPACKED:
                raise InputError(
                    f"seed set {seed_set.name!r} has more than {MAX_UNPACKED:,} bytes of vectors: split "
                    "it"
                )
    problems += _differing_dimensions({where: vectors for where, (vectors, _) in parts.items()})
    if problems:
        raise InputError(
            f"seed set {seed_set.name!r} cannot be used; correct or remove these: "
            f"{_first(problems, more=more)}"
        )
    return Seeds(
        _joined([vectors for vectors, _ in parts.values()]),
        pa.concat_tables([columns for _, columns in parts.values()], promote_options="default"),
        notes=tuple(notes),
    )


def _joined(parts: Sequence[Floats]) -> Floats:
    """Concatenate arrays; a single one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _with_thumbnails(uri: str, seed_set: SeedSet, seeds: Seeds) -> Seeds:
    fs, _ = open_storage(uri, SEEDS_URI)
    return replace(seeds, columns=with_thumbnails(fs, seed_set, seeds.columns))


def _embed_images(
    uri: str,
    seed_set: SeedSet,
    model: Model,
    known: KnownImages,
    max_bad_images: float,
    progress: Callable[[int], object],
    keep: Callable[[EmbeddedImage], object],
) -> Seeds:
    fs, _ = open_storage(uri, SEEDS_URI)
    files = (
        ImageFile(file.name, partial(_content, fs, file, _where(uri, seed_set, file)))
        for file in seed_set.images
    )
    good: list[EmbeddedImage] = []
    bad: list[BadImage] = []
    for outcome in embed_images(model, files, known=known.vectors, progress=progress):
        if isinstance(outcome, BadImage):
            bad.append(outcome)
            continue
        good.append(outcome)
        if outcome.content not in known.vectors:
            keep(outcome)
    # Rounded up, so that even a small set may lose one.
    allowed = math.ceil(max_bad_images * len(seed_set.images))
    if len(bad) > allowed or not good:
        named = _first([str(image) for image in bad], BAD_IMAGES_SHOWN)
        share = f"{len(bad):,} of {count(len(seed_set.images), 'image')} of seed set {seed_set.name!r}"
        are = "is" if len(bad) == 1 else "are"
        if len(bad) <= allowed:  # the limit is not the problem
            raise InputError(f"{share} {are} unusable, so none is left: replace them: {named}")
        most = f"{allowed:,} ({100 * max_bad_images:g} %) {'is' if allowed == 1 else 'are'} allowed"
        raise InputError(
            f"{share} {are} unusable, at most {most}: replace or remove them, or raise max_bad_images: "
            f"{named}",
            "max_bad_images",
        )
    reused = [image.content in known.vectors for image in good]
    thumbnails = [image.thumbnail or known.thumbnails.get(image.content) for image in good]
    columns = {
        "file": pa.array([image.name for image in good]),
        "row": pa.array(np.zeros(len(good), np.int32)),
        "kind": pa.array([IMAGE] * len(good)),
        "content": pa.array([image.content for image in good]),
        "thumbnail": pa.array(thumbnails, pa.binary()),
    }
    vectors = np.stack([image.vector for image in good])
    return Seeds(vectors, pa.table(columns), tuple(bad), reused=sum(reused))


def _where(uri: str, seed_set: SeedSet, file: SeedFile) -> str:
    return f"{uri.rstrip('/')}/{seed_set.name}/{file.name}"


def _content(fs: Any, file: SeedFile, where: str) -> bytes:
    """Read a file and check that it has not changed since it was listed.

    Raises:
        UnusableFileError: the file is gone or has changed, or a local file cannot be read.
        InputError: the storage denies access or fails.

    """
    try:
        with reaching(where, SEEDS_URI):
            ((_, content),) = read_files(fs, [file])
    except InputError:
        raise
    except Exception as error:  # each kind of storage has its own errors
        raise InputError(
            f"{where} cannot be read ({first_line(error)}): check your access to it, then try again",
            SEEDS_URI,
        ) from error
    return verified(content, file)


def _embed_prompts(uri: str, seed_set: SeedSet, model: Model) -> Seeds:
    prompts = _prompts_of(uri, seed_set)
    where = f"{seed_set.name}/{PROMPTS_FILE}"
    if not prompts:
        raise InputError(f"{where} has no prompt: write one per line, or remove the file")
    found = embed_prompts(model, prompts, name=where)
    columns = {
        "file": pa.array([PROMPTS_FILE] * len(prompts)),
        "row": pa.array([prompt.line - 1 for prompt in prompts], pa.int32()),
        "kind": pa.array([PROMPT] * len(prompts)),
        "caption": pa.array([prompt.text for prompt in prompts]),
    }
    return Seeds(found.vectors, pa.table(columns), cut_prompts=found.cut)


def _prompts_of(uri: str, seed_set: SeedSet) -> Sequence[Prompt]:
    fs, _ = open_storage(uri, SEEDS_URI)
    prompts: list[Prompt] = []
    for file in seed_set.prompts:
        name = f"{seed_set.name}/{file.name}"
        try:
            content = _content(fs, file, _where(uri, seed_set, file))
        except UnusableFileError as error:
            raise InputError(f"{name} {error}") from error
        prompts += read_prompts(content, name)
    return prompts


def _first(problems: Sequence[str], shown: int = PROBLEMS_SHOWN, more: int = 0) -> str:
    more += max(len(problems) - shown, 0)
    return "; ".join([*problems[:shown], *([f"and {more:,} more"] if more > 0 else [])])


def centroid(embeddings: Floats) -> tuple[Floats, float]:
    """Return the unit mean of (n, d) unit rows, shape (d,), and the length of the mean.

    The length measures how concentrated the seeds are: 1 if all are equal, near 0 if they point in all
    directions. Directional statistics calls it the mean resultant length.

    Raises:
        InputError: the seeds cancel out and have no mean direction.

    """
    mean = embeddings.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(mean))
    if length < 1e-6:
        raise InputError("the seeds cancel out, so they have no centroid: use seeds of one style")
    return (mean / length).astype(np.float32), length


def _with_location(found: VectorFile, name: str) -> pa.Table:
    rows = len(found.vectors)
    location = {
        "file": pa.array([name] * rows),
        "row": pa.array(np.arange(rows, dtype=np.int32)),
        "kind": pa.array([VECTOR] * rows),
    }
    return pa.table(location | dict(found.columns))


def _differing_dimensions(vectors_by_file: Mapping[str, Floats]) -> list[str]:
    first = next(iter(vectors_by_file), "")
    return [
        f"{file} has {vectors.shape[1]} dimensions, {first} has {vectors_by_file[first].shape[1]}"
        for file, vectors in vectors_by_file.items()
        if vectors.shape[1] != vectors_by_file[first].shape[1]
    ]
