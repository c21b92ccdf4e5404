"""A quick look: the best rows around a few images or a prompt, before hours are spent on a seed set.

It searches the staged index with the platform's model, in seconds. Nothing enters Dagster's history.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from laion_assets.defs.drawing.contact_sheet import Strip, contact_sheet
from laion_assets.defs.drawing.remote_thumbnails import FETCHED, reasons, remote_thumbnails
from laion_assets.defs.places import DATA, Places
from laion_assets.defs.resources import Embedder, LaionIndex
from laion_assets.defs.settings import Defaults, RetrievalConfig, Settings
from laion_assets.defs.terminal import aligned, one_line
from laion_assets.index import ModelRecord
from laion_assets.index.metadata import THUMBNAIL_COLUMN
from laion_assets.io.arrays import Floats
from laion_assets.io.errors import InputError
from laion_assets.io.progress import Progress
from laion_assets.io.storage import new_file
from laion_assets.search.filters import Filters, conditions_in
from laion_assets.search.safety import marked_unsafe
from laion_assets.search.top_rows import best_rows
from laion_assets.seeds import Model
from laion_assets.seeds.decoding import EXTENSIONS
from laion_assets.seeds.folder import is_hidden, is_image
from laion_assets.seeds.images import BadImage, EmbeddedImage, embed_images
from laion_assets.seeds.model_folder import MODEL
from laion_assets.seeds.prompts import Prompt, embed_prompts
from laion_assets.staging import verified_manifest

TOP, MAX_TOP = 48, 1000
IMAGES = 24  # of a folder; each is a query
PROBLEMS_SHOWN = 10
NAME = 40  # characters of a file's name, each of which may take four bytes
SHEETS = DATA / "look"
COLUMNS, CELL = 8, 128  # of the contact sheet: images in a row, pixels of each
CAPTION, URL = 48, 60  # columns of a terminal, where it has them
NO_THUMBNAILS = (
    "no contact sheet: the index has no thumbnails, and LAION_SHOW_REMOTE_PICTURES=true would fetch the "
    "images from their hosts"
)


@dataclass(frozen=True)
class Look:
    """What a look found.

    Attributes:
        about: one sentence.
        rows: the best first, see `best_rows`.
        sheet: where the contact sheet is; None where there are no thumbnails.
        notes: what a person should know besides.

    """

    about: str
    rows: pa.Table
    sheet: Path | None
    notes: tuple[str, ...] = ()

    def lines(self, width: int | None = None) -> list[str]:
        """Return the rows as an aligned table, for a terminal of that many columns."""
        width = width or shutil.get_terminal_size((CAPTION + URL + 20, 0)).columns
        caption = max(12, min(CAPTION, (width - 20) * CAPTION // (CAPTION + URL)))
        url = max(12, width - 20 - caption)
        shown = self.rows.select(["rank", "similarity", "caption", "url"]).to_pylist()
        cells = [
            [str(row["rank"]), f"{row['similarity']:.3f}", row["caption"] or "", row["url"] or ""]
            for row in shown
        ]
        head = ["rank", "similarity", "caption", "url"]
        return aligned([head, *cells], (True, True, False, False), (6, 10, caption, url))


@dataclass(frozen=True)
class _Query:
    """The vectors that a look searches around.

    Attributes:
        strip: the first of the contact sheet.
        vectors: (q, d) float32 unit rows.
        notes: see `Look`.

    """

    strip: Strip
    vectors: Floats
    notes: tuple[str, ...] = ()


def look(
    text: str,
    environment: Mapping[str, str],
    *,
    top: int = TOP,
    output: str | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Look:
    """Find the best rows around images or a prompt, and draw them.

    Around a folder, each of its images is a query; of more than 24, as many are taken evenly spaced. The
    environment's threshold, nprobe, filters and block list hold as in any run.

    Args:
        text: path of an image or of a folder of images; anything else is a prompt.
        environment: of the platform.
        top: rows wanted.
        output: path of the contact sheet; below `data/look` by default.
        log: takes lines about staging.

    Raises:
        InputError: no such path, no usable image, no model, no index, or a setting that cannot be used.

    """
    if not 1 <= top <= MAX_TOP:
        raise InputError(f"--top is {top:,}: give 1 to {MAX_TOP:,}")
    places = Places.from_environment(environment)
    index, embedder = LaionIndex.at(places), Embedder.at(places)
    images = images_at(text)
    sheet = _sheet_path(output, text, images or [])
    settings = RetrievalConfig().resolve(Defaults.from_environment(environment)).values
    model = _model(embedder, index, log)
    query = _prompt(model, text) if images is None else _images(model, text, images, log)
    _stage(index, log)
    with index.open(log) as opened:
        ModelRecord(dimension=opened.index.dimension).check(model.name, model.dimension)
        rows = best_rows(
            opened.index,
            opened.metadata,
            query.vectors,
            top,
            dedup_threshold=settings.dedup_threshold,
            nprobe=settings.nprobe,
            filters=_filters(settings, index),
        )
        about = f"the {len(rows):,} best of {opened.index.rows:,} rows around {query.strip.subtitle}"
    thumbnails, notes = _thumbnails(rows, remote=places.show_remote_pictures)
    notes = query.notes + notes
    if not any(thumbnails):
        return Look(about, rows, None, notes)
    captions = [caption or "" for caption in rows["caption"].to_pylist()]
    order = "nearest first" if len(query.vectors) == 1 else "the nearest of each image first"
    found = Strip(f"{len(rows):,} best rows", order, thumbnails, captions)
    _save([query.strip, found], sheet)
    return Look(about, rows, sheet, notes)


# --- queries --------------------------------------------------------------------------------------


def images_at(text: str) -> list[Path] | None:
    """Return the images that a text names: one, or those of a folder; None where it is a prompt.

    Raises:
        InputError: no such path, a folder without images, or no file that can be read.

    """
    if not text.strip():
        raise InputError("there is nothing to look for: give an image, a folder of images, or a prompt")
    path = _path(text)
    mode = _mode(path)
    if mode is None and _is_meant_as_path(text):
        raise InputError(f"{text} does not exist: {_hint(path)}")
    if mode is None:
        return None
    if stat.S_ISDIR(mode):
        found = sorted(_images_below(path))
        if not found:
            raise InputError(f"{text} holds no images ({' '.join(EXTENSIONS)}): name a folder that does")
        return found
    if not stat.S_ISREG(mode):
        raise InputError(f"{text} is neither a file nor a folder: name an image or a folder of images")
    return [path]


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # "~" and no user's name
        return Path(text)


def _mode(path: Path) -> int | None:
    """Return what a path leads to; None for nothing, as for a text that no path can be."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return None


