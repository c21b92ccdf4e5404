"""Find the files that make up an index, from the file names of a folder or bucket."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from laion_assets.io.errors import InputError
from laion_assets.io.text import list_shortly, printable

SINGLE_INDEX = "image.index"
POPULATED_INDEX = "image.index/populated.index"
INVERTED_LISTS = "image.index/merged_index.ivfdata"
METADATA_FOLDER = "metadata"
PUBLISHED_TABLES = "batches.parquet"  # where the metadata's record batches are, see `batch_tables`
PUBLISHING = ".publishing"  # marks a bucket's index while its objects are being replaced
MAX_NAME = 200  # bytes; staging keeps files beside it that have longer names
METADATA_SUFFIXES = (".arrow", ".parquet")


def index_files(names: Iterable[str], where: str) -> tuple[str, str | None]:
    """Find the faiss file and, if they are separate, its on-disk inverted lists.

    Args:
        names: paths of all files, relative to the index folder.
        where: the index folder, for error messages.

    Raises:
        InputError: the folder holds no index, or the index lacks its lists.

    """
    present = set(names)
    if POPULATED_INDEX in present:
        if INVERTED_LISTS not in present:
            other = next((name for name in sorted(present) if name.endswith(".ivfdata")), None)
            raise InputError(
                f"{where} has {POPULATED_INDEX} but not its inverted lists, {INVERTED_LISTS}: "
                + (f"rename {other} to that" if other else "copy both files of the index"),
                "index_uri",
            )
        return POPULATED_INDEX, INVERTED_LISTS
    if SINGLE_INDEX in present:
        return SINGLE_INDEX, None
    raise InputError(
        f"{where} holds no index (found {list_shortly(sorted(present))}): name the folder that holds "
        "image.index, which is one faiss file or a folder of populated.index and merged_index.ivfdata",
        "index_uri",
    )


def metadata_files(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Find the metadata files. All have one format, and sorting by name puts their rows in order.

    Args:
        names: names of the files directly inside the metadata folder.
        where: the metadata folder, for error messages.

    Raises:
        InputError: the folder holds neither Arrow nor Parquet files, or both, a name cannot be used, or
            the order of the files by name differs from that by number.

    """
    present = sorted(name for name in names if PurePosixPath(name).name[0] not in "._")
    found = {
        suffix: tuple(name for name in present if name.endswith(suffix)) for suffix in METADATA_SUFFIXES
    }
    arrow, parquet = found.values()
    for name in (*arrow, *parquet):
        if len(os.fsencode(name)) > MAX_NAME or printable(name) != name:
            raise InputError(
                f"{where} holds a file with the name {printable(name)}, which cannot be used: give it "
                f"a name of at most {MAX_NAME} bytes and without control characters",
                "metadata_uri",
            )
    if arrow and parquet:
        raise InputError(
            f"{where} holds metadata of two formats, such as {arrow[0]} and {parquet[0]}: remove one of "
            "them",
            "metadata_uri",
        )
    if files := arrow or parquet:
        _check_order(files, where)
        return files
    raise InputError(
        f"{where} holds no *.arrow or *.parquet file (found {list_shortly(sorted(present))}): name the "
        "folder that holds the metadata",
        "metadata_uri",
    )


def _check_order(names: Sequence[str], where: str) -> None:
    """Check that names are in the order of their numbers, or rows would get the URLs of others."""
    by_number = sorted(names, key=_with_numbers)
    for name, other in zip(names, by_number, strict=True):
        if name != other:
            raise InputError(
                f"the order of the metadata files in {where} is unclear: {name} comes before {other} by "
                "name and after it by number: rename them with as many digits each, in the order of the "
                "ids",
                "metadata_uri",
            )


def _with_numbers(name: str) -> list[tuple[str, int]]:
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def read_in_parts(name: str) -> bool:
    """Return whether requests read only known byte ranges of this file of the index."""
    return name == INVERTED_LISTS or name.endswith(METADATA_SUFFIXES[0])
