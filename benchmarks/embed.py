"""Images a second that are embedded, against the model alone on ready arrays, and clip-retrieval.

The demo's model is measured always; one of ViT-L/14's shape and clip-retrieval only where the environment
of `make test-embed` is there, or with `--model FOLDER`. The runs alternate, the numbers are medians. The
ratio of processor time tells the same where other work shares the cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image

from laion_assets.seeds.decoding import PixelBudget, open_image
from laion_assets.seeds.images import BATCH, EmbeddedImage, ImageFile, embed_images
from laion_assets.seeds.model import Model

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "laion_assets" / "demo"
THEIR_PYTHON = ROOT / "tests" / "embed" / ".venv" / "bin" / "python"
PEER = Path(__file__).with_name("embed_peer.py")
CORES = 2
PHOTOGRAPH = (4000, 3000)
ROW = "{:12}{:24}{:>8}{:>12.2f}{:>12.2f}{:>8.2f}{:>11.2f}{:>16}"
HEADER = (
    "model       images                  rounds   raw img/s  ours img/s   ratio  CPU ratio  "
    "clip-retrieval"
)


def photographs(count: int) -> list[bytes]:
    """JPEGs of 12 megapixels: noise of which each scale has as much, as in photographs."""
    width, height = PHOTOGRAPH
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequencies[0, 0] = 1
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            random = np.random.default_rng(number)
            spectrum = np.fft.rfft2(random.standard_normal((height, width))) / frequencies
            grey = np.fft.irfft2(spectrum, (height, width))
            bytes_of_grey = np.clip(128 + 50 * grey / grey.std(), 0, 255).astype(np.uint8)
            path = Path(folder) / "photograph.jpg"
            Image.merge("RGB", [Image.fromarray(np.roll(bytes_of_grey, n, 1)) for n in range(3)]).save(
                path, quality=90
            )
            made.append(path.read_bytes())
    return made


def ready_arrays(model: Model, images: Sequence[bytes]) -> list[np.ndarray]:
    """Batches as the model takes them."""
    budget, pixels = PixelBudget(), []
    for data in images:
        with open_image(data, lambda width, height: (width, height), budget) as image:
            pixels.append(model.preprocessing(image))
    return [np.stack(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]


def raw_session(model: Model) -> ort.InferenceSession:
    """ONNX Runtime with its defaults, on the cores there are."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = CORES
    path = model.files.path(model.files.vision)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def rates(work: Callable[[], object], images: int) -> tuple[float, float]:
    """Images a second, and images for a second of processor time."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return images / (time.perf_counter() - started), images / (time.process_time() - used)


def measure(
    folder: Path, images: Sequence[bytes], rounds: int, peer: Callable[[], float] | None
) -> tuple[float, float, float, float, str]:
    """Medians of the raw session, of ours, of their ratios, and of the peer."""
    model = Model(folder, "cpu", CORES)
    session, arrays = raw_session(model), ready_arrays(model, images)
    files = [ImageFile(str(number), lambda data=data: data) for number, data in enumerate(images)]

    def raw() -> None:
        for batch in arrays:
            session.run(None, {"pixel_values": batch})

    def ours() -> None:
        outcomes = list(embed_images(model, files, threads=CORES))
        assert all(isinstance(outcome, EmbeddedImage) for outcome in outcomes)

    raw(), ours()  # the first run allocates
    both = np.array([(rates(raw, len(images)), rates(ours, len(images))) for _ in range(rounds)])
    ratios = np.median(both[:, 1] / both[:, 0], axis=0)
    theirs = [peer() for _ in range(rounds)] if peer else []
    return (
        float(np.median(both[:, 0, 0])),
        float(np.median(both[:, 1, 0])),
        float(ratios[0]),
        float(ratios[1]),
        f"{statistics.median(theirs):.2f}" if theirs else "-",
    )


@contextmanager
def peer_on(images: Sequence[bytes], ending: str) -> Iterator[Callable[[], float]]:
    """clip-retrieval's inference on the same images, which it takes from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(images):
            (Path(folder) / f"{number:04}{ending}").write_bytes(data)

        def run() -> float:
            command = [str(THEIR_PYTHON), str(PEER), "measure", folder, str(BATCH)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            return float(done.stdout.split()[-1])

        yield run


def large_model() -> Path | None:
    """A model of ViT-L/14's shape with random weights, written once."""
    folder = Path(os.environ.get("LAION_BENCH_CACHE", Path(__file__).parent / ".cache")) / "vit-l-14"
    if not THEIR_PYTHON.exists():
        return folder if folder.exists() else None
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run([str(THEIR_PYTHON), str(PEER), "export", str(partial)], check=True)
        partial.rename(folder)
    return folder


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder in the layout of transformers.js")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=16, help="that a large model embeds in a round")
    parser.add_argument("--alone", action="store_true", help="without clip-retrieval")
    given = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    pictures = [path.read_bytes() for path in sorted((DEMO / "pictures").rglob("*.webp"))]
    print(HEADER, flush=True)

    def show(
        name: str, folder: Path, what: str, images: Sequence[bytes], peer: Callable[[], float] | None
    ) -> None:
        result = measure(folder, images, given.rounds, peer)
        print(ROW.format(name, f"{len(images)} {what}", given.rounds, *result), flush=True)

    show("demo", DEMO / "model", "pictures (256 px)", pictures, None)
    folder = given.model or large_model()
    if folder is None:
        sys.exit("the environment of `make test-embed` is not there: no model of ViT-L/14's shape")
    name = "given" if given.model else "ViT-L/14"
    for what, images, ending in (
        ("pictures (256 px)", pictures[: given.images], ".webp"),
        ("JPEGs of 12 MP", photographs(given.images), ".jpg"),
    ):
        if given.alone or given.model or not THEIR_PYTHON.exists():
            show(name, folder, what, images, None)
        else:
            with peer_on(images, ending) as peer:
                show(name, folder, what, images, peer)


if __name__ == "__main__":
    main()