def _images_below(folder: Path) -> Iterable[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        paths = (Path(root, name) for name in names if is_image(name) and not is_hidden(name))
        yield from (path for path in paths if path.is_file())


def _is_meant_as_path(text: str) -> bool:
    """Return whether a text is a path, not a prompt with a slash such as "a black/white photo"."""
    if "://" in text or text.startswith(("/", "./", "../", "~")):
        return True
    if is_image(text):
        return True
    return "/" in text and (not re.search(r"\s", text) or _mode(Path(Path(text).parts[0])) is not None)


def _hint(path: Path) -> str:
    if ":/" in str(path):
        return "name a local file or folder"
    if path.parent.is_dir():
        names = [entry.name for entry in path.parent.iterdir()]
        for near in difflib.get_close_matches(path.name, names, n=1):
            return f"did you mean {path.parent / near}?"
    return "correct the path, or write a prompt with spaces and without a leading slash"


def _images(model: Model, text: str, paths: Sequence[Path], log: Callable[[str], None]) -> _Query:
    taken = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), IMAGES)).astype(np.int64))
    some = [paths[number] for number in taken]
    files = ((str(path), partial(_content, path)) for path in some)
    with Progress("images", len(some), "", log) as progress:
        outcomes = list(embed_images(model, files, progress=progress.advance))
    bad = tuple(str(outcome) for outcome in outcomes if isinstance(outcome, BadImage))
    good = [outcome for outcome in outcomes if isinstance(outcome, EmbeddedImage)]
    if not good:
        raise InputError(f"no image can be embedded: {'; '.join(bad[:PROBLEMS_SHOWN])}")
    counted = f"{len(good):,} image{'s' * (len(good) > 1)}"
    if len(some) < len(paths):
        counted += f" of {len(paths):,}, evenly spaced"
    title = one_line(_path(text).resolve().name) or text
    strip = Strip(title, counted, [image.thumbnail for image in good], [])
    return _Query(strip, np.stack([image.vector for image in good]), bad)


