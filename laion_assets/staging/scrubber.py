"""Read all of a staged index, compare it with its checksums, and mend what is damaged.

A scrub that is interrupted continues where it was: its position, and the damage that it has found, are
kept in the cache directory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from laion_assets.index.arrow_file import ArrowFile
from laion_assets.index.batch_tables import BatchTables
from laion_assets.io.checksums import crc32c
from laion_assets.io.derived import keep
from laion_assets.io.errors import InputError
from laion_assets.io.progress import Progress
from laion_assets.staging.full.blocks import Blocks
from laion_assets.staging.full.mend import mend
from laion_assets.staging.manifest import Manifest, NotStagedError, StagedFile
from laion_assets.staging.opening import batch_tables, is_staged, open_sparse_files, sources_of
from laion_assets.staging.sparse.budget import DEFAULT_BUDGET
from laion_assets.staging.sparse.store import SparseFiles
from laion_assets.staging.transfer import locks
from laion_assets.staging.transfer.disk import allocated_bytes
from laion_assets.staging.transfer.fetch import TransferStats
from laion_assets.staging.transfer.range_readers import ChangedError
from laion_assets.staging.verify import (
    Damage,
    complete_manifest,
    forget_verified,
    record_verified,
    times_of,
    verify_file,
)

POSITION = ".scrub"  # file in the cache directory
BLOCKS_AT_ONCE = 1 << 10  # read between two updates of the position
SOURCE_PAGES = 256  # of all sparse files, read from the source
SECONDS_BETWEEN_UPDATES = 10.0


@dataclass(frozen=True)
class Scrubbed:
    """The result of a scrub.

    Attributes:
        files: number of files that were compared with their checksums.
        size: bytes of them on the disk.
        unchecked: number of files without checksums, because they are used in place.
        damaged: a clause for each damaged file.
        mended: whether the damage was mended.

    """

    files: int
    size: int
    unchecked: int
    damaged: tuple[str, ...]
    mended: bool


def scrub(
    cache: Path,
    *,
    repair: bool = False,
    budget: int = DEFAULT_BUDGET,
    log: Callable[[str], None] = lambda _: None,
) -> Scrubbed:
    """Read all of a staged index and compare it with its checksums; searches may run meanwhile.

    Of sparse files, the pages on the disk are read, and some of them from the source. What is damaged and
    not repaired is read again by the next step that opens the index, which reports it, or by staging,
    which mends it.

    Args:
        cache: the cache directory.
        repair: whether to fetch damaged parts from the source again; this waits for running searches.
        budget: bytes of disk that sparse files may occupy.
        log: called with lines about progress.

    Raises:
        NotStagedError: nothing is staged, or a file is missing or has another size.
        InputError: the source cannot be read, or returns other bytes than were staged.

    """
    if not is_staged(cache):
        raise NotStagedError(f"nothing is staged in {cache}: stage the index first")
    with ExitStack() as opened:
        with locks.reading(cache):
            manifest = complete_manifest(cache)
            sparse = None
            if any(file.sparse for file in manifest.files):
                sparse = opened.enter_context(closing(open_sparse_files(cache, manifest, budget, log)))
            found = _Scrub(cache, manifest, sparse, log)
            found.read_all()
        damaged = tuple(found.describe())
        mended = found.mend() if repair else not damaged
    if (cache / POSITION).exists():  # which it never does where the cache is read-only
        (cache / POSITION).unlink()
    size = sum(found.bytes_of(file) for file in found.files)
    return Scrubbed(len(found.files), size, len(manifest.files) - len(found.files), damaged, mended)


class _Scrub:
    """One scrub.

    Attributes:
        files: the files to compare.

    """

    def __init__(
        self, cache: Path, manifest: Manifest, sparse: SparseFiles | None, log: Callable[[str], None]
    ) -> None:
        self._cache = cache
        self._manifest = manifest
        self._sparse = sparse
        self._log = log
        self.files = [file for file in manifest.files if file.sparse or file.is_copied]
        # By name: numbers of blocks, or for sparse files ranges of bytes.
        self._damaged: dict[str, list[Any]] = {}
        self._file, self._block = 0, 0  # where it continues
        self._kept = time.monotonic()
        self._resume()

    @cached_property
    def _tables(self) -> BatchTables:
        return batch_tables(self._cache, self._manifest)

    def bytes_of(self, file: StagedFile) -> int:
        """Return the bytes of a file on the disk."""
        return allocated_bytes(self._cache / file.path) if file.sparse else file.size

    # --- reading ----------------------------------------------------------------------------------

    def read_all(self) -> None:
        """Read what is left, and keep the position."""
        with Progress("verifying", sum(map(self.bytes_of, self.files)), "B", self._log) as progress:
            progress.advance(sum(map(self.bytes_of, self.files[: self._file])))
            try:
                while self._file < len(self.files):
                    self._read(self.files[self._file], progress.advance)
                    self._move(self._file + 1, 0)
            finally:
                self._keep()

    def _read(self, file: StagedFile, advance: Callable[[int], object]) -> None:
        if file.sparse and self._sparse is not None:
            ranges = self._sparse.find_damage(file.name, advance)
            if self._differs_from_source(file, self._sparse, intact=not len(ranges)):
                ranges = self._sparse.present(file.name)
            if len(ranges):
                self._damaged[file.name] = ranges.tolist()
            return
        path = self._cache / file.path
        times, first = times_of(path), self._block
        if (blocks := Blocks.read(self._cache, file.name, file.size, file.checksum)) is None:
            if verify_file(file, self._cache, advance):
                self._damaged[file.name] = []  # it is unknown which blocks
        else:
            for at in range(first, len(blocks), BLOCKS_AT_ONCE):
                some = range(at, min(at + BLOCKS_AT_ONCE, len(blocks)))
                if wrong := blocks.damaged(path, some, advance):
                    self._damaged.setdefault(file.name, []).extend(wrong)
                self._move(self._file, some.stop)
        if file.name in self._damaged:
            forget_verified(self._cache, [file.name])
        elif first == 0:
            record_verified(self._cache, {file.name: times})

    def _differs_from_source(self, file: StagedFile, sparse: SparseFiles, *, intact: bool) -> bool:
        """Compare a few pages with the source, if it can be read, and headers if no page is damaged."""
        count = -(-SOURCE_PAGES // len(self.files))
        try:
            differs = sparse.differs_from_source(file.name, count)
            return differs or (intact and self._headers_differ(file, sparse, count))
        except (ChangedError, InputError) as error:
            self._log(f"pages of {file.source} are not compared with the source: {error}")
            return False

    def _headers_differ(self, file: StagedFile, sparse: SparseFiles, count: int) -> bool:
        """Compare what is kept of a few headers with the source; their pages are not on the disk."""
        if not file.name.endswith(".arrow"):
            return False
        return ArrowFile(self._cache / file.path, sparse, self._tables, 0).differs(sparse, count)

    def describe(self) -> Iterator[str]:
        """Describe the damage of each file."""
        for file, found in self._damage():
            if file.sparse:
                ranges = np.array(found)
                count = int((ranges[:, 1] - ranges[:, 0]).sum())
                path = self._cache / file.path
                yield f"{path} is damaged: {count:,} bytes differ from its page map or the source"
            else:
                yield self._as_damage(file, found).describe(self._cache)

    # --- mending ----------------------------------------------------------------------------------

    def mend(self) -> bool:
        """Fetch damaged parts again; whether all are mended.

        Files without checksums of blocks are left to staging, which copies them again.
        """
        damage = list(self._damage())
        whole = [self._as_damage(file, found) for file, found in damage if not file.sparse]
        for each in whole:
            if each.blocks is not None:
                self._mend(each, each.blocks)
        ranges = {self._cache / file.path: np.array(found) for file, found in damage if file.sparse}
        if self._sparse is not None and ranges:
            with locks.reading(self._cache):
                self._sparse.fetch_again(ranges)
                for path in ranges:
                    self._tables.forget(path)
        return all(each.blocks is not None for each in whole)

    def _mend(self, damage: Damage, blocks: Blocks) -> None:
        path = self._cache / damage.file.path
        reader, (source,) = sources_of([damage.file])
        with locks.staging(self._cache, self._log), locks.changing(self._cache, self._log):
            if Manifest.read(self._cache) != self._manifest:
                raise NotStagedError(f"another index was staged to {self._cache} meanwhile: try again")
            try:
                mend(path, blocks, damage.numbers, source, reader, self._log, TransferStats())
            except ChangedError as changed:
                raise NotStagedError(
                    f"{source.url} is no longer what was staged ({changed}): stage the index again"
                ) from changed
            record_verified(self._cache, {damage.file.name: times_of(path)})

    def _damage(self) -> Iterator[tuple[StagedFile, list[Any]]]:
        by_name = {file.name: file for file in self.files}
        return ((by_name[name], found) for name, found in self._damaged.items())

    def _as_damage(self, file: StagedFile, numbers: list[int]) -> Damage:
        blocks = Blocks.read(self._cache, file.name, file.size, file.checksum) if numbers else None
        return Damage(file, blocks, numbers)

    # --- position ---------------------------------------------------------------------------------

    def _move(self, file: int, block: int) -> None:
        self._file, self._block = file, block
        if time.monotonic() - self._kept > SECONDS_BETWEEN_UPDATES:
            self._keep()

    def _keep(self) -> None:
        self._kept = time.monotonic()
        position = [self._manifest.fingerprint, self._file, self._block, self._damaged]
        content = json.dumps(position).encode()
        keep(self._cache / POSITION, b"%08x" % crc32c(content) + content)

    def _resume(self) -> None:
        path = self._cache / POSITION
        kept = path.read_bytes() if path.exists() else b""
        if kept[:8] != b"%08x" % crc32c(kept[8:]):
            return
        fingerprint, *position = json.loads(kept[8:])
        if fingerprint == self._manifest.fingerprint:
            self._log("continuing the verification that was interrupted")
            self._file, self._block, self._damaged = position
