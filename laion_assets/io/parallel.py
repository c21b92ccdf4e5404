"""Work in threads, as many as faiss uses.

What must not live here: knowledge of the work.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from typing import TypeVar

import faiss
from threadpoolctl import ThreadpoolController

Job = TypeVar("Job")
Done = TypeVar("Done")


def one_blas_thread() -> AbstractContextManager[None]:
    """A context in which matrix products and LAPACK use the thread that asks, and no other.

    For small work, where more threads lose more in waiting for each other than they win, and for work
    that is in threads of its own already.
    """
    limited: AbstractContextManager[None] = _libraries().limit(limits=1, user_api="blas")
    return limited


@cache
def _libraries() -> ThreadpoolController:
    """The libraries with threads of their own; to find them takes milliseconds."""
    return ThreadpoolController()


def in_threads(work: Callable[[Job], Done], jobs: Iterable[Job]) -> list[Done]:
    """Do all jobs and return what each returned, in their order."""
    threads = faiss.omp_get_max_threads()  # asked first, for it obeys the limit
    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, jobs))
