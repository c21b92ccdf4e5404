"""Bits change anywhere in a staged index: nothing crashes, nothing is unclear, nothing stays wrong.

Each mutation is read in a forked process, so that a signal would be seen.
"""

import os
import pickle
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import indices
from helpers.fuzz import Tally, attempts, random_numbers
from helpers.staging import write_source

from laion_assets.index import Index, Metadata, open_folder
from laion_assets.io.errors import InputError
from laion_assets.io.parallel import one_faiss_thread
from laion_assets.staging import open_staged, scrub, stage

MUTATIONS = 60  # of a cache; half as many of each form of index
MEMORY = 16 << 30  # bytes of addresses; damaged sizes may ask for more
SECONDS = 30
DONE, CLEAR, UNCLEAR = range(3)  # how a process ends that no signal kills
NEVER = ("signals", "unclear", "silently wrong")


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


@pytest.fixture(autouse=True)
def one_thread():
    """A forked process has one thread, and OpenMP would wait for those of its parent."""
    with one_faiss_thread():
        yield


def mutated(path: Path, numbers: random.Random) -> str:
    """Change a bit of a file; returns which."""
    content = bytearray(path.read_bytes())
    at, bit = numbers.randrange(len(content)), numbers.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} of {path}"


def count(tally: Tally, what: str, ended: tuple[int, Any], right: Any, where: str) -> None:
    """Count how a read ended: with rows, which are the right ones if these are known, or with a name."""
    end, found = ended
    what = f"{what}: {end} {str(found)[:500]}"
    if end < 0:
        tally.add_broken("signals", what)
    elif end == UNCLEAR or (end == CLEAR and where not in found):
        tally.add_broken("unclear", what)
    elif end == CLEAR:
        tally.add("named")
    elif right is not None and found != right:
        tally.add_broken("silently wrong", what)
    else:
        tally.add("read")


@pytest.mark.faults
@pytest.mark.fuzz
@pytest.mark.parametrize("sparse", [False, True])
def test_a_bit_that_changes_anywhere_in_the_cache_is_named_and_mended(memory, sparse):
    source, cache, intact = write_source(memory / "source"), memory / "cache", memory / "intact"
    numbers, tally = random_numbers(), Tally(f"bits of a {'sparse' if sparse else 'full'} copy")

    def read() -> Any:
        with open_staged(cache) as opened:
            return search(opened.index, opened.metadata)

    stage(str(source), None, cache, sparse=sparse)
    _, right = outcome(read)
    shutil.copytree(cache, intact)
    files = [path for path in sorted(intact.rglob("*")) if path.is_file() and path.stat().st_size]
    for _ in attempts(MUTATIONS):
        shutil.rmtree(cache)
        shutil.copytree(intact, cache)
        what = mutated(cache / numbers.choice(files).relative_to(intact), numbers)
        count(tally, what, outcome(read), right, str(cache))
        stage(str(source), None, cache, sparse=sparse)
        if outcome(read) != (DONE, right) or scrub(cache).damaged:
            tally.add_broken("not mended", what)
    tally.check(*NEVER, "not mended")


@pytest.mark.faults
@pytest.mark.fuzz
@pytest.mark.parametrize(
    ("form", "suffix"),
    [
        (indices.MERGED, indices.ARROW),
        ("single file", indices.ARROW),
        ("IVF Flat", indices.PARQUET),
        ("Flat", indices.PARQUET),
        ("HNSW", indices.ARROW),
        ("IVF4,SQ8", indices.ARROW),
    ],
)
def test_without_checksums_a_changed_bit_never_ends_the_process(memory, form, suffix):
    source = write_source(memory / "source", form, suffix)
    numbers, tally = random_numbers(), Tally(f"bits of {form} with {suffix}, in place")

    def read() -> Any:
        return search(*open_folder(source))

    paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
    contents = {path: path.read_bytes() for path in paths}
    structured = {path: _structure(content) for path, content in contents.items()}
    for _ in attempts(MUTATIONS // 2):
        path = numbers.choice(paths)
        content, at, bit = (
            bytearray(contents[path]),
            numbers.choice(structured[path]),
            numbers.randrange(8),
        )
        content[at] ^= 1 << bit
        path.write_bytes(content)
        count(tally, f"bit {bit} of byte {at} of {path.name}", outcome(read), None, str(source))
        path.write_bytes(contents[path])
    tally.check(*NEVER[:2])


def _structure(content: bytes) -> list[int]:
    """The bytes near zeros: sizes and offsets, of which most are small, but few vectors and texts."""
    zeros = np.frombuffer(content, np.uint8) == 0
    near = np.convolve(zeros, np.ones(7), "same") >= 2
    return np.flatnonzero(near).tolist() or list(range(len(content)))
