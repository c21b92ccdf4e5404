"""List local folders: links are followed, and what cannot be listed is an error, never an absence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from laion_assets.io.errors import InputError
from laion_assets.io.text import printable


def walk(root: str, depth: int | None = None) -> Iterator[str]:
    """Yield everything below a folder that is not a folder: files, broken links, pipes and devices.

    A link to a folder that contains it ends there.

    Args:
        root: the folder; nothing is yielded if it does not exist.
        depth: how many levels to list; None for all.

    Raises:
        InputError: a folder cannot be listed.

    """
    yield from _walk(root, depth, frozenset())


def _walk(folder: str, depth: int | None, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    try:
        status = Path(folder).stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise InputError(
            f"{printable(folder)} cannot be listed ({error.strerror}): grant access to it, or remove it"
        ) from error
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        if not _is_folder(entry):
            yield entry.path
        elif depth is None or depth > 1:
            yield from _walk(entry.path, depth and depth - 1, above | {here})


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
