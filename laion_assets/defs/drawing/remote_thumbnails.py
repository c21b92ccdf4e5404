"""Make thumbnails from the images' hosts if the index has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from laion_assets.io.parallel import in_threads
from laion_assets.io.remote_images import BOUNDS, Bounds, NotFetched, fetch_images
from laion_assets.search.safety import marked_unsafe
from laion_assets.seeds.decoding import BadImageError, PixelBudget, thumbnail_of

FETCHED = 48  # rows of a table whose images are fetched
UNSAFE = NotFetched("is marked as unsafe by the index")


def remote_thumbnails(rows: pa.Table, bounds: Bounds = BOUNDS) -> list[bytes | NotFetched]:
    """Fetch the images of rows and make thumbnails of them; only call this if the user has allowed it.

    Args:
        rows: n rows of `url` and the index's safety columns; rows marked as unsafe are left out.
        bounds: limits on fetching.

    Returns:
        A WebP image for each row, or the reason why there is none.

    """
    unsafe = marked_unsafe(rows)
    wanted = [url for url, left_out in zip(rows["url"].to_pylist(), unsafe, strict=True) if not left_out]
    budget = PixelBudget()
    made = iter(in_threads(lambda image: _thumbnail(image, budget), fetch_images(wanted, bounds)))
    return [UNSAFE if left_out else next(made) for left_out in unsafe]


def reasons(found: Sequence[bytes | NotFetched]) -> str:
    """Count the reasons why images were not fetched, the most frequent first; empty without any."""
    counted = Counter(image.reason for image in found if isinstance(image, NotFetched))
    return "; ".join(f"{count} {reason}" for reason, count in counted.most_common())


def _thumbnail(image: bytes | NotFetched, budget: PixelBudget) -> bytes | NotFetched:
    if isinstance(image, NotFetched):
        return image
    try:
        return thumbnail_of(image, budget)
    except BadImageError as error:
        return NotFetched(str(error))
