"""Plan the work of staging, with a pure function of the source's listing, the manifest and the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from laion_assets.index.layout import read_in_parts
from laion_assets.staging.manifest import Manifest, StagedFile
from laion_assets.staging.transfer.files import SourceFile


@dataclass(frozen=True)
class Plan:
    """The work of staging.

    Attributes:
        fetch: files to copy, or to use in place.
        allocate: files to allocate sparse; requests fetch parts of them as needed.
        keep: files that are current, described as in the source's listing.
        remove: files that are outdated or no longer needed.

    """

    fetch: tuple[SourceFile, ...]
    allocate: tuple[SourceFile, ...]
    keep: tuple[StagedFile, ...]
    remove: tuple[StagedFile, ...]

    @property
    def changes(self) -> bool:
        """Whether the disk differs from the source."""
        return bool(self.fetch or self.allocate or self.remove)


def plan_staging(
    source: Sequence[SourceFile],
    manifest: Manifest | None,
    sizes: Mapping[str, int],
    *,
    in_place: bool = False,
    sparse: bool = False,
) -> Plan:
    """Compare source and disk.

    A staged file is current if its size, in the manifest and on the disk, and its checksum equal those at
    the source. If the source reports no checksum, URL and version are compared instead.

    Args:
        source: files of the index at the source.
        manifest: manifest of the cache directory, or None.
        sizes: size on the disk of each file in the manifest, by name; missing files are left out.
        in_place: whether files are used in place, so that copies are not needed.
        sparse: whether parts suffice for files that can be read in parts; whole files are kept too.

    """
    staged = {file.name: file for file in manifest.files} if manifest else {}

    def is_current(file: SourceFile) -> bool:
        found = staged.get(file.name)
        return (
            found is not None
            and found.path == staged_path(file, in_place)
            and sparse >= found.sparse
            and sizes.get(file.name) == found.size == file.size
            and _same_content(found, file)
        )

    current = {file.name for file in source if is_current(file)}
    missing = [file for file in source if file.name not in current]
    return Plan(
        fetch=tuple(file for file in missing if not (sparse and read_in_parts(file.name))),
        allocate=tuple(file for file in missing if sparse and read_in_parts(file.name)),
        keep=tuple(
            replace(staged[file.name], source=file.url, version=file.version)
            for file in source
            if file.name in current
        ),
        remove=tuple(file for name, file in staged.items() if name not in current),
    )


def staged_path(file: SourceFile, in_place: bool) -> str:
    """Return the path of a staged file, see `StagedFile.path`."""
    return file.path if in_place else file.name


def _same_content(staged: StagedFile, file: SourceFile) -> bool:
    if file.checksum is not None:
        return staged.checksum == file.checksum
    return (staged.source, staged.version) == (file.url, file.version)
