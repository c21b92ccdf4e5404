"""The folder of the seed sets: what is listed or ignored, and what changes a fingerprint."""

import errno
import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.seed_files import CLIP_RETRIEVAL, FORMS, VECTORS, npy, parquet, write

from laion_assets.io.errors import InputError
from laion_assets.seeds import check_name, find_seed_set, list_folder, read_seeds, read_settings


def refusal(root: Path, name: str) -> str:
    with pytest.raises(InputError) as refused:
        find_seed_set(str(root), name)
    return str(refused.value)


def refuse_to_list(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Deny access to a folder as the kernel does to all but the tests' own user, who may be root."""
    scandir = os.scandir

    def refusing(path: str | Path) -> Any:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


def test_an_empty_set_is_refused_and_says_where_to_put_files(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path, {"notes/README.txt": b"none here"})
    for name in ("set", "notes"):
        message = refusal(tmp_path, name)
        facts = [repr(name), "empty", ".npy", ".parquet", str(tmp_path / name)]
        assert [fact for fact in facts if fact not in message] == []
    assert list_folder(str(tmp_path)).sets == {}


def test_files_that_nobody_reads_are_named_and_those_that_are_no_mistake_are_not(tmp_path):
    write(tmp_path, FORMS[CLIP_RETRIEVAL])
    write(
        tmp_path,
        dict.fromkeys(
            [
                "a.npy",
                "photos/1.txt",
                "set/more.npy",
                "set/stats/0.json",
                "set/metadata/notes.txt",
                "set/img_emb/notes.txt",
                "set/settings.yaml",
                "set/.DS_Store",
                "set/_SUCCESS",
                ".git/config",
                "other/a.npy",
                "other/labels.json",
                "other/metadata/labels.csv",
            ],
            npy(VECTORS),
        ),
    )
    assert list_folder(str(tmp_path)).ignored == (
        "a.npy",
        "other/labels.json",
        "other/metadata/labels.csv",
        "photos/1.txt",
        "set/img_emb/notes.txt",
        "set/more.npy",
    )
    assert find_seed_set(str(tmp_path), "other").ignored == ("labels.json", "metadata/labels.csv")


def test_a_set_that_does_not_exist_is_answered_with_the_nearest_or_all_there_are(tmp_path):
    write(tmp_path, {"flower/a.npy": npy(VECTORS), "house/a.npy": npy(VECTORS)})
    message = refusal(tmp_path, "flowers")
    assert "'flower'" in message
    assert "house" not in message
    assert "flower, house" in refusal(tmp_path, "zebra")


def test_a_folder_that_does_not_exist_is_named_with_the_parameter_to_correct(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path / "nowhere")) as refused:
        list_folder(str(tmp_path / "nowhere"))
    assert refused.value.about == "seeds_uri"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "a/../b", "/etc", "a..b", "a\nb", "a\\b", "x" * 101, "猫" * 67]
)
def test_names_that_could_leave_the_folder_are_refused(tmp_path, name):
    write(tmp_path / "seeds", {"a/b/c.npy": npy(VECTORS)})
    write(tmp_path, {"a/c.npy": npy(VECTORS)})
    with pytest.raises(InputError, match="cannot name a seed set"):
        find_seed_set(str(tmp_path / "seeds"), name)


def test_only_dot_files_and_markers_of_other_programs_are_hidden(tmp_path):
    hidden = (".x", "_temporary", "_SUCCESS", "_delta_log", "__MACOSX")
    seen = ("_x", "x_", "2x", "Äpfel", "_SUCCESSES")
    write(tmp_path, {f"{name}/a.npy": npy(VECTORS) for name in hidden + seen})
    write(tmp_path, {f"2x/{name}.npy": npy(VECTORS) for name in (".b", "_DSC0001", "_metadata/c")})
    assert sorted(list_folder(str(tmp_path)).sets) == sorted(seen)
    for name in hidden:
        assert "cannot name a seed set" in refusal(tmp_path, name)
    for name in seen:
        assert find_seed_set(str(tmp_path), name).vectors
    assert [file.name for file in find_seed_set(str(tmp_path), "2x").vectors] == ["_DSC0001.npy", "a.npy"]


