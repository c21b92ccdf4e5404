"""Rules beyond import contracts: names in the library, use of the environment, Dagster's files."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from helpers.project import REPOSITORY

from laion_assets.definitions import build_defs
from laion_assets.defs.kubernetes.placement import CombiningPod, NvmeNode
from laion_assets.defs.launcher import LocalRunLauncher
from laion_assets.defs.places import Places
from laion_assets.defs.settings import FIELDS, variable_of
from laion_assets.io.errors import InputError

PACKAGE = REPOSITORY / "laion_assets"
MODULES = sorted(PACKAGE.rglob("*.py"))
LIBRARY = {"build", "index", "io", "search", "seeds", "staging"}
IN_LIBRARY = [path for path in MODULES if path.relative_to(PACKAGE).parts[0] in LIBRARY]
# Where the environment of the process comes in, and where Google's clients look for their own variables.
ENVIRONMENT = {
    "laion_assets",  # tells ONNX Runtime to report nothing
    "laion_assets.io.processes",  # hands it on to the processes that it starts
    "laion_assets.definitions",
    "laion_assets.cli",
    "laion_assets.defs.webserver",
    "laion_assets.io.storage",
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imported_by(*modules: str) -> set[str]:
    """Names of all modules that are loaded after importing these, in a separate process."""
    program = f"import sys, {', '.join(modules)}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def texts_in(path: Path) -> Iterator[str]:
    """Every string constant of a module, docstrings and parts of f-strings included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


# --- the library ----------------------------------------------------------------------------------


def test_the_library_works_without_dagster():
    library = [name_of(path) for path in IN_LIBRARY]
    assert len(library) > 10
    there = imported_by(*library)
    assert set(library) <= there
    assert {name for name in there if name.partition(".")[0].startswith("dagster")} == set()
    ours = {name for name in there if name.startswith("laion_assets.")}
    assert {name for name in ours if name.split(".")[1] not in LIBRARY} == set()


@pytest.mark.parametrize("path", IN_LIBRARY, ids=name_of)
def test_the_library_names_no_variable_and_no_asset_of_the_platform(path):
    keys = build_defs({}).resolve_asset_graph().get_all_asset_keys()
    assets = "|".join(key.to_user_string() for key in keys)
    platform = re.compile(rf"LAION_\w*|\b(?:{assets})\b|Launchpad|[Mm]aterializ\w+")
    assert sorted({found for text in texts_in(path) for found in platform.findall(text)}) == []


def test_where_assets_run_depends_on_nothing_of_ours_but_the_error():
    leaf = "laion_assets.defs.kubernetes.placement"
    there = imported_by(leaf)
    parents = {"laion_assets", "laion_assets.defs", "laion_assets.defs.kubernetes"}
    error = {"laion_assets.io", "laion_assets.io.errors"}
    assert {n for n in there if n.startswith("laion_assets")} - error == parents | {leaf}


# --- the environment ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_environment_of_the_process_is_read_where_it_comes_in_and_nowhere_else(path):
    reads = [
        f"line {node.lineno}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
    ]
    assert bool(reads) == (name_of(path) in ENVIRONMENT), reads


def test_onnx_runtime_keeps_no_record_of_the_models_that_it_opens(tmp_path):
    program = "from laion_assets.io.int8 import largest_code; print(largest_code())"
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}  # nothing that turns it off
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert list(tmp_path.rglob("*")) == []


def test_a_code_location_takes_no_notice_of_variables_that_it_was_not_given(monkeypatch):
    before = build_defs({})
    for name in (*Places.model_fields, *FIELDS):
        monkeypatch.setenv(variable_of(name), "not usable")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    after = build_defs({})
    assert after.executor is before.executor is dg.in_process_executor
    for name in ("laion_index", "seeds", "tables", "defaults", "pictures"):
        with dg.build_resources({name: (after.resources or {})[name]}) as given:
            assert "not usable" not in str(getattr(given, name))


def test_every_variable_that_the_package_names_is_declared():
    declared = {variable_of(name) for name in (*Places.model_fields, *FIELDS)}
    declared |= {*NvmeNode.variables().values(), *CombiningPod.variables().values()}
    named = {
        variable
        for path in MODULES
        for text in texts_in(path)
        for variable in re.findall(r"LAION_[A-Z_]*[A-Z](?!\w|<)", text)
    }
    assert "LAION_INDEX_URI" in named
    assert named - declared == set()


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("LAION_DEDUP_TRESHOLD", "LAION_DEDUP_THRESHOLD"),
        ("LAION_BLOCK_LISTS", "LAION_BLOCK_LIST"),
        ("LAION_FILTER", "LAION_FILTERS"),
        ("LAION_NVME_LABLE", "LAION_NVME_LABEL"),
        ("LAION_INDEX", "LAION_INDEX_KEY or LAION_INDEX_URI"),
        ("LAION_SEEDS", "LAION_SEEDS_URI"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_one_that_is_meant(misspelt, meant):
    with pytest.raises(InputError, match=rf"{misspelt} is set.*did you mean {meant}\?"):
        build_defs({misspelt: "1"})


def test_variables_of_others_are_left_alone():
    build_defs({"LAION_ASSETS_SERVICE_HOST": "10.0.0.7", "LAION_ASSETS_PORT": "tcp://10.0.0.7:3030"})


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
        assert instance.run_retries_enabled
        assert instance.run_retries_max_retries > 0
        assert not instance.run_retries_retry_on_asset_or_op_failure
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


def test_the_packaged_instance_is_that_of_a_checkout_but_for_where_its_storage_is():
    packaged, checkout = (
        yaml.safe_load(path.read_text())
        for path in (PACKAGE / "defs" / "instance.yaml", REPOSITORY / "dagster.yaml")
    )
    storage = {"storage", "local_artifact_storage", "compute_logs"}
    assert storage <= checkout.keys()
    assert {name: value for name, value in checkout.items() if name not in storage} == {
        name: value for name, value in packaged.items() if name not in storage
    }


def test_the_workspace_of_a_checkout_loads(tmp_path):
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
