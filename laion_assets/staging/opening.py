"""The staged index, verified and open for reading.

What must not live here: staging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from laion_assets.index.faiss_index import Index
from laion_assets.index.layout import METADATA_FOLDER, index_files
from laion_assets.index.metadata import Metadata
from laion_assets.io.ranges import Disk, WholeFiles
from laion_assets.staging.manifest import Manifest, NotStagedError, verified_manifest
from laion_assets.staging.sparse.store import DEFAULT_BUDGET, SparseFiles
from laion_assets.staging.transfer import locks
from laion_assets.staging.transfer.fetch import Tally


@dataclass(frozen=True)
class OpenIndex:
    """A verified index and its metadata, open for reading."""

    index: Index
    metadata: Metadata
    manifest: Manifest
    fetched: Tally  # from the source since it was opened


def is_staged(cache: Path) -> bool:
    """Tell whether an index was staged to a directory, complete or not."""
    return (cache / locks.DATA).exists()


@contextmanager
def open_staged(
    cache: Path,
    columns: Mapping[str, str] | None = None,
    *,
    budget: int = DEFAULT_BUDGET,
    log: Callable[[str], None] = lambda _: None,
) -> Iterator[OpenIndex]:
    """Verify the staged index, open it, and keep stagers from changing it until the end of the block.

    The cache may be mounted read-only, unless it was staged sparse: then what is missing comes as it is
    needed.

    Args:
        cache: the directory it was staged to.
        columns: names of metadata columns, see `Metadata`.
        budget: bytes that sparse files may take.
        log: takes lines about what is fetched of them.

    Raises:
        NotStagedError: nothing staged, or files that are not as the manifest says.
        InputError: files that hold no index or metadata.

    """
    if not is_staged(cache):
        raise NotStagedError(f"nothing is staged in {cache}: materialize staged_laion_index first")
    with locks.reading(cache):
        manifest = verified_manifest(cache)
        paths = {file.name: cache / file.path for file in manifest.files}
        index, lists = index_files(paths, str(cache))
        metadata = [paths[name] for name in sorted(paths) if name.startswith(f"{METADATA_FOLDER}/")]
        with _disk(cache, manifest, budget, log) as (disk, fetched):
            yield OpenIndex(
                Index(paths[index], paths[lists] if lists else None, disk),
                Metadata(metadata, columns, disk),
                manifest,
                fetched,
            )


@contextmanager
def _disk(
    cache: Path, manifest: Manifest, budget: int, log: Callable[[str], None]
) -> Iterator[tuple[Disk, Tally]]:
    """What holds the files, and the count of what it fetches."""
    if not any(file.sparse for file in manifest.files):
        yield WholeFiles(), Tally()
        return
    with closing(SparseFiles(cache, manifest, budget, log)) as disk:
        yield disk, disk.tally
