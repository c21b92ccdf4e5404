"""A project in which `make dev` runs, started once for the tests of all modules."""

from collections.abc import Iterator

import pytest
from helpers.webserver import Project


@pytest.fixture(scope="session")
def running_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    made = Project(tmp_path_factory.mktemp("project"))
    try:
        made.start()
        yield made
    finally:
        made.dev.press_ctrl_c()