def _content(path: Path) -> bytes:
    return path.read_bytes()


def _prompt(model: Model, text: str) -> _Query:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not UTF-8: write it in the encoding of the terminal") from error
    found = embed_prompts(model, [Prompt(1, text.strip())], name="the prompt")
    cut_short = tuple(
        f"the prompt has {prompt.tokens:,} tokens, of which the model reads {prompt.read}"
        for prompt in found.cut
    )
    return _Query(Strip(one_line(text), "a prompt", [], []), found.vectors, cut_short)


# --- the index ------------------------------------------------------------------------------------


def _model(embedder: Embedder, index: LaionIndex, log: Callable[[str], None]) -> Model:
    """Open the model before an index is staged, which may take hours."""
    model = embedder.open(index, None, log)
    if model is None:
        index.source_version()  # where there is no index either, that comes first
        raise InputError(
            "no model is set to embed the query: name the one that the index was made with",
            MODEL,
        )
    return model


def _stage(index: LaionIndex, log: Callable[[str], None]) -> None:
    """Stage the index where the cache holds none, or another; one that is there is not compared."""
    missing = index.what_is_missing(None)
    if missing is None and verified_manifest(index.cache_dir).source == index.index_uri:
        return
    if missing and index.lost_index == "fail":
        raise InputError(missing)
    log(f"staging {index.index_uri} to {index.cache_dir}")
    index.stage(log)


def _filters(settings: Settings, index: LaionIndex) -> Filters:
    return Filters(conditions_in(settings.filters or ""), index.block_list())


# --- the contact sheet ----------------------------------------------------------------------------


def _thumbnails(rows: pa.Table, *, remote: bool) -> tuple[list[bytes | None], tuple[str, ...]]:
    """Return the thumbnail of each row where there is one and it is not marked as unsafe, and notes."""
    if THUMBNAIL_COLUMN in rows.column_names and rows[THUMBNAIL_COLUMN].null_count < len(rows):
        unsafe = marked_unsafe(rows)
        stored = zip(rows[THUMBNAIL_COLUMN].to_pylist(), unsafe, strict=True)
        left_out = f"{unsafe.sum()} images are not shown: the index marks them as unsafe"
        return [None if hide else image for image, hide in stored], (left_out,) if unsafe.any() else ()
    if not remote:
        return [None] * len(rows), (NO_THUMBNAILS,) if len(rows) else ()
    fetched = remote_thumbnails(rows.slice(0, FETCHED))
    thumbnails = [image if isinstance(image, bytes) else None for image in fetched]
    why = reasons(fetched)
    note = f"{thumbnails.count(None)} of {len(fetched)} images were not fetched: {why}" if why else ""
    thumbnails += [None] * (len(rows) - len(thumbnails))
    return thumbnails, (note,) if note else ()


def _sheet_path(output: str | None, text: str, images: Sequence[Path]) -> Path:
    """Return where the contact sheet goes: never over one of the images.

    Raises:
        InputError: no PNG, or one of the images.

    """
    path = _path(output) if output else SHEETS / f"{_name(text)}.png"
    if path.suffix.lower() != ".png":
        raise InputError(f"--output is {output}: --output must end in .png")
    if path.is_dir() or any(path.exists() and path.samefile(image) for image in images):
        raise InputError(f"the contact sheet cannot replace {path}: name another file with --output")
    return path


def _name(text: str) -> str:
    """Return the name of the contact sheet of a query."""
    path = _path(text)
    mode = _mode(path)
    named = text if mode is None else path.resolve().name if stat.S_ISDIR(mode) else path.stem
    return re.sub(r"[^\w.-]+", "-", named)[:NAME].strip("-.") or "look"


def _save(strips: Sequence[Strip], path: Path) -> None:
    sheet = contact_sheet(strips, columns=COLUMNS, cell=CELL, show_captions=True)
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG", optimize=True)
    with new_file(str(path)) as sink:
        sink.write(encoded.getvalue())
