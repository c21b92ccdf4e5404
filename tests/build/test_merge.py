"""Shards become one file of lists: byte for byte, in little memory, and never from damaged files."""

import io
import tempfile
import tracemalloc
from itertools import chain
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laion_assets.build import merge
from laion_assets.build.merge import merge_lists, with_lists_on_disk
from laion_assets.build.shards import BATCH_ROWS, CODES, IDS, SIZES, write_metadata
from laion_assets.build.workspace import Workspace
from laion_assets.io.errors import InputError
from laion_assets.io.storage import Sink

WIDTH = 4


def write_shard(folder: Path, first: int, lists: Any, count: int, width: int = WIDTH):
    """Write a shard whose rows are in these lists; the codes are drawn from the ids."""
    shard = Workspace(str(folder))
    order = np.argsort(lists, kind="stable")
    ids = (first + np.arange(len(lists)))[order].astype(np.int64)
    codes = codes_of(ids, width)
    checksums = {}
    for name, content in ((CODES, codes), (IDS, ids)):
        with shard.new(name) as sink:
            sink.write(content.tobytes())
        checksums[name] = sink.checksum
    sizes = np.bincount(lists, minlength=count).astype(np.int64)
    checksums[SIZES] = shard.write_array(SIZES, sizes)
    return shard, checksums


def codes_of(ids: Any, width: int = WIDTH) -> Any:
    return ((ids[:, None] * 7 + np.arange(width)) % 251).astype(np.uint8)


@given(
    shards=st.lists(st.lists(st.integers(0, 5), max_size=30), min_size=1, max_size=4),
    at_once=st.integers(1, 300),
)
@settings(max_examples=40)
def test_the_lists_of_all_shards_follow_each_other_codes_then_ids_and_faiss_reads_them(shards, at_once):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "MERGED_AT_ONCE", at_once)
        root, first, written = Path(made), 0, []
        for number, lists in enumerate(shards):
            written.append(write_shard(root / str(number), first, np.array(lists, int), 6))
            first += len(lists)
        sink = io.BytesIO()
        sizes = merge_lists(written, WIDTH, 6, Sink(sink))
        of_all = np.array([*chain(*shards)], int)
        members = [np.flatnonzero(of_all == number) for number in range(6)]
        assert sizes.tolist() == [len(ids) for ids in members]
        expected = [codes_of(ids).tobytes() + ids.astype(np.int64).tobytes() for ids in members]
        assert sink.getvalue() == b"".join(expected)
        if not len(of_all):
            return  # faiss cannot map an empty file
        quantizer = faiss.IndexFlatIP(1)
        quantizer.add(np.arange(6, dtype=np.float32)[:, None])
        index = faiss.IndexIVFFlat(quantizer, 1, 6, faiss.METRIC_INNER_PRODUCT)
        index.is_trained = True
        made_index = with_lists_on_disk(index, sizes, WIDTH, "lists")
        faiss.write_index(made_index, str(root / "index"))
        (root / "lists").write_bytes(sink.getvalue())
        read = faiss.read_index(str(root / "index"), faiss.IO_FLAG_ONDISK_SAME_DIR)
        assert read.ntotal == len(of_all)
        for number, ids in enumerate(members):
            if len(ids):
                held = faiss.rev_swig_ptr(read.invlists.get_ids(number), len(ids))
                assert held.tolist() == ids.tolist()


def test_memory_holds_a_few_groups_of_lists_and_not_the_rows(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    shards = [
        write_shard(tmp_path / str(n), n * 100_000, random.integers(0, 500, 100_000), 500, width=128)
        for n in range(3)
    ]
    total, at_once = 3 * 100_000 * 136, 1 << 20
    monkeypatch.setattr(merge, "MERGED_AT_ONCE", at_once)
    tracemalloc.start()
    try:
        with (tmp_path / "lists").open("wb") as file:
            merge_lists(shards, 128, 500, Sink(file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "lists").stat().st_size == total
    assert peak < 10 * at_once < total / 3


@pytest.mark.parametrize("name", [CODES, IDS, SIZES])
@pytest.mark.parametrize("damage", ["gone", "truncated", "flipped", "swapped"])
def test_a_damaged_shard_is_named(tmp_path, name, damage):
    shard = write_shard(tmp_path / "0", 0, np.array([0, 1, 1, 2]), 3)
    path = tmp_path / "0" / name
    content = path.read_bytes()
    other = {
        "truncated": content[:-1],
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "swapped": content[:-16] + content[-8:] + content[-16:-8],  # the same number of rows
    }
    path.unlink() if damage == "gone" else path.write_bytes(other[damage])
    with pytest.raises(InputError, match=f"{path} .*remove {path.parent}") as refused:
        merge_lists([shard], WIDTH, 3, Sink(io.BytesIO()))
    assert refused.value.about == "build_uri"


@given(sizes=st.lists(st.integers(0, 90_000), max_size=6))
@settings(max_examples=15)
def test_metadata_has_batches_of_65536_rows_in_order(sizes):
    batches, first = [], 0
    schema = pa.schema([("row", pa.int64())])
    for size in sizes:
        batches.append(pa.record_batch([np.arange(first, first + size)], schema=schema))
        first += size
    sink = io.BytesIO()
    write_metadata(Sink(sink), iter(batches), schema)
    file = pa.ipc.open_file(sink.getvalue())
    lengths = [file.get_batch(number).num_rows for number in range(file.num_record_batches)]
    assert all(length == BATCH_ROWS == 65_536 for length in lengths[:-1])
    assert file.read_all()["row"].to_numpy().tolist() == list(range(first))
    assert all(lengths)
