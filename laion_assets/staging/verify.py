"""Compare a manifest with the disk."""

from __future__ import annotations

from pathlib import Path

from laion_assets.staging.manifest import Manifest, NotStagedError, StagedFile
from laion_assets.staging.sparse.pages import is_allocated, map_path


def sizes_on_disk(manifest: Manifest | None, cache: Path) -> dict[str, int]:
    """Return the size of each file in the manifest, by name; missing files are left out.

    A sparse file without its page map counts as missing, because only the map records its present parts.
    """
    files = manifest.files if manifest else ()
    present = [file for file in files if _is_present(file, cache)]
    return {file.name: (cache / file.path).stat().st_size for file in present}


def verified_manifest(cache: Path) -> Manifest:
    """Return the manifest after a cheap comparison of its sizes with the disk.

    Raises:
        NotStagedError: nothing is staged, staging did not finish, or a file is missing or has another
            size.

    """
    manifest = Manifest.read(cache)
    if manifest is None:
        raise NotStagedError(f"nothing is staged in {cache}: stage the index first")
    if not manifest.complete:
        raise NotStagedError(f"staging to {cache} did not finish: stage the index again")
    sizes = sizes_on_disk(manifest, cache)
    for file in manifest.files:
        size = sizes.get(file.name)
        if size != file.size:
            raise NotStagedError(f"{_difference(file, cache, size)}: stage the index again")
    return manifest


def _difference(file: StagedFile, cache: Path, size: int | None) -> str:
    """Describe how a file differs from the manifest."""
    path = cache / file.path
    if size is not None:
        return f"{path} has {size:,} bytes, but the manifest says {file.size:,}"
    if path.is_file():
        return f"{map_path(path)} is missing, or is not the page map of this version of {path}"
    return f"{path} is missing, but the manifest says {file.size:,} bytes"


def _is_present(file: StagedFile, cache: Path) -> bool:
    path = cache / file.path
    if file.sparse and not is_allocated(path, file.size, file.checksum):
        return False
    return path.is_file()
