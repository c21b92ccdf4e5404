"""List the folder of the seed sets, with a fingerprint for each set.

A seed set is a subfolder that holds seeds: vector files (`READERS`), images or prompts.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from laion_assets.io.checksums import fingerprint
from laion_assets.io.errors import InputError
from laion_assets.io.storage import Listed, is_local, list_files, open_storage, reaching
from laion_assets.io.text import printable
from laion_assets.seeds.decoding import EXTENSIONS
from laion_assets.seeds.prompts import PROMPTS_FILE
from laion_assets.seeds.readers import READERS
from laion_assets.seeds.seed_files import SeedFile
from laion_assets.seeds.stored_checksums import Deadline, checksum_of

SEEDS_URI = "seeds_uri"  # the setting that errors name
MAX_NAME = 200  # bytes of the name of a seed set, which is part of the names of its tables
OF_CLIP_RETRIEVAL = re.compile(r"(.*/)?img_emb/")
UNREADABLE_IMAGES = (".svg", ".heic", ".heif")  # listed as images; embedding them reports why they fail
BESIDE_CLIP_RETRIEVAL = re.compile(r"(.*/)?(text_emb|metadata|stats)/")  # in the same output folder
# Names that Spark, Hadoop, Delta Lake, Databricks and macOS write beside data.
MARKERS = re.compile(r"_(SUCCESS|temporary|(common_)?metadata|delta_log|(started|committed)_.*|_MACOSX)")


@dataclass(frozen=True)
class SeedSet:
    """The files of one seed set at the time of listing.

    Attributes:
        name: the name of its folder.
        vectors: vector files, sorted by name.
        images: image files, sorted by name; empty if the set has vector files.
        prompts: the file of prompts; at most one.
        settings_files: YAML files directly in its folder; `read_settings` accepts a single one with the
            right name.
        not_embedded: names of images that are not seeds because the set already has vectors.
        ignored: names of other files that might be mistaken for seeds.

    """

    name: str
    vectors: tuple[SeedFile, ...]
    settings_files: tuple[SeedFile, ...] = ()
    ignored: tuple[str, ...] = ()
    images: tuple[SeedFile, ...] = ()
    prompts: tuple[SeedFile, ...] = ()
    not_embedded: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[SeedFile, ...]:
        """All files that hold seeds."""
        return self.vectors + self.images + self.prompts

    @property
    def needs_model(self) -> bool:
        """Whether the set has images or prompts to embed."""
        return bool(self.images or self.prompts)

    def contents(self) -> str:
        """Return a short description of the set's files."""
        counted = {
            "image": len(self.images),
            "file of prompts": len(self.prompts),
            "file of embeddings": len(self.vectors),
            "image not embedded": len(self.not_embedded),
            "ignored file": len(self.ignored),
        }
        return ", ".join(_counted(count, what) for what, count in counted.items() if count)

    @property
    def fingerprint(self) -> str:
        """A hash that changes only with the name, size or content of a seed or settings file."""
        files = self.files + self.settings_files
        return fingerprint((file.name, file.size, file.checksum) for file in files)


@dataclass(frozen=True)
class Listing:
    """The contents of the folder of the seed sets.

    Attributes:
        sets: the seed sets, by name.
        ignored: ignored files, with paths relative to the folder.
        failed: why some seed sets cannot be listed, by name; they are neither present nor gone.

    """

    sets: dict[str, SeedSet]
    ignored: tuple[str, ...]
    failed: dict[str, str] = field(default_factory=dict)


def _counted(count: int, what: str) -> str:
    noun, _, rest = what.partition(" ")
    return f"{count:,} {what}" if count == 1 else f"{count:,} {noun}s {rest}".rstrip()


def list_folder(uri: str, seconds: float | None = None) -> Listing:
    """List the folder of the seed sets.

    On a local disk, a set that cannot be listed does not affect others.

    Args:
        uri: a local path or a URL.
        seconds: time after which sets that are not listed count as failed; a later call continues.

    Raises:
        InputError: the folder does not exist or cannot be accessed.

    """
    fs, root = open_storage(uri, SEEDS_URI)
    deadline = Deadline(seconds)
    found, failed = [], dict[str, str]()
    with reaching(uri, SEEDS_URI):
        listings, loose = _local_listings(uri, fs, root) if is_local(fs) else _listings(fs, root)
        if not listings and not loose and not fs.isdir(root):
            raise InputError(f"{uri} is not a folder: name the folder of the seed sets", SEEDS_URI)
        for name, listing in sorted(listings.items()):
            try:
                found.append(_seed_set(fs, name, listing(), deadline.share(len(listings))))
            except InputError as error:
                failed[name] = printable(str(error))
    ignored = [str(PurePosixPath(one.name, file)) for one in found for file in one.ignored]
    return Listing(
        {seed_set.name: seed_set for seed_set in found if seed_set.files},
        tuple(printable(name) for name in sorted(ignored + loose)),
        failed,
    )


Listings: TypeAlias = Mapping[str, Callable[[], Iterable[Listed]]]  # functions that list a set, by name


