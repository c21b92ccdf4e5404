"""Rows of the metadata are found by id, whatever the files, batches and types."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import indices
from helpers.metadata import metadata_files, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laion_assets.index import arrow_layout
from laion_assets.index.arrow_file import ArrowFile
from laion_assets.index.metadata import Metadata
from laion_assets.io.errors import InputError
from laion_assets.io.ranges import WholeFiles, in_memory
from laion_assets.search.filters import Filters, conditions_in

SUFFIXES = [indices.ARROW, indices.PARQUET]


# --- every row is the right one -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    tables=metadata_files(), batch=st.integers(1, 4), small=st.sampled_from([0, 1 << 30]), data=st.data()
)
def test_rows_taken_by_id_are_the_rows_of_all_files_in_a_line(
    tmp_path_factory, suffix, tables, batch, small, data
):
    folder = tmp_path_factory.mktemp("metadata")
    with mock.patch("laion_assets.index.metadata.SMALL", small):
        metadata = Metadata(write(folder, tables, suffix, batch))
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(metadata) == len(rows)
    ids = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20) if rows else st.just([]))
    ids = np.array(ids, np.int64)
    taken = metadata.take(ids, metadata.schema.names)
    assert taken.schema == metadata.schema
    for name in metadata.schema.names:
        expected = [rows[i].get(name) for i in ids]
        assert taken[name].to_pylist() == expected, name
    assert metadata.take(ids, ["caption"]) == taken.select(["caption"])
    assert metadata.take(ids).column_names == [n for n in taken.column_names if n != "thumbnail"]
    shutil.rmtree(folder)


def test_text_and_binary_views_as_newer_writers_leave_them_are_read(tmp_path):
    urls, pictures = (
        ["a", None, "an url that is too long to be inline"],
        [b"1", None, b"a long picture" * 3],
    )
    columns = [pa.array(urls, pa.string_view()), pa.array(pictures, pa.binary_view())]
    table = pa.table(columns, names=["url", "thumbnail"])
    metadata = Metadata(write(tmp_path, [table, pa.table({"url": ["b"], "thumbnail": [b"2"]})], batch=2))
    taken = metadata.take(np.array([3, 2, 1, 2]), ["thumbnail", "url"])
    assert taken["url"].to_pylist() == ["b", urls[2], None, urls[2]]
    assert taken["thumbnail"].to_pylist() == [b"2", pictures[2], None, pictures[2]]


def test_ids_without_a_row_are_recognised_and_never_given_another(tmp_path):
    metadata = Metadata(write(tmp_path, [pa.table({"url": ["a", "b"]}), pa.table({"url": ["c"]})]))
    ids = np.array([-1, 0, 2, 3, 1 << 40])
    assert metadata.covers(ids).tolist() == [False, True, True, False, False]
    for wrong in (-1, 3, 1 << 40):
        with pytest.raises(IndexError, match="without a metadata row"):
            metadata.take(np.array([0, wrong]))


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["url", "URL", "image_url", "image_path"])
@pytest.mark.parametrize("caption", ["caption", "TEXT", "text", "alt", None])
def test_the_usual_names_are_known(tmp_path, url, caption):
    named = {"key": ["k"], url: ["u"]} | ({caption: ["c"]} if caption else {})
    metadata = Metadata(write(tmp_path, [pa.table(named)]))
    assert metadata.take(np.array([0])).to_pylist() == [{"url": "u", "caption": "c" if caption else None}]


def test_unusual_names_are_mapped_and_the_mapping_comes_first(tmp_path):
    paths = write(
        tmp_path, [pa.table({"link": ["u"], "url": ["page"], "alt text": ["c"], "TEXT": ["t"]})]
    )
    metadata = Metadata(paths, {"url": "link", "caption": "alt text"})
    assert metadata.take(np.array([0])).to_pylist() == [{"url": "u", "caption": "c"}]
    with pytest.raises(
        InputError, match=r"000\.arrow .*'lnik'.*'url'.*link, url, alt text, TEXT"
    ) as refused:
        Metadata(paths, {"url": "lnik"})
    assert refused.value.about == "metadata_columns"


def test_safety_columns_travel_along_and_others_do_not(tmp_path):
    table = pa.table({"url": ["u"], "punsafe": [0.5], "NSFW": ["UNLIKELY"], "exif": ["{}"]})
    metadata = Metadata(write(tmp_path, [table]))
    assert metadata.take(np.array([0])).to_pylist() == [
        {"url": "u", "caption": None, "NSFW": "UNLIKELY", "punsafe": 0.5}
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_a_url_column_those_found_are_named(tmp_path, suffix):
    paths = write(tmp_path, [pa.table({"link": ["u"], "text": ["c"]})], suffix)
    with pytest.raises(InputError, match=f"000{suffix} .*image_url.*link, text.*url=<column>") as refused:
        Metadata(paths)
    assert refused.value.about == "metadata_columns"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_column_that_a_file_lacks_is_null_there(tmp_path, suffix):
    tables = [
        pa.table({"url": ["a"], "TEXT": ["c"]}),
        pa.table({"URL": ["b"], "caption": ["d"], "NSFW": ["UNSURE"]}),
        pa.table({"url": ["c"]}),
    ]
    taken = Metadata(write(tmp_path, tables, suffix)).take(np.arange(3)).to_pylist()
    assert taken == [
        {"url": "a", "caption": "c", "NSFW": None},
        {"url": "b", "caption": "d", "NSFW": "UNSURE"},
        {"url": "c", "caption": None, "NSFW": None},
    ]
    (tmp_path / f"003{suffix}").write_bytes(
        write(tmp_path / "other", [pa.table({"text": ["x"]})], suffix)[0].read_bytes()
    )
    with pytest.raises(InputError, match=f"003{suffix} has no URL column"):
        Metadata(sorted(tmp_path.glob(f"*{suffix}")))


def test_any_column_is_taken_by_name_and_travels_along_if_named(tmp_path):
    score = {"score": [0.25], "TEXT": ["c"]}
    paths = write(tmp_path, [pa.table({"url": ["a"]}), pa.table({"url": ["b"], **score})])
    metadata = Metadata(paths)
    assert metadata.take(np.array([0, 1]), ["score", "TEXT"]).to_pylist() == [
        {"score": None, "TEXT": None},
        {"score": 0.25, "TEXT": "c"},
    ]
    assert Metadata(paths, {"score": "score"}).schema.names == ["url", "caption", "score"]
    with pytest.raises(InputError, match=r"'scor' to carry along: choose some of .*score") as refused:
        Metadata(paths, {"scor": "scor"})
    assert refused.value.about == "metadata_columns"


def test_columns_of_types_that_do_not_go_together_are_refused_where_they_are_used(tmp_path):
    tables = [pa.table({"url": ["u"], "NSFW": kind, "odd": kind}) for kind in (["yes"], [True])]
    with pytest.raises(InputError, match=r"'NSFW' .*large_string in one file and bool in another"):
        Metadata(write(tmp_path, tables))
    odd = Metadata(write(tmp_path, [table.drop_columns(["NSFW"]) for table in tables]))
    with pytest.raises(InputError, match=r"odd .*holds dense_union.*remove this condition"):
        Filters(conditions_in("odd == 'yes'")).check(odd.columns)


def test_integers_of_any_size_in_any_file_are_kept_exactly(tmp_path):
    kinds = [(2**63 + 5, pa.uint64()), (-(2**63), pa.int64()), (7, pa.int8())]
    metadata = Metadata(
        write(tmp_path, [pa.table({"url": ["u"], "WIDTH": pa.array([n], kind)}) for n, kind in kinds])
    )
    assert metadata.take(np.arange(3))["WIDTH"].to_pylist() == [number for number, _ in kinds]
    floats = pa.table({"url": ["u"], "WIDTH": [0.5]})
    mixed = Metadata(write(tmp_path, [pa.table({"url": ["u"], "WIDTH": pa.array([2**53 + 1])}), floats]))
    with pytest.raises(InputError, match=r"'WIDTH' of .*000\.arrow holds int64.*double"):
        mixed.take(np.array([0]))


def test_run_end_encoded_columns_and_extension_types_are_read(tmp_path):
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["A", "B"]))
    table = pa.table({"url": ["a", "b", "c"], "NSFW": runs, "caption": pa.array(["{}"] * 3, pa.json_())})
    metadata = Metadata(write(tmp_path, [table, pa.table({"url": ["d"], "NSFW": ["C"]})], batch=2))
    assert metadata.take(np.array([3, 2, 1]), ["NSFW", "caption"]).to_pylist() == [
        {"NSFW": "C", "caption": None},
        {"NSFW": "B", "caption": "{}"},
        {"NSFW": "A", "caption": "{}"},
    ]


def test_the_stream_format_of_arrow_is_named_with_the_way_out(tmp_path):
    with pa.OSFile(str(tmp_path / "0.arrow"), "wb") as file:
        table = pa.table({"url": ["u"]})
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(InputError, match=r"0\.arrow is in Arrow's stream format.*Dataset\.to_parquet"):
        Metadata([tmp_path / "0.arrow"])


@pytest.mark.faults
def test_captions_of_more_than_2_gib_are_taken_in_one_request(tmp_path):
    caption, rows = "x" * (16 << 20), np.zeros(140, np.int64)
    paths = write(tmp_path, [pa.table({"url": ["u"], "caption": [caption]})], indices.PARQUET)
    taken = Metadata(paths).take(rows)
    assert taken["caption"].nbytes > 2 << 30
    assert taken["caption"][139].as_py() == caption


@pytest.mark.parametrize("column", ["url", "caption"])
def test_a_url_or_caption_that_is_not_text_is_refused(tmp_path, column):
    table = pa.table({"url": ["u"], "caption": ["c"]} | {column: [7]})
    with pytest.raises(InputError, match=f"'{column}' .*000.arrow .*int64.*{column}=<column>") as refused:
        Metadata(write(tmp_path, [table]))
    assert refused.value.about == "metadata_columns"


def test_thumbnails_that_are_not_pictures_do_not_travel(tmp_path):
    metadata = Metadata(
        write(tmp_path, [pa.table({"url": ["u"], "thumbnail": ["https://example.org/t"]})])
    )
    assert metadata.schema.names == ["url", "caption"]


# --- damaged files --------------------------------------------------------------------------------

OPEN_EVERY_LENGTH = """
import json, sys
from pathlib import Path
from laion_assets.io.errors import InputError
from laion_assets.index.metadata import Metadata

