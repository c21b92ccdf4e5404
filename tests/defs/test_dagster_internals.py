"""Only one module imports Dagster internals, and Dagster's release is pinned."""

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.execution.context.system import StepExecutionContext
from dagster._core.storage.event_log.base import EventLogStorage
from helpers.project import REPOSITORY

from laion_assets.defs import dagster_internals

PACKAGE = REPOSITORY / "laion_assets"
SOURCE = Path(dagster_internals.__file__)
DAGSTER = re.compile(r"dagster(_\w+)?$")
PINNED = ("dagster", "dagster-k8s", "dagster-gcp", "dagster-webserver")


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of each Dagster import of a file; the name is empty for a whole module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        yield from ((module, name) for module, name in found if DAGSTER.match(module.partition(".")[0]))


def is_private(module: str, name: str) -> bool:
    """Whether a name is a Dagster internal, as all of `dagster_shared` is."""
    return module.startswith("dagster_shared") or any(
        part[0] == "_" for part in [*module.split("."), name or "-"]
    )


PRIVATE = sorted(set(imports_of(SOURCE)))


def test_no_other_module_uses_what_is_not_public():
    others = {
        f"{path.relative_to(REPOSITORY)}: {module} {name}"
        for path in PACKAGE.rglob("*.py")
        if path != SOURCE
        for module, name in imports_of(path)
        if is_private(module, name)
    }
    assert others == set(), f"import it in {SOURCE.name}, where an upgrade is prepared"


def test_the_module_holds_nothing_but_what_is_not_public_and_all_of_it_is_used():
    assert [f"{module} {name}" for module, name in PRIVATE if not is_private(module, name)] == []
    assert {name for _, name in PRIVATE} == set(dagster_internals.__all__)
    used = {
        alias.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == dagster_internals.__name__
        for alias in node.names
    }
    assert used == set(dagster_internals.__all__)


@pytest.mark.parametrize(("module", "name"), PRIVATE)
def test_every_part_is_where_it_is_imported_from(module, name):
    upgrade = f"dagster {version('dagster')} has moved {name} out of {module}: adapt {SOURCE.name}"
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        found = None
    assert found is not None, upgrade


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (dg.DagsterInstance, "get_latest_data_version_record"),
        (EventLogStorage, "free_concurrency_slots_for_run"),
        (EventLogStorage, "get_latest_tags_by_partition"),
        (StepExecutionContext, "wipe_input_asset_version_info"),
    ],
)
def test_every_method_that_is_not_public_exists(owner, name):
    assert any(f".{name}(" in path.read_text() for path in PACKAGE.rglob("*.py")), "no longer used"
    assert hasattr(owner, name), f"dagster {version('dagster')} has no {owner.__name__}.{name}"


def test_the_executor_of_step_pods_still_has_a_handler_to_wrap():
    handler = "_step_handler"
    assert handler in inspect.getsource(dagster_internals.StepDelegatingExecutor.__init__)


@pytest.mark.parametrize("distribution", PINNED)
def test_the_minor_version_that_is_installed_is_the_one_that_is_pinned(distribution):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (pin,) = [each for each in project["dependencies"] if re.match(rf"{distribution}[><=]", each)]
    pinned = re.fullmatch(r"[\w-]+>=(\d+)\.(\d+)\.\d+,<(\d+)\.(\d+)", pin)
    assert pinned, f"{pin} does not pin a minor version"
    low, high = tuple(map(int, pinned.groups()[:2])), tuple(map(int, pinned.groups()[2:]))
    assert high == (low[0], low[1] + 1)
    installed = tuple(map(int, version(distribution).split(".")[:2]))
    assert installed == low, (
        f"{distribution} {version(distribution)} is another minor version than pyproject.toml pins "
        f"({pin}): check each part that {SOURCE.name} imports, then move the pin"
    )
