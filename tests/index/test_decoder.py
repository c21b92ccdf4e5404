"""Decoders turn codes into the vectors that the index itself reconstructs, whole or of some lists."""

import numpy as np
import pytest
from helpers import indices

from laion_assets.index import Decoder, Index
from laion_assets.index.decoder import _Reflection

ROWS = indices.random_rows(np.random.default_rng(4), 80)


MORE_DIMENSIONS = "OPQ8_24,IVF4_HNSW8,PQ8x8"  # than the vectors have, as LAION-5B's index


@pytest.mark.parametrize("form", [*indices.FORMS, MORE_DIMENSIONS])
def test_decoders_of_some_lists_and_merged_ones_decode_as_the_index_does(tmp_path, form):
    indices.write_index(tmp_path, ROWS, form)
    index = Index(*indices.index_paths(tmp_path))
    hits = index.search(ROWS, len(ROWS), index.nlist)
    ids, first = np.unique(hits.ids[hits.ids >= 0], return_index=True)
    codes = hits.codes[hits.code[hits.ids >= 0][first]]
    assert len(codes) > len(ROWS) // 2  # HNSW finds no more than a part
    stored = indices.reconstructed(tmp_path)[ids]
    halves = [np.arange(0, len(ids), 2), np.arange(1, len(ids), 2)]
    small = [index.decoder(index.lists_of(codes[half])) for half in halves]
    for half, decoder in zip(halves, small, strict=True):
        read_back = Decoder.from_bytes(decoder.to_bytes())
        np.testing.assert_allclose(read_back.decode(codes[half]), stored[half], atol=1e-5)
    for decoder in (index.decoder(), small[0].merged(small[1])):
        np.testing.assert_allclose(decoder.decode(codes), stored, atol=1e-5)
        compared = decoder.decode_to_compare(codes)
        fewer = form == "single file, fewer dimensions"
        assert compared.shape[1] == (8 if fewer else indices.DIMENSION)
        np.testing.assert_allclose(compared @ compared.T, stored @ stored.T, atol=1e-4)


@pytest.mark.parametrize(("width", "gone"), [(20, 0), (20, 5), (20, 19), (10, 5)])
@pytest.mark.parametrize("first", [0, 1, -1], ids=["the first axes", "the next axes", "any"])
def test_vectors_without_some_directions_keep_the_inner_products_of_the_rest(width, gone, first):
    random = np.random.default_rng(5)
    every = np.eye(width, dtype=np.float32)
    if first < 0:
        every = np.linalg.qr(random.standard_normal((width, width)).astype(np.float32))[0]
    directions = np.roll(every, -max(first, 0) * gone, axis=1)[:, :gone]
    vectors = random.standard_normal((30, width)).astype(np.float32)
    rest = vectors - vectors @ directions @ directions.T
    shorter = _Reflection.of(directions).rest_of(vectors)
    assert shorter.shape == (30, width - gone)
    np.testing.assert_allclose(shorter @ shorter.T, rest @ rest.T, atol=1e-4)
