"""Staging from a Google Cloud Storage server, through a proxy that fails as networks do."""

import os
import random
import shutil
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from google.auth.credentials import Credentials
from helpers.faults import ManyConnections, Proxy, first
from helpers.project import contents
from helpers.staging import (
    LISTS,
    MIB,
    SMALL,
    STAGE,
    bytes_in,
    disk_of,
    is_readable,
    kill_when,
    staged_data,
    write_many_chunks,
)

from laion_assets.io.errors import InputError
from laion_assets.staging import Manifest, NotStagedError, open_staged, scrub, stage
from laion_assets.staging.transfer import backoff, gcs
from laion_assets.staging.transfer.files import SourceFile

PARTIAL_LISTS = f".incoming/{LISTS}"

# --- a copy ---------------------------------------------------------------------------------------


def test_a_copy_from_a_bucket_is_whole_verified_and_not_made_twice(bucket, source, cache):
    there = contents(source)
    done = stage(bucket.uri, None, cache)
    assert staged_data(cache) == there
    assert done.bytes_fetched == bucket.proxy.bytes_read == sum(map(len, there.values()))
    assert "crc32c of every file" in done.verified
    assert is_readable(cache)
    again = stage(f"{bucket.uri}/", None, cache)
    assert (again.bytes_fetched, again.bytes_reused) == (0, done.bytes_fetched)
    assert again.manifest == done.manifest
    assert bucket.proxy.bytes_read == done.bytes_fetched


def test_only_what_changed_is_fetched_and_the_same_bytes_uploaded_again_are_not(bucket, source, cache):
    first_time = stage(bucket.uri, None, cache)
    changed = source / "metadata" / "000.arrow"
    (source / "metadata" / "001.arrow").rename(source / "metadata" / "001b.arrow")
    changed.write_bytes(changed.read_bytes()[:-1] + b"\1")
    bucket.remove("metadata/001.arrow")
    bucket.put(source)  # all of it, so that every object has another generation
    done = stage(bucket.uri, None, cache)
    assert staged_data(cache) == contents(source)
    fetched = (changed, source / "metadata" / "001b.arrow")
    assert done.bytes_fetched == sum(path.stat().st_size for path in fetched)
    versions = {file.name: file.version for file in first_time.manifest.files}
    assert all(file.version != versions.get(file.name) for file in done.manifest.files)
    assert stage(bucket.uri, None, cache).manifest == done.manifest


class Signed(Credentials):
    """Credentials that return another token each time."""

    def __init__(self) -> None:
        super().__init__()
        self.given = count()

    def refresh(self, _: Any) -> None:
        self.token = f"token-{next(self.given)}"
        self.expiry = datetime.now(UTC).replace(tzinfo=None) + timedelta(hours=1)


@pytest.mark.parametrize(("credentials", "sent"), [(None, None), (Signed(), "Bearer token-0")])
def test_a_bucket_is_read_with_the_credentials_that_listed_it(bucket, source, credentials, sent):
    fs = SimpleNamespace(
        base=f"{bucket.proxy.url}/storage/v1/", credentials=SimpleNamespace(credentials=credentials)
    )
    path = f"{bucket.uri.removeprefix('gs://')}/{LISTS}"
    held = (source / LISTS).read_bytes()
    generation = bucket.generation(LISTS)
    file = SourceFile(LISTS, f"gs://{path}", path, len(held), generation, None)
    reader = gcs.GcsReader(fs)
    assert b"".join(reader.read(file, 3, len(held))) == held[3:]
    assert bucket.proxy.authorizations == {sent}


# --- retries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [503, 500, 429, 408, "reset", "half", "silence"])
def test_transient_errors_are_retried_counted_and_logged(bucket, source, cache, monkeypatch, failure):
    if failure == "silence":
        monkeypatch.setattr(gcs, "SILENCE_TIMEOUT", timedelta(seconds=1))
    bucket.proxy.rule = first(5, failure)
    lines: list[str] = []
    done = stage(bucket.uri, None, cache, log=lines.append)
    assert staged_data(cache) == contents(source)
    assert done.retries == 5
    assert any("trying again in" in line and bucket.uri in line for line in lines)


