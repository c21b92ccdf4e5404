"""The folder of the seed sets: what is in it, with a fingerprint for each set.

Every subfolder that holds seed files is a seed set. Which files are seeds follows from `READERS`.
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
from laion_assets.io.storage import Listed, first_line, list_files, open_storage, reaching
from laion_assets.seeds.readers import READERS
from laion_assets.seeds.seed_files import SeedFile

SEEDS_URI = "seeds_uri"  # the parameter that errors are about
CLIP_RETRIEVAL_FOLDER = "img_emb/"
CLIP_RETRIEVAL_OTHERS = ("text_emb/", "metadata/", "stats/")  # in the same output folder


@dataclass(frozen=True)
class SeedSet:
    """The files of one seed set when it was listed.

    Attributes:
        name: of its folder.
        files: the seeds, in order of name.
        settings_files: YAML files directly in its folder; `read_settings` accepts only one, of the right
            name.
        ignored: names of other files that a person may take for seeds.

    """

    name: str
    files: tuple[SeedFile, ...]
    settings_files: tuple[SeedFile, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Changes with the name, size or content of any seed or settings file, and only then."""
        files = self.files + self.settings_files
        return fingerprint((file.name, file.size, file.checksum) for file in files)


@dataclass(frozen=True)
class Listing:
    """What the folder of the seed sets holds.

    Attributes:
        sets: the seed sets by name.
        ignored: ignored files, relative to the folder.

    """

    sets: dict[str, SeedSet]
    ignored: tuple[str, ...]


def list_folder(uri: str) -> Listing:
    """List the folder of the seed sets.

    Args:
        uri: a local path or any fsspec URL.

    Raises:
        InputError: no such folder, or no access to it.

    """
    fs, root = open_storage(uri, SEEDS_URI)
    folders: defaultdict[str, _Folder] = defaultdict(_Folder)
    with reaching(uri, SEEDS_URI):
        for listed in list_files(fs, root):
            if not _is_hidden(listed.name):
                set_name, _, name = listed.name.partition("/")
                folders[set_name].add(fs, name, listed)
        if not folders and not fs.isdir(root):
            raise InputError(f"{uri} is not a folder: name the folder of the seed sets", SEEDS_URI)
    found = [folder.seed_set(name) for name, folder in sorted(folders.items())]
    return Listing(
        {seed_set.name: seed_set for seed_set in found if seed_set.files},
        tuple(str(PurePosixPath(seed_set.name, file)) for seed_set in found for file in seed_set.ignored),
    )


def list_seed_sets(uri: str) -> dict[str, SeedSet]:
    """List the seed sets of a folder by name, see `list_folder`."""
    return list_folder(uri).sets


def find_seed_set(uri: str, name: str) -> SeedSet:
    """List the files of one seed set.

    Args:
        uri: the folder of the seed sets.
        name: of the set.

    Raises:
        InputError: an invalid name, no such set (the message suggests the nearest), or an empty one.

    """
    check_name(name)
    fs, root = open_storage(uri, SEEDS_URI)
    path = f"{root}/{name}"
    with reaching(uri, SEEDS_URI):
        folder = _Folder()
        for listed in list_files(fs, path):
            if not _is_hidden(listed.name):
                folder.add(fs, listed.name, listed)
        found = folder.seed_set(name)
        if found.files:
            return found
        if fs.isdir(path):
            kinds = " or ".join(READERS)
            raise InputError(f"seed set {name!r} is empty: put {kinds} files into {uri}/{name}")
    names = sorted(list_seed_sets(uri))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"found {', '.join(names) or 'none'}"
    raise InputError(f"there is no seed set {name!r} in {uri}: {hint}")


def check_name(name: str) -> None:
    """Check that a name can neither leave the folder nor fail to name a partition.

    Raises:
        InputError: it is not a valid name.

    """
    if not re.fullmatch(r"\w[\w .+-]{0,99}", name) or ".." in name:
        raise InputError(
            f"{name!r} cannot name a seed set: use letters, digits, '_', '-', '.', '+' and spaces, no "
            "'/' and no '..', at most 100 characters"
        )


def _is_hidden(name: str) -> bool:
    """Return whether a file is hidden, temporary, or a bucket's placeholder for a folder."""
    return not name or name.endswith("/") or any(part[:1] in (".", "_") for part in name.split("/"))


def _is_seed_file(name: str) -> bool:
    return PurePosixPath(name).suffix in READERS


def _may_hold_settings(name: str) -> bool:
    """Return whether this is a YAML file directly in the folder, so that a wrong name is noticed."""
    return "/" not in name and PurePosixPath(name).suffix in (".yaml", ".yml")


class _Folder:
    """The files of one folder by kind, with checksums where the content matters."""

    def __init__(self) -> None:
        self._seeds: list[SeedFile] = []
        self._settings: list[SeedFile] = []
        self._others: list[str] = []

    def add(self, fs: Any, name: str, listed: Listed) -> None:
        """Add a file, by its name in this folder."""
        if _is_seed_file(name):
            self._seeds.append(_seed_file(fs, name, listed))
        elif _may_hold_settings(name):
            self._settings.append(_seed_file(fs, name, listed))
        else:
            self._others.append(name)

    def seed_set(self, name: str) -> SeedSet:
        """Return the set; of clip-retrieval's output only the image embeddings are seeds."""
        seeds, ignored = self._seeds, self._others
        images = [file for file in seeds if file.name.startswith(CLIP_RETRIEVAL_FOLDER)]
        if images:
            beside = [file.name for file in seeds if not file.name.startswith(CLIP_RETRIEVAL_FOLDER)]
            ignored = [file for file in ignored + beside if not file.startswith(CLIP_RETRIEVAL_OTHERS)]
            seeds = images
        return SeedSet(name, _in_order(seeds), _in_order(self._settings), tuple(sorted(ignored)))


def _in_order(files: Sequence[SeedFile]) -> tuple[SeedFile, ...]:
    return tuple(sorted(files, key=lambda file: file.name))


def _seed_file(fs: Any, name: str, listed: Listed) -> SeedFile:
    return SeedFile(name, listed.path, listed.size, _listed_checksum(fs, listed))


def _listed_checksum(fs: Any, listed: Listed) -> str:
    """Return the bucket's crc32c, or compute it; a local file is read again only if it changed."""
    if listed.checksum:
        return listed.checksum
    try:
        return _computed_checksum(fs, listed.path, listed.size, listed.written)
    except OSError as error:  # must not hold up other sets; reading these seeds reports the file
        return f"unreadable: {first_line(error)}"


@lru_cache(maxsize=1 << 18)
def _computed_checksum(fs: Any, path: str, size: int, written: str) -> str:  # noqa: ARG001
    return checksum_text(google_crc32c.Checksum(fs.cat_file(path)))
