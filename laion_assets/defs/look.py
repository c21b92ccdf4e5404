"""A quick look at the best rows around a few images or a prompt, before a long run of a seed set.

It searches the staged index with the platform's model, in seconds. Dagster's history records nothing.
"""

from __future__ import annotations

import difflib
import errno
import io
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import pyarrow as pa

from laion_assets.defs.crashes import reported
from laion_assets.defs.drawing.contact_sheet import Strip, contact_sheet
from laion_assets.defs.drawing.remote_thumbnails import FETCHED, reasons, remote_thumbnails
from laion_assets.defs.places import DATA, Places
from laion_assets.defs.resources import Embedder, LaionIndex, SeedFolder
from laion_assets.defs.settings import Defaults, RetrievalConfig, Settings
from laion_assets.defs.terminal import aligned, count, one_line
from laion_assets.demo import DEMO_MODEL
from laion_assets.index import ModelRecord
from laion_assets.index.metadata import THUMBNAIL_COLUMN
from laion_assets.io.arrays import Floats
from laion_assets.io.errors import InputError
from laion_assets.io.local_files import walk
from laion_assets.io.progress import Progress
from laion_assets.io.storage import new_file, on_this_machine, open_storage, reaching
from laion_assets.search.filters import Filters, conditions_in
from laion_assets.search.safety import marked_unsafe
from laion_assets.search.top_rows import best_rows
from laion_assets.seeds import Model, SeedSet, check_name, read_seeds
from laion_assets.seeds.decoding import EXTENSIONS
from laion_assets.seeds.embeddings import IMAGE, PROMPT, VECTOR
from laion_assets.seeds.folder import is_hidden, is_image
from laion_assets.seeds.images import BadImage, EmbeddedImage, embed_images
from laion_assets.seeds.model_folder import MODEL
from laion_assets.seeds.prompts import PROMPTS_FILE, Prompt, embed_prompts, read_prompts
from laion_assets.seeds.seed_files import UnusableFileError
from laion_assets.staging import verified_manifest

T = TypeVar("T")
TOP, MAX_TOP = 48, 1000
NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
ALIKE = 0.8  # difflib ratio from which a prompt may be a misspelt name
IMAGES = 24  # most images of a folder; each is a query
PROBLEMS_SHOWN = 10
NAME = 40  # characters of a file name; each may take four bytes
SHEETS = DATA / "look"
COLUMNS, CELL = 8, 128  # of the contact sheet: images in a row, pixels of each
CAPTION, URL = 48, 60  # most columns of the terminal
WHOLE = 1 << 16  # columns; more than any URL needs
NO_THUMBNAILS = (
    "no contact sheet: the index has no thumbnails. LAION_SHOW_REMOTE_PICTURES=true fetches images from "
    "their hosts"
)


