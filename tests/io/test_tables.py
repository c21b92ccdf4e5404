"""Tables are written as they are computed, appear only when complete, and record their origin."""

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.faults import proxy_before
from helpers.fuzz import Tally, attempts, random_numbers
from helpers.project import contents, files_limited_to

from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage
from laion_assets.io.tables import StoredTable, new_table

SCHEMA = pa.schema({"id": pa.int64(), "url": pa.string(), "code": pa.binary(8)})
ROWS = 20_000


def batch(number: int) -> pa.RecordBatch:
    """About 1.3 MB of rows that do not compress well."""
    ids = np.arange(number * ROWS, (number + 1) * ROWS)
    codes = np.random.default_rng(number).bytes(8 * ROWS)
    urls = [f"https://example.org/{codes[i : i + 16].hex()}" for i in range(ROWS)]
    code = pa.FixedSizeBinaryArray.from_buffers(pa.binary(8), ROWS, [None, pa.py_buffer(codes)])
    return pa.record_batch([pa.array(ids), pa.array(urls), code], schema=SCHEMA)


def write_table(uri: str, batches: Iterable[pa.RecordBatch], attachment: bytes | None = None) -> None:
    with new_table(uri, SCHEMA) as table:
        for each in batches:
            table.write(each)
        if attachment is not None:
            table.attach("decoder", attachment)
        table.footer = {"rows": str(table.rows)}


def breaking(after: int) -> Iterator[pa.RecordBatch]:
    yield from (batch(number) for number in range(after))
    raise RuntimeError("the search broke")


@pytest.fixture(params=["local path", "bucket"])
def place(request, tmp_path):
    """A folder for tables, and a function that lists every object in it."""
    if request.param == "local path":
        return str(tmp_path), lambda: contents(tmp_path)
    bucket = request.getfixturevalue("new_bucket")
    fs, root = open_storage(bucket, "")
    return f"{bucket}/tables", lambda: {path: fs.cat_file(path) for path in fs.find(root)}


def test_what_is_written_is_read_back_in_order(place):
    root, _ = place
    write_table(f"{root}/some/set.parquet", (batch(number) for number in range(3)))
    stored = StoredTable(f"{root}/some/set.parquet")
    whole = pa.Table.from_batches([batch(number) for number in range(3)])
    assert len(stored) == 3 * ROWS
    assert stored.schema == SCHEMA
    assert stored.read() == whole
    assert pa.Table.from_batches(stored.batches(["url"])) == whole.select(["url"])
    assert stored.top(3, ["id"])["id"].to_pylist() == [0, 1, 2]
    assert stored.footer["rows"] == str(3 * ROWS)
    field = stored.schema.field("url")
    assert field.metadata == {b"description": b"address of the image"}


def test_a_table_without_rows_is_a_table(place):
    root, _ = place
    write_table(f"{root}/set.parquet", [])
    stored = StoredTable(f"{root}/set.parquet")
    assert len(stored) == len(stored.read()) == 0
    assert stored.schema == SCHEMA
    assert len(stored.top(5, ["id"])) == 0


