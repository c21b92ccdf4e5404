"""Embed a stream of image files as unit vectors; threads decode ahead of the model."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from laion_assets.io.arrays import Floats, unit_rows
from laion_assets.io.machine import cores
from laion_assets.io.storage import first_line
from laion_assets.seeds.decoding import BadImageError, PixelBudget, open_image, thumbnail
from laion_assets.seeds.model import NO_DIRECTION, Model
from laion_assets.seeds.preprocessing import Preprocessing
from laion_assets.seeds.seed_files import UnusableFileError

BATCH = 16
DETAIL = 6  # a JPEG is decoded at no less than this multiple of the size it is resized to
UNREADABLE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class ImageFile(NamedTuple):
    """An image file and how to read it.

    Attributes:
        name: the file's name in messages.
        read: returns its bytes. `UnusableFileError` and the errors in `UNREADABLE` mean that this file
            cannot be used; any other error aborts the run.

    """

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedImage:
    """An image and its vector.

    Attributes:
        name: the file's name.
        content: SHA-256 of the file, in hexadecimal digits.
        vector: (d,) float32 of length 1.
        thumbnail: WebP, at most 96 pixels wide and high; None if the vector was already known.

    """

    name: str
    content: str
    vector: Floats
    thumbnail: bytes | None


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that cannot be embedded.

    Attributes:
        name: the file's name.
        reason: a phrase that follows the name, such as "is empty (0 bytes): use another file".

    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """A preprocessed image, ready for the model."""

    name: str
    content: str
    pixels: Floats
    thumbnail: bytes


Outcome: TypeAlias = EmbeddedImage | BadImage


def embed_images(
    model: Model,
    files: Iterable[ImageFile | tuple[str, Callable[[], bytes]]],
    *,
    batch: int = BATCH,
    threads: int | None = None,
    progress: Callable[[int], object] | None = None,
    known: Mapping[str, Floats] | None = None,
) -> Iterator[Outcome]:
    """Embed image files.

    Threads read, decode and resize the next images while the model computes. At most three batches plus
    one image per thread are in memory at a time.

    Args:
        model: embeds the images.
        files: the image files; consumed as needed.
        batch: number of images per call of the model.
        threads: number of decoding threads; one per core by default.
        progress: called with the number of images done since the last call, such as `Progress.advance`.
        known: (d,) vectors that the same model returned before, by SHA-256 of the file; these images are
            not embedded again.

    Yields:
        An `EmbeddedImage` or a `BadImage` for each file, in the order of `files`.

    Raises:
        InputError: the model fails.
        Exception: any error of `read` that does not concern a single file, see `ImageFile`.

    """
    prepare = _Preparation(model.preprocessing, known or {})
    waiting: deque[_Prepared | Outcome] = deque()  # in file order; the first waits for the model
    prepared = 0
    for outcome in _ahead(prepare, map(_image_file, files), threads or cores(), 2 * batch):
        waiting.append(outcome)
        prepared += isinstance(outcome, _Prepared)
        if prepared == batch:
            waiting, prepared = deque(_embedded(model, waiting)), 0
        if not prepared:
            yield from _reported(waiting, progress)
    yield from _reported(deque(_embedded(model, waiting)), progress)


def _image_file(file: ImageFile | tuple[str, Callable[[], bytes]]) -> ImageFile:
    return ImageFile(*file)


def _reported(
    outcomes: deque[_Prepared | Outcome], progress: Callable[[int], object] | None
) -> Iterator[Outcome]:
    if progress is not None:
        progress(len(outcomes))
    while outcomes:
        outcome = outcomes.popleft()
        assert not isinstance(outcome, _Prepared)  # noqa: S101 - for mypy
        yield outcome


def _ahead(
    prepare: Callable[[ImageFile], _Prepared | Outcome],
    files: Iterator[ImageFile],
    threads: int,
    images: int,
) -> Iterator[_Prepared | Outcome]:
    """Prepare files in threads and yield them in order, at most `images` + `threads` ahead."""
    pool = ThreadPoolExecutor(threads, "decode")
    pending: deque[Future[_Prepared | Outcome]] = deque()
    try:
        while True:
            room = images + threads - len(pending)
            pending.extend(pool.submit(prepare, file) for file in itertools.islice(files, room))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Preparation:
    """Reads, decodes and preprocesses one file; called from several threads."""

    def __init__(self, preprocessing: Preprocessing, known: Mapping[str, Floats]) -> None:
        self._preprocessing = preprocessing
        self._known = known
        self._budget = PixelBudget()

    def __call__(self, file: ImageFile) -> _Prepared | Outcome:
        try:
            data = file.read()
        except UnusableFileError as error:
            return BadImage(file.name, str(error))
        except UNREADABLE as error:
            return BadImage(file.name, f"cannot be read ({error.strerror or first_line(error)})")
        content = hashlib.sha256(data).hexdigest()
        if content in self._known:
            return EmbeddedImage(file.name, content, self._known[content], None)
        try:
            with open_image(data, self._enough, self._budget) as image:
                return _Prepared(file.name, content, self._preprocessing(image), thumbnail(image))
        except BadImageError as bad:
            return BadImage(file.name, str(bad))

    def _enough(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) beyond which a JPEG gains nothing, see `open_image`."""
        wide, high = self._preprocessing.resized(width, height)
        return DETAIL * wide, DETAIL * high


def _embedded(model: Model, waiting: Iterable[_Prepared | Outcome]) -> Iterator[Outcome]:
    """Yield the outcomes in order, with prepared images embedded."""
    outcomes = list(waiting)
    pixels = [outcome.pixels for outcome in outcomes if isinstance(outcome, _Prepared)]
    vectors = _directions(model.embed_pixels(np.stack(pixels)) if pixels else None)
    for outcome in outcomes:
        if not isinstance(outcome, _Prepared):
            yield outcome
        elif (vector := next(vectors)) is not None:
            yield EmbeddedImage(outcome.name, outcome.content, vector, outcome.thumbnail)
        else:
            yield BadImage(outcome.name, f"{NO_DIRECTION}: use another file, or another model")


def _directions(answers: Floats | None) -> Iterator[Floats | None]:
    """Yield each answer as a unit vector, or None if it is zero or not finite."""
    if answers is not None:
        vectors, usable = unit_rows(answers)
        yield from (vector if known else None for vector, known in zip(vectors, usable, strict=True))