path = Path(sys.argv[1])
whole, cut = path.read_bytes(), path.with_name("cut" + path.suffix)
results = {}
for length in range(len(whole) + 1):
    cut.unlink(missing_ok=True)
    cut.write_bytes(whole[:length])
    try:
        Metadata([cut])
        results[length] = ["opened", None]
    except InputError as error:
        results[length] = [str(error), error.about]
    except Exception as error:
        results[length] = [repr(error), None]
print(json.dumps(results))
"""


FLIP_EVERY_BYTE = """
import collections, json, sys
from pathlib import Path
import numpy as np
from laion_assets.io.errors import InputError
import laion_assets.index.metadata as module
from laion_assets.index.metadata import Metadata

path, module.SMALL = Path(sys.argv[1]), int(sys.argv[2])
whole, wrong = path.read_bytes(), path.with_name("wrong" + path.suffix)
results = collections.Counter()
for place in range(len(whole)):
    wrong.unlink(missing_ok=True)
    wrong.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
    try:
        metadata = Metadata([wrong])
        metadata.take(np.arange(min(len(metadata), 12)), metadata.schema.names)
        results["rows"] += 1
    except InputError as error:
        results["error" if wrong.name in str(error) else str(error)] += 1
    except Exception as error:
        results[f"{place}: {error!r}"] += 1