def test_memory_depends_on_the_batch_and_not_on_the_table(tmp_path):
    def peak_while(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for each in batches:
            peak[0] = max(peak[0], pa.total_allocated_bytes() - before)
            yield each

    peaks = {}
    for count in (3, 60):
        before, peak = pa.total_allocated_bytes(), [0]
        write_table(str(tmp_path / "set.parquet"), peak_while(batch(number) for number in range(count)))
        written = peak[0]
        peak[0] = 0
        for _ in peak_while(StoredTable(str(tmp_path / "set.parquet")).batches()):
            pass
        peaks[count] = (written, peak[0])
    size = batch(0).nbytes
    assert peaks[60][0] < peaks[3][0] + size
    assert peaks[60][1] < peaks[3][1] + size
    assert max(peaks[60]) < 15 * size


def test_a_computation_that_breaks_leaves_the_old_table_and_nothing_else(place):
    root, listed = place
    uri = f"{root}/knn_urls/set.parquet"
    with pytest.raises(RuntimeError, match="the search broke"):
        write_table(uri, breaking(after=2))
    assert listed() == {}
    write_table(uri, [batch(7)])
    before = listed()
    assert len(before) == 1
    for after in (0, 2):
        with pytest.raises(RuntimeError, match="the search broke"):
            write_table(uri, breaking(after))
        assert listed() == before
    write_table(uri, [batch(8)])
    assert StoredTable(uri).read(["id"])["id"][0].as_py() == 8 * ROWS


def test_nothing_appears_before_the_last_row_is_written(place):
    root, listed = place
    uri = f"{root}/knn_urls/set.parquet"

    def watched() -> Iterator[pa.RecordBatch]:
        for number in range(3):
            assert not any(name.endswith("/set.parquet") for name in listed())
            yield batch(number)

    write_table(uri, watched())
    assert [name.rpartition("/")[2] for name in listed()] == ["set.parquet"]


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_one_keeps_its_own(tmp_path):
    """Pods that share a folder have the same process numbers, so what counts is the lock."""
    names = _, living, new, other = [
        f".{name}.partial"
        for name in ("set.parquet.1", "set.parquet.2", "set.parquet.3", "other.parquet.1")
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"PAR1")
        if name != new:
            os.utime(tmp_path / name, (0, 0))
    with (tmp_path / living).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_table(str(tmp_path / "set.parquet"), [batch(0)])
    assert set(contents(tmp_path)) == {"set.parquet", living, new, other}


def test_a_disk_that_takes_no_more_is_told_of_and_the_old_table_stays(tmp_path):
    uri = str(tmp_path / "knn_urls" / "set.parquet")
    write_table(uri, [batch(0)])
    before = contents(tmp_path)
    with (
        pytest.raises(InputError, match=f"cannot write {uri} ") as caught,
        files_limited_to(1 << 20),
    ):
        write_table(uri, (batch(number) for number in range(5)))
    assert caught.value.about == "output_uri"
    assert caught.value.__cause__.errno == errno.EFBIG
    assert contents(tmp_path) == before


def test_an_attachment_of_any_size_lies_beside_a_table_that_every_reader_opens(place):
    root, listed = place
    uri = f"{root}/knn_urls/set.parquet"
    decoder = np.random.default_rng(0).bytes(130 << 20)  # in a footer, more than Arrow reads by default
    write_table(uri, [batch(0)], decoder)
    assert StoredTable(uri).attachment("decoder") == decoder
    fs, path = fsspec.url_to_fs(uri)
    with fs.open(path) as file:
        assert pq.read_table(file).num_rows == ROWS
    assert len(listed()) == 2


def test_a_table_keeps_its_attachment_until_another_takes_its_name(place):
    root, listed = place
    uri = f"{root}/knn_urls/a set [1].parquet"
    write_table(f"{root}/knn_urls/a set [1].deadbeef.parquet", [batch(5)], b"of another set")
    write_table(uri, [batch(0)], b"old")
    with pytest.raises(RuntimeError, match="the search broke"):
        write_table(uri, breaking(after=1), b"never attached")
    with suppress(KeyboardInterrupt), new_table(uri, SCHEMA) as table:
        table.attach("decoder", b"new")
        raise KeyboardInterrupt
    assert StoredTable(uri).attachment("decoder") == b"old"
    write_table(uri, [batch(1)], b"newest")
    assert StoredTable(uri).attachment("decoder") == b"newest"
    assert StoredTable(f"{root}/knn_urls/a set [1].deadbeef.parquet").attachment("decoder")
    assert sum(name.endswith(".decoder") for name in listed()) == 2


def test_an_attachment_that_is_missing_or_damaged_is_named_with_the_remedy(place):
    root, listed = place
    uri = f"{root}/knn_urls/set.parquet"
    write_table(uri, [batch(0)])
    with pytest.raises(InputError, match=r"set\.parquet has no decoder .*: make it anew"):
        StoredTable(uri, "make it anew").attachment("decoder")
    write_table(uri, [batch(0)], b"decoder")
    (name,) = (name.rpartition("/")[2] for name in listed() if name.endswith(".decoder"))
    fs, path = fsspec.url_to_fs(f"{root}/knn_urls/{name}")
    fs.pipe_file(path, b"dEcoder")
    with pytest.raises(InputError, match=f"{name} differs from what was written: make it anew"):
        StoredTable(uri, "make it anew").attachment("decoder")
    fs.rm_file(path)
    with pytest.raises(InputError, match=f"{name} is missing: make it anew"):
        StoredTable(uri, "make it anew").attachment("decoder")


def test_an_upload_that_is_damaged_on_its_way_is_refused_and_removed(gcs, new_bucket, monkeypatch):
    with proxy_before(gcs) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        uri = f"{new_bucket}/tables/set.parquet"
        write_table(uri, [batch(0)])
        proxy.flips_a_bit_of_uploads = True
        with pytest.raises(InputError, match=rf"{uri} was damaged while it was uploaded .*: try again"):
            write_table(uri, [batch(0)])
        fs, path = open_storage(uri)
        assert not fs.exists(path)


def test_a_table_with_another_checksum_than_was_written_is_refused(place):
    root, _ = place
    uri = f"{root}/set.parquet"
    with new_table(uri, SCHEMA) as table:
        table.write(batch(0))
    assert StoredTable(uri, checksum=table.checksum).read() == pa.Table.from_batches([batch(0)])
    write_table(uri, [batch(1)])
    with pytest.raises(InputError, match=rf"{uri} differs from what was written: make it anew"):
        StoredTable(uri, "make it anew", table.checksum)


@pytest.mark.faults
@pytest.mark.fuzz
def test_one_changed_bit_is_refused_or_changes_no_row(tmp_path):
    """Without the file's checksum, those of the pages are left: the footer has none."""
    uri, numbers, tally = (
        str(tmp_path / "set.parquet"),
        random_numbers(),
        Tally("bits of a table's pages"),
    )
    write_table(uri, [batch(0)])
    whole, right = Path(uri).read_bytes(), StoredTable(uri).read()
    pages = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8
    for _ in attempts(300):
        damaged, bit = bytearray(whole), numbers.randrange(8 * pages)
        damaged[bit // 8] ^= 1 << bit % 8
        Path(uri).write_bytes(damaged)
        try:
            same = StoredTable(uri).read() == right
        except InputError:
            tally.add("refused")
        else:
            tally.add("read") if same else tally.add_broken("silently wrong", f"bit {bit}")
    tally.check("silently wrong")


def test_a_table_that_is_gone_or_damaged_is_named_with_the_remedy(place):
    root, _ = place
    uri = f"{root}/seed_embeddings/flower.parquet"
    with pytest.raises(InputError, match=r"flower\.parquet is missing: make it anew"):
        StoredTable(uri, "make it anew")
    write_table(uri, [batch(0)])
    fs, path = fsspec.url_to_fs(uri)
    fs.pipe_file(path, fs.cat_file(path)[:-100])
    with pytest.raises(InputError, match=r"flower\.parquet cannot be read .*: make it anew"):
        StoredTable(uri, "make it anew")
