"""Build an index folder from embeddings and their URLs, and search it.

    python examples/own_index.py embeddings.npy metadata.parquet my_index

`embeddings.npy` holds a matrix (n, d). Row i of `metadata.parquet` describes row i of it, with columns
`url` and `caption`. A flat index compares every row. For more than a few million rows, build a smaller
type of index (docs/build.md).
"""

import shutil
import sys
from pathlib import Path

import faiss
import numpy as np

from laion_assets.search import search


def main(embeddings: str, metadata: str, folder: str) -> None:
    """Write `image.index` and `metadata/`, and search for the images nearest to the first one."""
    vectors = np.load(embeddings).astype(np.float32)
    faiss.normalize_L2(vectors)
    index = faiss.index_factory(vectors.shape[1], "Flat", faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    Path(folder, "metadata").mkdir(parents=True)
    faiss.write_index(index, str(Path(folder, "image.index")))
    shutil.copy(metadata, Path(folder, "metadata", "metadata_0.parquet"))

    for row in search(folder, vectors[:1], 5).to_pylist():
        print(f"{row['id']:8} {row['similarity']:6.3f}  {row['url']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
