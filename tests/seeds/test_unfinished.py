"""Embedded images are kept even if their run is killed."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from laion_assets.seeds import KnownImages, UnfinishedImages

KILLED = """
import os, signal, sys
import numpy as np
from laion_assets.seeds import UnfinishedImages
from laion_assets.seeds.images import EmbeddedImage
with UnfinishedImages(sys.argv[1], "model", print, seconds=0) as unfinished:
    for number in range(3):
        vector = np.eye(4, dtype="f4")[number]
        unfinished.keep(EmbeddedImage("a.png", str(number), vector, b"webp"))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.faults
@pytest.mark.parametrize("place", ["{}/set.unfinished", "file://{}/set.unfinished"])
def test_of_a_killed_process_the_next_one_takes_the_images_if_its_model_is_the_same(tmp_path, place):
    uri = place.format(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, uri], check=False)
    assert done.returncode == -signal.SIGKILL
    assert UnfinishedImages(uri, "another model", print).tables() == []
    unfinished = UnfinishedImages(uri, "model", print)
    known = [KnownImages.of(table) for table in unfinished.tables()]
    vectors = {content: vector for images in known for content, vector in images.vectors.items()}
    assert vectors.keys() == {"0", "1", "2"}
    for number in range(3):
        np.testing.assert_array_equal(vectors[str(number)], np.eye(4)[number])
    unfinished.remove()
    assert unfinished.tables() == []
