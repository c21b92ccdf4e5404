"""What this machine reaches in products of the shape that compares sketches, on all cores.

Prints JSON. What must not live here: anything that is measured for its own sake.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import numpy as np

from laion_assets.io.parallel import in_threads

JOBS = 400


def main() -> None:
    """Measure for sketches of some width."""
    width = int(sys.argv[1])
    rng = np.random.default_rng(0)
    left = rng.standard_normal((512, width), np.float32)
    right = rng.standard_normal((2048, width), np.float32)
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        in_threads(lambda _: left @ right.T, range(JOBS))
        rates.append(JOBS * 2 * 512 * 2048 * width / (time.perf_counter() - started) / 1e9)
    json.dump({"gflops": median(rates)}, sys.stdout)


if __name__ == "__main__":
    main()
