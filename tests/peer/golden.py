"""Writes `tests/golden.npz`: a small index and what clip-retrieval's KnnService answers over it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from helpers import copies
from helpers.answers import Question, ask

ROWS = 3_000
QUERIES = 12
K, NPROBE = 250, 16
THRESHOLDS = (0.9, 0.94)
GOLDEN = Path(__file__).parents[1] / "search" / "golden.npz"


def main() -> None:
    """Build, query and record."""
    images = copies.images(np.random.default_rng(1), ROWS + QUERIES)
    queries = images[ROWS:]
    with TemporaryDirectory() as name:
        folder = Path(name)
        copies.write_two_files(folder, images[:ROWS])
        copies.write_metadata(folder, ROWS)
        kept = {
            (threshold, query): answer
            for threshold in THRESHOLDS
            for query, answer in enumerate(ask(Question(name, K, NPROBE, threshold), queries))
        }
        golden = {
            "populated": np.fromfile(folder / "image.index" / "populated.index", np.uint8),
            "lists": np.fromfile(folder / "image.index" / "merged_index.ivfdata", np.uint8),
        }
    np.savez_compressed(
        GOLDEN,
        **golden,
        rows=ROWS,
        queries=queries,
        k=K,
        nprobe=NPROBE,
        received_ids=[kept[THRESHOLDS[0], query].received[0] for query in range(QUERIES)],
        received_scores=[kept[THRESHOLDS[0], query].received[1] for query in range(QUERIES)],
        answers=np.array(
            [
                (threshold, query, row["id"], row["similarity"], row["url"], row["caption"])
                for (threshold, query), answer in kept.items()
                for row in answer.rows
            ],
            "f8,i4,i8,f4,U40,U40",
        ),
    )
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
