"""Mirror the source to a cache directory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from laion_assets.index.layout import METADATA_FOLDER, SINGLE_INDEX
from laion_assets.io.descriptors import enough_descriptors
from laion_assets.io.errors import InputError
from laion_assets.staging.full.blocks import Blocks, remove_other_checksums
from laion_assets.staging.full.copy import FullCopy
from laion_assets.staging.full.journal import INCOMING, journal_path, partial_path, recorded_chunks
from laion_assets.staging.full.mend import mend
from laion_assets.staging.manifest import VERSION, Manifest, NotStagedError, StagedFile
from laion_assets.staging.plan import Plan, plan_staging
from laion_assets.staging.sparse.leases import remove_leases
from laion_assets.staging.sparse.pages import allocate, is_allocated, map_path
from laion_assets.staging.transfer import locks
from laion_assets.staging.transfer.disk import (
    DISK_FULL_ERRORS,
    allocated_bytes,
    cannot_write,
    sync_folder,
)
from laion_assets.staging.transfer.fetch import TransferOptions, TransferStats
from laion_assets.staging.transfer.files import SourceFile, version_of
from laion_assets.staging.transfer.range_readers import ChangedError
from laion_assets.staging.transfer.source import Source
from laion_assets.staging.verify import (
    Damage,
    find_damage,
    record_verified,
    sample_damage,
    sizes_on_disk,
    times_of,
)

MAX_ROUNDS = 5  # copies started before a source that keeps changing is an error


@dataclass(frozen=True)
class Staged:
    """The result of staging.

    Attributes:
        manifest: the current contents of the disk.
        source_version: version of the source that the disk matches, see `version_of`.
        fetched: number of files that were copied or allocated, or newly used in place.
        mended: number of damaged files whose damaged blocks were fetched again.
        bytes_fetched: bytes read from the source.
        bytes_reused: bytes that were already on the disk, including those of an interrupted attempt.
        retries: number of reads that failed and were retried.
        seconds: duration, including waits for locks.
        verified: a phrase that describes how the bytes were verified.

    """

    manifest: Manifest
    source_version: str
    fetched: int
    mended: int
    bytes_fetched: int
    bytes_reused: int
    retries: int
    seconds: float
    verified: str


def stage(
    index_uri: str,
    metadata_uri: str | None,
    cache: Path,
    *,
    in_place: bool = False,
    sparse: bool = False,
    replace_other: bool = True,
    options: TransferOptions | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Staged:
    """Make the index available on the local disk, unless it is already there.

    Every byte from Google Cloud Storage is read from the listed generation, and compared with the
    bucket's crc32c. Other sources are compared by size, and by modification time or etag before and after
    the copy; the crc32c of the copy is recorded. Files that are used in place are not read; they are
    identified by size and modification time.

    If there is room, a new version is copied beside the old one, which can be read in the meantime. If
    there is not, and for the first copy, readers wait until the copy is complete.

    Args:
        index_uri: folder of the index, a local path or a URL.
        metadata_uri: folder of the metadata; by default `metadata` in the index folder.
        cache: local directory for the copy; with `in_place`, only for the manifest.
        in_place: whether to use the files in place, which requires a local disk.
        sparse: whether to copy only files that are read whole; parts of others are fetched as needed.
        replace_other: whether a copy of another index may be removed from the cache.
        options: options for reading.
        log: called with lines about progress, retries and waits.

    Raises:
        InputError: the index does not exist or cannot be read; the cache is not writable or lacks free
            space; a file differs from its checksum; or the source keeps changing.

    """
    source = Source(index_uri, metadata_uri)
    if in_place and not source.is_local:
        raise InputError(
            f"{index_uri} is not on a local disk and cannot be used in place: copy it, in full or sparse",
            "staging",
        )
    if source.is_local and not in_place:
        _check_apart(source.list(), cache)
    stager = _Stager(source, cache, in_place, sparse, replace_other, options or TransferOptions(), log)
    try:
        _create(cache)
    except InputError:
        if current := stager.if_current():  # the cache may be read-only if there is nothing to do
            return current
        raise
    try:
        with enough_descriptors():
            return stager.run()
    except OSError as error:
        if error.errno not in DISK_FULL_ERRORS:
            raise
        raise cannot_write(cache, error) from error


@dataclass
class _Stager:
    """One run of staging; other stagers wait for it."""

    source: Source
    cache: Path
    in_place: bool
    sparse: bool
    replace_other: bool
    options: TransferOptions
    log: Callable[[str], None]
    stats: TransferStats = field(default_factory=TransferStats)
    readers_locked_out: bool = False
    mended: int = 0

    def run(self) -> Staged:
        started = time.monotonic()
        with locks.staging(self.cache, self.log), ExitStack() as held:
            self._mend_manifest()
            for _ in range(MAX_ROUNDS):
                files = self.source.list()
                manifest, todo, damage = self._compare(files)
                if not self._mend(damage, todo, files, held):
                    continue
                if manifest and manifest.complete and not todo.changes:
                    if manifest.files != todo.keep:  # the same bytes were uploaded again
                        manifest = self._write(todo.keep, complete=True)
                    return self._report(manifest, todo, files, started)
                self._check_other(todo, manifest)
                self._remove_strays(todo)
                self._make_room(todo, manifest, held)
                copied = self._copy(todo)
                if copied is not None and self.source.list() == files:
                    manifest = self._exchange(files, todo, copied, held)
                    return self._report(manifest, todo, files, started)
                self.log(f"{self.source.index_uri} changed while it was being copied: starting over")
        raise InputError(
            f"{self.source.index_uri} keeps changing while it is being copied: wait until the upload has "
            "finished, then stage the index again",
            "staged_index",
        )

    def if_current(self) -> Staged | None:
        """Describe the copy if it is current, without writing; None if there is anything to do."""
        started = time.monotonic()
        if not (self.cache / locks.INDEX_LOCK).exists():
            return None
        with locks.reading(self.cache):
            files = self.source.list()
            manifest, todo, damage = self._compare(files)
            if manifest is None or not manifest.complete or todo.changes or damage:
                return None
            return self._report(manifest, todo, files, started)

    def _compare(self, files: Sequence[SourceFile]) -> tuple[Manifest | None, Plan, list[Damage]]:
        """Compare source and disk: return the manifest, what is to do, and damaged files."""
        manifest = Manifest.read(self.cache)
        sizes = sizes_on_disk(manifest, self.cache)
        damage = self._find_damage(manifest, sizes)
        lost = {found.file.name for found in damage if found.blocks is None}  # it is unknown where
        intact = {name: size for name, size in sizes.items() if name not in lost}
        todo = plan_staging(files, manifest, intact, in_place=self.in_place, sparse=self.sparse)
        return manifest, todo, damage

    def _mend_manifest(self) -> None:
        """Replace a damaged manifest by one of the files whose content is known without it."""
        try:
            Manifest.read(self.cache)
        except NotStagedError as error:
            self.log(f"{error}; files whose content is known without it are kept")
            known = map(self._known_without_manifest, self.source.list())
            self._write([file for file in known if file], complete=False)

    def _known_without_manifest(self, file: SourceFile) -> StagedFile | None:
        """Describe a file of the cache by its page map, or by the checksums of its blocks."""
        content = file.checksum or f"{VERSION}{file.version}"
        sparse = is_allocated(self.cache / file.name, file.size, content)
        if self.in_place or not (sparse or Blocks.read(self.cache, file.name, file.size, content)):
            return None
        return StagedFile(file.name, file.name, file.url, file.size, file.version, content, sparse)

    def _find_damage(self, manifest: Manifest | None, sizes: Mapping[str, int]) -> list[Damage]:
        """Find the damage in files that have changed, or of which a sample is damaged."""
        files = manifest.files if manifest else ()
        whole = [file for file in files if sizes.get(file.name) == file.size]
        sample_damage(whole, self.cache)
        return find_damage(whole, self.cache, self.log)

    def _mend(
        self, damage: Iterable[Damage], todo: Plan, files: Sequence[SourceFile], held: ExitStack
    ) -> bool:
        """Fetch the damaged blocks of files that stay; False if the source has changed meanwhile."""
        kept, sources = {file.name for file in todo.keep}, {file.name: file for file in files}
        for found in damage:
            name = found.file.name
            if name not in kept or found.blocks is None:
                continue
            self.log(f"{found.describe(self.cache)}; fetching them again")
            self._lock_out_readers(held)
            path, source = self.cache / found.file.path, sources[name]
            try:
                mend(path, found.blocks, found.numbers, source, self.source.reader, self.log, self.stats)
            except ChangedError as changed:
                self.log(f"{source.url} was overwritten while it was being read ({changed})")
                return False
            record_verified(self.cache, {name: times_of(path)})
            self.mended += 1
        return True

    def _copy(self, todo: Plan) -> list[StagedFile] | None:
        """Copy the files to fetch; None if the source has changed since it was listed."""
        if self.in_place:
            return [_known_by_version(file, file.path) for file in todo.fetch]
        copy = FullCopy(self.source.reader, self.cache, self.options, self.log, self.stats)
        try:
            checksums = copy.run(todo.fetch)
        except ChangedError as changed:
            if changed.file in self.source.list():
                raise InputError(
                    f"{changed.file.url} is listed with {changed.file.size:,} bytes but cannot be read "
                    f"({changed}): upload it to the source again"
                ) from changed
            self.log(f"{changed.file.url} was overwritten while it was being copied ({changed})")
            return None
        return [
            StagedFile(f.name, f.name, f.url, f.size, f.version, checksum)
            for f, checksum in zip(todo.fetch, checksums, strict=True)
        ]

    def _check_other(self, todo: Plan, manifest: Manifest | None) -> None:
        """Check that no copy of another index is removed that should be kept."""
        other = self._other_source(manifest)
        if other is None or self.replace_other:
            return
        if stale := self._stale(todo):
            raise InputError(
                f"{self.cache} holds {sum(map(allocated_bytes, stale)):,} bytes of {other}, "
                f"which would be removed to stage {self.source.index_uri}: set another cache directory",
                "cache_dir",
            )

    def _other_source(self, manifest: Manifest | None) -> str | None:
        """Return the source of the staged copy, if it is another index."""
        if manifest is None or manifest.source == self.source.index_uri:
            return None
        return manifest.source

    def _make_room(self, todo: Plan, manifest: Manifest | None, held: ExitStack) -> None:
        """Make room for the copy, beside the old version or else in its place."""
        if self.in_place:
            return
        needed = sum(self._left_to_fetch(file) for file in todo.fetch)
        free = shutil.disk_usage(self.cache).free
        readable = manifest is not None and manifest.complete
        if readable and needed <= free:
            return
        stale = self._stale(todo)
        freed = sum(map(allocated_bytes, stale))
        if needed > free + freed:
            more = f" and {freed:,} more in outdated files" if freed else ""
            raise InputError(
                f"{self.cache} has {free:,} bytes free{more}, staging needs {needed:,}: free some "
                "space or use a larger disk",
                "cache_dir",
            )
        self._lock_out_readers(held)
        self._remove(todo, stale)

    def _left_to_fetch(self, file: SourceFile) -> int:
        partial = partial_path(self.cache, file.name)
        copied = allocated_bytes(partial) if partial.exists() else 0
        return max(file.size - copied, 0)

    def _exchange(
        self, files: Iterable[SourceFile], todo: Plan, copied: list[StagedFile], held: ExitStack
    ) -> Manifest:
        """Replace old files with new ones; if this is killed at any point, the next run finishes it."""
        self._lock_out_readers(held)
        self._remove(todo, self._stale(todo))
        sparse = [_known_by_version(file, file.name, sparse=True) for file in todo.allocate]
        if not self.in_place:
            remove_leases(self.cache)
            # Files enter the manifest before they are renamed. After a kill, renamed files are therefore
            # known. Others are copied again without reading, because all their chunks are on the disk.
            self._write((*todo.keep, *copied, *sparse), complete=False)
            for file in sparse:
                allocate(self.cache / file.path, file.size, file.checksum)
            for file in copied:
                self._rename(file)
            for folder in {(self.cache / file.path).parent for file in copied}:
                sync_folder(folder)
            _remove_empty_folders(self.cache)
            record_verified(self.cache, {file.name: times_of(self.cache / file.path) for file in copied})
        by_name = {file.name: file for file in (*todo.keep, *copied, *sparse)}
        manifest = self._write([by_name[file.name] for file in files], complete=True)
        remove_other_checksums(self.cache, [(file.name, file.checksum) for file in manifest.files])
        return manifest

    def _rename(self, file: StagedFile) -> None:
        partial, path = partial_path(self.cache, file.name), self.cache / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(path)
        journal_path(partial).unlink()

    def _stale(self, todo: Plan) -> list[Path]:
        """Return outdated files of the copy, but never files of the source itself."""
        names = {file.path for file in todo.remove if not Path(file.path).is_absolute()}
        if not self.in_place:
            names |= {file.name for file in (*todo.fetch, *todo.allocate)}
        used = {file.path for file in (*todo.fetch, *todo.allocate)} | {file.path for file in todo.keep}
        sources = {Path(path).resolve() for path in used}
        paths = [
            path for name in sorted(names) for path in (map_path(self.cache / name), self.cache / name)
        ]
        return [path for path in paths if path.is_file() and path.resolve() not in sources]

    def _remove(self, todo: Plan, stale: Sequence[Path]) -> None:
        manifest = Manifest.read(self.cache)
        other = self._other_source(manifest)
        why = f"of {other}" if other else "outdated"
        if manifest is None or manifest.complete or stale:
            # Files stay in the manifest until they are removed: if this process is killed here, the next
            # one removes them.
            self._write((*todo.keep, *todo.remove), complete=False)
        for path in stale:
            self.log(f"removing {path}, which is {why}")
            path.unlink()
        _remove_empty_folders(self.cache)

    def _remove_strays(self, todo: Plan) -> None:
        """Remove partial files of killed stagers that cannot be resumed."""
        wanted = set()
        for file in () if self.in_place else todo.fetch:
            partial = partial_path(self.cache, file.name)
            if recorded_chunks(partial, file, self.options.chunk) is not None:
                wanted |= {partial, journal_path(partial)}
        for path in list((self.cache / INCOMING).rglob("*")):
            if path.is_file() and path not in wanted:
                self.log(f"removing {path}, which cannot be resumed")
                path.unlink()
        _remove_empty_folders(self.cache)

    def _lock_out_readers(self, held: ExitStack) -> None:
        if not self.readers_locked_out:
            held.enter_context(locks.changing(self.cache, self.log))
            self.readers_locked_out = True

    def _write(self, files: Sequence[StagedFile], *, complete: bool) -> Manifest:
        manifest = Manifest(self.source.index_uri, tuple(files), complete)
        manifest.write(self.cache)
        return manifest

    def _report(
        self, manifest: Manifest, todo: Plan, files: Sequence[SourceFile], started: float
    ) -> Staged:
        return Staged(
            manifest,
            version_of(files),
            fetched=len(todo.fetch) + len(todo.allocate),
            mended=self.mended,
            bytes_fetched=self.stats.fetched,
            bytes_reused=self.stats.reused + replace(manifest, files=todo.keep).bytes_on_disk(self.cache),
            retries=self.stats.retries,
            seconds=time.monotonic() - started,
            verified=_verified(files, manifest),
        )


def _known_by_version(file: SourceFile, path: str, *, sparse: bool = False) -> StagedFile:
    """Describe a file that was not read whole, by the checksum or version that the source reports.

    Args:
        file: the file from the listing.
        path: path of the staged file, see `StagedFile.path`.
        sparse: whether only parts of it are on the disk.

    Raises:
        InputError: the source reports neither.

    """
    if not (file.checksum or file.version):
        raise InputError(
            f"the source reports neither checksum nor version of {file.url}, so changes cannot be "
            "detected when parts of it are read: copy it in full",
            "staging",
        )
    content = file.checksum or f"{VERSION}{file.version}"
    return StagedFile(file.name, path, file.url, file.size, file.version, content, sparse)


def _verified(files: Sequence[SourceFile], manifest: Manifest) -> str:
    if any(file.sparse for file in manifest.files):
        return "the listed version of every part; crc32c of the files that are copied whole"
    if not any(file.has_checksum for file in manifest.files):
        return "size and modification time of every file"
    with_checksum = sum(file.checksum is not None for file in files)
    if with_checksum == len(files):
        return "size and the source's crc32c of every file"
    return (
        "size, and that no file changed while it was being read; the source keeps no crc32c of "
        f"{len(files) - with_checksum} of {len(files)} files"
    )


def _remove_empty_folders(cache: Path) -> None:
    """Remove empty folders, because another form of index may have files in their place."""
    for top in (SINGLE_INDEX, METADATA_FOLDER, INCOMING):
        for folder in (*sorted((cache / top).rglob("*"), reverse=True), cache / top):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _check_apart(source: Sequence[SourceFile], cache: Path) -> None:
    if any(Path(file.path).resolve() == (cache / file.name).resolve() for file in source):
        raise InputError(
            f"the index is already in {cache} and would be copied onto itself: use it in place, or copy "
            "it to another folder",
            "staging",
        )


def _create(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for name in (locks.INDEX_LOCK, locks.STAGER_LOCK):
            (cache / name).open("a").close()
    except OSError as error:
        raise cannot_write(cache, error) from error
