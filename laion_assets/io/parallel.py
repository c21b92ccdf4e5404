"""Run jobs in as many threads as faiss uses."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import TypeVar

import faiss
from threadpoolctl import ThreadpoolController

from laion_assets.io.machine import cores

Argument = TypeVar("Argument")
Result = TypeVar("Result")

SHORT_CALLS = 8  # threads where most calls of NumPy are short: more wait for each other and take longer


def one_blas_thread() -> AbstractContextManager[None]:
    """Return a context in which matrix products and LAPACK run only in the calling thread.

    Use it for small products, for which threads wait longer than they compute, and for work that already
    runs in several threads.
    """
    limited: AbstractContextManager[None] = _libraries().limit(limits=1, user_api="blas")
    return limited


@contextmanager
def one_thread() -> Iterator[None]:
    """Run faiss, BLAS and `in_threads` in one thread, so that sums always have the same order."""
    with one_faiss_thread(), one_blas_thread():
        yield


@contextmanager
def one_faiss_thread() -> Iterator[None]:
    """Run faiss only in the calling thread.

    faiss's worker threads spin for some 20 ms after a call, and take a core from what comes next.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


@cache
def _libraries() -> ThreadpoolController:
    """Find the loaded libraries with their own thread pools; cached, because it takes milliseconds."""
    return ThreadpoolController()


def thread_count() -> int:
    """Return in how many threads work is done: those of faiss, or as many as this process has cores."""
    return min(int(faiss.omp_get_max_threads()), cores())


def in_threads(
    work: Callable[[Argument], Result], arguments: Iterable[Argument], most: int | None = None
) -> list[Result]:
    """Call `work` with each argument and return the results in the order of the arguments.

    Args:
        work: what each thread does.
        arguments: of each call.
        most: threads, at most; `thread_count` if None.

    """
    arguments = list(arguments)
    threads = thread_count()  # read before the limit on BLAS, which lowers it too
    threads = min(threads, most or threads)
    with one_blas_thread():
        # A thread takes longer to start than a small request to compute.
        if threads == 1 or len(arguments) < 2:
            return [work(argument) for argument in arguments]
        with one_thread_each(threads) as pool:
            return list(pool.map(work, arguments))


def one_thread_each(threads: int, name: str = "") -> ThreadPoolExecutor:
    """Return threads in each of which faiss starts no others."""
    return ThreadPoolExecutor(threads, name, faiss.omp_set_num_threads, (1,))


def slices(count: int, size: int) -> list[slice]:
    """Cut `count` items into slices of `size`, of which the last may be shorter."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
