"""Sparse staging: what is copied or allocated, and that requests find the same as in a full copy."""

import multiprocessing
import os
import random
import re
import shutil
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import indices
from helpers.project import contents
from helpers.searches import digest_of_searches
from helpers.sparse import page, present_pages
from helpers.staging import (
    LISTS,
    POPULATED,
    Steps,
    is_readable,
    killed_at,
    staged_data,
    write_source,
)

from laion_assets.index import arrow_layout
from laion_assets.search.retrieval import Request, retrieve_table
from laion_assets.staging import NotStagedError, open_staged, stage, verified_manifest

# --- what is staged -------------------------------------------------------------------------------


def everything(cache: Path) -> pa.Table:
    with open_staged(cache) as opened:
        return opened.metadata.take(np.arange(len(opened.metadata)))


def test_files_that_are_read_whole_are_copied_and_the_others_allocated(source, cache):
    done = stage(str(source), None, cache, sparse=True)
    assert (done.fetched, done.bytes_fetched) == (5, (source / POPULATED).stat().st_size)
    assert {file.name for file in done.manifest.files if not file.sparse} == {POPULATED}
    assert stage(str(source), None, cache, sparse=True).bytes_fetched == 0
    assert everything(cache)["url"][7].as_py() == "https://example.org/0/7.jpg"


@pytest.mark.parametrize(
    ("form", "suffix"),
    [("Flat", indices.ARROW), ("single file", indices.PARQUET), (indices.MERGED, indices.PARQUET)],
)
def test_forms_that_cannot_be_read_in_parts_are_copied_whole(tmp_path, form, suffix):
    source, cache = write_source(tmp_path / "source", form, suffix), tmp_path / "cache"
    done = stage(str(source), None, cache, sparse=True)
    whole = {file.name for file in done.manifest.files if not file.sparse}
    names = {file.name for file in done.manifest.files}
    assert names - whole == {n for n in names if n.endswith(".arrow") or n == LISTS}
    query = np.eye(1, indices.DIMENSION, dtype=np.float32)
    with open_staged(cache) as opened:
        ids = opened.index.search(query, 40, opened.index.nlist or None).ids[0]
        urls = opened.metadata.take(ids)["url"].to_pylist()
    assert urls == [f"https://example.org/0/{number}.jpg" for number in ids]


def test_between_the_modes_nothing_is_lost_and_no_part_is_taken_for_a_whole(source, cache):
    stage(str(source), None, cache)
    kept = stage(str(source), None, cache, sparse=True)
    assert (kept.fetched, any(file.sparse for file in kept.manifest.files)) == (0, False)
    shutil.rmtree(cache)
    stage(str(source), None, cache, sparse=True)
    everything(cache)
    again = stage(str(source), None, cache)
    assert again.fetched == 4
    assert not any(file.sparse for file in again.manifest.files)
    assert staged_data(cache) == contents(source)


def bytes_to_headers(path: Path) -> int:
    """From the first to the last header of a file whose headers are near to each other."""
    content = path.read_bytes()
    ((start, _),) = arrow_layout.footer(len(content), content[-arrow_layout.TAIL :]).tolist()
    headers = arrow_layout.blocks(content[start:], len(content)).headers
    return int(headers[-1, 1] - headers[0, 0])


def test_another_version_begins_empty_and_unchanged_files_keep_their_pages(source, cache, tmp_path):
    stage(str(source), None, cache, sparse=True)
    everything(cache)
    write_source(tmp_path / "other", seed=1)
    changed = source / "metadata" / "001.arrow"
    shutil.copy(tmp_path / "other" / "metadata" / "001.arrow", changed)
    stage(str(source), None, cache, sparse=True)
    with open_staged(cache) as opened:
        urls = opened.metadata.take(np.arange(40))["url"].to_pylist()
        # Its headers are read before the pages that hold them, which are all of this tiny file.
        assert opened.fetched.fetched == bytes_to_headers(changed) + changed.stat().st_size
    assert [url.split("/")[3] for url in urls] == ["0"] * 14 + ["1"] * 13 + ["0"] * 13


@pytest.mark.parametrize("lost", [LISTS, f"{LISTS}.pages", "metadata/000.arrow.pages"])
def test_a_file_or_its_map_that_is_gone_is_allocated_again(source, cache, lost):
    stage(str(source), None, cache, sparse=True)
    expected = everything(cache)
    (cache / lost).unlink()
    with pytest.raises(NotStagedError, match=re.escape(lost.removesuffix(".pages"))):
        verified_manifest(cache)
    stage(str(source), None, cache, sparse=True)
    assert everything(cache) == expected


def map_of_another_file(cache: Path) -> None:
    shutil.copy(cache / "metadata/001.arrow.pages", cache / "metadata/000.arrow.pages")


