"""Search an index around the vectors of a file, and print the results.

Run `make demo` first, then `python examples/search.py`, or name an index and a Parquet file with a column
`embedding`:

    python examples/search.py /mnt/index data/output/seed_embeddings/interiors.parquet
"""

import sys

import numpy as np
import pyarrow.parquet as pq

from laion_assets.search import search


def main(index: str = "data/index", seeds: str = "data/output/seed_embeddings/fruit.parquet") -> None:
    """Print the two nearest images of each vector."""
    vectors = np.array(pq.read_table(seeds, columns=["embedding"])["embedding"].to_pylist())
    found = search(index, vectors, 20)
    print(f"{found.num_rows} images around {len(vectors)} vectors")
    for row in found.select(["seed", "rank", "similarity", "url"]).to_pylist():
        if row["rank"] <= 2:
            print(f"{row['seed']:4} {row['rank']:4} {row['similarity']:6.3f}  {row['url']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
