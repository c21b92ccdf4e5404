"""Brings the cache directory to what the source holds.

What must not live here: comparing (plan), copying (copy), reading what is staged (opening).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from laion_assets.index.layout import METADATA_FOLDER, SINGLE_INDEX
from laion_assets.io.errors import InputError
from laion_assets.staging.copy import Copy
from laion_assets.staging.journal import INCOMING, journal_of, partial_of, recorded_chunks
from laion_assets.staging.manifest import (
    STAGE_AGAIN,
    Manifest,
    StagedFile,
    sizes_on_disk,
)
from laion_assets.staging.plan import Plan, SourceFile, Transfer, plan, version_of
from laion_assets.staging.sparse.leases import forget_leases
from laion_assets.staging.sparse.pages import lay_out, map_of
from laion_assets.staging.transfer import locks
from laion_assets.staging.transfer.disk import TAKES_NO_MORE, bytes_held, cannot_write, sync_folder
from laion_assets.staging.transfer.errors import ChangedError
from laion_assets.staging.transfer.fetch import Tally
from laion_assets.staging.transfer.source import Source

ROUNDS = 5  # as often may the source change while it is copied


@dataclass(frozen=True)
class Staged:
    """What staging did.

    Attributes:
        manifest: what is on the disk now.
        source_version: of the source that it was compared with.
        fetched: files that were copied or laid out, or read where they are used in place.
        bytes_fetched: read from the source.
        bytes_reused: that were on the disk already, those of an earlier attempt that was cut off too.
        retries: reads that failed and were tried again.
        seconds: for all of it, waiting included.
        verified: what the bytes were compared with, for people.

    """

    manifest: Manifest
    source_version: str
    fetched: int
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
    transfer: Transfer | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Staged:
    """Make the index available on the local disk; does nothing when it is already there.

    Every byte from Google Cloud Storage is compared with the crc32c that the bucket keeps, and read from
    the generation that was listed. Other sources are compared by size, and by modification time or etag
    before and after; the crc32c of what was read is recorded.

    Where there is room, a new version is copied beside the old one, which can be read meanwhile. Where
    there is not, and the first time, readers wait until the copy is whole.

    Args:
        index_uri: folder of the index, any fsspec URL.
        metadata_uri: folder of the metadata, if elsewhere.
        cache: local directory for the copy, or only for the manifest when `in_place`.
        in_place: use the files where they are, which must be a local disk.
        sparse: copy only the files that are read whole; of the others, parts come as they are needed.
        transfer: how to read, when not as usual.
        log: takes lines about the progress.

    Raises:
        InputError: no index there or no right to read it, a cache that cannot be written to or has not
            enough free space, a file that differs from its checksum, or a source that keeps changing.

    """
    source = Source(index_uri, metadata_uri)
    if in_place and not source.is_local:
        raise InputError(f"{index_uri} is not on a local disk: LAION_STAGING=in-place needs one")
    if source.is_local and not in_place:
        _check_apart(source.list(), cache)
    _make(cache)
    try:
        return _Stager(source, cache, in_place, sparse, transfer or Transfer(), log).run()
    except OSError as error:
        if error.errno not in TAKES_NO_MORE:
            raise
        raise cannot_write(cache, error) from error


@dataclass
class _Stager:
    """One run of staging, with the other stagers kept out."""

    source: Source
    cache: Path
    in_place: bool
    sparse: bool
    transfer: Transfer
    log: Callable[[str], None]
    tally: Tally = field(default_factory=Tally)
    readers_are_out: bool = False

    def run(self) -> Staged:
        started = time.monotonic()
        with locks.staging(self.cache, self.log), ExitStack() as held:
            for _ in range(ROUNDS):
                files = self.source.list()
                manifest = Manifest.read(self.cache)
                todo = plan(
                    files,
                    manifest,
                    sizes_on_disk(manifest, self.cache),
                    in_place=self.in_place,
                    sparse=self.sparse,
                )
                if manifest and manifest.complete and not todo.changes:
                    if manifest.files != todo.keep:  # the source has other versions of the same bytes
                        manifest = self._write(todo.keep, complete=True)
                    return self._report(manifest, todo, files, started)
                self._remove_strays(todo)
                self._make_room(todo, manifest, held)
                copied = self._copy(todo)
                if copied is not None and self.source.list() == files:
                    manifest = self._put_into_place(files, todo, copied, held)
                    return self._report(manifest, todo, files, started)
                self.log(f"{self.source.index_uri} changed while it was copied: taking what it has now")
        raise InputError(
            f"{self.source.index_uri} keeps changing while it is copied: wait until it is uploaded, then "
            f"{STAGE_AGAIN}"
        )

    def _copy(self, todo: Plan) -> list[StagedFile] | None:
        """Copy what is to be fetched; None when the source is no longer as it was listed."""
        cache = None if self.in_place else self.cache
        copy = Copy(self.source.reader, cache, self.transfer, self.log, self.tally)
        try:
            return copy.run(todo.fetch)
        except ChangedError as changed:
            if changed.file in self.source.list():
                raise InputError(
                    f"{changed.file.url} is listed with {changed.file.size:,} bytes but cannot be read "
                    f"({changed}): upload it to the source again"
                ) from changed
            self.log(f"{changed.file.url} was overwritten while it was copied ({changed})")
            return None

    def _make_room(self, todo: Plan, manifest: Manifest | None, held: ExitStack) -> None:
        """See that the copy fits: beside what is there, or else in its place."""
        if self.in_place:
            return
        needed = sum(self._left_to_fetch(file) for file in todo.fetch)
        free = shutil.disk_usage(self.cache).free
        readable = manifest is not None and manifest.complete
        if readable and needed <= free:
            return
        stale = self._stale(todo)
        freed = sum(map(bytes_held, stale))
        if needed > free + freed:
            more = f" and {freed:,} more in files that go" if freed else ""
            raise InputError(
                f"{self.cache} has {free:,} bytes free{more}, staging needs {needed:,}: free some space "
                "or set LAION_CACHE_DIR to a larger disk"
            )
        self._keep_readers_out(held)
        self._remove(todo, stale)

    def _left_to_fetch(self, file: SourceFile) -> int:
        partial = partial_of(self.cache, file.name)
        there = bytes_held(partial) if partial.exists() else 0
        return max(file.size - there, 0)

    def _put_into_place(
        self, files: Iterable[SourceFile], todo: Plan, copied: list[StagedFile], held: ExitStack
    ) -> Manifest:
        """Exchange old files for new ones; killed at any point, the next run finishes it."""
        self._keep_readers_out(held)
        self._remove(todo, self._stale(todo))
        sparse = [_as_sparse(file) for file in todo.lay_out]
        if not self.in_place:
            forget_leases(self.cache)
            # Listed before they have their names: one that has it is known, one that has not is copied,
            # which costs nothing as its chunks are all there.
            self._write((*todo.keep, *copied, *sparse), complete=False)
            for file in sparse:
                lay_out(self.cache / file.path, file.size, file.checksum)
            for file in copied:
                self._give_name(file)
            for folder in {(self.cache / file.path).parent for file in copied}:
                sync_folder(folder)
            _remove_empty_folders(self.cache)
        by_name = {file.name: file for file in (*todo.keep, *copied, *sparse)}
        return self._write([by_name[file.name] for file in files], complete=True)

    def _give_name(self, file: StagedFile) -> None:
        partial, path = partial_of(self.cache, file.name), self.cache / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(path)
        journal_of(partial).unlink()

    def _stale(self, todo: Plan) -> list[Path]:
        """Files of the copy that are not as the source has them; never a file of the source itself."""
        names = {file.path for file in todo.remove if not Path(file.path).is_absolute()}
        if not self.in_place:
            names |= {file.name for file in (*todo.fetch, *todo.lay_out)}
        used = {file.path for file in (*todo.fetch, *todo.lay_out)} | {file.path for file in todo.keep}
        sources = {Path(path).resolve() for path in used}
        paths = [
            path for name in sorted(names) for path in (map_of(self.cache / name), self.cache / name)
        ]
        return [path for path in paths if path.is_file() and path.resolve() not in sources]

    def _remove(self, todo: Plan, stale: Sequence[Path]) -> None:
        manifest = Manifest.read(self.cache)
        if manifest is None or manifest.complete or stale:
            # What goes stays listed until it is gone, or a stager killed here would leave it for ever.
            self._write((*todo.keep, *todo.remove), complete=False)
        for path in stale:
            self.log(f"removing {path}, which the index no longer needs")
            path.unlink()
        _remove_empty_folders(self.cache)

    def _remove_strays(self, todo: Plan) -> None:
        """Remove what killed stagers left of files that are not wanted any more."""
        wanted = set()
        for file in () if self.in_place else todo.fetch:
            partial = partial_of(self.cache, file.name)
            if recorded_chunks(partial, file, self.transfer.chunk) is not None:
                wanted |= {partial, journal_of(partial)}
        for path in list((self.cache / INCOMING).rglob("*")):
            if path.is_file() and path not in wanted:
                self.log(f"removing {path}, which is no longer wanted")
                path.unlink()
        _remove_empty_folders(self.cache)

    def _keep_readers_out(self, held: ExitStack) -> None:
        if not self.readers_are_out:
            held.enter_context(locks.changing(self.cache, self.log))
            self.readers_are_out = True

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
            fetched=len(todo.fetch) + len(todo.lay_out),
            bytes_fetched=self.tally.fetched,
            bytes_reused=self.tally.reused + replace(manifest, files=todo.keep).bytes_on_disk(self.cache),
            retries=self.tally.retries,
            seconds=time.monotonic() - started,
            verified=_verified(files, manifest),
        )


def _as_sparse(file: SourceFile) -> StagedFile:
    """Record a file none of which was read: its content is what the source says it is.

    Raises:
        InputError: the source says nothing that changes with the content.

    """
    if not (file.checksum or file.version):
        raise InputError(
            f"nothing tells whether {file.url} is overwritten while parts of it are read: set "
            "LAION_STAGING=full"
        )
    content = file.checksum or f"version {file.version}"
    return StagedFile(file.name, file.name, file.url, file.size, file.version, content, sparse=True)


def _verified(files: Sequence[SourceFile], manifest: Manifest) -> str:
    if any(file.sparse for file in manifest.files):
        return (
            "that every part comes from the version that was listed; crc32c of the files that are whole"
        )
    with_checksum = sum(file.checksum is not None for file in files)
    if with_checksum == len(files):
        return "size and the source's crc32c of every file"
    return (
        "size, and that no file changed while it was read; the source keeps no crc32c "
        f"of {len(files) - with_checksum} of {len(files)} files"
    )


def _remove_empty_folders(cache: Path) -> None:
    """Make way for an index of another form, which has a file where this one has a folder."""
    for top in (SINGLE_INDEX, METADATA_FOLDER, INCOMING):
        for folder in (*sorted((cache / top).rglob("*"), reverse=True), cache / top):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _check_apart(source: Sequence[SourceFile], cache: Path) -> None:
    if any(Path(file.path).resolve() == (cache / file.name).resolve() for file in source):
        raise InputError(
            f"the index is in {cache} already, and would be copied onto itself: set "
            "LAION_STAGING=in-place to use it where it is, or LAION_CACHE_DIR to another folder"
        )


def _make(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for name in (locks.DATA, locks.STAGER):
            (cache / name).open("a").close()
    except OSError as error:
        raise cannot_write(cache, error) from error