def test_links_are_followed_and_end_where_they_began(tmp_path):
    write(tmp_path, {"elsewhere/deep/b.npy": npy(VECTORS), "seeds/cats/a.npy": npy(VECTORS)})
    seeds = tmp_path / "seeds"
    (seeds / "cats" / "more").symlink_to(tmp_path / "elsewhere")
    (seeds / "cats" / "again").symlink_to(seeds / "cats")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "elsewhere")
    (seeds / "dogs").symlink_to(tmp_path / "elsewhere")
    (seeds / "loop").symlink_to("loop")
    listing = list_folder(str(seeds))
    assert [file.name for file in listing.sets["cats"].vectors] == ["a.npy", "more/deep/b.npy"]
    assert sorted(listing.sets) == ["cats", "dogs"]
    assert listing.ignored == ("loop",)
    for name, found in listing.sets.items():
        assert find_seed_set(str(seeds), name) == found
        assert len(read_seeds(str(seeds), found).embeddings) == len(VECTORS) * len(found.vectors)


def test_a_set_that_cannot_be_listed_is_neither_there_nor_gone(tmp_path, monkeypatch):
    write(tmp_path, {"cats/a.npy": npy(VECTORS), "dogs/sub/a.npy": npy(VECTORS)})
    refuse_to_list(monkeypatch, tmp_path / "dogs" / "sub")
    listing = list_folder(str(tmp_path))
    assert list(listing.sets) == ["cats"]
    assert list(listing.failed) == ["dogs"]
    for message in (listing.failed["dogs"], refusal(tmp_path, "dogs")):
        assert f"{tmp_path}/dogs/sub cannot be listed (Permission denied): grant access" in message


def test_a_listing_that_takes_too_long_is_continued_and_holds_up_no_other_set(tmp_path, monkeypatch):
    write(tmp_path, {"large/a.npy": bytes(6 << 20), "small/a.npy": npy(VECTORS)})
    monkeypatch.setattr("laion_assets.seeds.stored_checksums.SHORTEST", 0)
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    rounds = 0
    while "large" not in (listing := list_folder(str(tmp_path), 6)).sets:
        assert "large/a.npy is still being read" in listing.failed["large"]
        rounds += 1
    assert rounds > 1
    monkeypatch.undo()
    assert listing.sets["large"] == find_seed_set(str(tmp_path), "large")
    assert list(list_folder(str(tmp_path)).sets) == ["large", "small"]


BAD_NAME = b"caf\xe9\n\x1b[2J"


@pytest.mark.parametrize("kind", ["set", "seed", "image", "ignored", "loose"])
def test_a_name_that_is_not_text_is_printable_and_its_file_is_read(tmp_path, kind):
    root = os.fsencode(tmp_path)
    places = {
        "set": BAD_NAME + b"/a.npy",
        "seed": b"set/" + BAD_NAME + b".npy",
        "image": b"set/" + BAD_NAME + b".png",
        "ignored": b"set/" + BAD_NAME + b".txt",
        "loose": BAD_NAME,
    }
    write(tmp_path, {"good/a.npy": npy(VECTORS), "set/a.npy": npy(VECTORS)})
    path = os.path.join(root, places[kind])  # noqa: PTH118
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(npy(VECTORS))
    listing = list_folder(str(tmp_path))
    assert "good" in listing.sets
    names = [*listing.ignored, *(file.name for found in listing.sets.values() for file in found.files)]
    names += [name for found in listing.sets.values() for name in (*found.ignored, *found.not_embedded)]
    assert [name for name in names if not name.isprintable()] == []
    if kind == "seed":
        found = find_seed_set(str(tmp_path), "set")
        assert len(read_seeds(str(tmp_path), found).embeddings) == 2 * len(VECTORS)
    if kind == "set":
        assert "cannot name a seed set" in refusal(tmp_path, os.fsdecode(BAD_NAME))


