"""A finished index takes its place, whole: readers see the old one until then, and never half of one.

A folder on a disk is exchanged by renaming. In a bucket, where nothing can be renamed, the index holds a
marker while its objects are replaced: `Source.list` refuses to read an index that has one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from laion_assets.build.workspace import Workspace
from laion_assets.index import PUBLISHING
from laion_assets.io.errors import InputError
from laion_assets.io.storage import is_local, list_files, new_file, open_storage, reaching

INDEX_URI = "index_uri"
COPIED_AT_ONCE = 16 << 20  # bytes


def new_index_uri(index_uri: str) -> str:
    """Return where the files of an index are put together: beside it, so that they can be renamed."""
    return f"{index_uri.rstrip('/')}.new"


def publish(index_uri: str, owned: str) -> None:
    """Put the new index in the place of the old one.

    If it is killed, calling it again finishes.

    Args:
        index_uri: of the place.
        owned: name of the file that an index made here has. A folder without it is not replaced.

    Raises:
        InputError: the place holds something that was not made here.

    """
    fs, path = open_storage(index_uri, INDEX_URI)
    with reaching(index_uri, INDEX_URI):
        if is_local(fs):
            _exchange(Path(path), Path(open_storage(new_index_uri(index_uri))[1]), owned)
        else:
            _copy_objects(index_uri, owned)


def _exchange(place: Path, new: Path, owned: str) -> None:
    old = place.with_name(f"{place.name}.old")
    if place.exists() and any(place.iterdir()):
        if not (place / owned).exists():
            raise _not_ours(str(place))
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    elif place.exists():
        place.rmdir()
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _copy_objects(index_uri: str, owned: str) -> None:
    fs, place = open_storage(index_uri, INDEX_URI)
    new_uri = new_index_uri(index_uri)
    _, source = open_storage(new_uri, INDEX_URI)
    names = sorted(listed.name for listed in list_files(fs, source))
    before = [listed.name for listed in list_files(fs, place)]
    if before and owned not in before and PUBLISHING not in before:
        raise _not_ours(index_uri)
    with new_file(f"{index_uri.rstrip('/')}/{PUBLISHING}", INDEX_URI) as sink:
        sink.write(b"the objects of this index are being replaced\n")
    for name in names:
        fs.copy(f"{source}/{name}", f"{place}/{name}")  # inside the bucket: no bytes pass through here
    for name in before:
        if name not in names and name != PUBLISHING:
            fs.rm_file(f"{place}/{name}")
    fs.rm_file(f"{place}/{PUBLISHING}")
    Workspace(new_uri).remove()


def _not_ours(where: str) -> InputError:
    return InputError(
        f"{where} holds files that no build wrote: empty the folder, or build to another place", INDEX_URI
    )


def put(source: Workspace, name: str, index_uri: str, target: str) -> None:
    """Put a file of a workspace into the new index without copying bytes where that is possible.

    Args:
        source: the workspace.
        name: of the file there.
        index_uri: of the index.
        target: name of the file in the index.

    """
    uri = f"{new_index_uri(index_uri)}/{target}"
    fs, path = open_storage(uri, INDEX_URI)
    if source.local and is_local(fs):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.local / name, path)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source.local / name, path)
        return
    source_fs, source_path = open_storage(source.where(name))
    if not source.local and type(source_fs) is type(fs):
        fs.copy(source_path, path)
        return
    with source_fs.open(source_path, "rb") as file, new_file(uri, INDEX_URI) as sink:
        shutil.copyfileobj(file, sink, COPIED_AT_ONCE)
