"""Work in threads, as many as faiss uses.

What must not live here: knowledge of the work.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import faiss
from threadpoolctl import threadpool_limits

Job = TypeVar("Job")
Done = TypeVar("Done")


def in_threads(work: Callable[[Job], Done], jobs: Iterable[Job]) -> list[Done]:
    """Do all jobs and return what each returned, in their order.

    Meanwhile a matrix product runs in the one thread that asks for it: threads of BLAS below threads
    of ours would wait for each other.
    """
    threads = faiss.omp_get_max_threads()  # asked first, for it obeys the limit
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, jobs))
