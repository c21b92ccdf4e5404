"""Metadata files for tests: drawn by Hypothesis, in every type in which files store a column."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from helpers import indices
from hypothesis import strategies as st

TEXT = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.null()]
NUMBERS = [pa.int16(), pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.null()]
WORDS = st.none() | st.text(st.characters(codec="utf-8"), max_size=6)
BYTES = st.none() | st.binary(max_size=6)
MOMENTS = st.none() | st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1))
# What a column holds, and the types in which files may store it.
COLUMNS: dict[str, tuple[st.SearchStrategy[Any], list[pa.DataType]]] = {
    "url": (WORDS, TEXT),
    "caption": (WORDS, TEXT),
    "NSFW": (WORDS, TEXT),
    "WIDTH": (st.none() | st.integers(0, 1 << 14), NUMBERS),
    "punsafe": (st.none() | st.floats(0, 1, width=32), [pa.float32(), pa.float64(), pa.null()]),
    "md5": (BYTES, [pa.binary(), pa.large_binary(), pa.null()]),
    "thumbnail": (BYTES, [pa.binary(), pa.large_binary(), pa.null()]),
    "LICENSE": (st.none() | st.booleans(), [pa.bool_(), pa.null()]),
    "aesthetic": (MOMENTS, [pa.timestamp("us"), pa.timestamp("ns")]),
    "LANGUAGE": (
        st.none() | st.lists(WORDS, max_size=3),
        [pa.list_(pa.string()), pa.list_(pa.large_string())],
    ),
}


def write(
    folder: Path, tables: list[pa.Table], suffix: str = indices.ARROW, batch: int = 7
) -> list[Path]:
    """One file for each table, named in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}{suffix}" for number in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        indices.WRITERS[suffix](path, table, batch)
    return paths


@st.composite
def metadata_files(draw: st.DrawFn) -> list[pa.Table]:
    names = ["url", *draw(st.lists(st.sampled_from(sorted({*COLUMNS} - {"url"})), unique=True))]
    return [
        pa.table({name: draw(arrays(name, rows)) for name in names})
        for rows in draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    ]


@st.composite
def arrays(draw: st.DrawFn, name: str, rows: int) -> pa.Array:
    held, kinds = COLUMNS[name]
    kind = draw(st.sampled_from(kinds))
    values = st.none() if kind == pa.null() else held
    made = draw(st.lists(values, min_size=rows, max_size=rows))
    if pa.types.is_dictionary(kind):
        return pa.array(made, kind.value_type).cast(kind)
    return pa.array(made, kind)
