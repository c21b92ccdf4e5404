"""Layouts of published embeddings: pair vector and metadata files by their names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from laion_assets.build.input_files import URI
from laion_assets.io.errors import InputError
from laion_assets.io.text import list_shortly

CLIP_RETRIEVAL, LAION, DATACOMP, PARQUET = "clip-retrieval", "laion", "datacomp", "parquet"
LAYOUTS: Mapping[str, str] = {
    CLIP_RETRIEVAL: "img_emb/img_emb_0.npy and metadata/metadata_0.parquet",
    LAION: "img_emb_0000.npy and metadata_0000.parquet, in any folders",
    DATACOMP: "<name>.npz and <name>.parquet",
    PARQUET: "<name>.parquet with a column of vectors",
}
DEFAULT_KEYS: Mapping[str, str | None] = {
    CLIP_RETRIEVAL: "img_emb",
    LAION: "img_emb",
    DATACOMP: "l14_img",
    PARQUET: None,
}


@dataclass(frozen=True)
class Pair:
    """Names of a vector file and its metadata file; the same name if one file holds both."""

    vectors: str
    metadata: str


def detect_layout(names: Iterable[str], where: str, key: str | None = None) -> str:
    """Return the layout of some files.

    Args:
        names: paths relative to the folder.
        where: the folder, for messages.
        key: which vectors to use, see `list_embeddings`.

    Raises:
        InputError: the files fit no layout, or more than one.

    """
    names = sorted(names)
    numbered = _numbered(names, key or "img_emb", ".npy")
    numbered_metadata = _numbered(names, "metadata", ".parquet")
    archives = [name for name in names if name.endswith(".npz")]
    tables = [name for name in names if name.endswith(".parquet")]
    found: dict[str, str] = {}
    if numbered:
        numbered_all = numbered + numbered_metadata
        usual = (key or "img_emb", "metadata")
        in_place = all(str(PurePosixPath(name).parent) in usual for name, _ in numbered_all)
        found[CLIP_RETRIEVAL if in_place else LAION] = numbered[0][0]
        paired = {name for name, _ in numbered_metadata}
        tables = [name for name in tables if name not in paired]
    if archives:
        found[DATACOMP] = archives[0]
        tables = []
    if tables:
        found[PARQUET] = tables[0]
    if not found:
        raise _nothing_found(names, where, LAYOUTS)
    if len(found) > 1:
        examples = ", ".join(f"{name} ({layout})" for layout, name in found.items())
        raise InputError(
            f"{where} holds files of several layouts, such as {examples}: name the layout to read, "
            "or a folder with only one of them",
            "layout",
        )
    return next(iter(found))


def pair_files(layout: str, names: Iterable[str], where: str, key: str | None = None) -> list[Pair]:
    """Pair vector files with their metadata, in natural order of the vector files' names.

    Args:
        layout: one of `LAYOUTS`; files that are not part of it are left out.
        names: paths relative to the folder.
        where: the folder, for messages.
        key: which vectors to use, see `list_embeddings`.

    Raises:
        InputError: the layout is unknown, there are no files of it, a file lacks its partner, or two
            files have the same partner.

    """
    names = sorted(names, key=natural_order)
    key = key or DEFAULT_KEYS.get(layout)
    if layout not in LAYOUTS:
        raise InputError(
            f"there is no layout {layout!r}: choose one of {', '.join(LAYOUTS)}, or leave it out",
            "layout",
        )
    if layout == PARQUET:
        pairs = [Pair(name, name) for name in names if name.endswith(".parquet")]
    elif layout == DATACOMP:
        archives = [(name, _stem(name)) for name in names if name.endswith(".npz")]
        tables = [(name, _stem(name)) for name in names if name.endswith(".parquet")]
        pairs = _paired(archives, tables, lambda name, suffix: _stem(name) + suffix, ".npz", where)
    else:
        vectors = _numbered(names, str(key), ".npy")
        metadata = _numbered(names, "metadata", ".parquet")
        if layout == CLIP_RETRIEVAL:
            vectors = [(name, n) for name, n in vectors if str(PurePosixPath(name).parent) == key]
            metadata = [
                (name, n) for name, n in metadata if str(PurePosixPath(name).parent) == "metadata"
            ]
        vectors.sort(key=lambda named: int(named[1]))
        stems = {".npy": str(key), ".parquet": "metadata"}

        def partner(name: str, suffix: str) -> str:
            file = f"{stems[suffix]}_{_stem(name).rpartition('_')[2]}{suffix}"  # with leading zeros
            return f"{stems[suffix]}/{file}" if layout == CLIP_RETRIEVAL else file

        pairs = _paired(vectors, metadata, partner, ".npy", where)
    if not pairs:
        raise _nothing_found(names, where, {layout: LAYOUTS[layout]})
    return pairs


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that puts file 2 before file 10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def _numbered(names: Iterable[str], stem: str, suffix: str) -> list[tuple[str, str]]:
    """Return the files named <stem>_<number><suffix>, with their numbers without leading zeros."""
    pattern = re.compile(rf"(?:.*/)?{re.escape(stem)}_0*([0-9]+){re.escape(suffix)}")
    return [(name, found[1]) for name in names if (found := pattern.fullmatch(name))]


def _in_folder_of(others: Sequence[tuple[str, str]], partner: str, name: str) -> str:
    """Put a partner without a folder into that of all other partners, or else into that of the file."""
    if "/" in partner:
        return partner
    folders = {PurePosixPath(other).parent for other, _ in others}
    return str((folders.pop() if len(folders) == 1 else PurePosixPath(name).parent) / partner)


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _paired(
    vectors: Sequence[tuple[str, str]],
    metadata: Sequence[tuple[str, str]],
    partner: Callable[[str, str], str],
    suffix: str,
    where: str,
) -> list[Pair]:
    """Pair files with the same number or stem.

    Args:
        vectors: names of vector files, each with the number or stem that it shares with its partner.
        metadata: the same for metadata files.
        partner: returns the usual name of a file's partner with a suffix; without a folder if it may be
            in any.
        suffix: suffix of the vector files.
        where: the folder, for messages.

    """
    if not vectors:
        return []
    by_common: tuple[dict[str, list[str]], ...] = (defaultdict(list), defaultdict(list))
    for side, named in zip(by_common, (vectors, metadata), strict=True):
        for name, common in named:
            side[common].append(name)
    twice = [" and ".join(found) for side in by_common for found in side.values() if len(found) > 1]
    if twice:
        raise InputError(
            f"{where} has files that clash ({list_shortly(twice, '; ')}): name a folder with a single "
            "set of embeddings",
            URI,
        )
    alone = [
        f"{name} without {_in_folder_of(others, partner(name, other_suffix), name)}"
        for side, others, by_other, other_suffix in (
            (vectors, metadata, by_common[1], ".parquet"),
            (metadata, vectors, by_common[0], suffix),
        )
        for name, common in side
        if common not in by_other
    ]
    if alone:
        raise InputError(
            f"{where} has {list_shortly(alone)}: add the missing files, or move the others elsewhere", URI
        )
    return [Pair(name, by_common[1][common][0]) for name, common in vectors]


def _nothing_found(names: Sequence[str], where: str, layouts: Mapping[str, str]) -> InputError:
    known = "; ".join(f"{layout}: {files}" for layout, files in layouts.items())
    return InputError(
        f"{where} holds no embeddings (found {list_shortly(names)}): name a folder with files in "
        f"a known layout ({known})",
        URI,
    )
