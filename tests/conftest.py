import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.project import Demo, Project, new_project
from hypothesis import settings

from laion_assets.demo import DEMO_MODEL, build_demo
from laion_assets.seeds import Model, list_folder, read_seeds

pytest_plugins = ["helpers.gcs"]

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Keep the garbage collector from visiting the modules of Dagster and of the tests over and over."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nothing_from_outside() -> Iterator[None]:
    """Keep settings and locations of the user's environment out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("LAION_", "DAGSTER_", "KUBERNETES_SERVICE_")):
                patch.delenv(name)
        patch.setenv("DAGSTER_DISABLE_TELEMETRY", "1")
        yield


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("demo")
    index, images, seeds = root / "index", root / "images", root / "seeds"
    report = build_demo(index, images)
    model = Model(DEMO_MODEL, "cpu")
    for name, seed_set in list_folder(str(images)).sets.items():
        (seeds / name).mkdir(parents=True)
        table = read_seeds(str(images), seed_set, model).to_table()
        captions = pa.array([Path(file).stem for file in table["file"].to_pylist()])
        pq.write_table(
            table.select(["embedding", "thumbnail"]).append_column("caption", captions),
            seeds / name / "seeds.parquet",
        )
    return Demo(index, images, seeds, report)


@pytest.fixture
def project(demo: Demo, tmp_path: Path) -> Iterator[Project]:
    """A project on the demo's index, with the demo's seed sets."""
    with new_project(tmp_path, demo.index, demo.seeds) as made:
        yield made
