"""Secrets in URLs are used for requests and shown nowhere."""

import pytest

from laion_assets.io.public_urls import is_same, private, public, without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pass@example.org/index?sig=1#top", "https://example.org/index"),
        ("https://me:p@ss@example.org:8080/a@b", "https://example.org:8080/a@b"),
        ("https://example.org/index", "https://example.org/index"),
        ("ftp://me:pass@example.org/index", "ftp://example.org/index"),
        ("gs://bucket/a?b#c@d", "gs://bucket/a?b#c@d"),
        ("file:///a@b/c?d", "file:///a@b/c?d"),
        ("/a@b/c?d#e", "/a@b/c?d#e"),
        ("https://[", "https://["),
    ],
)
def test_only_the_public_part_of_a_url_is_shown(url: str, shown: str) -> None:
    assert public(url) == shown


def test_files_below_a_url_are_requested_with_its_secrets_and_no_others() -> None:
    public("https://one.example.org/index/?sig=1")
    public("https://me:pass@one.example.org/index/metadata?sig=2")
    for url, requested in {
        "https://one.example.org/index": "https://one.example.org/index?sig=1",
        "https://one.example.org/index/": "https://one.example.org/index/?sig=1",
        "https://one.example.org/index/a": "https://one.example.org/index/a?sig=1",
        "https://one.example.org/index/metadata/0": "https://me:pass@one.example.org/index/metadata/0?sig=2",
        "https://one.example.org/indices": "https://one.example.org/indices",
        "https://one.example.org.evil.com/index": "https://one.example.org.evil.com/index",
    }.items():
        assert private(url) == requested


def test_the_secrets_of_a_url_in_a_message_are_left_out() -> None:
    said = "404, message='Not Found', url='https://me:pass@example.org/a?sig=1', and https://b.org/?c"
    assert without_secrets(said) == (
        "404, message='Not Found', url='https://example.org/a', and https://b.org/"
    )


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("gs://laion/index", "gs://laion/index/", True),
        ("https://user:secret@laion.org/index", "https://laion.org/index/", True),
        ("data/index", "data/index", True),
        ("gs://laion/index", "gs://laion/index2", False),
        ("", "gs://laion/index", False),
    ],
)
def test_folders_are_compared_without_secrets_and_the_last_slash(one, other, same):
    assert is_same(one, other) == same
    assert is_same(other, one) == same
