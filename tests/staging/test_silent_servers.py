"""A server that accepts and never answers, or answers a byte at a time, ends in one sentence in time."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pyarrow as pa
import pytest
from helpers.silence import (
    Send,
    captive_portal,
    lying_server,
    silent,
    silent_after_the_head,
    silent_after_the_upload_begins,
    trickling,
    trickling_the_head,
)

from laion_assets.io import timeouts
from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage, reaching
from laion_assets.io.tables import StoredTable, new_table
from laion_assets.seeds import list_folder
from laion_assets.staging.transfer import backoff, gcs
from laion_assets.staging.transfer.fetch import TransferStats, read_range
from laion_assets.staging.transfer.files import SourceFile
from laion_assets.staging.transfer.source import Source, range_reader

MIB = 1 << 20


def list_the_index(uri: str) -> None:
    Source(uri, None).list()


def write_a_table(uri: str) -> None:
    with new_table(f"{uri}/table.parquet", pa.schema({"url": pa.string()})) as table:
        table.write(pa.record_batch({"url": ["https://example.org/1.jpg"]}))


def read_a_table(uri: str) -> None:
    StoredTable(f"{uri}/table.parquet")


def read_a_file(uri: str) -> None:
    fs, path = open_storage(uri)
    with reaching(uri):
        fs.cat_file(path)


def read_a_range(uri: str) -> None:
    fs, path = open_storage(uri)
    file = SourceFile("x", uri, path, MIB, "1", None)
    for _ in read_range(
        range_reader(fs, uri), file, 0, MIB, threading.Event(), lambda _: None, TransferStats()
    ):
        pass


CALLS = (list_the_index, list_folder, write_a_table, read_a_table, read_a_file, read_a_range)


def ends(call: Callable[[str], object], uri: str) -> tuple[float, str]:
    """The seconds until a call ends, and its sentence."""
    began = time.monotonic()
    with pytest.raises(InputError) as refused:
        call(uri)
    return time.monotonic() - began, str(refused.value)


@pytest.fixture
def hundredth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of every limit and pause."""
    for name in ("CONNECT", "SILENCE", "SERVER_WORK", "LONGEST"):
        monkeypatch.setattr(timeouts, name, getattr(timeouts, name) / 100)
    for name in ("SILENCE_TIMEOUT", "REQUEST_TIMEOUT"):
        monkeypatch.setattr(gcs, name, getattr(gcs, name) / 100)
    for name in ("PATIENCE", "FIRST_PAUSE", "LONGEST_PAUSE"):
        monkeypatch.setattr(backoff, name, getattr(backoff, name) / 100)

    async def sleep(_: float) -> None:
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=sleep))


def all_end(server: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """Make all calls at once; returns the seconds that the slowest takes."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    bucket, web = "gs://bucket/folder", f"{server}/folder"
    calls = [(call, bucket) for call in CALLS] + [(list_the_index, web), (read_a_range, web)]
    with ThreadPoolExecutor(len(calls)) as pool:
        ended = list(pool.map(ends, *zip(*calls, strict=True)))
    for (_, uri), (_, told) in zip(calls, ended, strict=True):
        assert uri in told
        assert "\n" not in told
    return max(seconds for seconds, _ in ended)


@pytest.mark.usefixtures("hundredth")
def test_a_server_that_never_answers_ends_every_call_in_one_sentence(monkeypatch) -> None:
    with lying_server(silent) as server:
        assert all_end(server, monkeypatch) < 30


@pytest.mark.usefixtures("hundredth")
def test_a_page_in_place_of_every_answer_is_taken_for_nothing_else(monkeypatch) -> None:
    with lying_server(captive_portal) as server:
        assert all_end(server, monkeypatch) < 30


@pytest.mark.faults
@pytest.mark.usefixtures("hundredth")
@pytest.mark.parametrize(
    "lie",
    [
        silent_after_the_head,
        silent_after_the_upload_begins,
        partial(trickling, pause=0.01),
        partial(trickling_the_head, pause=0.01),
    ],
)
def test_a_server_that_answers_only_in_part_ends_every_call_in_one_sentence(lie, monkeypatch) -> None:
    with lying_server(lie) as server:
        assert all_end(server, monkeypatch) < 30


@pytest.mark.usefixtures("hundredth")
def test_an_answer_that_trickles_is_requested_again_as_often_as_one_that_does_not_come(
    monkeypatch,
) -> None:
    requests: list[str] = []

    def trickle(request: str, send: Send) -> None:
        requests.append(request)
        trickling(request, send, pause=0.01)

    with lying_server(trickle) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
        ends(list_the_index, "gs://bucket/folder")
    assert len(requests) == timeouts.READ_TRIES


@pytest.mark.faults
def test_about_a_minute_is_about_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    with lying_server(silent) as server:
        assert 55 < all_end(server, monkeypatch) < 90


def test_a_slow_server_is_read_to_the_end_and_nothing_twice(bucket, monkeypatch) -> None:
    monkeypatch.setattr(gcs, "REQUEST_TIMEOUT", timedelta(seconds=0.3))
    monkeypatch.setattr(gcs, "STREAM_PIECE", 64 << 10)
    content = bytes(range(256)) * (8 << 10)
    bucket.write("slow", content)
    bucket.proxy.bytes_per_second = 2 * MIB
    fs, path = open_storage(f"{bucket.uri}/slow")
    file = SourceFile("slow", f"{bucket.uri}/slow", path, len(content), bucket.generation("slow"), None)
    stats = TransferStats()
    reader, halt = range_reader(fs, bucket.uri), threading.Event()
    read = read_range(reader, file, 0, len(content), halt, lambda _: None, stats)
    assert b"".join(piece for piece, _ in read) == content
    assert bucket.proxy.reads > 1
    assert stats.retries == 0