def _local_listings(uri: str, fs: Any, root: str) -> tuple[Listings, list[str]]:
    """Return a function that lists each set, and the files beside the sets."""
    try:
        names = [path.name for path in Path(root).iterdir() if not is_hidden(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return {}, []
    except OSError as error:
        raise InputError(f"{uri} cannot be listed ({error.strerror}): grant access", SEEDS_URI) from error
    sets = [name for name in names if fs.isdir(f"{root}/{name}")]
    return {name: partial(list_files, fs, f"{root}/{name}") for name in sets}, list(
        set(names) - set(sets)
    )


def _listings(fs: Any, root: str) -> tuple[Listings, list[str]]:
    """Return the same for a bucket, from one listing."""
    folders: defaultdict[str, list[Listed]] = defaultdict(list)
    for listed in list_files(fs, root):
        if not is_hidden(listed.name):
            set_name, _, name = listed.name.partition("/")
            folders[set_name].append(replace(listed, name=name))
    loose = [name for name, files in folders.items() if not files[0].name]
    return {name: partial(iter, files) for name, files in folders.items() if name not in loose}, loose


def _seed_set(fs: Any, name: str, listing: Iterable[Listed], deadline: Deadline) -> SeedSet:
    folder = _Folder(fs, deadline)
    for listed in listing:
        deadline.check(name)
        if not is_hidden(listed.name):
            folder.add(listed)
    return folder.seed_set(name)


def find_seed_set(uri: str, name: str) -> SeedSet:
    """List the files of one seed set.

    Args:
        uri: the folder of the seed sets.
        name: the name of the set.

    Raises:
        InputError: the name is invalid, or the set is empty or does not exist. The message suggests the
            nearest name.

    """
    check_name(name)
    fs, root = open_storage(uri, SEEDS_URI)
    path = f"{root}/{name}"
    with reaching(uri, SEEDS_URI):
        found = _seed_set(fs, name, list_files(fs, path), Deadline())
        if found.files:
            return found
        if fs.isdir(path):
            raise InputError(
                f"seed set {name!r} is empty: put images, {PROMPTS_FILE}, or "
                f"{' or '.join(READERS)} files into {uri}/{name}"
            )
    names = sorted(list_folder(uri).sets)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"found {', '.join(names) or 'none'}"
    raise InputError(f"there is no seed set {name!r} in {uri}: {hint}")


def check_name(name: str) -> None:
    """Check that a name stays in the folder, is not hidden, and is valid as a partition key.

    Raises:
        InputError: the name is not valid.

    """
    is_short = len(name.encode(errors="replace")) <= MAX_NAME
    if not re.fullmatch(r"\w[\w .+-]{0,99}", name) or ".." in name or is_hidden(name) or not is_short:
        raise InputError(
            f"{name!r} cannot name a seed set: use letters, digits, '_', '-', '.', '+' and spaces, no "
            "'/' and no '..', a letter, digit or '_' first, at most 100 characters and "
            f"{MAX_NAME} bytes"
        )


def is_hidden(name: str) -> bool:
    """Return whether a file is hidden, a marker of another program, or a bucket's mark of a folder."""
    parts = name.split("/")
    return not parts[-1] or any(part.startswith(".") or MARKERS.fullmatch(part) for part in parts)


def _holds_vectors(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in READERS


def is_image(name: str) -> bool:
    """Return whether a file's extension is that of an image."""
    return PurePosixPath(name).suffix.lower() in (*EXTENSIONS, *UNREADABLE_IMAGES)


def _may_hold_settings(name: str) -> bool:
    """Return whether this is a YAML file directly in the folder; a misspelt name is reported later."""
    return "/" not in name and PurePosixPath(name).suffix in (".yaml", ".yml")


class _Folder:
    """The files of one folder by kind, with checksums for those that are read."""

    def __init__(self, fs: Any, deadline: Deadline) -> None:
        self._fs = fs
        self._deadline = deadline
        self._vectors: list[SeedFile] = []
        self._images: list[Listed] = []
        self._prompts: list[SeedFile] = []
        self._settings: list[SeedFile] = []
        self._others: list[str] = []

    def add(self, listed: Listed) -> None:
        """Add a file, by its name in this folder."""
        name = listed.name
        if _holds_vectors(name):
            self._vectors.append(self._seed_file(listed))
        elif is_image(name):
            self._images.append(listed)
        elif name == PROMPTS_FILE:
            self._prompts.append(self._seed_file(listed))
        elif _may_hold_settings(name):
            self._settings.append(self._seed_file(listed))
        else:
            self._others.append(printable(name))

    def seed_set(self, name: str) -> SeedSet:
        """Return the set.

        Vectors take precedence over images. Of clip-retrieval's output, only the image vectors are used.
        """
        vectors, ignored = self._vectors, self._others
        of_images = [file for file in vectors if OF_CLIP_RETRIEVAL.match(file.name)]
        if of_images:
            beside = [file.name for file in vectors if not OF_CLIP_RETRIEVAL.match(file.name)]
            ignored = [file for file in ignored + beside if not BESIDE_CLIP_RETRIEVAL.match(file)]
            vectors = of_images
        images = () if vectors else _in_order([self._seed_file(image) for image in self._images])
        return SeedSet(
            name,
            vectors=_in_order(vectors),
            settings_files=_in_order(self._settings),
            ignored=tuple(sorted(ignored)),
            images=images,
            prompts=tuple(self._prompts),
            not_embedded=tuple(sorted(printable(image.name) for image in self._images))
            if vectors
            else (),
        )

    def _seed_file(self, listed: Listed) -> SeedFile:
        checksum = listed.checksum or checksum_of(self._fs, listed, self._deadline)
        return SeedFile(printable(listed.name), listed.path, listed.size, checksum)


def _in_order(files: Sequence[SeedFile]) -> tuple[SeedFile, ...]:
    return tuple(sorted(files, key=lambda file: file.name))
