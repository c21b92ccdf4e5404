"""Type aliases for the arrays that modules of the library pass to each other, and unit vectors."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Ids: TypeAlias = NDArray[np.int64]
Bytes: TypeAlias = NDArray[np.uint8]
Mask: TypeAlias = NDArray[np.bool_]


def unit_rows(rows: NDArray[Any]) -> tuple[Floats, Mask]:
    """Scale (n, d) rows to length 1.

    Args:
        rows: of any floating-point dtype. Lengths are computed in float64: in float32 the squares of very
            small numbers are zero.

    Returns:
        The unit rows (n, d), and a mask (n,) of those that are usable, which are not zero and all finite.
        The other rows hold anything.

    """
    wide = rows.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(wide, axis=1)
        vectors: Floats = (wide / lengths[:, None]).astype(np.float32)
    return vectors, np.isfinite(lengths) & (lengths > 0)
