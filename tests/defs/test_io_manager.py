"""Tables are written as they are computed, appear whole or not at all, and say what made them."""

import errno
import os
import subprocess
from collections.abc import Iterator

import dagster as dg
import fsspec
import numpy as np
import pyarrow as pa
import pytest
from helpers.project import contents, failures, files_limited_to

from laion_assets.defs.io_manager import ParquetIOManager, StoredTable, TableOutput, write_table
from laion_assets.defs.partitions import seed_sets
from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage
from laion_assets.io.tables import Provenance, Table, decoder_bytes, decoder_footer

SCHEMA = pa.schema({"id": pa.int64(), "url": pa.string(), "code": pa.binary(8)})
ROWS = 20_000


def batch(number: int) -> pa.RecordBatch:
    """Rows that do not compress to nothing, about 1.3 MB of them."""
    ids = np.arange(number * ROWS, (number + 1) * ROWS)
    codes = np.random.default_rng(number).bytes(8 * ROWS)
    urls = [f"https://example.org/{codes[i : i + 16].hex()}" for i in range(ROWS)]
    code = pa.FixedSizeBinaryArray.from_buffers(pa.binary(8), ROWS, [None, pa.py_buffer(codes)])
    return pa.record_batch([pa.array(ids), pa.array(urls), code], schema=SCHEMA)


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
    table = Table(SCHEMA, (batch(number) for number in range(3)), lambda: {"made": "here"})
    rows, preview = write_table(table, f"{root}/some/set.parquet")
    stored = StoredTable(f"{root}/some/set.parquet")
    whole = pa.Table.from_batches([batch(number) for number in range(3)])
    assert rows == len(stored) == 3 * ROWS
    assert stored.schema == SCHEMA
    assert stored.read() == whole
    assert pa.Table.from_batches(stored.batches(["url"])) == whole.select(["url"])
    assert stored.top(3, ["id"])["id"].to_pylist() == [0, 1, 2]
    assert [row["id"] for row in preview] == list(range(10))
    assert stored.footer["made"] == "here"


def test_a_table_without_rows_is_a_table(place):
    root, _ = place
    assert write_table(Table(SCHEMA, []), f"{root}/set.parquet") == (0, [])
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
        table = Table(SCHEMA, peak_while(batch(number) for number in range(count)))
        write_table(table, str(tmp_path / "set.parquet"))
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
        write_table(Table(SCHEMA, breaking(after=2)), uri)
    assert listed() == {}
    write_table(Table(SCHEMA, [batch(7)]), uri)
    before = listed()
    assert len(before) == 1
    for after in (0, 2):
        with pytest.raises(RuntimeError, match="the search broke"):
            write_table(Table(SCHEMA, breaking(after)), uri)
        assert listed() == before
    write_table(Table(SCHEMA, [batch(8)]), uri)
    assert StoredTable(uri).read(["id"])["id"][0].as_py() == 8 * ROWS


def test_nothing_appears_before_the_last_row_is_written(place):
    root, listed = place
    uri = f"{root}/knn_urls/set.parquet"

    def watched() -> Iterator[pa.RecordBatch]:
        for number in range(3):
            assert not any(name.endswith("/set.parquet") for name in listed())
            yield batch(number)

    write_table(Table(SCHEMA, watched()), uri)
    assert [name.rpartition("/")[2] for name in listed()] == ["set.parquet"]


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_one_keeps_its_own(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = tmp_path / f".set.parquet.{gone.pid}.partial"
    living = tmp_path / f".set.parquet.{os.getppid()}.partial"
    other = tmp_path / f".other.parquet.{gone.pid}.partial"
    for path in (left, living, other):
        path.write_bytes(b"PAR1")
    write_table(Table(SCHEMA, [batch(0)]), str(tmp_path / "set.parquet"))
    assert set(contents(tmp_path)) == {"set.parquet", living.name, other.name}


def test_a_disk_that_takes_no_more_is_told_of_and_the_old_table_stays(tmp_path):
    uri = str(tmp_path / "knn_urls" / "set.parquet")
    write_table(Table(SCHEMA, [batch(0)]), uri)
    before = contents(tmp_path)
    with (
        pytest.raises(InputError, match=f"cannot write {uri} .*LAION_OUTPUT_URI") as caught,
        files_limited_to(1 << 20),
    ):
        write_table(Table(SCHEMA, (batch(number) for number in range(5))), uri)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert contents(tmp_path) == before


def test_the_footer_carries_provenance_and_a_decoder_of_any_size(tmp_path):
    uri = str(tmp_path / "set.parquet")
    decoder = np.random.default_rng(0).bytes(90 << 20)  # more text than Arrow reads when not told to
    made = Provenance.now("flower", "5eed", "1dex", {"nprobe": 3, "origins": {}}, "run", {"nprobe": 3})
    write_table(Table(SCHEMA, [batch(0)], lambda: made.to_footer() | decoder_footer(decoder)), uri)
    stored = StoredTable(uri)
    assert Provenance.from_footer(stored.footer, stored.where) == made
    assert decoder_bytes(stored.footer, stored.where) == decoder


def test_the_footer_is_asked_for_after_the_rows(tmp_path):
    seen = []

    def counted() -> Iterator[pa.RecordBatch]:
        for number in range(3):
            seen.append(number)
            yield batch(number)

    write_table(
        Table(SCHEMA, counted(), lambda: {"batches": str(len(seen))}), str(tmp_path / "a.parquet")
    )
    assert StoredTable(str(tmp_path / "a.parquet")).footer["batches"] == "3"


def test_a_table_that_is_gone_or_damaged_is_named_with_the_remedy(place):
    root, _ = place
    uri = f"{root}/seed_embeddings/flower.parquet"
    with pytest.raises(InputError, match=r"flower\.parquet is not there: materialize seed_embeddings"):
        StoredTable(uri)
    write_table(Table(SCHEMA, [batch(0)]), uri)
    fs, path = fsspec.url_to_fs(uri)
    fs.pipe_file(path, fs.cat_file(path)[:-100])
    with pytest.raises(InputError, match=r"flower\.parquet cannot be read .*materialize"):
        StoredTable(uri)


def test_a_step_that_breaks_while_it_writes_keeps_the_old_table(tmp_path):
    fail: list[bool] = []

    @dg.asset(partitions_def=seed_sets)
    def knn_urls() -> dg.MaterializeResult[TableOutput]:
        batches = breaking(after=2) if fail else iter([batch(1)])
        return dg.MaterializeResult(
            value=TableOutput(Table(SCHEMA, batches), lambda table: {"n": len(table)})
        )

    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("seed_sets", ["flower"])

        def run() -> dg.ExecuteInProcessResult:
            manager = {"io_manager": ParquetIOManager(f"{tmp_path}/")}
            return dg.materialize(
                [knn_urls],
                resources=manager,
                partition_key="flower",
                instance=instance,
                raise_on_error=False,
            )

        (event,) = run().asset_materializations_for_node("knn_urls")
        assert event.metadata["n"].value == event.metadata["dagster/partition_row_count"].value == ROWS
        shown = [column.name for column in event.metadata["first rows"].schema.columns]
        assert shown == ["id", "url"]  # a code says nothing to people
        before = contents(tmp_path)
        assert set(before) == {"knn_urls/flower.parquet"}
        fail.append(True)
        result = run()
        assert "the search broke" in failures(result)["knn_urls"]
        assert result.asset_materializations_for_node("knn_urls") == []
        assert contents(tmp_path) == before