print(json.dumps(results))
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_off_anywhere_is_named_and_nothing_crashes(tmp_path, suffix):
    table = pa.table({"url": [f"u{i}" for i in range(12)], "caption": ["c"] * 12})
    (path,) = write(tmp_path, [table], suffix, batch=5)
    # In a process of its own: reading beyond the end of a mapped file would end it.
    done = subprocess.run(
        [sys.executable, "-c", OPEN_EVERY_LENGTH, str(path)], capture_output=True, text=True, check=True
    )
    results = json.loads(done.stdout)
    assert results.pop(str(path.stat().st_size)) == ["opened", None]
    assert len(results) > 500
    kind = "Arrow IPC" if suffix == indices.ARROW else "Parquet"
    unexpected = {
        length: (message, about)
        for length, (message, about) in results.items()
        if not (f"cut{suffix} " in message and kind in message and about == "staged_index")
    }
    assert unexpected == {}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_another_format_is_named(tmp_path, suffix):
    path = tmp_path / f"0{suffix}"
    path.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(InputError, match=f"{path.name} ") as refused:
        Metadata([path])
    assert refused.value.about == "staged_index"


def test_a_truncated_metadata_file_is_named(tmp_path) -> None:
    (path,) = indices.write_metadata(tmp_path, pa.table({"url": ["a"] * 100}))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=path.name):
        Metadata([path])


