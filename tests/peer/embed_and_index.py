"""Leaves embeddings as `clip-retrieval inference` does, and runs its `index` over them.

Runs inside the peer's environment. Its writer and its index command (which is autofaiss) are unchanged;
only the pictures and the model are left out: the vectors are given.
"""

import json
import sys
from pathlib import Path

import numpy as np
import peer


def main() -> None:
    """Write `embeddings` and `index` into a folder that holds `vectors.npy`."""
    folder, memory, with_urls = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "with urls"
    writer, command = peer.part("clip_inference.writer"), peer.part("clip_index")
    vectors = np.load(folder / "vectors.npy")
    parts = np.array_split(np.arange(len(vectors)), 3)
    for number, rows in enumerate(parts):
        write = writer.NumpyWriter(
            number, str(folder / "embeddings"), with_urls, True, with_urls, len(parts)
        )
        write(
            {
                "image_embs": vectors[rows],
                "image_filename": [f"images/{row}.jpg" for row in rows],
                "text_embs": vectors[rows],
                "text": [f"the picture in row {row}" for row in rows],
                "metadata": [json.dumps({"url": f"https://example.org/{row}.jpg"}) for row in rows],
            }
        )
        write.flush()
    command.clip_index(
        str(folder / "embeddings"), str(folder / "index"), max_index_memory_usage=memory, nb_cores=2
    )


if __name__ == "__main__":
    main()