def map_cut_to_nothing(cache: Path) -> None:
    os.truncate(cache / "metadata/000.arrow.pages", 0)


def file_cut(cache: Path) -> None:
    os.truncate(cache / "metadata/000.arrow", 100)


@pytest.mark.parametrize("damage", [map_of_another_file, map_cut_to_nothing, file_cut])
def test_a_file_or_its_map_that_is_another_is_named_and_staged_again(source, cache, damage):
    stage(str(source), None, cache, sparse=True)
    expected = everything(cache)
    damage(cache)
    with pytest.raises(NotStagedError, match=r"metadata/000\.arrow.*: stage the index again"):
        verified_manifest(cache)
    assert stage(str(source), None, cache, sparse=True).fetched == 1
    assert everything(cache) == expected


def test_pages_that_the_disk_lost_without_a_change_of_size_give_no_wrong_row(source, cache):
    stage(str(source), None, cache, sparse=True)
    expected = everything(cache)
    assert is_readable(cache)
    for file in verified_manifest(cache).files:
        if file.sparse:
            (cache / file.path).write_bytes(bytes(file.size))
    log: list[str] = []
    with open_staged(cache, log=log.append) as opened:
        assert opened.metadata.take(np.arange(len(opened.metadata))) == expected
        assert opened.fetched.fetched > 0
    assert is_readable(cache)
    assert any("metadata/000.arrow differ from the checksums" in line for line in log)


@pytest.mark.parametrize("step", range(12))
def test_an_allocation_that_is_killed_is_finished_by_the_next_run(source, cache, monkeypatch, step):
    def until_killed(steps: Steps) -> None:
        steps.count(monkeypatch, [(os, "fsync"), (os, "pwrite"), (os, "fdatasync")])
        stage(str(source), None, cache, sparse=True)

    killed_at(step, until_killed)
    with suppress(NotStagedError):
        verified_manifest(cache)
        everything(cache)
    stage(str(source), None, cache, sparse=True)
    assert everything(cache)["url"][39].as_py() == "https://example.org/0/39.jpg"


# --- what requests find ---------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [Request(50, 0.9), Request(40, 0.9, keep=40)], ids=["once", "goes on"])
def test_what_a_notebook_finds_is_the_same_with_and_without_a_copy(scattered, tmp_path, asked):
    queries = indices.random_rows(np.random.default_rng(5), 40)
    tables = []
    for sparse in (False, True):
        cache = tmp_path / str(sparse)
        stage(str(scattered), None, cache, sparse=sparse)
        with open_staged(cache) as opened:
            table, found = retrieve_table(opened.index, opened.metadata, queries, asked, per_seed=True)
            tables.append(table)
    assert tables[0] == tables[1]
    assert asked.keep is None or found.funnel.requested > len(queries) * asked.k


# Processes are forks of a server that has imported the library, but has not used it.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["laion_assets.search.retrieval", "laion_assets.staging"])


class Searches:
    """A process that searches a cache in some order."""

    def __init__(self, cache: Path, budget: int, order: int) -> None:
        self._result, sender = FORKSERVER.Pipe(duplex=False)
        self.process: BaseProcess = FORKSERVER.Process(
            target=digest_of_searches, args=(cache, budget, order, sender)
        )
        self.process.start()
        sender.close()

    def digest(self) -> str:
        found: str = self._result.recv()
        self.process.join(60)
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.join(60)


@pytest.mark.faults
def test_several_processes_some_of_them_killed_all_find_what_a_full_copy_has(scattered, memory):
    cache = memory / "cache"
    stage(str(scattered), None, memory / "full")
    expected = Searches(memory / "full", 0, 0).digest()
    stage(str(scattered), None, cache, sparse=True)
    budget = 2_500_000
    whole = sum(path.stat().st_size for path in scattered.rglob("*") if path.is_file())
    assert budget < whole / 2
    chance = random.Random(0)
    lucky = [Searches(cache, budget, order) for order in range(2)]
    unlucky = [Searches(cache, budget, order) for order in range(2, 6)]
    for process in unlucky:
        time.sleep(chance.uniform(0.2, 1))
        process.kill()
    assert {process.digest() for process in lucky} == {expected}
    assert Searches(cache, budget, 99).digest() == expected
    manifest = verified_manifest(cache)
    wrong = 0
    for file in manifest.files:
        if file.sparse:
            there, right = (cache / file.path).read_bytes(), (scattered / file.name).read_bytes()
            for number in present_pages(cache / file.path, file.size, file.checksum):
                wrong += there[page(number)] != right[page(number)]
    assert wrong == 0
    assert manifest.bytes_on_disk(cache) < budget * 1.2 + 100_000
