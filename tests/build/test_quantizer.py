"""Training and encoding give what faiss's own index would store, for every type of key."""

import faiss
import numpy as np
import pytest

from laion_assets.build import nearest
from laion_assets.build.encoder import encode
from laion_assets.build.index_key import index_key_for, training_rows
from laion_assets.build.training import train
from laion_assets.demo.build import one_thread
from laion_assets.index.decoder import Decoder
from laion_assets.io.arrays import unit_rows
from laion_assets.io.errors import InputError

DIMENSION = 64
EXHAUSTIVE = 1_000  # efSearch with which HNSW finds the nearest list
KEYS = [
    "IVF1,Flat",
    "IVF32,Flat",
    "OPQ8_64,IVF32,Flat",
    "IVF32,PQ8x8",
    "IVF300_HNSW8,PQ16",
    "OPQ8_56,IVF32,PQ8x8",
    "OPQ8,IVF32,PQ16x8",
    "OPQ16_112,IVF300_HNSW8,PQ16x8",
]


def vectors(rows: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around 40 topics, with little variance in most directions."""
    random = np.random.default_rng(seed)
    topics = np.random.default_rng(9).standard_normal((40, DIMENSION))[random.integers(40, size=rows)]
    own = random.standard_normal((rows, DIMENSION)) * np.arange(1, DIMENSION + 1) ** -0.5
    return unit_rows(topics + 3 * own)[0]


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return vectors(12_000)


def trained(key: str, sample: np.ndarray) -> faiss.Index:
    index = train(key, DIMENSION, sample, log=str)
    ivf = faiss.extract_index_ivf(index)
    quantizer = faiss.downcast_index(ivf.quantizer)
    if isinstance(quantizer, faiss.IndexHNSW):
        quantizer.hnsw.efSearch = EXHAUSTIVE
    return index


def few_rounds(index: faiss.Index) -> None:
    """Let faiss train in seconds."""
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    rotation.niter, rotation.niter_pq_0, rotation.niter_pq = 5, 4, 2
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    ivf.pq.cp.niter, ivf.do_polysemous_training = 10, False


def stored(index: faiss.Index) -> dict[int, tuple[int, bytes]]:
    """The list and the code of each id in a filled index."""
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    found = {}
    for number in range(ivf.nlist):
        size = ivf.invlists.list_size(number)
        if size:
            ids = faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size)
            codes = faiss.rev_swig_ptr(ivf.invlists.get_codes(number), size * ivf.code_size)
            for row, code in zip(ids.tolist(), codes.reshape(size, -1), strict=True):
                found[row] = number, code.tobytes()
    return found


@pytest.mark.parametrize("key", KEYS)
def test_rows_get_the_list_and_the_code_that_faiss_stores(key, sample) -> None:
    index, rows = trained(key, sample), vectors(3_000, seed=1)
    lists, codes = encode(index, rows)
    assert (lists.dtype, codes.dtype) == (np.int64, np.uint8)
    index.add(rows)
    expected = stored(index)
    assert lists.tolist() == [expected[row][0] for row in range(len(rows))]
    theirs = np.frombuffer(b"".join(expected[row][1] for row in range(len(rows))), np.uint8)
    theirs = theirs.reshape(len(rows), -1)
    if key.endswith("Flat"):
        np.testing.assert_allclose(codes.view(np.float32), theirs.view(np.float32), atol=1e-6)
    else:
        # Two entries may be equally near but for rounding.
        assert (codes != theirs).mean() < 1e-4


@pytest.mark.parametrize("key", ["IVF32,Flat", "OPQ16_112,IVF300_HNSW8,PQ16x8"])
def test_a_row_is_encoded_alike_in_any_batch(key, sample) -> None:
    index, rows = trained(key, sample), vectors(500, seed=2)
    whole = encode(index, rows)
    pieces = [encode(index, rows[start : start + 37]) for start in range(0, 500, 37)]
    np.testing.assert_array_equal(whole[0], np.concatenate([lists for lists, _ in pieces]))
    codes = np.concatenate([codes for _, codes in pieces])
    if key.endswith("Flat"):
        np.testing.assert_array_equal(whole[1], codes)
    else:
        assert (whole[1] != codes).mean() < 1e-4
    lists, codes = encode(index, rows[:0])
    assert lists.shape == (0,)
    assert codes.shape == (0, whole[1].shape[1])


def test_of_many_lists_nearly_every_row_gets_the_nearest(sample, monkeypatch) -> None:
    for name, value in (("EXACT_CENTRES", 100), ("GROUP_CENTRES", 8), ("CANDIDATES", 80)):
        monkeypatch.setattr(nearest, name, value)
    index, rows = trained("IVF300_HNSW8,Flat", sample), vectors(3_000, seed=1)
    lists, _ = encode(index, rows)
    _, exact = faiss.extract_index_ivf(index).quantizer.search(rows, 1)
    assert (lists == exact[:, 0]).mean() > 0.98


def test_an_index_of_faiss_is_encoded_with_too(sample) -> None:
    index = faiss.index_factory(DIMENSION, "OPQ8_32,IVF20,PQ8x8", faiss.METRIC_INNER_PRODUCT)
    few_rounds(index)
    with one_thread():
        index.train(sample)
    lists, codes = encode(index, sample[:500])
    index.add(sample[:500])
    expected = stored(index)
    assert lists.tolist() == [expected[row][0] for row in range(500)]
    assert [code.tobytes() for code in codes] == [expected[row][1] for row in range(500)]


def test_training_loses_no_more_than_that_of_faiss(sample) -> None:
    """Cosines of decoded rows, and how evenly lists are filled."""
    key, rows = "OPQ8_64,IVF100,PQ8x8", vectors(3_000, seed=1)
    theirs = faiss.index_factory(DIMENSION, key, faiss.METRIC_INNER_PRODUCT)
    few_rounds(theirs)
    with one_thread():
        theirs.train(sample)
    cosines = {}
    for name, index in (("ours", trained(key, sample)), ("theirs", theirs)):
        lists, codes = encode(index, rows)
        decoder = Decoder(index, np.arange(100), DIMENSION)
        decoded = decoder.decode(np.hstack([lists.astype(np.uint8)[:, None], codes]))
        cosines[name] = (unit_rows(decoded)[0] * rows).sum(axis=1).mean()
    assert cosines["ours"] > cosines["theirs"] - 0.002


def test_the_same_sample_gives_the_same_index(sample) -> None:
    one, two = (
        faiss.serialize_index(train("OPQ8_64,IVF300_HNSW8,PQ8x8", DIMENSION, sample)) for _ in range(2)
    )
    np.testing.assert_array_equal(one, two)


def test_without_lists_an_index_needs_no_training() -> None:
    for key in ("Flat", "HNSW16"):
        index = train(key, DIMENSION, np.empty((0, DIMENSION), np.float32))
        rows = vectors(10)
        lists, codes = encode(index, rows)
        assert not lists.any()
        np.testing.assert_array_equal(codes.view(np.float32), rows)
        assert training_rows(key, 1_000_000) == 0


@pytest.mark.parametrize(
    ("rows", "bytes_per_row", "key"),
    [
        (0, None, "IVF1,Flat"),
        (19_999, 136, "IVF1,Flat"),
        (20_000, None, "IVF256,Flat"),
        (100_000, None, "IVF1024,Flat"),
        (100_000, 3_080, "IVF1024,Flat"),
        (100_000, 136, "OPQ128_896,IVF1024_HNSW32,PQ128x8"),
        (30_000, 40, "OPQ32_224,IVF512,PQ32x8"),
        (999_999, None, "IVF4096,Flat"),
        (1_000_000, None, "OPQ128_896,IVF16384_HNSW32,PQ128x8"),
        (1_000_000, 136, "OPQ128_896,IVF16384_HNSW32,PQ128x8"),
        (10_000_000, 264, "OPQ256_1024,IVF65536_HNSW32,PQ256x8"),
        (5_850_000_000, 137, "OPQ128_896,IVF131072_HNSW32,PQ128x8"),
    ],
)
def test_the_key_is_that_of_autofaiss_as_far_as_rows_suffice(rows, bytes_per_row, key) -> None:
    assert index_key_for(rows, 768, bytes_per_row) == key
    if rows:
        assert training_rows(key, rows) <= rows


def test_a_row_that_may_take_no_code_is_refused() -> None:
    with pytest.raises(InputError, match="12 bytes"):
        index_key_for(1_000_000, 768, 11)


@pytest.mark.parametrize(
    "key",
    [
        "", "IVF", "IVF0,Flat", "IVF16", "PCA32,IVF16,Flat", "IVF16,PQ8x4", "IVF16,PQ8fs", "IVF16,SQ8",
        "IMI2x8,PQ8", "IVF16,PQ7", "OPQ7,IVF16,PQ8", "OPQ8_60,IVF16,PQ8", "HNSW1", "IVF16,Flat,RFlat",
        "Flat ",
    ],
)  # fmt: skip
def test_another_key_is_refused_with_an_example(key, sample) -> None:
    with pytest.raises(InputError) as error:
        train(key, DIMENSION, sample)
    assert f'"{key}"' in str(error.value)
    assert "OPQ128_896,IVF131072_HNSW32,PQ128x8" in str(error.value)


def test_too_few_rows_are_refused_with_how_many_it_takes(sample) -> None:
    for key, needed in (("IVF32,Flat", 1_248), ("IVF2,PQ8x8", 9_984)):
        with pytest.raises(InputError, match=f"{needed:,}") as error:
            train(key, DIMENSION, sample[: needed - 1])
        assert key in str(error.value)
        assert f"{needed - 1:,}" in str(error.value)
