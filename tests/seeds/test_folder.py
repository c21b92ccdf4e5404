"""The folder of the seed sets: what is listed or ignored, and what changes a fingerprint."""

import os
from pathlib import Path

import pytest
from helpers.seed_files import CLIP_RETRIEVAL, FORMS, VECTORS, npy, write

from laion_assets.io.errors import InputError
from laion_assets.seeds import check_name, find_seed_set, list_folder, read_seeds


def refusal(root: Path, name: str) -> str:
    with pytest.raises(InputError) as refused:
        find_seed_set(str(root), name)
    return str(refused.value)


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
    "name", ["", ".", "..", "a/b", "../a", "a/../b", "/etc", "a..b", "a\nb", "a\\b", "x" * 101]
)
def test_names_that_could_leave_the_folder_are_refused(tmp_path, name):
    write(tmp_path / "seeds", {"a/b/c.npy": npy(VECTORS)})
    write(tmp_path, {"a/c.npy": npy(VECTORS)})
    with pytest.raises(InputError, match="cannot name a seed set"):
        find_seed_set(str(tmp_path / "seeds"), name)


def test_a_hidden_folder_is_no_set_by_any_name(tmp_path):
    write(tmp_path, {f"{name}/a.npy": npy(VECTORS) for name in ("_x", ".x", "x_", "2x", "Äpfel")})
    assert sorted(list_folder(str(tmp_path)).sets) == ["2x", "x_", "Äpfel"]
    for name in ("_x", ".x"):
        assert "letter or digit first" in refusal(tmp_path, name)
    for name in ("2x", "x_", "Äpfel"):
        assert len(find_seed_set(str(tmp_path), name).vectors) == 1


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
