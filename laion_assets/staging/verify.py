"""Compare a manifest with the disk: sizes always, bytes where they may have changed.

A program that changes a file changes its times, so files are read again only if their times are not those
recorded in `.verified`. Nothing but a failing disk changes a file otherwise; for that a few random blocks
are read each time, and all by `scrub`. Pages of sparse files are compared before they are first read, see
`sparse.pages`.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from laion_assets.io.derived import keep
from laion_assets.io.locks import locked_folder
from laion_assets.io.progress import Progress
from laion_assets.io.text import count, json_object
from laion_assets.staging.full.blocks import BLOCK, Blocks
from laion_assets.staging.manifest import Manifest, NotStagedError, StagedFile
from laion_assets.staging.sparse.pages import is_allocated, map_path

VERIFIED = ".verified"  # file in the cache directory
SAMPLED_BLOCKS = 16  # that every step reads again

Times = list[int]  # size, time of modification, time of the last change of content or attributes


def sizes_on_disk(manifest: Manifest | None, cache: Path) -> dict[str, int]:
    """Return the size of each file in the manifest, by name; missing files are left out.

    A sparse file without its page map counts as missing, because only the map records its present parts.
    """
    files = manifest.files if manifest else ()
    present = [file for file in files if _is_present(file, cache)]
    return {file.name: (cache / file.path).stat().st_size for file in present}


def verified_manifest(cache: Path, log: Callable[[str], None] = lambda _: None) -> Manifest:
    """Return the manifest after a comparison with the disk, which is cheap unless files have changed.

    Args:
        cache: the cache directory.
        log: called with lines about progress.

    Raises:
        NotStagedError: nothing is staged, staging did not finish, or a file is missing, has another size,
            or is damaged.

    """
    manifest = complete_manifest(cache)
    try:
        damage = find_damage(manifest.files, cache, log) or sample_damage(manifest.files, cache)
    except FileNotFoundError as error:  # a stager replaces files meanwhile, if the caller holds no lock
        raise NotStagedError(f"{error.filename} is missing: stage the index again") from error
    if damage:
        raise NotStagedError(f"{damage[0].describe(cache)}: stage the index again")
    return manifest


def complete_manifest(cache: Path) -> Manifest:
    """Return the manifest after a comparison of its sizes with the disk.

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


# --- bytes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """A copied file that differs from its checksum.

    Attributes:
        file: the file.
        blocks: checksums of its blocks; None if none are kept, so all of it has to be copied again.
        numbers: the damaged blocks.

    """

    file: StagedFile
    blocks: Blocks | None
    numbers: Sequence[int]

    def describe(self, cache: Path) -> str:
        """Describe the damage in a clause."""
        path = cache / self.file.path
        if self.blocks is None:
            return f"{path} is damaged: it differs from its checksum"
        start, stop = self.blocks.ends(self.numbers[0])
        more = f" and {count(len(self.numbers) - 1, 'more block')}" if len(self.numbers) > 1 else ""
        return f"{path} is damaged: bytes {start:,} to {stop:,}{more} differ from their checksums"


def find_damage(
    files: Iterable[StagedFile], cache: Path, log: Callable[[str], None] = lambda _: None
) -> list[Damage]:
    """Read all files that have changed since they were last verified, and return the damaged ones.

    A cache that was staged by an earlier version keeps no checksums of blocks: they are computed here.

    Args:
        files: files of the manifest whose sizes are right.
        cache: the cache directory.
        log: called with lines about progress.

    """
    recorded = _recorded(cache)
    times = {file: times_of(cache / file.path) for file in files if file.is_copied}
    changed = [file for file, found in times.items() if recorded.get(file.name) != found]
    if not changed:
        return []
    damage = []
    with Progress("verifying", sum(file.size for file in changed), "B", log) as progress:
        for file in changed:
            if found := verify_file(file, cache, progress.advance):
                damage.append(found)
    wrong = {found.file for found in damage}
    record_verified(cache, {file.name: times[file] for file in changed if file not in wrong})
    return damage


def verify_file(
    file: StagedFile, cache: Path, advance: Callable[[int], object] = lambda _: None
) -> Damage | None:
    """Read all of a copied file and compare it with its checksums; None if it is intact."""
    blocks = Blocks.read(cache, file.name, file.size, file.checksum)
    if blocks is not None:
        wrong = blocks.damaged(cache / file.path, range(len(blocks)), advance)
        return Damage(file, blocks, wrong) if wrong else None
    found = Blocks.of_file(cache / file.path, advance)
    if found.checksum != file.checksum:
        return Damage(file, None, ())
    found.write(cache, file.name, file.checksum)
    return None


def sample_damage(files: Iterable[StagedFile], cache: Path, blocks: int = SAMPLED_BLOCKS) -> list[Damage]:
    """Read random blocks of files that were verified before, and return the damaged files.

    They no longer count as verified, so `find_damage` reads all of them; neither do files without
    checksums of blocks.
    """
    some = [file for file in files if file.is_copied]
    first = [0, *accumulate(-(-file.size // BLOCK) for file in some)]
    chosen: dict[StagedFile, list[int]] = {}
    for number in sorted(random.sample(range(first[-1]), min(blocks, first[-1]))):
        at = bisect_right(first, number) - 1
        chosen.setdefault(some[at], []).append(number - first[at])
    damage: list[Damage] = []
    unknown: list[StagedFile] = []
    for file, numbers in chosen.items():
        kept = Blocks.read(cache, file.name, file.size, file.checksum)
        if kept is None:
            unknown.append(file)
        elif wrong := kept.damaged(cache / file.path, [n * BLOCK // kept.block for n in numbers]):
            damage.append(Damage(file, kept, wrong))
    forget_verified(cache, [file.name for file in (*unknown, *(found.file for found in damage))])
    return damage


def times_of(path: Path) -> Times:
    """Return what changes when a file does."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def record_verified(cache: Path, verified: Mapping[str, Times]) -> None:
    """Record files that are intact, with their times before they were read."""
    with locked_folder(cache):
        keep(cache / VERIFIED, json.dumps({**_recorded(cache), **verified}).encode())


def forget_verified(cache: Path, names: Iterable[str]) -> None:
    """Let files be read again when they are next opened or staged."""
    if forgotten := set(names):
        with locked_folder(cache):
            left = {name: at for name, at in _recorded(cache).items() if name not in forgotten}
            keep(cache / VERIFIED, json.dumps(left).encode())


def forget_all_verified(cache: Path) -> None:
    """Let all files be read again when they are next opened or staged."""
    forget_verified(cache, _recorded(cache))


def _recorded(cache: Path) -> dict[str, Times]:
    try:
        return json_object((cache / VERIFIED).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
