"""Readers and stagers of one cache directory."""

import fcntl
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers.project import contents
from helpers.staging import (
    ROWS,
    SMALL,
    is_readable,
    staged_data,
    start,
    touched,
    write_many_chunks,
    write_source,
)

from laion_assets.staging import Staged, open_staged, stage

# --- from a folder --------------------------------------------------------------------------------


def test_a_stager_that_must_change_bytes_waits_until_the_readers_are_done(source, cache):
    stage(str(source), None, cache)
    with open_staged(cache) as opened:
        assert stage(str(source), None, cache).bytes_fetched == 0  # has nothing to do, does not wait
        assert is_readable(cache)  # nor does another reader
        before = touched(cache)
        with (source / "metadata" / "002.arrow").open("ab") as file:
            file.write(b"\0")
        lines: list[str] = []
        thread, results = start(lambda: stage(str(source), None, cache, log=lines.append))
        thread.join(0.5)
        assert thread.is_alive()
        (line,) = lines
        assert re.search(f"waiting for .*{cache}", line)
        assert touched(cache).items() >= before.items()  # the new version lies beside
        last = opened.metadata.take(np.array([ROWS - 1]))
        assert last["url"].to_pylist() == [f"https://example.org/0/{ROWS - 1}.jpg"]
    thread.join(30)
    (done,) = results
    assert isinstance(done, Staged)
    assert done.fetched == 1
    assert staged_data(cache) == contents(source)


@pytest.mark.faults
def test_a_reader_in_another_process_is_waited_for_and_freed_when_it_is_killed(source, cache):
    stage(str(source), None, cache)
    program = (
        "import sys, time; from pathlib import Path\n"
        "from laion_assets.staging import open_staged\n"
        "with open_staged(Path(sys.argv[1])):\n"
        "    print('open', flush=True)\n"
        "    time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(cache)], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"open\n"
        (source / "metadata" / "001.arrow").unlink()
        thread, results = start(lambda: stage(str(source), None, cache))
        thread.join(0.5)
        assert thread.is_alive()
        assert (cache / "metadata" / "001.arrow").exists()
        reader.kill()
    thread.join(30)
    assert results
    assert staged_data(cache) == contents(source)


def test_two_stagers_at_once_fetch_once(source, cache):
    cache.mkdir()
    with (cache / ".lock").open("a") as file:  # as a stager does, while both get ready
        fcntl.flock(file, fcntl.LOCK_EX)
        both = [start(lambda: stage(str(source), None, cache)) for _ in range(2)]
        time.sleep(0.2)
    for thread, _ in both:
        thread.join(30)
    assert sorted(results[0].fetched for _, results in both) == [0, len(contents(source))]
    assert staged_data(cache) == contents(source)


# --- from a bucket --------------------------------------------------------------------------------


def test_the_second_stager_waits_says_for_whom_and_fetches_nothing(bucket, source, cache):
    write_many_chunks(bucket, source)
    begun, go_on = threading.Event(), threading.Event()

    def rule(_: str) -> None:
        begun.set()
        go_on.wait(30)

    bucket.proxy.rule = rule
    one, first_results = start(lambda: stage(bucket.uri, None, cache, options=SMALL))
    assert begun.wait(30)
    lines: list[str] = []
    other, second_results = start(lambda: stage(bucket.uri, None, cache, log=lines.append))
    other.join(0.5)
    assert other.is_alive()
    (line,) = lines
    assert re.search(rf"waiting for .* on \S+ \(process {os.getpid()}, since 20\S+\).*{cache}", line)
    go_on.set()
    for thread in (one, other):
        thread.join(30)
    assert isinstance(first_results[0], Staged)
    assert second_results[0].bytes_fetched == 0
    assert bucket.proxy.bytes_read == first_results[0].bytes_fetched
    assert staged_data(cache) == contents(source)


def test_an_update_during_a_search_changes_nothing_under_it(bucket, cache, tmp_path):
    stage(bucket.uri, None, cache)
    new = write_source(tmp_path / "new", seed=1)
    with open_staged(cache) as opened:
        query = np.eye(1, opened.index.dimension, dtype=np.float32)
        before = opened.index.search(query, ROWS, opened.index.nlist)
        bucket.put(new)
        thread, results = start(lambda: stage(bucket.uri, None, cache))
        thread.join(1)
        assert thread.is_alive()  # it waits for us,
        assert set(contents(cache / ".incoming")) >= set(contents(new))  # and has copied all
        after = opened.index.search(query, ROWS, opened.index.nlist)
        np.testing.assert_array_equal(before.ids, after.ids)
        np.testing.assert_array_equal(before.similarity, after.similarity)
        assert opened.metadata.take(after.ids[0])["url"][0].as_py().startswith("https://example.org/0/")
        assert is_readable(cache)  # and others may still open it
    thread.join(30)
    assert results
    assert staged_data(cache) == contents(new)
    with open_staged(cache) as opened:
        assert opened.metadata.take(np.array([0]))["url"][0].as_py() == "https://example.org/1/0.jpg"
