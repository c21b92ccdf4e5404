"""Indices, seeds and block lists on web servers, with and without a password."""

from pathlib import Path

import dagster as dg
import pytest
from helpers.project import Demo, Project, contents, failures, new_project
from helpers.web import PASSWORD, SIGNATURE, USER, Plain, Private, web_server

from laion_assets.io.errors import InputError
from laion_assets.io.storage import new_file
from laion_assets.io.tables import StoredTable
from laion_assets.staging import Manifest, stage
from laion_assets.staging.transfer.fetch import TransferOptions


def everything_written(project: Project) -> bytes:
    """Tables, manifests, events, logs and the UI's page of each resource."""
    instance = project.instance
    said = [repr((run, instance.all_logs(run.run_id))) for run in instance.get_runs()]
    said += [repr(instance.fetch_observations(dg.AssetKey("retrieval_settings"), limit=100).records)]
    said += [str(getattr(each, "description", each)) for each in (project.defs.resources or {}).values()]
    files = b"".join(contents(project.root).values())
    return files + "\n".join(said).encode()


@pytest.mark.faults
def test_an_index_behind_a_password_makes_the_same_tables_and_its_secrets_are_written_nowhere(
    demo: Demo, project: Project, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    (served / "index").symlink_to(demo.index)
    (served / "seeds").symlink_to(demo.seeds)
    (served / "blocked.txt").write_text("3\n")
    (tmp_path / "web").mkdir()
    with web_server(served, Private) as host:
        place, secret = f"http://{USER}:{PASSWORD}@{host}", f"?sig={SIGNATURE}"
        variables = {
            "LAION_INDEX_URI": f"{place}/index{secret}",
            "LAION_SEEDS_URI": f"{place}/seeds/{secret}",
            "LAION_BLOCK_LIST": f"{place}/blocked.txt{secret}",
        }
        with new_project(tmp_path / "web", demo.index, **variables) as over_web:
            assert failures(over_web.run("flower")) == {}
            assert failures(over_web.run(None, "staged_laion_index")) == {}
            manifest = Manifest.read(over_web.cache)
            assert manifest is not None
            assert manifest.source == f"http://{host}/index"
            (served / "index").unlink()
            failed = failures(over_web.run(None, "staged_laion_index"))
            assert "there is no folder" in failed["staged_laion_index"]
            written = everything_written(over_web)
    assert host.encode() in written
    said = "".join(capfd.readouterr()).encode()
    for part in (USER, PASSWORD, SIGNATURE):
        assert part.encode() not in written + said
    project.with_environment(LAION_BLOCK_LIST=str(served / "blocked.txt")).run("flower")
    for name in ("knn_urls", "combined_urls"):
        tables = [StoredTable(str(each.table(name, "flower"))).read() for each in (over_web, project)]
        assert tables[0] == tables[1]


def test_a_full_copy_of_an_index_on_a_web_server_is_made_once(demo: Demo, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with web_server(demo.index, Private) as host:
        uri = f"http://{USER}:{PASSWORD}@{host}/?sig={SIGNATURE}"
        done, again = stage(uri, None, cache), stage(uri, None, cache)
    copied, there = contents(cache), contents(demo.index)
    assert {file.name for file in done.manifest.files} <= set(copied)
    assert all(copied[file.name] == there[file.name] for file in done.manifest.files)
    assert done.fetched == len(done.manifest.files)
    assert again.fetched == 0
    assert PASSWORD.encode() not in (cache / "manifest.json").read_bytes()


def test_a_server_that_returns_whole_files_only_is_refused_by_name(demo: Demo, tmp_path: Path) -> None:
    with web_server(demo.index, Plain) as host, pytest.raises(InputError) as refused:
        stage(f"http://{host}", None, tmp_path / "cache", options=TransferOptions(chunk=1 << 16))
    assert f"http://{host}/" in str(refused.value)
    assert "cannot be read in parts" in str(refused.value)
    assert "nginx" in str(refused.value)


def test_a_web_server_cannot_be_written_to_and_says_so(tmp_path: Path) -> None:
    with (
        web_server(tmp_path) as host,
        pytest.raises(InputError, match=rf"http://{host}/table.parquet cannot be written.*gs://"),
        new_file(f"http://{host}/table.parquet"),
    ):
        pass