@dataclass(frozen=True)
class Look:
    """The result of a look.

    Attributes:
        about: a summary in one sentence.
        rows: the rows, best first, see `best_rows`.
        sheet: path of the contact sheet; None if there are no thumbnails.
        notes: further notes for the user.

    """

    about: str
    rows: pa.Table
    sheet: Path | None
    notes: tuple[str, ...] = ()

    def lines(self, *, is_terminal: bool = True) -> list[str]:
        """Return the rows as an aligned table, cut to the terminal's width, or else with whole URLs."""
        width = shutil.get_terminal_size((CAPTION + URL + 20, 0)).columns
        caption = max(12, min(CAPTION, (width - 20) * CAPTION // (CAPTION + URL)))
        url = max(12, width - 20 - caption)
        if not is_terminal:
            caption, url = CAPTION, WHOLE
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
        strip: the first strip of the contact sheet.
        vectors: (q, d) float32 unit rows.
        each: noun for one of several vectors.
        notes: see `Look`.

    """

    strip: Strip
    vectors: Floats
    each: str = "image"
    notes: tuple[str, ...] = ()

    def heading(self, found: int, rows: int) -> str:
        """Return a sentence with the number of rows found, the query and the order."""
        best = {0: "no row", 1: "the best"}.get(found, f"the {found:,} best")
        order = f", in order of rank around any {self.each}" if len(self.vectors) > 1 else ""
        return f"{best} of {count(rows, 'row')} around {self.strip.subtitle}{order}"


def look(
    text: str,
    environment: Mapping[str, str],
    *,
    top: int = TOP,
    output: str | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Look:
    """Find the best rows around images, prompts or a seed set, and draw them.

    Each image and prompt of a folder or seed set is a query. If there are more than 24 images, 24 of them
    are used, evenly spaced; the same holds for prompts and vectors. The settings of the environment and
    the seed set (threshold, nprobe, filters and block list) apply as in any run.

    Args:
        text: path of an image or of a folder with images and prompts, or the name of a seed set; any
            other text is a prompt.
        environment: environment variables of the platform.
        top: number of rows wanted.
        output: path of the contact sheet; below `data/look` by default.
        log: called with lines about staging.

    Raises:
        InputError: a path does not exist, no image is usable, there is no index, or no model for images
            and prompts, or a setting cannot be used.

    """
    if not 1 <= top <= MAX_TOP:
        raise InputError(f"--top is {top:,}: give 1 to {MAX_TOP:,}")
    places = Places.from_environment(environment)
    index, embedder = LaionIndex.at(places), Embedder.at(places)
    seeds = SeedFolder(places.seeds_uri)
    images = images_at(text)
    seed_set = _seed_set(seeds, text) if images is None else None
    sheet = _sheet_path(output, text, images or _local_images(seeds, seed_set))
    own = seeds.settings(seed_set) if seed_set else {}
    settings = (
        RetrievalConfig()
        .resolve(Defaults.from_environment(environment), own, text if seed_set else "")
        .values
    )
    model = None if seed_set and not seed_set.needs_model else _model(embedder, index, log)
    if seed_set:
        query = _seeds(model, seeds.uri, seed_set, log)
    elif model:
        query = _prompt(model, text, seeds) if images is None else _images(model, text, images, log)
    _stage(index, log)
    with reported("look"), index.open(log) as opened:
        if model:
            ModelRecord(dimension=opened.index.dimension).check(model.name, model.dimension)
        rows, blocking = best_rows(
            opened.index,
            opened.metadata,
            query.vectors,
            top,
            dedup_threshold=settings.dedup_threshold,
            nprobe=settings.nprobe,
            filters=_filters(settings, index),
        )
        about = query.heading(len(rows), opened.index.rows)
    thumbnails, notes = _thumbnails(rows, remote=places.show_remote_pictures)
    notes = query.notes + notes + ((f"block list: {blocking}",) if blocking else ())
    if not any(thumbnails):
        return Look(about, rows, None, notes)
    captions = [caption or "" for caption in rows["caption"].to_pylist()]
    order = "nearest first" if len(query.vectors) == 1 else f"the nearest of each {query.each} first"
    found = Strip(
        "best row" if len(rows) == 1 else f"{len(rows):,} best rows", order, thumbnails, captions
    )
    _save([query.strip, found], sheet)
    return Look(about, rows, sheet, notes)


# --- queries --------------------------------------------------------------------------------------


def images_at(text: str) -> list[Path] | None:
    """Return the image or the images of the folder that a text names; None if it is a prompt.

    The images of a folder include those that are not regular files. The list is empty if the folder holds
    only prompts.

    Raises:
        InputError: the path does not exist or cannot be read, or the folder holds neither images nor
            prompts.

    """
    if not text.strip():
        raise InputError("no query is given: give an image, a folder of images, or a prompt")
    path = _path(text)
    mode = _mode(path)
    if mode is not None and stat.S_ISDIR(mode):
        found = sorted(_images_below(path))
        if not found and _mode(path / PROMPTS_FILE) is None:
            raise InputError(
                f"{text} holds no images ({' '.join(EXTENSIONS)}) and no {PROMPTS_FILE}: name another "
                "folder"
            )
        return found
    if mode is not None and stat.S_ISREG(mode):
        return [path]
    if problem := _why_no_file(path):
        raise InputError(f"{text} {problem}: name an image or a folder of images")
    if _is_meant_as_path(text):
        raise InputError(f"{text} does not exist: {_hint(path)}")
    return None


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # "~" without a known user
        return Path(text)


def _mode(path: Path) -> int | None:
    """Return the mode of the file at a path; None if there is no file, or if it is not a valid path."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return None


def _images_below(folder: Path) -> Iterable[Path]:
    """Yield files with an image extension; links to folders are followed."""
    names = (Path(path).relative_to(folder) for path in walk(str(folder)))
    return (folder / name for name in names if is_image(name.name) and not is_hidden(str(name)))


def _why_no_file(path: Path) -> str | None:
    """Return why a path is not a regular file; None for a regular file or a missing one."""
    try:
        mode = path.stat().st_mode
    except ValueError:
        return None
    except OSError as error:
        with suppress(OSError):  # if it is not a link
            return f"is a link to {path.readlink()}, which cannot be followed ({error.strerror})"
        return None if error.errno in NOTHING else f"cannot be read ({error.strerror})"
    return None if stat.S_ISREG(mode) else "is neither a file nor a folder"


def _is_meant_as_path(text: str) -> bool:
    """Return whether a text is a path, as opposed to a prompt such as "a black/white photo"."""
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
    left_out = [f"{path} {problem}" for path in paths if (problem := _why_no_file(path))]
    files = [path for path in paths if not _why_no_file(path)]
    some = _evenly(files)
    with Progress("images", len(some), "", log) as progress:
        named = ((str(path), partial(_content, path)) for path in some)
        outcomes = list(embed_images(model, named, progress=progress.advance))
    bad = [str(outcome) for outcome in outcomes if isinstance(outcome, BadImage)]
    good = [outcome for outcome in outcomes if isinstance(outcome, EmbeddedImage)]
    notes = [*_first(left_out), *bad]
    if paths and not good:
        raise InputError(f"no image can be embedded: {'; '.join(_first([*left_out, *bad]))}")
    vectors = [image.vector[None] for image in good]
    counted = [_counted(len(good), "image", len(files))] if good else []
    prompts = _prompts_in(_path(text))
    name = str(_path(text) / PROMPTS_FILE)
    if not paths and not prompts:
        raise InputError(f"{name} has no prompt: write one per line, or put images beside it")
    if not paths:
        _check_reads_texts(model)
    if prompts and model.files.text is None:
        notes.append(f"{name} is not used: the model reads images only")
    elif prompts:
        read = _evenly(prompts)
        found = embed_prompts(model, read, name=name)
        vectors.append(found.vectors)
        counted.append(_counted(len(read), "prompt", len(prompts)))
        notes += [f"{name} {prompt}" for prompt in found.cut]
    each = "image or prompt" if len(counted) > 1 else "image" if good else "prompt"
    title = one_line(_path(text).resolve().name) or text
    strip = Strip(title, " and ".join(counted), [image.thumbnail for image in good], [])
    return _Query(strip, np.concatenate(vectors), each, tuple(notes))


def _first(problems: Sequence[str]) -> list[str]:
    more = len(problems) - PROBLEMS_SHOWN
    return [*problems[:PROBLEMS_SHOWN], *([f"{more:,} more are left out"] if more > 0 else [])]


def _prompts_in(folder: Path) -> Sequence[Prompt]:
    """Read the prompts of a folder; none if it has no prompts file or is an image."""
    path = folder / PROMPTS_FILE
    try:
        return read_prompts(path.read_bytes(), str(path)) if path.is_file() else ()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnusableFileError(f"cannot be read ({error.strerror or error})") from error


def _evenly(items: Sequence[T]) -> list[T]:
    """Return at most `IMAGES` of the items, evenly spaced."""
    taken = np.linspace(0, len(items) - 1, min(len(items), IMAGES)).astype(np.int64)
    return [items[number] for number in np.unique(taken)]


def _counted(used: int, noun: str, total: int) -> str:
    return count(used, noun) + (f" of {total:,}, evenly spaced" if total > IMAGES else "")


def _seed_set(folder: SeedFolder, text: str) -> SeedSet | None:
    """Return the seed set with that name; None if there is none, so the text is a prompt."""
    try:
        check_name(text)
        fs, root = open_storage(folder.uri)
        with reaching(folder.uri):
            if not fs.isdir(f"{root}/{text}"):
                return None
    except InputError:  # a prompt needs no folder of seed sets
        return None
    return folder.find(text)


def _local_images(folder: SeedFolder, seed_set: SeedSet | None) -> list[Path]:
    """Return the images of a seed set that a contact sheet could overwrite."""
    if seed_set is None or not on_this_machine(folder.uri):
        return []
    return [Path(file.path) for file in seed_set.images]


def _seeds(model: Model | None, uri: str, seed_set: SeedSet, log: Callable[[str], None]) -> _Query:
    """Read the seeds of a set, but only some of its images if there are many.

    Only images and prompts need a model.
    """
    images = tuple(_evenly(seed_set.images))
    with Progress("images", len(images), "", log) as progress:
        seeds = read_seeds(
            uri, replace(seed_set, images=images), model, max_bad_images=1, progress=progress.advance
        )
    kinds = np.array(seeds.columns["kind"].to_pylist())
    taken: list[int] = []
    counted, each = [], []
    for kind, noun in ((VECTOR, "vector"), (IMAGE, "image"), (PROMPT, "prompt")):
        places = np.flatnonzero(kinds == kind).tolist()
        if some := _evenly(places):
            total = len(seed_set.images) if kind == IMAGE else len(places)
            counted.append(_counted(len(some), noun, total))
            each.append(noun)
            taken += some
    columns = seeds.columns.take(pa.array(taken))
    thumbnails = columns["thumbnail"].to_pylist() if "thumbnail" in columns.column_names else []
    strip = Strip(
        one_line(seed_set.name),
        f"seed set {seed_set.name!r} ({' and '.join(counted)})",
        [thumbnail for thumbnail in thumbnails if thumbnail],
        [],
    )
    notes = [str(bad) for bad in seeds.bad_images]
    notes += [f"{PROMPTS_FILE} {prompt}" for prompt in seeds.cut_prompts]
    return _Query(strip, seeds.embeddings[taken], " or ".join(each), tuple(notes))


def _check_reads_texts(model: Model, hint: str = "") -> None:
    if model.files.text is None:
        folder = model.files.folder
        named = "the demo's model" if folder == DEMO_MODEL else f"the model {folder}"
        raise InputError(
            f"{hint}{named} has no text model and embeds images only: use a model that has one", MODEL
        )


def _prompt(model: Model, text: str, seeds: SeedFolder) -> _Query:
    near = _near_names(seeds, text)
    hint = f"{text!r} is taken for a prompt, not for {near[0]!r}" if near else ""
    is_one_word = len(text.split()) == 1  # more likely a name than a prompt
    unknown = f"{text!r} is no file, folder or seed set, so it is taken for a prompt"
    named = hint or (unknown if is_one_word else "")
    _check_reads_texts(model, named and f"{named}; ")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not UTF-8: write it in the encoding of the terminal") from error
    found = embed_prompts(model, [Prompt(1, text.strip())], name="the prompt")
    cut_short = tuple(
        f"the prompt has {count(prompt.tokens, 'token')}, but the model reads only {prompt.read}"
        for prompt in found.cut
    )
    notes = (hint, *cut_short) if hint else cut_short
    return _Query(Strip(one_line(text), "a prompt", [], []), found.vectors, "prompt", notes)


def _near_names(folder: SeedFolder, text: str) -> list[str]:
    """Return the closest name of a seed set or local file to a prompt, or an empty list."""
    names: list[str] = []
    with suppress(InputError, OSError):
        check_name(text)
        names += [path.name for path in Path().iterdir()]
        fs, root = open_storage(folder.uri)
        with reaching(folder.uri):
            found = [entry["name"] for entry in fs.ls(root, detail=True) if entry["type"] == "directory"]
        names += [PurePosixPath(path).name for path in found]
    return difflib.get_close_matches(text, names, 1, ALIKE)


# --- the index ------------------------------------------------------------------------------------


def _model(embedder: Embedder, index: LaionIndex, log: Callable[[str], None]) -> Model:
    """Open the model first, because staging the index may take hours."""
    model = embedder.open(index, None, log)
    if model is None:
        index.source_version()  # a missing index is reported before a missing model
        raise InputError(
            "no model is set to embed the query: name the one that the index was made with",
            MODEL,
        )
    return model


def _stage(index: LaionIndex, log: Callable[[str], None]) -> None:
    """Stage the index if the cache holds none or another one, without comparing it with its source."""
    missing = index.what_is_missing(None)
    if missing is None and verified_manifest(index.cache_dir).source == index.index_uri:
        return
    if missing and index.lost_index == "fail":
        raise InputError(missing)
    log(f"staging {index.index_uri} to {index.cache_dir}")
    index.stage(log, replace_other=False)


def _filters(settings: Settings, index: LaionIndex) -> Filters:
    return Filters(conditions_in(settings.filters or ""), index.block_list())


# --- the contact sheet ----------------------------------------------------------------------------


def _thumbnails(rows: pa.Table, *, remote: bool) -> tuple[list[bytes | None], tuple[str, ...]]:
    """Return each row's thumbnail, or None if it has none or is marked as unsafe; also return notes."""
    if THUMBNAIL_COLUMN in rows.column_names and rows[THUMBNAIL_COLUMN].null_count < len(rows):
        unsafe = marked_unsafe(rows)
        stored = zip(rows[THUMBNAIL_COLUMN].to_pylist(), unsafe, strict=True)
        hidden = int(unsafe.sum())
        are, them = ("is", "it") if hidden == 1 else ("are", "them")
        left_out = f"{count(hidden, 'image')} {are} not shown: the index marks {them} as unsafe"
        return [None if hide else image for image, hide in stored], (left_out,) if unsafe.any() else ()
    if not remote:
        return [None] * len(rows), (NO_THUMBNAILS,) if len(rows) else ()
    fetched = remote_thumbnails(rows.slice(0, FETCHED))
    thumbnails = [image if isinstance(image, bytes) else None for image in fetched]
    why = reasons(fetched)
    missing = f"{thumbnails.count(None)} of {count(len(fetched), 'image')}"
    note = f"not fetched: {missing} ({why})" if why else ""
    thumbnails += [None] * (len(rows) - len(thumbnails))
    return thumbnails, (note,) if note else ()


def _sheet_path(output: str | None, text: str, images: Sequence[Path]) -> Path:
    """Return the path of the contact sheet, which never replaces one of the images.

    Raises:
        InputError: the path is not a .png, is one of the images, or is in a missing folder.

    """
    path = _path(output) if output else SHEETS / f"{_name(text)}.png"
    if path.suffix.lower() != ".png":
        raise InputError(f"--output is {output}: --output must end in .png")
    if path.is_dir() or any(_is_same(path, image) for image in images):
        raise InputError(f"the contact sheet cannot replace {path}: name another file with --output")
    if output and not path.parent.is_dir():
        raise InputError(f"--output is {output}: there is no folder {path.parent}; create it first")
    return path


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _name(text: str) -> str:
    """Return the name of a query's contact sheet."""
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
