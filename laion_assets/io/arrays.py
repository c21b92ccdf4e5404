"""Type aliases for arrays, and unit vectors."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]
Ids: TypeAlias = NDArray[np.int64]
Bytes: TypeAlias = NDArray[np.uint8]
Mask: TypeAlias = NDArray[np.bool_]


def unit_rows(rows: NDArray[Any]) -> tuple[Floats, Mask]:
    """Scale (n, d) rows to length 1.

    Args:
        rows: rows of any floating-point dtype. Lengths are computed in float64, because the squares of
            very small numbers are zero in float32.

    Returns:
        The unit rows (n, d), and a mask (n,) of usable rows, which are finite and not zero. Other rows
        have arbitrary values.

    """
    wide = rows.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(wide, axis=1)
        vectors: Floats = (wide / lengths[:, None]).astype(np.float32)
    return vectors, np.isfinite(lengths) & (lengths > 0)
