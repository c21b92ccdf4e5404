"""Publish a finished index as a whole: readers see either the old index or the new one.

Folders on a disk are exchanged atomically. Objects in a bucket cannot be renamed, so the index holds a
marker while its objects are replaced, and `Source.list` refuses to read an index with the marker.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from laion_assets.build.workspace import Workspace, existing
from laion_assets.index import (
    INVERTED_LISTS,
    METADATA_FOLDER,
    MODEL_RECORD,
    POPULATED_INDEX,
    PUBLISHED_TABLES,
    PUBLISHING,
    SINGLE_INDEX,
)
from laion_assets.io.checksums import file_crc32c
from laion_assets.io.errors import InputError
from laion_assets.io.locks import locked
from laion_assets.io.storage import is_local, list_files, open_storage, reaching, writing

INDEX_URI = "index_uri"
BUILT = "build.json"  # the record of an index that was built here, written last
COPIED_AT_ONCE = 16 << 20  # bytes
AT_WORKING_FOLDER, EXCHANGE = -100, 2  # arguments of Linux' renameat2
_WRITTEN = {
    BUILT,
    INVERTED_LISTS,
    MODEL_RECORD,
    POPULATED_INDEX,
    PUBLISHED_TABLES,
    PUBLISHING,
    SINGLE_INDEX,
}
_METADATA = re.compile(rf"{METADATA_FOLDER}/\d+\.arrow")


class Destination:
    """The destination of an index, and the folder beside it where its files are assembled.

    Args:
        uri: folder of the index, a local path or a URL.

    Attributes:
        uri: the folder; the absolute path with links resolved if it is local.
        current: the folder of the index.
        new: the folder where the files of the next index are assembled.

    Raises:
        InputError: the folder is a whole bucket or disk.

    """

    def __init__(self, uri: str) -> None:
        self._fs, path = open_storage(uri, INDEX_URI)
        if is_local(self._fs):
            uri = path = str(Path(path).resolve())
        self.uri, self._path = uri.rstrip("/"), path
        parent, slash, name = self.uri.rpartition("/")
        if ("/" not in path.strip("/") and not is_local(self._fs)) or not name:
            raise InputError(f"{uri} is not a folder in a bucket or on a disk: name one", INDEX_URI)
        self._beside = f"{parent}{slash}.{name}"
        self.current, self.new = Workspace(self.uri), Workspace(f"{self._beside}.new")

    def locked(self, log: Callable[[str], None]) -> AbstractContextManager[None]:
        """Wait for another build on this machine, then keep others out. Buckets have no locks.

        Args:
            log: called with a line if this has to wait.

        """
        if not is_local(self._fs):
            return nullcontext()
        path = Path(f"{self._beside}.lock")
        return locked(path, lambda: log(f"waiting for another build that publishes {self.uri}"))

    def check(self) -> None:
        """Check that an index may be published here.

        Raises:
            InputError: the folder holds files that no build wrote, or cannot be exchanged.

        """
        if is_local(self._fs) and os.path.ismount(self._path):
            raise InputError(f"{self.uri} is a mounted disk: name a folder on it", INDEX_URI)
        with reaching(self.uri, INDEX_URI):
            names = sorted(listed.name for listed in list_files(self._fs, self._path))
        foreign = [name for name in names if name not in _WRITTEN and not _METADATA.fullmatch(name)]
        if names and not {BUILT, PUBLISHING} & set(names):
            foreign = names
        if foreign:
            raise InputError(
                f"{self.uri} holds files that no build wrote, such as {foreign[0] or 'itself'}: move "
                "them, or build to another folder",
                INDEX_URI,
            )

    def is_complete(self) -> bool:
        """Return whether an index exists and is not being replaced."""
        return self.current.exists(BUILT) and not self.current.exists(PUBLISHING)

    def discard_new(self) -> None:
        """Remove the assembled files, the record first, so that a partial index has no record."""
        self.new.discard(BUILT)
        self.new.remove()

    def publish(self) -> None:
        """Replace the old index with the new one. If killed, a second call finishes the exchange.

        Raises:
            InputError: the folder is not writable, or the bucket cannot be reached.

        """
        with writing(self.uri, INDEX_URI):
            if is_local(self._fs):
                self._exchange()
            else:
                self._copy_objects()
        self.discard_new()

    def _exchange(self) -> None:
        current, new, old = (Path(f) for f in (self._path, self.new.uri, f"{self._beside}.old"))
        shutil.rmtree(old, ignore_errors=True)
        if not current.exists():
            new.rename(current)
        elif not _exchanged(current, new):
            current.rename(old)
            new.rename(current)
            shutil.rmtree(old)

    def _copy_objects(self) -> None:
        fs, target, (_, source) = self._fs, self._path, open_storage(self.new.uri, INDEX_URI)
        names = sorted(listed.name for listed in list_files(fs, source))
        before = [listed.name for listed in list_files(fs, target)]
        with self.current.new(PUBLISHING) as sink:
            sink.write(b"the objects of this index are being replaced\n")
        for name in names:  # copied within the bucket, not through this machine
            fs.copy(f"{source}/{name}", f"{target}/{name}")
        for name in before:
            if name not in names and name != PUBLISHING:
                fs.rm_file(f"{target}/{name}")
        fs.rm_file(f"{target}/{PUBLISHING}")

    def put(self, source: Workspace, name: str, target: str, checksum: str) -> None:
        """Add a file to the new index, without copying its bytes if possible.

        Args:
            source: folder that holds the file.
            name: name of the file in `source`.
            target: name of the file in the index.
            checksum: crc32c of the file.

        Raises:
            InputError: the file is missing or damaged, or there is too little space.

        """
        linked = self._linked(source, name, target)
        if linked:
            if file_crc32c(linked) != checksum:
                raise source.damaged(name, "differs from what was written")
            return
        _, path = open_storage(self.new.where(target), INDEX_URI)
        source_fs, source_path = open_storage(source.where(name), INDEX_URI)
        if not source.local and type(source_fs) is type(self._fs):
            if source.stored_checksum(name) not in (None, checksum):
                raise source.damaged(name, "differs from what was written")
            with reaching(self.uri, INDEX_URI):
                self._fs.copy(source_path, path)
            return
        with source.open(name) as file, self.new.new(target) as sink:
            shutil.copyfileobj(file, sink, COPIED_AT_ONCE)
            if sink.checksum != checksum:
                raise source.damaged(name, "differs from what was written")

    def links(self, source: Workspace) -> bool:
        """Return whether files of a folder can probably be linked, because both are on one local disk."""
        if source.local is None or self.new.local is None:
            return False
        one, other = existing(source.local).stat(), existing(self.new.local).stat()
        return one.st_dev == other.st_dev

    def _linked(self, source: Workspace, name: str, target: str) -> Path | None:
        """Link a file and return its path in the new index; None if it cannot be linked."""
        if source.local is None or self.new.local is None:
            return None
        path = self.new.local / target
        with writing(self.uri, INDEX_URI):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.local / name, path)
        except OSError:  # another disk, or one without links
            return None
        return path


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders atomically; return False if the file system cannot do that."""
    arguments = AT_WORKING_FOLDER, os.fsencode(one), AT_WORKING_FOLDER, os.fsencode(other), EXCHANGE
    if not _renameat2()(*arguments):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one))


@cache
def _renameat2() -> Any:
    """Return Linux's renameat2, which Python does not wrap."""
    call = ctypes.CDLL(None, use_errno=True).renameat2
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call
