"""Verify and open the staged index."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from laion_assets.index.batch_tables import BatchTables, content_of
from laion_assets.index.faiss_index import Index
from laion_assets.index.layout import METADATA_FOLDER, PUBLISHED_TABLES, index_files
from laion_assets.index.metadata import Metadata
from laion_assets.io.descriptors import enough_descriptors
from laion_assets.io.errors import InputError
from laion_assets.io.ranges import Disk, WholeFiles
from laion_assets.staging.manifest import Manifest, NotStagedError, StagedFile
from laion_assets.staging.sparse.budget import DEFAULT_BUDGET
from laion_assets.staging.sparse.store import SparseFiles
from laion_assets.staging.transfer import locks
from laion_assets.staging.transfer.fetch import TransferStats
from laion_assets.staging.transfer.files import SourceFile
from laion_assets.staging.transfer.range_readers import RangeReader
from laion_assets.staging.transfer.source import open_files
from laion_assets.staging.verify import forget_all_verified, verified_manifest

BATCHES = ".batches"  # folder in the cache directory, see `BatchTables`


@dataclass(frozen=True)
class OpenIndex:
    """A verified index and its metadata, open for reading.

    Attributes:
        index: the index.
        metadata: its metadata.
        manifest: manifest of the cache directory.
        fetched: statistics of reads from the source since the index was opened.

    """

    index: Index
    metadata: Metadata
    manifest: Manifest
    fetched: TransferStats

    @property
    def whole(self) -> bool:
        """Whether all of it is on the disk, not only what requests needed."""
        return not any(file.sparse for file in self.manifest.files)


def is_staged(cache: Path) -> bool:
    """Return whether an index was staged to a directory, completely or not."""
    return (cache / locks.INDEX_LOCK).exists()


@contextmanager
def open_staged(
    cache: Path,
    columns: Mapping[str, str] | None = None,
    *,
    budget: int = DEFAULT_BUDGET,
    log: Callable[[str], None] = lambda _: None,
) -> Iterator[OpenIndex]:
    """Verify the staged index and open it; stagers cannot change it until the block ends.

    The cache may be mounted read-only, unless it was staged sparse: missing pages are then fetched as
    needed.

    Args:
        cache: the cache directory.
        columns: names of metadata columns, see `Metadata`.
        budget: bytes of disk that sparse files may occupy.
        log: called with lines about fetches.

    Raises:
        NotStagedError: nothing is staged, or the files differ from the manifest.
        InputError: the files are not an index and its metadata.

    """
    if not is_staged(cache):
        raise NotStagedError(f"nothing is staged in {cache}: stage the index first")
    with locks.reading(cache), enough_descriptors():
        manifest = verified_manifest(cache, log)
        paths = {file.name: cache / file.path for file in manifest.files}
        index, lists = index_files(paths, str(cache))
        metadata = [paths[name] for name in sorted(paths) if name.startswith(f"{METADATA_FOLDER}/")]
        opened = _open_disk(cache, manifest, budget, log)
        with _noticing_damage(cache), opened as (disk, stats):
            yield OpenIndex(
                Index(paths[index], paths[lists] if lists else None, disk),
                Metadata(metadata, columns, disk, batch_tables(cache, manifest)),
                manifest,
                stats,
            )


@contextmanager
def _noticing_damage(cache: Path) -> Iterator[None]:
    """Let all files be verified by the next staging if one turns out to be unusable while it is read."""
    try:
        yield
    except NotStagedError:
        raise
    except InputError as error:
        if error.about == "staged_index":
            forget_all_verified(cache)
        raise
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        forget_all_verified(cache)
        raise InputError(
            f"the disk that holds {error.filename or cache} returned an error ({error.strerror}): check "
            "it, and stage the index again to fetch the parts that cannot be read",
            "staged_index",
        ) from error


def batch_tables(cache: Path, manifest: Manifest) -> BatchTables:
    """Keep where record batches and their buffers are beside the manifest."""
    contents = {cache / file.path: content_of(file.size, file.checksum) for file in manifest.files}
    published = {file.name: cache / file.path for file in manifest.files}.get(PUBLISHED_TABLES)
    return BatchTables(cache / BATCHES, contents, published)


@contextmanager
def _open_disk(
    cache: Path, manifest: Manifest, budget: int, log: Callable[[str], None]
) -> Iterator[tuple[Disk, TransferStats]]:
    if not any(file.sparse for file in manifest.files):
        yield WholeFiles(), TransferStats()
        return
    with closing(open_sparse_files(cache, manifest, budget, log)) as disk:
        yield disk, disk.stats


def open_sparse_files(
    cache: Path,
    manifest: Manifest,
    budget: int,
    log: Callable[[str], None],
    clock: Callable[[], float] = time.time,
) -> SparseFiles:
    """Open the sparse files of a manifest, see `SparseFiles`.

    If the source has changed, the manifest is marked incomplete, so that the index is not opened again.
    """
    reader, files = sources_of([file for file in manifest.files if file.sparse])
    return SparseFiles(
        cache,
        files,
        reader,
        budget=budget,
        log=log,
        on_change=lambda: replace(manifest, complete=False).write(cache),
        clock=clock,
    )


def sources_of(files: Sequence[StagedFile]) -> tuple[RangeReader, list[SourceFile]]:
    """Return a reader of the source of an index, and what some staged files are there."""
    reader, paths = open_files([file.source for file in files])
    return reader, [
        SourceFile(file.name, file.source, path, file.size, file.version, file.checksum)
        for file, path in zip(files, paths, strict=True)
    ]
