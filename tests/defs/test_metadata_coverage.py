"""A run reports metadata that is shorter or longer than the index, and no row is wrong."""

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import indices
from helpers.project import failures, new_project, reported

ROWS = 60


@pytest.mark.parametrize("rows", [45, 75])
def test_metadata_shorter_or_longer_than_the_index_is_reported_and_no_row_is_wrong(tmp_path, rows):
    root = tmp_path / "index"
    vectors = np.random.default_rng(5).standard_normal((ROWS, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(16)
    index.add(vectors)
    root.mkdir()
    faiss.write_index(index, str(root / "image.index"))
    urls = pa.table({"url": [f"https://example.org/{i}.jpg" for i in range(rows)]})
    indices.write_metadata(root, urls, files=4)
    with new_project(tmp_path, root) as project:
        (project.seeds / "mine").mkdir()
        np.save(project.seeds / "mine" / "seeds.npy", vectors[:3])
        result = project.run("mine", nb_images_knn=ROWS, nb_images_centroid=ROWS, dedup_threshold=1.0)
        assert failures(result) == {}
        (check,) = [
            check
            for check in result.get_asset_check_evaluations()
            if check.check_name == "metadata_covers_the_index"
        ]
        assert not check.passed
        assert f"{abs(rows - ROWS)} " in (check.description or "")
        report = reported(result, "staged_laion_index")
        assert (report["dagster/row_count"], report["metadata rows"]) == (ROWS, rows)
        covered = min(rows, ROWS)
        for asset, queries in (("knn_urls", 3), ("centroid_urls", 1)):
            report = reported(result, asset)
            assert report["received"] == queries * ROWS
            assert report["without url"] == queries * (ROWS - covered)
            assert report["kept"] == queries * covered
        for asset in ("knn_urls", "centroid_urls", "combined_urls"):
            table = pq.read_table(project.table(asset, "mine"), columns=["id", "url"]).to_pylist()
            assert {row["id"] for row in table} == set(range(covered))
            assert all(row["url"] == f"https://example.org/{row['id']}.jpg" for row in table)
