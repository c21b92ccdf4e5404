"""Errors of a bucket become one sentence with the remedy; other errors are unchanged."""

import errno
import json

import pytest
from gcsfs.retry import validate_response

from laion_assets.io.errors import InputError
from laion_assets.io.public_urls import public
from laion_assets.io.storage import new_file, open_storage, reaching


@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (400, "the parameter is invalid", "cannot be used"),
        (400, "no", "cannot be used"),
        (401, "Invalid Credentials", "no valid credentials"),
        (403, "robot does not have storage.objects.list access", "access to gs://bucket/x is denied"),
        (429, "slow down", "temporarily unavailable"),
        (503, "Backend Error", "temporarily unavailable"),
    ],
)
def test_an_answer_is_explained_in_one_line_with_the_words_of_the_server(status, message, told):
    body = json.dumps({"error": {"code": status, "message": message}})
    with pytest.raises(InputError, match=told) as refused, reaching("gs://bucket/x", "seeds_uri"):
        validate_response(status, body, "b/bucket/o")
    assert message in str(refused.value)
    assert "gs://bucket/x" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.about == "seeds_uri"


@pytest.mark.parametrize("url", ["s3://bucket/x", "abfs://c@host/x", "az://c/x", "ftp://me:pass@host/x"])
def test_a_kind_of_storage_that_is_not_supported_is_refused_with_the_remedy(url):
    with pytest.raises(InputError, match=r"not supported: copy it .*gs://.*rclone mount") as refused:
        open_storage(url, "index_uri")
    assert public(url) in str(refused.value)
    assert "pass" not in str(refused.value)
    assert refused.value.about == "index_uri"


def test_a_bucket_that_does_not_exist_is_named():
    with pytest.raises(InputError, match="no bucket gs://bucket:"), reaching("gs://bucket/x"):
        validate_response(404, "", "b/bucket/o")


@pytest.mark.parametrize(
    "error",
    [
        OSError("Couldn't deserialize thrift"),  # as pyarrow raises them
        ValueError("Parquet magic bytes not found"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=repr,
)
def test_errors_of_another_origin_are_not_taken_for_the_buckets(error):
    with pytest.raises(type(error)) as raised, reaching("gs://bucket/x"):
        raise error
    assert raised.value is error


def test_two_writers_of_one_process_do_not_take_each_others_file(tmp_path):
    uri = str(tmp_path / "record.json")
    with new_file(uri) as one:
        with new_file(uri) as other:
            other.write(b"the other")
        one.write(b"the one")
    assert (tmp_path / "record.json").read_bytes() == b"the one"
    assert len(list(tmp_path.iterdir())) == 1
