"""List the folder of the seed sets, with a fingerprint for each set.

A seed set is a subfolder that holds seeds: vector files (`READERS`), images or prompts.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import google_crc32c

from laion_assets.io.checksums import checksum_text, fingerprint
from laion_assets.io.errors import InputError
from laion_assets.io.storage import (
    Listed,
    first_line,
    is_local,
    is_regular,
    list_files,
    open_storage,
    reaching,
)
from laion_assets.io.text import printable
from laion_assets.seeds.decoding import EXTENSIONS
from laion_assets.seeds.prompts import PROMPTS_FILE
from laion_assets.seeds.readers import READERS
from laion_assets.seeds.seed_files import NOT_REGULAR, SeedFile

SEEDS_URI = "seeds_uri"  # the setting that errors name
CLIP_RETRIEVAL_FOLDER = "img_emb/"
UNREADABLE_IMAGES = (".svg", ".heic", ".heif")  # listed as images; embedding them reports why they fail
LINKED = "(a linked folder, which is not followed)"
CLIP_RETRIEVAL_OTHERS = ("text_emb/", "metadata/", "stats/")  # in the same output folder


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

    """

    sets: dict[str, SeedSet]
    ignored: tuple[str, ...]


def _counted(count: int, what: str) -> str:
    noun, _, rest = what.partition(" ")
    return f"{count:,} {what}" if count == 1 else f"{count:,} {noun}s {rest}".rstrip()


def list_folder(uri: str) -> Listing:
    """List the folder of the seed sets.

    Args:
        uri: a local path or a URL.

    Raises:
        InputError: the folder does not exist or cannot be accessed.

    """
    fs, root = open_storage(uri, SEEDS_URI)
    folders: defaultdict[str, _Folder] = defaultdict(_Folder)
    with reaching(uri, SEEDS_URI):
        for listed in list_files(fs, root):
            if not is_hidden(listed.name):
                set_name, _, name = listed.name.partition("/")
                folders[set_name].add(fs, name, listed)
        if not folders and not fs.isdir(root):
            raise InputError(f"{uri} is not a folder: name the folder of the seed sets", SEEDS_URI)
    found = [folder.seed_set(name) for name, folder in sorted(folders.items())]
    return Listing(
        {seed_set.name: seed_set for seed_set in found if seed_set.files},
        tuple(str(PurePosixPath(seed_set.name, file)) for seed_set in found for file in seed_set.ignored),
    )


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
        folder = _Folder()
        for listed in list_files(fs, path):
            if not is_hidden(listed.name):
                folder.add(fs, listed.name, listed)
        found = folder.seed_set(name)
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
    if not re.fullmatch(r"[^\W_][\w .+-]{0,99}", name) or ".." in name:
        raise InputError(
            f"{name!r} cannot name a seed set: use letters, digits, '_', '-', '.', '+' and spaces, no "
            "'/' and no '..', a letter or digit first, at most 100 characters"
        )


def is_hidden(name: str) -> bool:
    """Return whether a file is hidden, temporary, or a bucket's placeholder for a folder."""
    return not name or name.endswith("/") or any(part[:1] in (".", "_") for part in name.split("/"))


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

    def __init__(self) -> None:
        self._vectors: list[SeedFile] = []
        self._images: list[tuple[Any, str, Listed]] = []
        self._prompts: list[SeedFile] = []
        self._settings: list[SeedFile] = []
        self._others: list[str] = []

    def add(self, fs: Any, name: str, listed: Listed) -> None:
        """Add a file, by its name in this folder."""
        if _holds_vectors(name):
            self._vectors.append(_seed_file(fs, name, listed))
        elif is_image(name):
            self._images.append((fs, name, listed))
        elif name == PROMPTS_FILE:
            self._prompts.append(_seed_file(fs, name, listed))
        elif _may_hold_settings(name):
            self._settings.append(_seed_file(fs, name, listed))
        else:
            is_linked_folder = is_local(fs) and fs.isdir(listed.path)
            self._others.append(str(PurePosixPath(printable(name), LINKED if is_linked_folder else "")))

    def seed_set(self, name: str) -> SeedSet:
        """Return the set.

        Vectors take precedence over images. Of clip-retrieval's output, only the image vectors are used.
        """
        vectors, ignored = self._vectors, self._others
        of_images = [file for file in vectors if file.name.startswith(CLIP_RETRIEVAL_FOLDER)]
        if of_images:
            beside = [file.name for file in vectors if not file.name.startswith(CLIP_RETRIEVAL_FOLDER)]
            ignored = [file for file in ignored + beside if not file.startswith(CLIP_RETRIEVAL_OTHERS)]
            vectors = of_images
        images = () if vectors else _in_order([_seed_file(*image) for image in self._images])
        return SeedSet(
            name,
            vectors=_in_order(vectors),
            settings_files=_in_order(self._settings),
            ignored=tuple(sorted(ignored)),
            images=images,
            prompts=tuple(self._prompts),
            not_embedded=tuple(sorted(printable(image) for _, image, _ in self._images))
            if vectors
            else (),
        )


def _in_order(files: Sequence[SeedFile]) -> tuple[SeedFile, ...]:
    return tuple(sorted(files, key=lambda file: file.name))


def _seed_file(fs: Any, name: str, listed: Listed) -> SeedFile:
    return SeedFile(printable(name), listed.path, listed.size, _listed_checksum(fs, listed))


def _listed_checksum(fs: Any, listed: Listed) -> str:
    """Return the bucket's crc32c, or compute it; a local file is only read again if it changed."""
    if listed.checksum:
        return listed.checksum
    try:
        return _computed_checksum(fs, listed.path, listed.size, listed.written)
    except OSError as error:  # must not block other sets; reading this set reports the file
        return f"unreadable: {first_line(error)}"


@lru_cache(maxsize=1 << 18)
def _computed_checksum(fs: Any, path: str, size: int, written: str) -> str:  # noqa: ARG001
    if not is_regular(fs, path):
        raise OSError(NOT_REGULAR)
    return checksum_text(google_crc32c.Checksum(fs.cat_file(path)))
