"""Bits change anywhere in a staged index: nothing crashes, nothing is unclear, nothing stays wrong.

Each mutation is read in a forked process, so that a signal would be seen. The seed of the random numbers
is printed; set MUTATIONS_SEED to repeat a run, and MUTATIONS to another number of mutations.
"""

import os
import pickle
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from helpers import indices
from helpers.staging import write_source

from laion_assets.index import Index, Metadata, open_folder
from laion_assets.io.errors import InputError
from laion_assets.staging import open_staged, scrub, stage

MUTATIONS = int(os.environ.get("MUTATIONS", "60"))  # of a cache; half as many of each form of index
MEMORY = 16 << 30  # bytes of addresses; damaged sizes may ask for more
SECONDS = 30
DONE, CLEAR, UNCLEAR = range(3)  # how a process ends that no signal kills


def search(index: Index, metadata: Metadata) -> list[Any]:
    """Read every list and row of an index."""
    queries = np.eye(3, index.dimension, dtype=np.float32)
    hits = index.search(queries, index.rows, index.nlist or None)
    index.recall(queries, hits, 2)
    decoded = index.decoder().decode_to_compare(hits.codes)
    ids = np.unique(hits.ids[hits.ids >= 0])
    rows = metadata.take(ids[metadata.covers(ids)])
    return [hits.ids.tolist(), hits.similarity.tolist(), decoded.tolist(), rows.to_pydict()]


def outcome(read: Callable[[], Any]) -> tuple[int, Any]:
    """Read in a forked process; returns how it ended, below 0 for a signal, and the result or error.

    The parent must not read: threads that it keeps for the next read are missing in the child.
    """
    receiving, sending = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        end, found = UNCLEAR, None
        try:
            end, found = DONE, read()
        except InputError as error:
            end, found = CLEAR, str(error)
        except BaseException as error:
            found = repr(error)
        finally:
            with os.fdopen(sending, "wb") as pipe:
                pickle.dump(found, pipe)
            os._exit(end)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        content = pipe.read()
    end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return end, pickle.loads(content) if end >= 0 else None


@pytest.fixture
def numbers() -> random.Random:
    seed = int(os.environ.get("MUTATIONS_SEED", random.randrange(1 << 32)))
    print(f"MUTATIONS_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(autouse=True)
def one_thread():
    """A forked process has one thread, and OpenMP would wait for those of its parent."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


def mutated(path: Path, numbers: random.Random) -> str:
    """Change a bit of a file; returns which."""
    content = bytearray(path.read_bytes())
    at, bit = numbers.randrange(len(content)), numbers.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} of {path}"


@pytest.mark.faults
@pytest.mark.parametrize("sparse", [False, True])
def test_a_bit_that_changes_anywhere_in_the_cache_is_named_and_mended(memory, numbers, sparse):
    source, cache, intact = write_source(memory / "source"), memory / "cache", memory / "intact"

    def read() -> Any:
        with open_staged(cache) as opened:
            return search(opened.index, opened.metadata)

    stage(str(source), None, cache, sparse=sparse)
    _, right = outcome(read)
    shutil.copytree(cache, intact)
    files = [path for path in sorted(intact.rglob("*")) if path.is_file() and path.stat().st_size]
    ends: Counter[int] = Counter()
    for _ in range(MUTATIONS):
        shutil.rmtree(cache)
        shutil.copytree(intact, cache)
        what = mutated(cache / numbers.choice(files).relative_to(intact), numbers)
        end, found = outcome(read)
        assert (end, found) == (DONE, right) or (end == CLEAR and str(cache) in found), (
            f"{what}: {end} {found}"
        )
        ends[end] += 1
        stage(str(source), None, cache, sparse=sparse)
        assert outcome(read) == (DONE, right), what
        assert not scrub(cache).damaged, what
    print(f"{ends[CLEAR]} of {MUTATIONS} named, the others of no consequence")
    assert ends[CLEAR]


@pytest.mark.faults
@pytest.mark.parametrize("form", [indices.MERGED, "single file", "IVF Flat", "Flat", "HNSW"])
def test_without_checksums_a_changed_bit_never_ends_the_process(memory, numbers, form):
    source = write_source(memory / "source", form)

    def read() -> Any:
        return search(*open_folder(source))

    paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
    contents = {path: path.read_bytes() for path in paths}
    structured = {path: _structure(content) for path, content in contents.items()}
    for _ in range(MUTATIONS // 2):
        path = numbers.choice(paths)
        content, at = bytearray(contents[path]), numbers.choice(structured[path])
        content[at] ^= 1 << numbers.randrange(8)
        path.write_bytes(content)
        end, found = outcome(read)
        assert end in (DONE, CLEAR), f"byte {at} of {path.name}: {end} {found}"
        path.write_bytes(contents[path])


def _structure(content: bytes) -> list[int]:
    """The bytes near zeros: sizes and offsets, of which most are small, but few vectors and texts."""
    zeros = np.frombuffer(content, np.uint8) == 0
    near = np.convolve(zeros, np.ones(7), "same") >= 2
    return np.flatnonzero(near).tolist() or list(range(len(content)))
