"""Threads are limited only for a while."""

import faiss
import pytest

from laion_assets.io.parallel import one_faiss_thread


def test_faiss_has_its_threads_again_after_work_in_one_even_if_that_fails() -> None:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        with one_faiss_thread():
            assert faiss.omp_get_max_threads() == 1
        assert faiss.omp_get_max_threads() == 3
        with pytest.raises(KeyError), one_faiss_thread():
            raise KeyError
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)
