"""An asset writes its table and a later asset opens it; a failed step changes nothing."""

import dagster as dg
import pyarrow as pa
import pytest
from helpers.fuzz import Tally, attempts, random_numbers
from helpers.project import contents, failures

from laion_assets.defs.io_manager import ParquetIOManager, Tables
from laion_assets.defs.partitions import SEED_SETS, seed_sets
from laion_assets.io.tables import StoredTable

BATCH = pa.record_batch({"id": pa.array([1, 2], pa.int64())})


def test_a_step_that_fails_while_it_writes_keeps_the_old_table(tmp_path):
    tables, fail = Tables(f"{tmp_path}/"), []

    @dg.asset(partitions_def=seed_sets)
    def knn_urls(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        with tables.new(context, BATCH.schema) as table:
            table.write(BATCH)
            if fail:
                raise RuntimeError("the search failed")
        return dg.MaterializeResult(metadata={"rows": len(tables.written(context))})

    @dg.asset(partitions_def=seed_sets)
    def combined_urls(knn_urls: StoredTable) -> dg.MaterializeResult[None]:
        return dg.MaterializeResult(metadata={"ids": knn_urls.read()["id"].to_pylist()})

    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(SEED_SETS, ["flower"])

        def run() -> dg.ExecuteInProcessResult:
            return dg.materialize(
                [knn_urls, combined_urls],
                resources={"io_manager": ParquetIOManager(tables)},
                partition_key="flower",
                instance=instance,
                raise_on_error=False,
            )

        (event,) = run().asset_materializations_for_node("combined_urls")
        assert event.metadata["ids"].value == [1, 2]
        before = contents(tmp_path)
        assert set(before) == {"knn_urls/flower.parquet"}
        fail.append(True)
        assert "the search failed" in failures(run())["knn_urls"]
        assert contents(tmp_path) == before


@pytest.mark.faults
@pytest.mark.fuzz
def test_every_changed_bit_of_a_table_is_refused_by_the_next_asset(project):
    assert failures(project.run("fruit")) == {}
    path = project.table("knn_urls", "fruit")
    manager = ParquetIOManager(Tables(str(project.output)))
    context = dg.build_input_context(
        asset_key=dg.AssetKey("knn_urls"), partition_key="fruit", instance=project.instance
    )
    choice, whole, tally = random_numbers(), path.read_bytes(), Tally("bits of a recorded table")
    for _ in attempts(300):
        bit, damaged = choice.randrange(8 * len(whole)), bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(dg.Failure, match=rf"{path} differs .*: materialize knn_urls again"):
            manager.load_input(context)
        tally.add("refused")
    tally.check("silently wrong")
    failed = failures(project.run("fruit", "combined_urls"))
    assert f"{path} differs from what was written: materialize knn_urls again" in failed["combined_urls"]
    assert failures(project.run("fruit", "knn_urls", "combined_urls")) == {}


def test_an_asset_that_returns_a_value_is_a_mistake(tmp_path):
    manager = ParquetIOManager(Tables(str(tmp_path)))
    with pytest.raises(TypeError, match="knn_urls returned int"):
        manager.handle_output(dg.build_output_context(asset_key="knn_urls"), 5)
