"""Carrying out the plan of staging makes the disk equal to the source."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laion_assets.staging import Manifest, StagedFile
from laion_assets.staging.plan import plan_staging
from laion_assets.staging.transfer.files import SourceFile, file_version, version_of

NAMES = st.sampled_from([f"metadata/{name}" for name in "abcdef"])
VERSIONS = st.tuples(st.sampled_from(["v1", "v2"]), st.integers(0, 2))  # version, size


@given(
    there=st.dictionaries(NAMES, VERSIONS),
    listed=st.none() | st.dictionaries(NAMES, VERSIONS),
    found=st.dictionaries(NAMES, st.integers(0, 2)),
)
def test_carrying_out_the_plan_makes_the_disk_the_source_and_keeps_what_did_not_change(
    there, listed, found
):
    source = [
        SourceFile(name, f"far:/{name}", f"/{name}", size, v, None) for name, (v, size) in there.items()
    ]
    files = {
        name: StagedFile(name, name, f"far:/{name}", size, v, f"crc of {v}")
        for name, (v, size) in (listed or {}).items()
    }
    manifest = None if listed is None else Manifest("far", tuple(files.values()), complete=True)
    sizes = {name: size for name, size in found.items() if name in files}
    todo = plan_staging(source, manifest, sizes)

    unchanged = {n for n, at in (listed or {}).items() if there.get(n) == at and sizes.get(n) == at[1]}
    assert {file.name for file in todo.keep} == unchanged
    assert all(files[file.name] == file for file in todo.keep)
    assert {file.name for file in (*todo.keep, *todo.remove)} == set(files)

    disk = {name: (files[name].version, size) for name, size in sizes.items()}
    for gone in todo.remove:
        disk.pop(gone.name, None)
    assert set(disk) == unchanged
    disk |= {file.name: (file.version, file.size) for file in todo.fetch}
    assert disk == there

    made = [StagedFile(f.name, f.name, f.url, f.size, f.version, "crc") for f in todo.fetch]
    whole = Manifest("far", (*todo.keep, *made), complete=True)
    after = plan_staging(source, whole, {file.name: file.size for file in source})
    assert (after.fetch, after.remove) == ((), ())


@pytest.mark.parametrize("key", ["ETag", "etag", "generation", "mtime", "LastModified", "last_modified"])
def test_the_version_of_a_file_is_found_however_a_file_system_spells_it(key):
    assert file_version({"name": "x", "size": 1, key: "v7"}) == "v7"


def test_the_version_of_a_source_is_that_of_its_files_in_any_order():
    files = [SourceFile(name, f"far:/{name}", f"/{name}", 1, "v1", "crc") for name in "ab"]
    uploaded_again = [SourceFile(name, f"far:/{name}", f"/{name}", 1, "v2", "crc") for name in "ba"]
    assert version_of(files) == version_of(uploaded_again)
    no_checksums = [SourceFile(f.name, f.url, f.path, f.size, f.version, None) for f in files]
    assert version_of(no_checksums) != version_of(files)
