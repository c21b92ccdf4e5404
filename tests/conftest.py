import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.project import Demo, Project, new_project
from hypothesis import settings

from laion_assets.demo.build import build_demo

pytest_plugins = ["helpers.gcs"]

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def nothing_from_outside() -> Iterator[None]:
    """Settings and places of whoever runs the tests play no part in them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("LAION_", "DAGSTER_", "KUBERNETES_SERVICE_")):
                patch.delenv(name)
        patch.setenv("DAGSTER_DISABLE_TELEMETRY", "1")
        yield


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("demo")
    index, seeds = root / "index", root / "seeds"
    return Demo(index, seeds, build_demo(index, seeds))


@pytest.fixture
def project(demo: Demo, tmp_path: Path) -> Iterator[Project]:
    """A project on the demo's index, with the demo's seed sets."""
    with new_project(tmp_path, demo.index, demo.seeds) as made:
        yield made
