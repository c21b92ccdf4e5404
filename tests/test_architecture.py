"""The rules of the house, the settings, and Dagster's own files."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from helpers.project import REPOSITORY

from laion_assets.definitions import build_defs
from laion_assets.defs.launcher import LocalRunLauncher
from laion_assets.defs.settings import DEFAULTS
from laion_assets.io.errors import InputError

PACKAGE = REPOSITORY / "laion_assets"
MODULES = sorted(PACKAGE.rglob("*.py"))
LIBRARY = {"index", "io", "search", "seeds", "staging"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imported_by(*modules: str) -> set[str]:
    """Names of all modules that are there once these were imported, in a process of its own."""
    program = f"import sys, {', '.join(modules)}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


# --- the house ------------------------------------------------------------------------------------


def test_the_library_works_without_dagster():
    library = [name_of(path) for path in MODULES if path.relative_to(PACKAGE).parts[0] in LIBRARY]
    assert len(library) > 10
    there = imported_by(*library)
    assert set(library) <= there
    assert {name for name in there if name.partition(".")[0].startswith("dagster")} == set()
    ours = {name for name in there if name.startswith("laion_assets.")}
    assert {name for name in ours if name.split(".")[1] not in LIBRARY} == set()


@pytest.mark.parametrize(
    "leaf", ["laion_assets.defs.kubernetes.placement", "laion_assets.defs.kubernetes.claim"]
)
def test_where_assets_run_depends_on_nothing_of_ours(leaf):
    there = imported_by(leaf)
    parents = {"laion_assets", "laion_assets.defs", "laion_assets.defs.kubernetes"}
    assert {n for n in there if n.startswith("laion_assets")} == parents | {leaf}


# --- Dagster's own files --------------------------------------------------------------------------


def test_dagster_yaml_loads_and_frees_what_a_killed_run_held(tmp_path):
    (tmp_path / "dagster.yaml").write_text(
        (REPOSITORY / "dagster.yaml").read_text().replace("data/dagster", str(tmp_path / "data"))
    )
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert isinstance(instance.run_launcher, LocalRunLauncher)
        assert instance.run_launcher.supports_check_run_worker_health
        assert instance.run_monitoring_enabled
        told = instance.get_settings("run_monitoring")
        assert 0 < told["free_slots_after_run_end_seconds"] <= 60
        pools = instance.get_concurrency_config().pool_config
        assert pools.default_pool_limit == 1
        assert pools.pool_granularity.value == "op"
        assert instance.telemetry_enabled is False
        instance.add_dynamic_partitions("seed_sets", ["flower"])
        instance.event_log_storage.initialize_concurrency_limit_to_default("retrieval")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert instance.get_dynamic_partitions("seed_sets") == ["flower"]
        assert instance.event_log_storage.get_concurrency_info("retrieval").slot_count == 1
    assert {path.name for path in tmp_path.iterdir()} == {"dagster.yaml", "data"}


def test_the_workspace_loads(tmp_path):
    shutil.copy(REPOSITORY / "workspace.yaml", tmp_path)
    dagster = Path(sys.executable).with_name("dagster")
    done = subprocess.run(
        [dagster, "definitions", "validate", "-w", "workspace.yaml"],
        cwd=tmp_path,
        env=os.environ | {"DAGSTER_HOME": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Validation successful for code location laion_assets" in done.stdout + done.stderr


# --- settings -------------------------------------------------------------------------------------


def variables_read() -> set[str]:
    """The variables of the environment that the code takes notice of."""

    class Noted(dict[str, str]):
        def get(self, name, default=None):
            noted.add(name)
            return super().get(name, default)

    noted: set[str] = set()
    build_defs(Noted())
    settings = {f"LAION_{name.upper()}" for name in DEFAULTS}
    written = {
        node.value
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"LAION_(?!NVME_)[A-Z_]+", node.value)  # those are k8s/README.md's
    }
    assert written <= noted | settings
    return {name for name in noted if name.startswith("LAION_")} | settings


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("LAION_DEDUP_TRESHOLD", "LAION_DEDUP_THRESHOLD"),
        ("LAION_BLOCK_LISTS", "LAION_BLOCK_LIST"),
        ("LAION_FILTER", "LAION_FILTERS"),
    ],
)
def test_a_misspelt_variable_is_no_silent_default(misspelt, meant):
    with pytest.raises(InputError, match=f"{misspelt} is set, which is no setting: did you mean {meant}"):
        build_defs({misspelt: "1"})


def test_variables_of_others_are_left_alone():
    build_defs({"LAION_ASSETS_SERVICE_HOST": "10.0.0.7", "LAION_ASSETS_PORT": "tcp://10.0.0.7:3030"})