@pytest.mark.parametrize("name", ["a.npy", "a.parquet", "a.png", "prompts.txt", "settings.yaml", "a.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a pipe", "socket"])
def test_only_regular_files_are_read(tmp_path, name, kind):
    write(tmp_path, {"good/a.npy": npy(VECTORS), "set/b.npy": npy(VECTORS)})
    path = tmp_path / "set" / name
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe") if kind != "pipe" else os.mkfifo(path)
    (tmp_path / "pipe").unlink(missing_ok=True) if kind == "pipe" else None
    seeds = str(tmp_path)
    listing = list_folder(seeds)
    assert {"good", "set"} <= set(listing.sets)
    found = listing.sets["set"]
    if name == "settings.yaml":
        with pytest.raises(InputError, match=r"set/settings\.yaml cannot be read \(neither a file"):
            read_settings(seeds, found)
    elif name in ("a.npy", "a.parquet"):
        with pytest.raises(InputError, match=rf"set/{name} cannot be read \(neither a file"):
            read_seeds(seeds, found)
    else:
        assert name in (*found.ignored, *found.not_embedded, *(file.name for file in found.prompts))


def test_clip_retrievals_output_is_recognised_at_any_depth(tmp_path):
    for part, number in (("one", 0), ("two/deep", 1)):
        write(
            tmp_path / "set" / part,
            {
                f"img_emb/img_emb_{number}.npy": npy(VECTORS),
                f"text_emb/text_emb_{number}.npy": npy(-VECTORS),
                f"metadata/metadata_{number}.parquet": parquet(url=["a", "b", "c"]),
            },
        )
    found = find_seed_set(str(tmp_path), "set")
    assert [file.name for file in found.files] == [
        "one/img_emb/img_emb_0.npy",
        "two/deep/img_emb/img_emb_1.npy",
    ]
    assert found.ignored == ()


def test_extensions_of_embeddings_count_in_any_case(tmp_path):
    write(tmp_path, {"set/a.NPY": npy(VECTORS), "set/b.npy": npy(VECTORS[:1])})
    found = find_seed_set(str(tmp_path), "set")
    assert [file.name for file in found.vectors] == ["a.NPY", "b.npy"]
    assert len(read_seeds(str(tmp_path), found).embeddings) == len(VECTORS) + 1


# --- fingerprints -----------------------------------------------------------------------------------


def fingerprints(root: Path) -> dict[str, str]:
    return {name: found.fingerprint for name, found in list_folder(str(root)).sets.items()}


def test_the_fingerprint_follows_names_and_contents_and_nothing_else(tmp_path):
    write(tmp_path, {"one/a.npy": npy(VECTORS), "two/a.npy": npy(VECTORS)})
    first = fingerprints(tmp_path)
    assert first["one"] == first["two"]  # neither the name of the set nor the time of writing count

    file = tmp_path / "one" / "a.npy"
    os.utime(file, (1, 1))
    write(tmp_path, {"one/README.txt": b"not a seed"})
    assert fingerprints(tmp_path) == first

    file.write_bytes(npy(VECTORS[::-1]))  # as many bytes
    changed = fingerprints(tmp_path)
    assert changed["one"] != first["one"]
    assert changed["two"] == first["two"]

    file.write_bytes(npy(VECTORS))
    assert fingerprints(tmp_path) == first

    file.rename(file.with_name("b.npy"))
    assert fingerprints(tmp_path)["one"] not in (first["one"], changed["one"])


def test_of_clip_retrievals_folder_only_image_embeddings_change_the_fingerprint(tmp_path):
    write(tmp_path, FORMS[CLIP_RETRIEVAL])
    first = fingerprints(tmp_path)
    write(tmp_path, {"set/text_emb/text_emb_0.npy": npy(VECTORS)})
    assert fingerprints(tmp_path) == first
    write(tmp_path, {"set/img_emb/img_emb_1.npy": npy(VECTORS[:1])})
    assert fingerprints(tmp_path) != first


def test_a_set_found_by_name_is_the_same_as_in_the_list(tmp_path):
    for number, form in enumerate(FORMS.values()):
        write(tmp_path, {name.replace("set/", f"set {number}/"): data for name, data in form.items()})
    listed = list_folder(str(tmp_path)).sets
    assert len(listed) == len(FORMS)
    for name, found in listed.items():
        check_name(name)
        assert find_seed_set(str(tmp_path), name) == found
