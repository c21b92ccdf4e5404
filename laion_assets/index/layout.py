"""Which files of a folder make up a LAION-style index.

A pure function over file names: the same for a bucket's listing and a local folder.
What must not live here: opening, copying or checking files.
"""

from collections.abc import Iterable
from pathlib import PurePosixPath

from laion_assets.io.errors import InputError

SINGLE_INDEX = "image.index"
POPULATED_INDEX = "image.index/populated.index"
INVERTED_LISTS = "image.index/merged_index.ivfdata"
METADATA_FOLDER = "metadata"
METADATA_SUFFIXES = (".arrow", ".parquet")  # Arrow first: it is read without unpacking


def index_files(names: Iterable[str], where: str) -> tuple[str, str | None]:
    """Find the faiss file and, beside it, its on-disk inverted lists.

    Args:
        names: relative paths of all files in the index folder.
        where: the folder, for the error message.

    Raises:
        InputError: no index in the folder, or one without its lists.

    """
    present = set(names)
    if POPULATED_INDEX in present:
        if INVERTED_LISTS not in present:
            raise InputError(
                f"{where}/{POPULATED_INDEX} is there but its inverted lists {INVERTED_LISTS} are not: "
                "copy both files of the index"
            )
        return POPULATED_INDEX, INVERTED_LISTS
    if SINGLE_INDEX in present:
        return SINGLE_INDEX, None
    raise InputError(
        f"{where} holds no index: expected the folder image.index with populated.index and "
        f"merged_index.ivfdata, or one faiss file named image.index; set LAION_INDEX_URI to the "
        f"folder that holds it (found {_some(present)})"
    )


def metadata_files(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Find the metadata files of one format, in the order of their rows: by name.

    Args:
        names: file names directly inside the metadata folder.
        where: the folder, for the error message.

    Raises:
        InputError: no Arrow and no Parquet file in the folder.

    """
    present = sorted(name for name in names if PurePosixPath(name).name[0] not in "._")
    for suffix in METADATA_SUFFIXES:
        found = tuple(name for name in present if name.endswith(suffix))
        if found:
            return found
    raise InputError(
        f"{where} holds no *.arrow or *.parquet file: put the metadata there, or set "
        f"LAION_METADATA_URI to the folder that holds it (found {_some(present)})"
    )


def read_in_parts(name: str) -> bool:
    """Tell whether a request reads only parts of a file, and which ones is known before it does."""
    return name == INVERTED_LISTS or name.endswith(METADATA_SUFFIXES[0])


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    if not listed:
        return "nothing"
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
