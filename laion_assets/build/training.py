"""Train an index: the centres of its lists, then a rotation and codebooks for the residuals.

A residual is the difference between a vector and the centre of its list. Encoding applies to residuals,
so the rotation is fitted to them. faiss trains the rotation first, on whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import faiss
import numpy as np

from laion_assets.build import codebooks as books
from laion_assets.build.centres import centres_of
from laion_assets.build.index_key import ROWS_PER_LIST, SAMPLED_ROWS, IndexKey
from laion_assets.build.nearest import Centres, unit_or_zero
from laion_assets.build.rotation import main_directions, rotation_of
from laion_assets.io.arrays import Floats
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import one_faiss_thread
from laion_assets.io.text import count

ROTATION_ROUNDS, ROTATION_ROWS = 4, 32_768
CODEBOOK_ROUNDS = 8
GRAPH_BREADTH = 100  # faiss's efConstruction
SEARCH_BREADTH = 64  # faiss's efSearch, until a search sets it
GRAPH_IN_ONE_THREAD = 32_768  # up to this number of lists, the graph is reproducible


def train(
    key: str,
    dimension: int,
    sample: Floats,
    *,
    random_seed: int = 0,
    rows_per_centre: int = ROWS_PER_LIST,
    log: Callable[[str], object] = print,
) -> Any:
    """Return an empty inner-product index, trained on a sample.

    Up to 32,768 lists, the same sample, seed and number of threads give the same index. With more lists,
    several threads build the graph over the lists, and only its links may differ.

    Args:
        key: faiss factory key, see `IndexKey`.
        dimension: dimension of the vectors.
        sample: (n, dimension) float32 rows of length 1, drawn from all rows.
        random_seed: seed of the random generator.
        rows_per_centre: rows needed per list and per codebook entry.
        log: called with each log line.

    Raises:
        InputError: the key is not supported or needs more rows.

    """
    parsed = IndexKey.parse(key, dimension)
    if sample.ndim != 2 or sample.shape[1] != dimension:
        raise InputError(f"training rows have {sample.shape[-1]} dimensions instead of {dimension}")
    index = faiss.index_factory(dimension, key, faiss.METRIC_INNER_PRODUCT)
    if not parsed.lists:
        return index
    parsed.check_rows(len(sample), rows_per_centre)
    random = np.random.default_rng(random_seed)
    base, rows = None, sample
    coded = random.permutation(len(sample))[:SAMPLED_ROWS]
    if parsed.width and parsed.width < dimension:
        base = main_directions(sample[coded], parsed.width)
        rows = sample @ base.T
    log(f"placing the centres of {count(parsed.lists, 'list')} among {len(rows):,} rows")
    centres = centres_of(rows, parsed.lists, random)
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    if parsed.opq or parsed.pq:
        remaining = rows[coded]
        remaining -= centres[Centres(centres).nearest(remaining)]
        codebooks: Floats | None = None
        if parsed.opq:
            log(f"fitting the rotation to {min(len(coded), ROTATION_ROWS):,} rows")
            width = parsed.width or dimension
            rotation, codebooks = rotation_of(
                remaining[:ROTATION_ROWS], parsed.opq, width, ROTATION_ROUNDS, random
            )
            _set_rotation(index, rotation if base is None else rotation @ base)
            remaining, centres = remaining @ rotation.T, centres @ rotation.T
        if parsed.pq:
            log(f"fitting {parsed.pq} codebooks")
            _set_codebooks(ivf, _codebooks(remaining, parsed, codebooks, random))
    _set_centres(ivf, centres)
    index.is_trained = ivf.is_trained = True
    return index


def _codebooks(
    rows: Floats, key: IndexKey, initial: Floats | None, random: np.random.Generator
) -> Floats:
    if initial is None or key.opq != key.pq:
        initial = books.random_codebooks(rows, key.pq, random)
    return books.kmeans(initial, rows, CODEBOOK_ROUNDS, random)


def _set_rotation(index: Any, matrix: Floats) -> None:
    transform = faiss.downcast_VectorTransform(index.chain.at(0))
    faiss.copy_array_to_vector(np.ascontiguousarray(matrix, np.float32).ravel(), transform.A)
    transform.is_trained = transform.is_orthonormal = True


def _set_codebooks(ivf: Any, codebooks: Floats) -> None:
    faiss.copy_array_to_vector(np.ascontiguousarray(codebooks, np.float32).ravel(), ivf.pq.centroids)


def _set_centres(ivf: Any, centres: Floats) -> None:
    quantizer = faiss.downcast_index(ivf.quantizer)
    is_graph = isinstance(quantizer, faiss.IndexHNSW)
    if is_graph:
        quantizer.hnsw.efConstruction, quantizer.hnsw.efSearch = GRAPH_BREADTH, SEARCH_BREADTH
    few = is_graph and len(centres) <= GRAPH_IN_ONE_THREAD
    with one_faiss_thread() if few else nullcontext():
        quantizer.add(np.ascontiguousarray(unit_or_zero(centres), np.float32))
