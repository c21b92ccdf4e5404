"""Sparse staging on the stand-in for a cluster: on any node, with a copy for each pod."""

from pathlib import Path

import pyarrow.parquet as pq
from helpers.installation import installed
from helpers.project import new_project

READ_THE_INDEX = ("staged_laion_index", "knn_urls.search", "centroid_urls")


def test_steps_read_sparse_copies_on_any_node_and_find_the_rows_of_full_ones(tmp_path: Path):
    (tmp_path / "platform").mkdir()
    (tmp_path / "machine").mkdir()
    sparse = {"LAION_STAGING": "sparse", "LAION_SPARSE_BUDGET": "1GB"}
    with installed(tmp_path / "platform", **sparse) as platform:
        platform.cluster.add_node("any", nvme=False)
        platform.succeed(platform.launch("fruit"))
        bucket = platform.root / "bucket"
        assert [len(platform.cluster.pods_of(step)) for step in READ_THE_INDEX] == [1, 1, 1]
        assert {node for node, _ in platform.stagings()} == {"any"}
        assert {name: files for name, files in platform.cluster.written.items() if files} == {}
        with new_project(tmp_path / "machine", bucket / "index", bucket / "seeds") as one_machine:
            assert one_machine.run("fruit").success
            expected = pq.read_table(one_machine.table("combined_urls", "fruit"))
            assert platform.table("combined_urls", "fruit").equals(expected)