@pytest.mark.parametrize(
    ("field", "kind", "number"),
    [
        *((0, np.int64, number) for number in (-8, 1 << 44, (1 << 63) - 8)),  # where a batch begins
        *((8, np.int32, number) for number in (-8, 1 << 30)),  # bytes of its header
        *((16, np.int64, number) for number in (-8, 1 << 44, (1 << 63) - 8)),  # bytes of its rows
    ],
)
def test_a_footer_that_names_what_is_outside_of_the_file_is_named(tmp_path, field, kind, number) -> None:
    (path,) = indices.write_metadata(tmp_path, pa.table({"url": ["a"] * 100}))
    content = path.read_bytes()
    ((start, _),) = arrow_layout.footer(len(content), content[-arrow_layout.TAIL :]).tolist()
    blocks = arrow_layout.blocks(content[start:], len(content))
    at = content.rindex(np.int64(blocks.headers[0, 0]).tobytes()) + field
    written = kind(number).tobytes()
    path.write_bytes(content[:at] + written + content[at + len(written) :])
    with pytest.raises(InputError, match=f"{path.name} .*outside of the file"):
        Metadata([path])


def test_a_footer_that_names_all_of_the_file_again_and_again_is_named(tmp_path) -> None:
    rows = [pa.table({"url": ["a"] * 100})] * 3
    (path,) = indices.write_metadata(tmp_path, pa.concat_tables(rows), batch=100)
    content = bytearray(path.read_bytes())
    ((start, _),) = arrow_layout.footer(len(content), content[-arrow_layout.TAIL :]).tolist()
    for first, end in arrow_layout.blocks(content[start:], len(content)).headers.tolist():
        block = content.rindex(np.int64(first).tobytes()), len(content) - end
        content[block[0] + 16 : block[0] + 24] = np.int64(block[1]).tobytes()
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path.name} .*overlap"):
        Metadata([path])


