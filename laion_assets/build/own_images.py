"""Embed a folder of images in the layout "parquet", as input of a build."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from laion_assets.io.errors import InputError
from laion_assets.io.progress import Progress
from laion_assets.io.storage import is_local, is_regular, list_files, open_storage, reaching
from laion_assets.io.tables import SUFFIX, StoredTable, new_table, vector_column
from laion_assets.io.text import count
from laion_assets.seeds import KnownImages, Model, UnfinishedImages
from laion_assets.seeds.decoding import EXTENSIONS
from laion_assets.seeds.folder import is_hidden, is_image
from laion_assets.seeds.images import BadImage, EmbeddedImage, ImageFile, embed_images
from laion_assets.seeds.unfinished import MODEL_KEY

IMAGES_PER_FILE = 10_000


@dataclass(frozen=True)
class EmbeddedFolder:
    """The result of embedding a folder of images.

    Attributes:
        images: number of images with embeddings, including those of earlier calls.
        new: number of images that this call embedded.
        bad: images that cannot be embedded.
        example: path of the first image in the folder that has an embedding, or None.

    """

    images: int
    new: int
    bad: tuple[BadImage, ...]
    example: str | None


def embed_folder(uri: str, into: str, model: Model, log: Callable[[str], None]) -> EmbeddedFolder:
    """Embed the images in a folder and its subfolders, as Parquet files of 10,000 rows.

    Images that already have an embedding are skipped, so images can be added later: they go to new files
    and get higher ids. A killed call loses at most two minutes of work.

    Args:
        uri: folder of the images, a local path or a URL.
        into: folder of the embeddings, a local path or a URL.
        model: embeds the images.
        log: called with lines about the progress.

    Raises:
        InputError: the folder does not exist or holds no usable image, or `into` holds embeddings of
            another model.

    """
    fs, root = open_storage(uri)
    with reaching(uri):
        if not fs.isdir(root):
            problem = f"{uri} is a file" if fs.isfile(root) else f"there is no folder {uri}"
            raise InputError(f"{problem}: name the folder of the images")
        paths = sorted(
            listed.path
            for listed in list_files(fs, root)
            if is_image(listed.name) and not is_hidden(listed.name) and is_regular(fs, listed.path)
        )
    if not paths:
        raise InputError(
            f"{uri} holds no images (looked for {', '.join(EXTENSIONS)}): name a folder with images"
        )
    files, known = _embedded_before(into, model)
    waiting = [path for path in paths if _url(fs, path) not in known]
    unfinished = UnfinishedImages(f"{into.rstrip('/')}.unfinished", model.fingerprint, log)
    bad: list[BadImage] = []
    new = 0
    again = KnownImages.of(*unfinished.tables())
    with Progress("images", len(waiting), "", log) as progress, unfinished:
        images = (ImageFile(path, partial(_read, fs, path)) for path in waiting)
        outcomes = embed_images(model, images, known=again.vectors, progress=progress.advance)
        for number in itertools.count(files):
            good = list(itertools.islice(_good(outcomes, bad, unfinished, again), IMAGES_PER_FILE))
            if not good:
                break
            new += len(good)
            _write(f"{into.rstrip('/')}/images-{number:06}{SUFFIX}", fs, good, again, model)
    unfinished.remove()
    if not new + len(known):
        named = "; ".join(map(str, bad[:5]))
        raise InputError(f"no image in {uri} can be embedded ({count(len(paths), 'image')}): {named}")
    unusable = {image.name for image in bad}
    example = next((path for path in paths if path not in unusable), None)
    return EmbeddedFolder(new + len(known), new, tuple(bad), example)


def _read(fs: Any, path: str) -> bytes:
    with reaching(str(fs.unstrip_protocol(path))):
        content: bytes = fs.cat_file(path)
    return content


def _good(
    outcomes: Iterator[EmbeddedImage | BadImage],
    bad: list[BadImage],
    unfinished: UnfinishedImages,
    again: KnownImages,
) -> Iterator[EmbeddedImage]:
    for outcome in outcomes:
        if isinstance(outcome, BadImage):
            bad.append(outcome)
            continue
        if outcome.content not in again.vectors:
            unfinished.keep(outcome)
        yield outcome


def _embedded_before(into: str, model: Model) -> tuple[int, set[str]]:
    """Return the number of existing files, and the URLs of their images."""
    fs, root = open_storage(into)
    with reaching(into):
        names = [listed.name for listed in list_files(fs, root)] if fs.exists(root) else []
    known: set[str] = set()
    tables = sorted(name for name in names if name.endswith(SUFFIX))
    for name in tables:
        table = StoredTable(f"{into.rstrip('/')}/{name}", "remove the folder and start again")
        if table.footer.get(MODEL_KEY) != model.fingerprint:
            raise InputError(
                f"{table.where} holds embeddings of another model: use that model, or remove {into} and "
                "the index",
                "model",
            )
        known.update(table.read(["url"])["url"].to_pylist())
    return len(tables), known


def _write(uri: str, fs: Any, images: list[EmbeddedImage], again: KnownImages, model: Model) -> None:
    rows = pa.record_batch(
        {
            "url": pa.array([_url(fs, image.name) for image in images]),
            "caption": pa.array([_caption(image.name) for image in images]),
            "thumbnail": pa.array(
                [image.thumbnail or again.thumbnails.get(image.content) for image in images], pa.binary()
            ),
            "embedding": vector_column(np.stack([image.vector for image in images])),
        }
    )
    with new_table(uri, rows.schema) as table:
        table.footer = {MODEL_KEY: model.fingerprint}
        table.write(rows)


def _url(fs: Any, path: str) -> str:
    return Path(path).as_uri() if is_local(fs) else str(fs.unstrip_protocol(path))


def _caption(path: str) -> str:
    """Return the words of a file name."""
    return " ".join(re.split(r"[\W_]+", PurePosixPath(path).stem)).strip()
