"""Search an index around the seeds of a set, and print what was found.

Run `make demo` first, then `python examples/search.py`, or name an index, a seeds folder and a set:

    python examples/search.py /mnt/index data/seeds interiors
"""

import sys

from laion_assets.search import search
from laion_assets.seeds.seed_sets import find_seed_set, read_seeds


def main(index: str = "data/index", seeds_folder: str = "data/seeds", name: str = "fruit") -> None:
    """Print the two nearest images of each seed."""
    seeds = read_seeds(seeds_folder, find_seed_set(seeds_folder, name))
    found = search(index, seeds.embeddings, 20)
    print(f"{found.num_rows} images around {len(seeds.embeddings)} seeds")
    for row in found.select(["seed", "rank", "similarity", "url"]).to_pylist():
        if row["rank"] <= 2:
            print(f"{row['seed']:4} {row['rank']:4} {row['similarity']:6.3f}  {row['url']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