def test_headers_are_as_they_were_whatever_the_number_of_their_buffers(tmp_path) -> None:
    path, schema = tmp_path / "0.arrow", pa.schema({"url": pa.string(), "views": pa.string_view()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as out:
        for parts in (1, 2):  # each part has a buffer of its own
            views = pa.concat_arrays([pa.array(["long" * 9], pa.string_view())] * parts)
            out.write_batch(pa.record_batch([["u"] * parts, views], schema=schema))
    opened = ArrowFile(path, WholeFiles(), None, 0)
    assert not any(opened.differs(WholeFiles(), count) for count in (1, 1, 1, 1, 2))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_row_has_about_as_many_bytes_as_its_texts(tmp_path, suffix) -> None:
    random, letters = np.random.default_rng(0), np.array(list("abcdefghijklmnopqrstuvwxyz"))
    texts = ["".join(random.choice(letters, 200)) for _ in range(500)]
    rows = pa.table({"url": texts})
    some, none = (
        Metadata(indices.write_files(tmp_path / str(n), [np.arange(n)], rows, 100, suffix))
        for n in (500, 0)
    )
    assert 100 < some.row_bytes() < 230
    assert none.row_bytes() < 50


def test_rows_of_many_row_groups_are_taken_side_by_side(tmp_path):
    rows = pa.table({"url": [f"https://example.org/{n}" for n in range(60_000)]})
    pq.write_table(rows, tmp_path / "0.parquet", row_group_size=10)
    ids = np.random.default_rng(0).permutation(4000)
    for _ in range(5):
        taken = Metadata([tmp_path / "0.parquet"]).take(ids)
        assert taken["url"].to_pylist() == rows.take(ids)["url"].to_pylist()


def test_a_large_file_that_is_cut_after_it_was_opened_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("laion_assets.index.metadata.SMALL", 0)
    (path,) = write(tmp_path, [pa.table({"url": [f"https://example.org/{n}" for n in range(4000)]})])
    metadata = Metadata([path])
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=rf"{path.name} .*stage the index again"):
        metadata.take(np.array([3999]))


def test_too_few_descriptors_are_no_damage_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr("laion_assets.index.metadata.SMALL", 0)
    metadata = Metadata(write(tmp_path, [pa.table({"url": ["https://example.org"]})]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_one = os.open(os.devnull, os.O_RDONLY)
    os.close(next_one)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            metadata.take(np.array([0]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_small_files_take_one_descriptor_each(tmp_path):
    paths = write(tmp_path, [pa.table({"url": [f"https://example.org/{n}"]}) for n in range(40)])
    metadata = Metadata(paths)
    assert sorted(open_files(tmp_path)) == paths
    assert metadata.take(np.array([39]))["url"].to_pylist() == ["https://example.org/39"]


def open_files(folder: Path) -> list[Path]:
    """The files within `folder` that this process holds open, once for each descriptor."""
    files = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists the descriptors
            files.append(descriptor.readlink())
    return [file for file in files if file.is_relative_to(folder)]


def test_a_text_that_would_lie_outside_its_batch_is_an_error_of_its_file(tmp_path):
    (path,) = write(tmp_path, [pa.table({"url": [f"https://example.org/{n}" for n in range(40)]})])
    content = path.read_bytes()
    length = len("https://example.org/0")
    offset = content.index(np.array([0, length, 2 * length], "<i4").tobytes())
    for wrong in (-1, 1 << 20, 1):
        damaged = content[: offset + 8] + np.int32(wrong).tobytes() + content[offset + 12 :]
        path.unlink()
        path.write_bytes(damaged)
        metadata, ids = Metadata([path]), np.array([1, 2])
        sentence = rf"{path.name} .*not within its batch.*stage the index again"
        with pytest.raises(InputError, match=sentence):
            metadata.take(ids)
        with metadata.reading_ahead(["url"]) as ahead, pytest.raises(InputError, match=sentence):
            ahead(ids)


def test_rows_of_a_cold_file_are_in_memory_soon_after_they_are_read_ahead(tmp_path):
    table = pa.table({"url": [f"https://example.org/{n:0500}" for n in range(60_000)]})
    (path,) = write(tmp_path, [table], indices.ARROW, batch=len(table))
    metadata = Metadata([path])
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (rows,) = metadata._by_file(np.array([30_000, 30_001]))
    needed = next(rows.file.needs(rows.batches, rows.rows, ["url"]))
    if in_memory(path, needed):
        pytest.skip("this file system does not forget what it has in memory")
    with metadata.reading_ahead(["url"]) as read_ahead:
        read_ahead(np.array([30_001, 30_000]))
    give_up = time.monotonic() + 10
    while not in_memory(path, needed) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert in_memory(path, needed)


@pytest.mark.faults
@pytest.mark.parametrize("small", [0, 1 << 30])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_gives_rows_or_an_error_and_no_crash(tmp_path, compressed, small):
    table = pa.table({"url": [f"u{n}" for n in range(12)], "width": range(12), "LANGUAGE": [["a"]] * 12})
    options = pa.ipc.IpcWriteOptions(compression="zstd" if compressed else None)
    path = tmp_path / "0.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as out:
        out.write_table(table, max_chunksize=5)
    # In a process of its own, which a wrong address would end.
    done = subprocess.run(
        [sys.executable, "-c", FLIP_EVERY_BYTE, str(path), str(small)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert sum(results.values()) == path.stat().st_size > 1000
    assert set(results) <= {"rows", "error"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_that_is_not_utf8_is_replaced_and_the_others_stay(tmp_path, suffix):
    texts = pa.array([b"caf\xe9.jpg", b"plain.jpg", None], pa.binary()).view(pa.string())
    metadata = Metadata(write(tmp_path, [pa.table({"url": texts, "caption": texts})], suffix))
    expected = [None, "plain.jpg", "caf\ufffd.jpg"]
    assert metadata.take(np.array([2, 1, 0]))["url"].to_pylist() == expected
    compressed, table = tmp_path / "compressed.arrow", pa.table({"url": texts})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(compressed, table.schema, options=options) as writer:
        writer.write_table(table)
    assert Metadata([compressed]).take(np.array([2, 1, 0]))["url"].to_pylist() == expected
