"""The manifest: what is staged, from where, and whether all of it is there.

What must not live here: how it came there (stager), what is read from it (opening).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from laion_assets.io.errors import InputError
from laion_assets.staging.sparse.pages import is_laid_out
from laion_assets.staging.transfer.disk import bytes_held, sync_folder

MANIFEST = "manifest.json"
STAGE_AGAIN = "materialize staged_laion_index again"


class NotStagedError(InputError):
    """The disk does not hold a whole staged index: staging (again) mends it."""


@dataclass(frozen=True)
class StagedFile:
    """A file of the index as it is on the local disk.

    Attributes:
        name: relative path in the staged index.
        path: relative to the manifest; absolute where the source is used in place.
        source: URL of the source file it was made from.
        size: bytes.
        version: of that source file.
        checksum: crc32c of its bytes, in base64; of a sparse file from a source that keeps none, what
            tells its version.
        sparse: whether only parts of it are there, those that a request has needed.

    """

    name: str
    path: str
    source: str
    size: int
    version: str
    checksum: str
    sparse: bool = False


@dataclass(frozen=True)
class Manifest:
    """What is staged, from where, and whether all of it is there."""

    source: str
    files: tuple[StagedFile, ...]
    complete: bool

    @property
    def fingerprint(self) -> str:
        """Changes with the name, size or content of any file, and only then."""
        lines = sorted(f"{file.name}\t{file.size}\t{file.checksum}" for file in self.files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def bytes_on_disk(self, cache: Path) -> int:
        """Bytes that are there of them: of sparse files only parts."""
        return sum(bytes_held(cache / file.path) if file.sparse else file.size for file in self.files)

    @classmethod
    def read(cls, cache: Path) -> Manifest | None:
        """Read the manifest of a cache directory; None where there is none.

        Raises:
            InputError: it is not as `write` left it.

        """
        path = cache / MANIFEST
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text())
            files = tuple(StagedFile(**file) for file in stored["files"])
            manifest = cls(stored["source"], files, stored["complete"])
            manifest._check_types()
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error!r}): delete it and {STAGE_AGAIN}") from error
        return manifest

    def _check_types(self) -> None:
        whole = (self.source, str), (self.complete, bool)
        sizes = ((file.size, int) for file in self.files)
        kinds = ((file.sparse, bool) for file in self.files)
        texts = (
            (text, str)
            for file in self.files
            for text in (file.name, file.path, file.source, file.version, file.checksum)
        )
        for value, kind in chain(whole, sizes, kinds, texts):
            if type(value) is not kind:
                raise TypeError(f"{value!r} is no {kind.__name__}")

    def write(self, cache: Path) -> None:
        """Replace the manifest, durably: all of it or none."""
        temporary = cache / f"{MANIFEST}.new"
        with temporary.open("w") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(cache / MANIFEST)
        sync_folder(cache)


def sizes_on_disk(manifest: Manifest | None, cache: Path) -> dict[str, int]:
    """Return the bytes of each file that the manifest names, by name; what is missing is left out.

    A sparse file without its page map is as good as missing: nobody knows what is there of it.
    """
    there = {file.name: cache / file.path for file in (manifest.files if manifest else ())}
    for file in manifest.files if manifest else ():
        if file.sparse and not is_laid_out(cache / file.path, file.size, file.checksum):
            del there[file.name]
    return {name: path.stat().st_size for name, path in there.items() if path.is_file()}


def verified_manifest(cache: Path) -> Manifest:
    """Return the manifest after comparing it with the disk: cheap, sizes only.

    Raises:
        NotStagedError: names the file that is missing or has another size, and the remedy.

    """
    manifest = Manifest.read(cache)
    if manifest is None:
        raise NotStagedError(f"nothing is staged in {cache}: materialize staged_laion_index first")
    if not manifest.complete:
        raise NotStagedError(f"staging into {cache} did not finish: {STAGE_AGAIN}")
    sizes = sizes_on_disk(manifest, cache)
    for file in manifest.files:
        size = sizes.get(file.name)
        if size != file.size:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise NotStagedError(
                f"{cache / file.path} {found}, the manifest says {file.size:,}: {STAGE_AGAIN}"
            )
    return manifest
