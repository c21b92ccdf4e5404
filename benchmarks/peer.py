"""clip-retrieval's own KnnService, its code unchanged, in an environment of its own.

Prints JSON: for each query the ids it keeps, the time of each phase and the peak of memory.
What must not live here: anything of ours that would make the peer faster or slower.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import time
import types
import venv
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np
from memory import PeakMemory

PEER = ["clip-retrieval==2.45.0", "autofaiss==2.18.0"]  # without the training tools they ask for
IMPORTED = [
    "embedding-reader",
    "fire",
    "flask",
    "flask-cors",
    "flask-restful",
    "fsspec",
    "h5py",
    "numpy==1.26.4",
    "packaging",
    "pandas==2.3.3",
    "pillow",
    "prometheus-client",
    "pyarrow==15.0.2",
    "setuptools<81",
    "tqdm",
]
SERVICE = ["faiss-cpu==1.15.1"]  # ours: the same search
BUILDER = ["faiss-cpu==1.12.0"]  # autofaiss cannot make an OPQ index with the newest
COLUMNS = ["url", "image_path", "caption", "NSFW"]  # the service's default


def cache() -> Path:
    """Where the environment is kept."""
    return Path(os.environ.get("LAION_BENCH_CACHE", Path(__file__).parent / ".cache"))


def environment(name: str = "peer", more: list[str] = SERVICE) -> Path:
    """The interpreter of an environment of the peer: installed from PyPI the first time."""
    folder = cache() / name
    python, recipe = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join([*PEER, *IMPORTED, *more])
    if not recipe.exists() or recipe.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--only-binary", ":all:"]
        subprocess.run([*pip, "--no-deps", *PEER], check=True, stdout=sys.stderr)
        subprocess.run([*pip, *IMPORTED, *more], check=True, stdout=sys.stderr)
        recipe.write_text(wanted)
    return python


def part(name: str) -> Any:
    """A module of the peer, without the front doors of its packages and without torch.

    The front doors import the training tools; torch is imported by every query, and used by queries of
    text and images only.
    """
    root = Path(str(distribution("clip-retrieval").locate_file("clip_retrieval")))
    for package in ("clip_retrieval", "clip_retrieval.clip_inference"):
        door = types.ModuleType(package)
        door.__path__ = [str(root.parent.joinpath(*package.split(".")))]
        sys.modules[package] = door
    sys.modules.setdefault("torch", types.ModuleType("torch"))
    return importlib.import_module(f"clip_retrieval.{name}")


def resource(module: Any, folder: Path, nprobe: int | None) -> Any:
    """One index, mapped, with its metadata, as users of the service run it; nprobe may be as stored."""
    index = module.load_index(str(folder / "image.index"), True)
    if nprobe is not None:
        # As it sets them itself where the metadata has the order of the lists, and as autofaiss does.
        set_parameter = module.faiss.ParameterSpace().set_index_parameter
        set_parameter(index, "nprobe", nprobe)
        quantizer = module.faiss.downcast_index(module.faiss.extract_index_ivf(index).quantizer)
        if isinstance(quantizer, module.faiss.IndexHNSW):
            set_parameter(index, "efSearch", 2 * nprobe)
    metadata = folder / "metadata"
    is_arrow = any(metadata.glob("*.arrow"))
    provider = module.ArrowMetadataProvider if is_arrow else module.ParquetMetadataProvider
    return module.ClipResource(
        device="cpu",
        model=None,
        preprocess=None,
        tokenizer=None,
        model_txt_mclip=None,
        safety_model=None,
        violence_detector=None,
        metadata_provider=provider(str(metadata)),
        image_index=index,
        text_index=None,
        ivf_old_to_new_mapping=None,
        columns_to_return=COLUMNS,
        metadata_is_ordered_by_ivf=False,
        aesthetic_embeddings=None,
    )


def service(module: Any, folder: Path, nprobe: int) -> Any:
    """The service over one index."""

    class Watched(module.KnnService):  # type: ignore[misc]
        """The service, which also tells how many rows it received."""

        received = 0

        def post_filter(self, safety_model: Any, embeddings: Any, *options: Any) -> Any:
            self.received = len(embeddings)
            return super().post_filter(safety_model, embeddings, *options)

    return Watched(clip_resources={"laion": resource(module, folder, nprobe)})


def phases(module: Any) -> dict[str, float]:
    """The seconds its own clocks have counted so far."""
    clocks = {
        "search": module.KNN_INDEX_TIME,
        "near_duplicates": module.DEDUP_TIME,
        "metadata": module.METADATA_GET_TIME,
    }
    return {name: clock._sum.get() for name, clock in clocks.items()}


def ask(module: Any, knn: Any, query: Any, k: int) -> dict[str, Any]:
    """One request, and what it took."""
    before, started = phases(module), time.perf_counter()
    results = knn.query(embedding_input=query, num_images=k, num_result_ids=k, deduplicate=True)
    total = time.perf_counter() - started
    seconds = {name: now - before[name] for name, now in phases(module).items()}
    return {
        "received": knn.received,
        "ids": [row["id"] for row in results],
        "similarities": [row["similarity"] for row in results],
        "seconds": {"total": total, **seconds, "other": total - sum(seconds.values())},
    }


def serve(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer every query: this runs inside the peer's environment."""
    module = part("clip_back")
    queries = np.atleast_2d(np.load(arguments.queries))[: arguments.first]
    with PeakMemory() as memory:
        knn = service(module, arguments.folder, arguments.nprobe)
        ask(module, knn, queries[0], 10)  # what is loaded at the first request
        gc.collect()  # as in `ours.py`
        requests = [ask(module, knn, query, arguments.k) for query in queries]
    packages = ("clip-retrieval", "faiss-cpu", "numpy", "pandas", "pyarrow")
    return {
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        "k": arguments.k,
        "nprobe": arguments.nprobe,
        "threads": module.faiss.omp_get_max_threads(),
        "anonymous_bytes": {"before": memory.before, "peak": memory.peak},
        "requests": requests,
    }


def main() -> None:
    """Run the peer in its environment, or, there already, answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder with image.index and metadata")
    parser.add_argument("queries", type=Path, help="an .npy file: one query, or one per row")
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--nprobe", type=int, required=True)
    parser.add_argument("--first", type=int, help="only so many of the queries")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        with os.fdopen(os.dup(1), "w") as output:
            os.dup2(2, 1)  # faiss prints to stdout: that is no part of the answer
            json.dump(serve(arguments), output)
    else:
        command = [environment(), __file__, "--inside", *sys.argv[1:]]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
