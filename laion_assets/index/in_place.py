"""Open an index folder on the local disk in place, without staging it."""

from collections.abc import Mapping
from pathlib import Path

from laion_assets.index.faiss_index import Index
from laion_assets.index.layout import METADATA_FOLDER, index_files, metadata_files
from laion_assets.index.metadata import Metadata
from laion_assets.io.errors import InputError


def open_folder(
    path: str | Path,
    metadata_columns: Mapping[str, str] | None = None,
    *,
    metadata: str | Path | None = None,
) -> tuple[Index, Metadata]:
    """Open an index and its metadata, memory-mapped and read-only.

    Checksums are not verified, and the files are not protected from changes by others.

    Args:
        path: the folder that holds `image.index` and, unless `metadata` is given, `metadata`.
        metadata_columns: names of the columns for `url` and `caption`, see `Metadata`.
        metadata: the folder of the metadata; by default `metadata` in `path`.

    Returns:
        The index, and the metadata of its rows.

    Raises:
        InputError: the folder, the index or the metadata is missing, or a file cannot be read.

    """
    root = _folder(path, "index_uri")
    metadata_root = _folder(root / METADATA_FOLDER if metadata is None else metadata, "metadata_uri")
    names = [found.relative_to(root).as_posix() for found in _files(root) + _files(root / "image.index")]
    faiss_file, lists = index_files(names, str(root))
    rows = metadata_files([found.name for found in _files(metadata_root)], str(metadata_root))
    return (
        Index(root / faiss_file, root / lists if lists else None),
        Metadata([metadata_root / name for name in rows], metadata_columns),
    )


def _folder(path: str | Path, about: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: correct the path", about)
    return folder


def _files(folder: Path) -> list[Path]:
    """Return the files directly inside a folder; none if it is not a folder."""
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