def test_after_the_last_retry_staging_fails_and_the_next_run_resumes_it(bucket, source, cache):
    write_many_chunks(bucket, source)
    total = sum(map(len, contents(source).values()))
    passing = bucket.proxy.reads + 40
    bucket.proxy.rule = lambda _: 503 if bucket.proxy.reads > passing else None
    with pytest.raises(InputError, match=rf"{bucket.uri}/.* {backoff.MAX_TRIES} tries .*503"):
        stage(bucket.uri, None, cache, options=SMALL)
    fetched = bucket.proxy.bytes_read
    assert 0 < fetched < total
    bucket.proxy.rule = lambda _: None
    done = stage(bucket.uri, None, cache, options=SMALL)
    assert staged_data(cache) == contents(source)
    assert done.bytes_fetched + done.bytes_reused == total
    assert fetched - SMALL.threads * SMALL.chunk <= done.bytes_reused <= fetched


@pytest.mark.parametrize("status", [400, 416])
def test_what_obstore_has_no_class_for_ends_after_the_retries_in_the_words_of_the_server(
    bucket, cache, monkeypatch, status
):
    monkeypatch.setattr(backoff, "MAX_TRIES", 3)
    bucket.proxy.rule = first(1000, status, of="ivfdata")
    with pytest.raises(InputError) as refused:
        stage(bucket.uri, None, cache)
    message = str(refused.value)
    assert f"{bucket.uri}/{LISTS}" in message
    assert str(status) in message
    assert "refused by the proxy" in message
    assert "Debug source" not in message


# --- errors that are not retried ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (403, "no permission to read {lists} .*Storage Object Viewer"),
        (401, "no permission to read {lists} .*credentials"),
        (404, "{lists} is listed with .* bytes but cannot be read .*upload"),
        (412, "{lists} cannot be read: .*412.*refused by the proxy"),
    ],
)
def test_a_refusal_is_an_error_at_once_that_names_the_object(bucket, cache, status, told):
    refused: list[str] = []

    def rule(path: str) -> int | None:
        if "ivfdata" not in path:
            return None
        refused.append(path)
        return status

    bucket.proxy.rule = rule
    with pytest.raises(InputError, match=told.format(lists=f"{bucket.uri}/{LISTS}")):
        stage(bucket.uri, None, cache)
    assert len(refused) == 1


def test_an_object_that_is_not_what_its_checksum_says_never_becomes_the_index(bucket, source, cache):
    stage(bucket.uri, None, cache)
    before = staged_data(cache)
    write_many_chunks(bucket, source)
    right = bucket.set_checksum(LISTS, "AAAAAA==")
    for _ in range(2):
        with pytest.raises(InputError, match=f"{bucket.uri}/{LISTS} differs from its checksum.*AAAAAA=="):
            stage(bucket.uri, None, cache, options=SMALL)
        there = staged_data(cache).items()
        assert {name: held for name, held in there if not name.startswith(".incoming")} == before
        assert is_readable(cache)  # what was there still is
    bucket.set_checksum(LISTS, right)
    stage(bucket.uri, None, cache, options=SMALL)
    assert staged_data(cache) == contents(source)


def test_an_object_that_was_cut_off_in_the_bucket_is_named(bucket, cache):
    path = bucket.objects / LISTS
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match=f"{bucket.uri}/{LISTS} differs from its checksum"):
        stage(bucket.uri, None, cache)
    with pytest.raises(NotStagedError, match="did not finish"), open_staged(cache):
        pass


