"""Find the rows that the metadata marks as unsafe to show."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.io.arrays import Mask

SAFETY_COLUMNS = ("punsafe", "NSFW", "nsfw")
UNSAFE_FROM = 0.5  # LAION's threshold for the probability that an image is unsafe
SAFE_WORDS = ("UNLIKELY", "FALSE", "SFW", "SAFE")  # LAION's other words are UNSURE and NSFW


def marked_unsafe(rows: pa.Table) -> Mask:
    """Return which rows any of their safety columns marks as unsafe, shape (n,).

    A row is unsafe if its probability is 0.5 or more, missing or NaN, or if its word is neither LAION's
    UNLIKELY nor a synonym. Rows without a safety column are not marked.
    """
    unsafe = np.zeros(len(rows), np.bool_)
    for name in SAFETY_COLUMNS:
        if name in rows.column_names:
            unsafe |= ~_safe(rows[name])
    return unsafe


def _safe(column: pa.ChunkedArray) -> Mask:
    kind = column.type
    if pa.types.is_boolean(kind):
        passed = pc.invert(column)
    elif pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind):
        passed = pc.less(column.cast(pa.float64()), UNSAFE_FROM)  # NaN fails
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        passed = pc.is_in(pc.utf8_upper(column), pa.array(SAFE_WORDS))
    else:
        return np.zeros(len(column), np.bool_)
    safe: Mask = pc.fill_null(passed, False).to_numpy()
    return safe
