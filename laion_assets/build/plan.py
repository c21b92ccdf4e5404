"""Assign rows to shards, with pure functions over the names and sizes of the input files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from laion_assets.io.errors import InputError
from laion_assets.io.text import list_shortly

SHARD_ROWS = 2_000_000
"""Approximate rows of a shard. At 136 bytes per row its codes take 272 MB; they are sorted in memory."""


@dataclass(frozen=True)
class Part:
    """An input file at the time of planning.

    Attributes:
        name: name of the file.
        rows: number of rows in the file.
        version: version of its vectors and metadata.

    """

    name: str
    rows: int
    version: str


@dataclass(frozen=True)
class Shard:
    """Whole input files that are encoded together.

    Attributes:
        number: number of the shard, from 0.
        first_id: id of its first row; ids continue from shard to shard.
        parts: its files, in the order of their rows.

    """

    number: int
    first_id: int
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """A name that sorts in the order of the numbers."""
        return f"{self.number:06}"

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(part.rows for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """A hash of its files, 16 hexadecimal digits."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Plan:
    """All shards, in the order of their ids."""

    shards: tuple[Shard, ...] = ()

    @property
    def rows(self) -> int:
        """The number of ids."""
        return sum(shard.rows for shard in self.shards)

    def parts(self) -> Iterator[Part]:
        """Yield all files in the order of their ids."""
        for shard in self.shards:
            yield from shard.parts

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object for `from_json`."""
        return {"shards": [[asdict(part) for part in shard.parts] for shard in self.shards]}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Plan:
        """Read a stored plan."""
        return cls(_numbered([tuple(Part(**part) for part in parts) for parts in stored["shards"]]))


def extended(
    plan: Plan,
    files: Sequence[Part],
    shard_rows: int = SHARD_ROWS,
    is_encoded: Callable[[Shard], bool] = lambda _: True,
) -> Plan:
    """Add new files to a plan as new shards. Existing shards stay, so every row keeps its id.

    A file of a shard that is not encoded yet may be replaced, for example because it was damaged, by one
    with the same number of rows.

    Args:
        plan: the existing plan.
        files: all current files, in order.
        shard_rows: a shard takes files until it has this many rows.
        is_encoded: returns whether a shard is encoded; called only for shards with changed files.

    Raises:
        InputError: a planned file is gone or has changed.

    """
    now = {file.name: file for file in files}
    check_planned(plan, {file.name: file.version for file in files}, is_encoded)
    resized = [part.name for part in plan.parts() if now[part.name].rows != part.rows]
    if resized:
        raise _changed(resized)
    planned = {part.name for part in plan.parts()}
    groups = [tuple(now[part.name] for part in shard.parts) for shard in plan.shards]
    groups += _grouped([file for file in files if file.name not in planned], shard_rows)
    return Plan(_numbered(groups))


def check_planned(
    plan: Plan, versions: Mapping[str, str], is_encoded: Callable[[Shard], bool] = lambda _: True
) -> None:
    """Check that the files of a plan are there, and that those of encoded shards are unchanged.

    Args:
        plan: the plan.
        versions: versions of all current files, by name.
        is_encoded: returns whether a shard is encoded; called only for shards with changed files.

    Raises:
        InputError: a file is missing or has changed; the message names the files.

    """
    if lost := [part.name for part in plan.parts() if part.name not in versions]:
        are, their, files = ("is", "its", "file") if len(lost) == 1 else ("are", "their", "files")
        raise InputError(
            f"{list_shortly(lost)} {are} gone, but {their} rows have ids in the index: put the {files} "
            "back, or build a new index elsewhere",
            "embeddings_uri",
        )
    changed = [
        (shard, names)
        for shard in plan.shards
        if (names := [part.name for part in shard.parts if versions[part.name] != part.version])
    ]
    if names := [name for shard, names in changed if is_encoded(shard) for name in names]:
        raise _changed(names)


def _changed(names: Sequence[str]) -> InputError:
    their, files = ("its", "file") if len(names) == 1 else ("their", "files")
    return InputError(
        f"{list_shortly(names)} changed after {their} rows got ids (on a disk, size and modification "
        f"time are compared): put the old {files} back, with the old time (`cp -p` keeps it, `touch -r` "
        "sets it), and add new ones under new names; or build a new index elsewhere",
        "embeddings_uri",
    )


def _grouped(files: Sequence[Part], shard_rows: int) -> Iterator[tuple[Part, ...]]:
    group: list[Part] = []
    rows = 0
    for file in files:
        if group and rows + file.rows > shard_rows:
            yield tuple(group)
            group, rows = [], 0
        group.append(file)
        rows += file.rows
    if group:
        yield tuple(group)


def _numbered(groups: Sequence[tuple[Part, ...]]) -> tuple[Shard, ...]:
    shards = []
    first_id = 0
    for number, parts in enumerate(groups):
        shards.append(Shard(number, first_id, parts))
        first_id += shards[-1].rows
    return tuple(shards)