class Stranger(BaseHTTPRequestHandler):
    """A server that answers every read of a range with as many bytes as requested."""

    def do_GET(self) -> None:
        start, stop = (int(end) for end in self.headers["Range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        for name, value in {
            "Content-Range": f"bytes {start}-{stop}/{stop + 1}",
            "Content-Length": str(stop + 1 - start),
            "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
            "ETag": "any",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(bytes(stop + 1 - start))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("sparse", [False, True])
def test_a_redirect_to_another_server_is_refused_and_brings_nothing(bucket, cache, sparse):
    with ManyConnections(("127.0.0.1", 0), Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever, args=(0.02,), daemon=True).start()
        elsewhere = f"http://localhost:{stranger.server_port}"
        if sparse:
            stage(bucket.uri, None, cache, sparse=True)
        bucket.proxy.rule = lambda _: elsewhere
        with pytest.raises(InputError, match=f"{bucket.uri}/.* comes from another server"):
            is_readable(cache) if sparse else stage(bucket.uri, None, cache)
        stranger.shutdown()
    bucket.proxy.rule = lambda _: None
    stage(bucket.uri, None, cache, sparse=sparse)
    assert is_readable(cache)


# --- overwritten meanwhile ------------------------------------------------------------------------


def after_reads(proxy: Proxy, reads: int, act: Any) -> None:
    """Do something once, just before some read of an object."""
    done = threading.Event()

    def rule(_: str) -> None:
        if proxy.reads > reads and not done.is_set():
            done.set()
            act()

    proxy.rule = rule


def test_an_object_that_is_overwritten_meanwhile_is_begun_again_and_never_mixed(bucket, source, cache):
    write_many_chunks(bucket, source)
    after_reads(bucket.proxy, 30, lambda: write_many_chunks(bucket, source, seed=1))
    lines: list[str] = []
    done = stage(bucket.uri, None, cache, options=SMALL, log=lines.append)
    assert staged_data(cache) == contents(source)
    assert any(
        f"{bucket.uri}/{LISTS} was overwritten while it was being copied" in line for line in lines
    )
    assert done.manifest.complete


def test_an_object_that_is_overwritten_after_it_was_copied_is_noticed_before_the_end(
    bucket, source, cache
):
    write_many_chunks(bucket, source)
    new = (source / "image.index/populated.index").read_bytes()[:-1] + b"\1"
    (source / "image.index/populated.index").write_bytes(new)
    after_reads(bucket.proxy, 100, lambda: bucket.write("image.index/populated.index", new))
    lines: list[str] = []
    stage(bucket.uri, None, cache, options=SMALL, log=lines.append)
    assert staged_data(cache) == contents(source)
    assert any("changed while it was being copied" in line for line in lines)


def test_a_source_that_never_rests_is_an_error(bucket, source, cache):
    stage(bucket.uri, None, cache)
    seeds = count()
    names = sorted(name for name in contents(source) if name.startswith("metadata"))

    def rule(_: str) -> None:
        bucket.write(names[0], str(next(seeds)).encode())

    bucket.write(names[0], b"new")
    bucket.proxy.rule = rule
    with pytest.raises(InputError, match=f"{bucket.uri} keeps changing"):
        stage(bucket.uri, None, cache)
    assert is_readable(cache)


# --- killed, or the disk damaged ------------------------------------------------------------------


@pytest.mark.faults
def test_killed_at_any_point_it_goes_on_and_fetches_only_what_is_missing(bucket, source, cache):
    write_many_chunks(bucket, source, mib=24)
    total = sum(map(len, contents(source).values()))
    kills = 0
    for share in sorted(random.uniform(0.05, 0.95) for _ in range(4)):
        target = share * total
        program = [sys.executable, "-c", STAGE, bucket.uri, str(cache)]
        kill_when(program, lambda target=target: bytes_in(cache) >= target)
        manifest = Manifest.read(cache)
        kills += manifest is None or not manifest.complete
    assert kills  # or nothing was killed in the middle
    done = stage(bucket.uri, None, cache, options=SMALL)
    assert staged_data(cache) == contents(source)
    # At a kill, what is lost are the chunks that were not yet recorded: at most one for each thread.
    assert bucket.proxy.bytes_read <= total + kills * SMALL.threads * SMALL.chunk
    assert done.bytes_reused >= done.manifest.size - done.bytes_fetched


def test_a_chunk_that_the_disk_lost_or_changed_is_fetched_again_and_no_other(bucket, source, cache):
    write_many_chunks(bucket, source)
    bucket.proxy.rule = lambda _: 403 if bucket.proxy.reads > 100 else None
    with pytest.raises(InputError, match="no permission"):
        stage(bucket.uri, None, cache, options=SMALL)
    journal = (cache / f"{PARTIAL_LISTS}.journal").read_text().splitlines()[1:]
    recorded = sorted(int(line.split()[0]) for line in journal)
    with (cache / PARTIAL_LISTS).open("r+b") as file:
        file.seek(recorded[3] * SMALL.chunk + 5)
        file.write(b"bit rot")
    os.truncate(cache / PARTIAL_LISTS, recorded[-1] * SMALL.chunk + 7)
    bucket.proxy.rule = lambda _: None
    before = bucket.proxy.bytes_read
    done = stage(bucket.uri, None, cache, options=SMALL)
    assert staged_data(cache) == contents(source)
    assert bucket.proxy.bytes_read - before == done.bytes_fetched
    chunks = (source / LISTS).stat().st_size // SMALL.chunk
    lists_fetched = (chunks - (len(recorded) - 2)) * SMALL.chunk
    rest = done.bytes_fetched - lists_fetched
    assert 0 <= rest < sum(len(held) for name, held in contents(source).items() if name != LISTS) + 1


# --- room on the disk -----------------------------------------------------------------------------


def test_what_does_not_fit_is_told_before_the_first_byte_and_the_old_index_stays(
    bucket, source, tmp_path
):
    with disk_of(4, tmp_path / "disk") as disk:
        stage(bucket.uri, None, disk)
        before, read = staged_data(disk), bucket.proxy.bytes_read
        write_many_chunks(bucket, source, mib=9)
        free = shutil.disk_usage(disk).free
        with pytest.raises(InputError, match=rf"{free:,} bytes free and .* more .*needs 9,4") as refused:
            stage(bucket.uri, None, disk)
        assert refused.value.about == "cache_dir"
        assert (staged_data(disk), bucket.proxy.bytes_read) == (before, read)
        assert is_readable(disk)


def test_a_new_version_that_fits_only_in_place_of_the_old_one_takes_it(bucket, source, tmp_path):
    with disk_of(12, tmp_path / "disk") as disk:
        write_many_chunks(bucket, source)
        stage(bucket.uri, None, disk)
        write_many_chunks(bucket, source, seed=1)
        lines: list[str] = []
        stage(bucket.uri, None, disk, log=lines.append)
        assert staged_data(disk) == contents(source)
        assert any(f"removing {disk / LISTS}" in line for line in lines)


def test_a_disk_that_fills_up_meanwhile_loses_nothing(bucket, source, tmp_path):
    with disk_of(12, tmp_path / "disk") as disk:
        write_many_chunks(bucket, source)
        other = disk / "of-somebody-else"
        after_reads(bucket.proxy, 30, lambda: other.write_bytes(bytes(shutil.disk_usage(disk).free)))
        with pytest.raises(InputError, match=f"cannot write to {disk} .*No space") as refused:
            stage(bucket.uri, None, disk, options=SMALL)
        assert refused.value.about == "cache_dir"
        fetched = bucket.proxy.bytes_read
        other.unlink()
        done = stage(bucket.uri, None, disk, options=SMALL)
        assert {n: held for n, held in staged_data(disk).items() if n != other.name} == contents(source)
        assert done.bytes_reused >= fetched - (SMALL.threads + 1) * SMALL.chunk - MIB


def test_a_reader_needs_no_right_to_write(bucket, tmp_path):
    with disk_of(8, tmp_path / "disk") as disk:
        stage(bucket.uri, None, disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert is_readable(disk)
        assert stage(bucket.uri, None, disk).fetched == 0  # there is nothing to do
        assert not scrub(disk).damaged
        bucket.write("metadata/000.arrow", b"of another version")
        with pytest.raises(InputError, match=f"cannot write to {disk}"):
            stage(bucket.uri, None, disk)
