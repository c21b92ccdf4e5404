"""Our answers over a small index equal clip-retrieval's, which `make golden` recorded."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import copies, indices
from helpers.same import Rows, differences

from laion_assets.index.faiss_index import Index
from laion_assets.index.metadata import Metadata
from laion_assets.index.vectors import unit
from laion_assets.search.retrieval import Request, retrieve_table

GOLDEN = np.load(Path(__file__).parent / "golden.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The index that the peer was asked about."""
    root = tmp_path_factory.mktemp("golden")
    (root / "image.index").mkdir()
    GOLDEN["populated"].tofile(root / "image.index" / "populated.index")
    GOLDEN["lists"].tofile(root / "image.index" / "merged_index.ivfdata")
    copies.write_metadata(root, int(GOLDEN["rows"]))
    return root


@pytest.mark.parametrize("threshold", [0.9, 0.94])
def test_the_same_rows_stay_with_the_same_similarities_and_texts(folder, threshold) -> None:
    index = Index(*indices.index_paths(folder))
    metadata = Metadata(sorted((folder / "metadata").iterdir()))
    request = Request(int(GOLDEN["k"]), threshold, int(GOLDEN["nprobe"]))
    table, _ = retrieve_table(index, metadata, GOLDEN["queries"], request, per_seed=True)
    vectors = unit(indices.reconstructed(folder))
    answers = GOLDEN["answers"][GOLDEN["answers"]["f0"] == threshold]
    for query in range(len(GOLDEN["queries"])):
        mine = table.filter(pa.compute.equal(table["seed"], query))
        theirs = answers[answers["f1"] == query]
        ours = Rows(mine["id"].to_numpy(), mine["similarity"].to_numpy())
        received = Rows(GOLDEN["received_ids"][query], GOLDEN["received_scores"][query])
        assert 0 < len(ours) < len(received) == request.k
        kept = Rows(theirs["f2"], theirs["f3"])
        assert differences(kept, ours, received, vectors, threshold) == []
        texts = {row: (url, caption) for _, _, row, _, url, caption in theirs.tolist()}
        for row, *text in zip(
            *(mine[name].to_pylist() for name in ("id", "url", "caption")), strict=True
        ):
            assert texts.get(row, tuple(text)) == tuple(text)
