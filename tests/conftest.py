from dataclasses import dataclass
from pathlib import Path

import pytest

from laion_assets.demo.build import DemoReport, build_demo


@dataclass(frozen=True)
class Demo:
    """The demo data, built once a session: read it, copy it, do not write to it."""

    index: Path
    seeds: Path
    report: DemoReport


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("demo")
    index, seeds = root / "index", root / "seeds"
    return Demo(index, seeds, build_demo(index, seeds))
