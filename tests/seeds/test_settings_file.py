"""The settings file of a seed set: plain YAML of bounded size, every name once, under one name."""

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.seed_files import VECTORS, npy, write

from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage
from laion_assets.seeds import find_seed_set, list_folder, read_settings

LAUGHS = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghi")]


def settings_in(root: Path, content: str | bytes, name: str = "settings.yaml") -> dict[str, Any]:
    data = content if isinstance(content, bytes) else content.encode()
    write(root, {"cats/a.npy": npy(VECTORS), f"cats/{name}": data})
    return read_settings(str(root), find_seed_set(str(root), "cats"))


def test_settings_are_read_as_they_are_written_and_a_set_needs_none(tmp_path):
    write(tmp_path, {"cats/a.npy": npy(VECTORS)})
    assert read_settings(str(tmp_path), find_seed_set(str(tmp_path), "cats")) == {}
    assert settings_in(tmp_path, "") == settings_in(tmp_path, "# nothing yet\n") == {}
    assert settings_in(tmp_path, "nprobe: 5\nfilters: width > 5\nx: [1, 2]") == {
        "nprobe": 5,
        "filters": "width > 5",
        "x": [1, 2],
    }


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("nprobe: 1\nnprobe: 2", ["nprobe", "twice"]),
        ("just words", ["list of settings", "name: value"]),
        ("1: 2", ["list of settings", "name: value"]),
        ("[", ["not YAML", "name: value"]),
        ("[" * 9000, ["not YAML"]),
        ("nprobe: 2001-99-99", ["not YAML", "month"]),
        ("nprobe: !!python/object/apply:os.abort []", ["not YAML", "could not determine"]),
        (b"\xff\xfe\xff", ["not YAML"]),
        ("nprobe: 0x" + "f" * 9000, ["36,000 bits", "nprobe"]),
        ("nprobe: " + "1" * 9000, ["not YAML", "4300"]),
        ("nprobe: 1" + ":59" * 5000, ["bits", "nprobe"]),
        ("# " + "x" * (16 << 10), ["16,386 bytes", "16,384"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_cannot_be_used_is_named_with_the_remedy(tmp_path, content, facts):
    with pytest.raises(InputError) as refused:
        settings_in(tmp_path, content)
    message = str(refused.value)
    assert [fact for fact in ["cats/settings.yaml", *facts] if fact not in message] == []
    assert len(message) < 400


MERGED = "a: &a {x: 1}\n" + "\n".join(
    f"{b}: &{b}\n  <<: [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    "content", ["\n".join(["a: &a [x]", *LAUGHS]), MERGED], ids=["aliases", "merges"]
)
def test_aliases_that_multiply_are_refused_at_once(tmp_path, content):
    started = time.perf_counter()
    with pytest.raises(InputError, match=r"cats/settings\.yaml uses an alias"):
        settings_in(tmp_path, content)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("name", ["settings.yml", "setting.yaml"])
def test_a_file_of_another_name_is_not_overlooked(tmp_path, name):
    with pytest.raises(InputError, match=rf"cats/{name} .*settings\.yaml.*rename"):
        settings_in(tmp_path, "nprobe: 5", name)


def test_settings_are_part_of_the_fingerprint_and_no_seeds(tmp_path):
    def fingerprint() -> str:
        return list_folder(str(tmp_path)).sets["cats"].fingerprint

    settings_in(tmp_path, "nprobe: 5")
    with_settings = fingerprint()
    settings_in(tmp_path, "nprobe: 6")
    assert fingerprint() != with_settings
    (tmp_path / "cats" / "settings.yaml").unlink()
    without = fingerprint()
    write(tmp_path, {"cats/deeper/notes.yaml": b"not: ours"})
    assert fingerprint() == without != with_settings
    write(tmp_path, {"empty/settings.yaml": b"nprobe: 5"})
    assert set(list_folder(str(tmp_path)).sets) == {"cats"}
    with pytest.raises(InputError, match="'empty' is empty"):
        find_seed_set(str(tmp_path), "empty")


def test_a_file_in_a_bucket_that_changed_since_it_was_listed_is_refused(new_bucket):
    fs, root = open_storage(new_bucket)
    fs.pipe(f"{root}/seeds/cats/a.npy", npy(VECTORS))
    fs.pipe(f"{root}/seeds/cats/settings.yaml", b"nprobe: 5")
    seed_set = find_seed_set(f"{new_bucket}/seeds", "cats")
    assert read_settings(f"{new_bucket}/seeds", seed_set) == {"nprobe": 5}
    fs.pipe(f"{root}/seeds/cats/settings.yaml", b"nprobe: 6")
    with pytest.raises(InputError, match=r"cats/settings\.yaml changed"):
        read_settings(f"{new_bucket}/seeds", seed_set)
