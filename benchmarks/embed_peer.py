"""clip-retrieval's own inference over a folder of images: its reader and its mapper, unchanged.

Runs in the environment of tests/embed. Also writes the model. Prints images a second.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests" / "embed"))

import reference

WORKERS = 2  # that decode; the cores there are


def main() -> None:
    """Write a model of ViT-L/14's shape, or measure the peer with it."""
    model = reference.random_clip(reference.LARGE)
    if sys.argv[1] == "export":
        reference.export(model, Path(sys.argv[2]), masked=False)
        return
    images, batch = Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(WORKERS)
    reader, mapper = reference.peers_parts(model)
    processor = reference.CLIPImageProcessorPil()
    batches = reader.FilesReader(
        lambda keys: keys,
        lambda image: processor(image, return_tensors="pt").pixel_values[0],
        None,
        str(images),
        batch,
        WORKERS,
        enable_text=False,
        enable_image=True,
        enable_metadata=False,
    )
    started = time.perf_counter()
    done = sum(len(mapper(batch)["image_embs"]) for batch in batches)
    print(done / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
