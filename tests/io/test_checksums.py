"""Checksums put together from parts, and fingerprints of files."""

from hypothesis import given
from hypothesis import strategies as st

from laion_assets.io import checksums


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_the_checksums_of_parts_make_that_of_the_whole(parts):
    told = [(checksums.crc32c(part), len(part)) for part in parts]
    assert checksums.crc32c_of_parts(told) == checksums.crc32c(b"".join(parts))


def test_the_checksum_of_a_huge_file_is_put_together_as_that_of_a_small_one():
    zeros = bytes(1 << 20)
    one = checksums.crc32c(zeros)
    by_parts = checksums.crc32c_of_parts([(one, len(zeros))] * 1000)
    whole = 0
    for _ in range(1000):
        whole = checksums.crc32c(zeros, whole)
    assert by_parts == whole


def test_the_checksum_of_a_file_is_that_of_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "READ_AT_ONCE", 1000)
    for content in (b"", b"123456789", bytes(range(256)) * 40):
        (tmp_path / "file").write_bytes(content)
        expected = checksums.checksum_text(checksums.crc32c(content))
        assert checksums.file_crc32c(tmp_path / "file") == expected
        assert checksums.file_crc32c(str(tmp_path / "file")) == expected
    assert checksums.checksum_text(checksums.crc32c(b"123456789")) == "4waSgw=="  # its check value


def test_a_fingerprint_is_of_names_sizes_and_checksums_in_any_order():
    files = [("b", 2, "y"), ("a", 1, "x")]
    assert checksums.fingerprint(files) == checksums.fingerprint(files[::-1]) == "99c8dbd300f658c9"
    for other in (("c", 2, "y"), ("b", 3, "y"), ("b", 2, "z")):
        assert checksums.fingerprint([other, files[1]]) != checksums.fingerprint(files)
