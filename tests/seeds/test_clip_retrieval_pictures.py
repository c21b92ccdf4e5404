"""Vectors from clip-retrieval have thumbnails if their images still exist."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.seed_files import npy, parquet, write
from PIL import Image

from laion_assets.seeds import Seeds, count_seeds, find_seed_set, read_seeds


def picture(colour: str, size: tuple[int, int] = (300, 200)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def vectors(rows: int) -> bytes:
    return npy(np.random.default_rng(0).standard_normal((rows, 4), np.float32))


def read(root: Path) -> Seeds:
    return read_seeds(str(root), find_seed_set(str(root), "set"))


def colours(seeds: Seeds) -> list[str | None]:
    """What the thumbnails show."""
    if "thumbnail" not in seeds.columns.column_names:
        return [None] * len(seeds.columns)

    def colour(data: bytes | None) -> str | None:
        if data is None:
            return None
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, max(image.size)) == ("WEBP", 96)
            red, _, blue = image.convert("RGB").getpixel((5, 5))
            return "red" if red > blue else "blue"

    return [colour(data) for data in seeds.columns["thumbnail"].to_pylist()]


def test_each_vector_has_the_thumbnail_of_its_own_image(tmp_path) -> None:
    write(tmp_path / "elsewhere", {"1.png": picture("red")})
    write(
        tmp_path,
        {
            "set/img_emb/img_emb_00.npy": vectors(2),
            "set/img_emb/img_emb_01.npy": vectors(2),
            "set/metadata/metadata_00.parquet": parquet(
                image_path=[str(tmp_path / "elsewhere" / "1.png"), "pictures/2.png"]
            ),
            "set/metadata/metadata_01.parquet": parquet(
                caption=["a", "b"],
                image_path=pa.array(["pictures/gone.png", "pictures/2.png"]).dictionary_encode(),
            ),
            "set/pictures/2.png": picture("blue"),
        },
    )
    found = read(tmp_path)
    assert found.columns["row"].to_pylist() == [0, 1, 0, 1]
    assert colours(found) == ["red", "blue", None, "blue"]


# What lies beside the vectors of two images, instead of the paths of both.
WITHOUT: dict[str, dict[str, bytes]] = {
    "no metadata": {},
    "metadata of other rows": {"metadata/metadata_0.parquet": parquet(image_path=["1.png"] * 3)},
    "metadata without paths": {"metadata/metadata_0.parquet": parquet(url=["1.png"] * 2)},
    "paths that are numbers of something": {
        "metadata/metadata_0.parquet": parquet(image_path=[{"a": 1}, {"a": 2}])
    },
    "paths that are null": {"metadata/metadata_0.parquet": parquet(image_path=pa.nulls(2))},
    "paths that no file can have": {
        "metadata/metadata_0.parquet": parquet(image_path=["a\0b", "x" * 5000])
    },
    "damaged metadata": {"metadata/metadata_0.parquet": b"PAR1 and no more PAR1"},
    "metadata of another file": {"metadata/metadata_1.parquet": parquet(image_path=["1.png"] * 2)},
    "files that are no images": {
        "metadata/metadata_0.parquet": parquet(image_path=["text.jpg", "cut.png"]),
        "text.jpg": b"hello",
        "cut.png": picture("red")[:60],
    },
    "a folder, and a device without end": {
        "metadata/metadata_0.parquet": parquet(image_path=["metadata", "/dev/zero"])
    },
    "a URL": {
        "metadata/metadata_0.parquet": parquet(image_path=["file:///1.png", "http://h.example/1.png"])
    },
}


@pytest.mark.parametrize("case", WITHOUT)
def test_what_is_wrong_with_images_concerns_no_vector(tmp_path, case) -> None:
    write(
        tmp_path / "set", {"img_emb/img_emb_0.npy": vectors(2), "1.png": picture("red"), **WITHOUT[case]}
    )
    found = read(tmp_path)
    assert len(found.embeddings) == 2
    assert "thumbnail" not in found.columns.column_names


def test_a_pipe_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    paths = parquet(image_path=[str(tmp_path / "pipe.png")])
    files = {"img_emb/img_emb_0.npy": vectors(1), "metadata/metadata_0.parquet": paths}
    write(tmp_path / "set", files)
    assert colours(read(tmp_path)) == [None]


def test_the_first_48_seeds_of_a_set_are_pictured(tmp_path) -> None:
    write(
        tmp_path / "set",
        {
            "img_emb/img_emb_0.npy": vectors(10),
            "img_emb/img_emb_1.npy": vectors(1000),
            "metadata/metadata_0.parquet": parquet(image_path=["1.png"] * 10),
            "metadata/metadata_1.parquet": parquet(image_path=["1.png"] * 1000),
            "1.png": picture("red"),
        },
    )
    assert colours(read(tmp_path)) == ["red"] * 48 + [None] * 962
    assert count_seeds(str(tmp_path), find_seed_set(str(tmp_path), "set")) == 1010


def test_vectors_that_bring_thumbnails_keep_them(tmp_path) -> None:
    write(
        tmp_path / "set",
        {
            "img_emb/img_emb_0.parquet": parquet(embedding=[[1.0, 2.0]], thumbnail=[b"own"]),
            "metadata/metadata_0.parquet": parquet(image_path=["1.png"]),
            "1.png": picture("red"),
        },
    )
    assert read(tmp_path).columns["thumbnail"].to_pylist() == [b"own"]
