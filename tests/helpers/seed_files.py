"""Seed files in every supported form."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VECTORS = np.arange(1, 13, dtype=np.float32).reshape(3, 4)


def npy(values: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


LISTS: dict[str, pa.DataType] = {
    "list": pa.list_(pa.float32()),
    "large list": pa.large_list(pa.float64()),
    "fixed size list": pa.list_(pa.float32(), 4),
    "float16 list": pa.list_(pa.float16()),
    "float16 fixed size list": pa.list_(pa.float16(), 4),
}
CLIP_RETRIEVAL = "an output folder of clip-retrieval"
FORMS: dict[str, dict[str, bytes]] = {
    "a vector per file": {f"set/{i}.npy": npy(row) for i, row in enumerate(VECTORS)},
    "in folders": {f"set/{i}/deep/seed.npy": npy(row) for i, row in enumerate(VECTORS)},
    "a matrix": {"set/all.npy": npy(VECTORS)},
    "a matrix in Fortran order": {"set/all.npy": npy(np.asfortranarray(VECTORS))},
    "float16": {"set/all.npy": npy(VECTORS.astype(np.float16))},
    "big-endian float64": {"set/all.npy": npy(VECTORS.astype(">f8"))},
    "npy and Parquet": {
        "set/a.npy": npy(VECTORS[:2]),
        "set/b.parquet": parquet(embedding=VECTORS[2:].tolist()),
    },
    CLIP_RETRIEVAL: {
        "set/img_emb/img_emb_0.npy": npy(VECTORS[:2].astype(np.float16)),
        "set/img_emb/img_emb_1.npy": npy(VECTORS[2:].astype(np.float16)),
        "set/text_emb/text_emb_0.npy": npy(-VECTORS),
        "set/metadata/metadata_0.parquet": parquet(url=["a", "b", "c"]),
    },
    "beside files that are no seeds": {
        "set/all.npy": npy(VECTORS),
        "set/README.txt": b"no seeds",
        "set/.hidden.npy": b"half a copy",
        "set/_temporary/part.npy": b"half a copy",
    },
    **{
        f"Parquet, {name}": {
            "set/all.parquet": parquet(embedding=pa.array(list(VECTORS.astype(np.float16)), kind))
            if "float16" in name
            else parquet(embedding=pa.array(VECTORS.tolist(), kind))
        }
        for name, kind in LISTS.items()
    },
}
