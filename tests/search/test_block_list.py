"""Block lists: every form that people export is read as what it is, or refused with the line."""

import bz2
import gzip
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.limits import limited
from hypothesis import given, settings
from hypothesis import strategies as st

from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage
from laion_assets.search.block_list import BlockList
from laion_assets.search.block_list_file import read_block_list


def blocked(found: BlockList, *rows: tuple[int, str]) -> list[bool]:
    ids, urls = zip(*rows, strict=True)
    return found.holds(np.array(ids), pa.chunked_array([urls])).tolist()


ROWS = [(1, "https://a/1.jpg"), (2, "https://a/2.jpg"), (3, "https://a/3.jpg"), (4, "https://a/4.jpg?é")]
LINES = "\ufeff2\r\n\r\nhttps://a/4.jpg?é\nhttps://a/9.jpg\n77"


@pytest.mark.parametrize("name", ["list.txt", "list", "list.txt.gz", "list.parquet"])
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_ids_and_urls_are_blocked_whatever_form_the_list_has(tmp_path, request, name, place):
    file = tmp_path / name
    if name.endswith(".parquet"):
        table = {
            "url": ["https://a/4.jpg?é", None, "https://a/9.jpg"],
            "id": [2, 77, None],
            "more": [1, 2, 3],
        }
        pq.write_table(pa.table(table), file)
    else:
        content = LINES.encode()
        file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    uri = str(file)
    if place == "bucket":
        bucket = request.getfixturevalue("new_bucket")
        fs, root = open_storage(bucket, "")
        fs.pipe(f"{root}/{name}", file.read_bytes())
        uri = f"{bucket}/{name}"
    found = read_block_list(uri)
    assert blocked(found, *ROWS) == [False, True, False, True]
    fingerprint = str(found).rpartition(", ")[2]
    assert str(found) == f"{uri}, 2 ids, 2 URLs, {fingerprint}"
    same = tmp_path / "same.txt"
    same.write_text("\n".join(reversed(LINES.strip("\ufeff").splitlines())) + "\n2")
    assert str(read_block_list(str(same))).endswith(fingerprint)
    same.write_text("2")
    assert not str(read_block_list(str(same))).endswith(fingerprint)


@settings(deadline=None)
@given(st.sets(st.integers(0, 2**63 - 1), max_size=30), st.sets(st.integers(0, 2**63 - 1), max_size=30))
def test_exactly_the_ids_on_the_list_are_blocked(listed, asked):
    found = BlockList("", np.array(sorted(listed), np.int64), np.empty(0, np.int64))
    ids = np.array(sorted(listed | asked), np.int64)
    assert found.holds(ids, pa.chunked_array([], pa.string())).tolist() == [
        i in listed for i in ids.tolist()
    ]


def test_a_list_of_ones_own_table_blocks_its_images(tmp_path):
    pq.write_table(
        pa.table({"id": pa.array([3], pa.int64()), "url": ["https://a/1.jpg"]}), tmp_path / "t.parquet"
    )
    assert blocked(read_block_list(str(tmp_path / "t.parquet")), *ROWS) == [True, False, True, False]


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("none.txt", None, ["missing"]),
        ("list.txt", b"", ["empty"]),
        ("list.txt.gz", b"1\n2\n", ["cannot be read", "gzip"]),
        ("list.parquet", b"1\n2\n", ["cannot be read", "Parquet"]),
    ],
)
def test_a_list_that_is_missing_empty_or_damaged_is_refused(tmp_path, name, content, facts):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_block_list(str(tmp_path / name))
    facts = [str(tmp_path / name), *facts]
    assert [fact for fact in facts if fact not in str(refused.value)] == []
    assert refused.value.about == "block_list"


@pytest.mark.parametrize(
    ("content", "line", "quoted"),
    [(b"1\n2\nurl\n", 3, "'url'"), (b"1\nhttp://a\xff\n", 2, "'http://"), (b"9" * 30, 1, repr("9" * 30))],
)
def test_a_line_that_is_neither_id_nor_url_is_named(tmp_path, content, line, quoted):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_block_list(str(path))
    facts = [str(path), f"line {line} ", quoted, "one URL such as"]
    assert [fact for fact in facts if fact not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("columns", "found"), [({"key": [1]}, "key (int64)"), ({"id": ["1"]}, "id (string)")]
)
def test_a_table_without_ids_or_urls_is_no_list(tmp_path, columns, found):
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    with pytest.raises(InputError) as refused:
        read_block_list(str(tmp_path / "list.parquet"))
    facts = ["list.parquet", found, "column id, url or host"]
    assert [fact for fact in facts if fact not in str(refused.value)] == []


# --- what people export ---------------------------------------------------------------------------

LISTED, OTHER = ["http://h3.example/1.jpg", "http://h3.example/2.jpg"], "http://h4.example/1.jpg"
ONE, TWO = LISTED


def lines(*entries: str, end: str = "\n") -> bytes:
    return "".join(entry + end for entry in entries).encode()


READ = {
    "windows line ends": ("l.txt", lines(*LISTED, end="\r\n")),
    "old Macintosh line ends": ("l.txt", lines(*LISTED, end="\r")),
    "a byte order mark": ("l.txt", b"\xef\xbb\xbf" + lines(*LISTED)),
    "UTF-16": ("l.txt", lines(*LISTED).decode().encode("utf-16")),
    "no line end": ("l.txt", lines(*LISTED).rstrip()),
    "spaces and tabs around": ("l", lines(*(f" {url}\t" for url in LISTED))),
    "https": ("l.txt", lines(*(url.replace("http", "https") for url in LISTED))),
    "upper case": ("l.txt", lines(*(url.replace("http://h3", "HTTP://H3") for url in LISTED))),
    "a default port": ("l.txt", lines(*(url.replace("example", "example:80") for url in LISTED))),
    "a fragment": ("l.txt", lines(*(f"{url}#top" for url in LISTED))),
    "percent-encoding": ("l.txt", lines(*(url.replace(".jpg", "%2ejpg") for url in LISTED))),
    "dot segments": ("l.txt", lines(*(url.replace("example/", "example/x/../") for url in LISTED))),
    "a host": ("l.txt", b"host:h3.example\n"),
    "a host in another case": ("l.txt", b"host: H3.Example.\n"),
    "a parent domain": ("l.csv", b"host\nh3.example\nexample.org\n"),
    "CSV": ("l.csv", lines("reason,url", *(f'"a, ""b""",{url}' for url in LISTED))),
    "quoted CSV": ("l.csv", lines('"url"', *(f'"{url}"' for url in LISTED))),
    "TSV": ("l.tsv", lines("url\twhy", *(f"{url}\tabuse" for url in LISTED))),
    "gzip": ("l.txt.gz", gzip.compress(lines(*LISTED))),
    "bzip2": ("l.bz2", bz2.compress(lines(*LISTED))),
    "xz": ("l.csv.xz", lzma.compress(lines("URL", *LISTED))),
}  # fmt: skip


@pytest.mark.parametrize("form", READ)
def test_a_list_is_read_as_what_it_is(tmp_path, form):
    name, content = READ[form]
    (tmp_path / name).write_bytes(content)
    rows = [(1, ONE), (2, TWO), (3, OTHER), (4, ""), (5, None)]
    found = read_block_list(str(tmp_path / name))
    assert blocked(found, *rows) == [True, True, False, False, False]


REFUSED = {
    "CSV rows": (lines(f"{ONE},abuse"), "line 1", ".csv"),
    "CSV with a header": (lines("url,why", f"{ONE},abuse"), "line 1", "'url,why'"),
    "id and URL": (lines(f"7,{ONE}"), "line 1", "'7,http"),
    "semicolons": (lines(f"{ONE};abuse"), "line 1", "column"),
    "TSV": (lines("7", f"{ONE}\tabuse"), "line 2", "U+0009"),
    "double quotes": (lines(f'"{ONE}"'), "line 1", "neither an id nor a URL"),
    "single quotes": (lines(f"'{ONE}'"), "line 1", "neither an id nor a URL"),
    "a quote at the end": (lines(f'{ONE}"'), "line 1", "neither an id nor a URL"),
    "pandas' floats": (lines("7.0", "8.0"), "line 1", "'7.0'"),
    "negative ids": (lines("-7"), "line 1", "'-7'"),
    "ids with separators": (lines("1,000"), "line 1", "'1,000'"),
    "hexadecimal ids": (lines("0x1f"), "line 1", "'0x1f'"),
    "other digits": (lines("\u0667"), "line 1", "neither"),
    "a comment": (lines(f"{ONE} # abuse"), "line 1", "# abuse"),
    "a comment line": (lines("# abuse.", ONE), "line 1", "'# abuse.'"),
    "JSON lines": (lines(f'{{"url": "{ONE}"}}'), "line 1", "url"),
    "a JSON list": (lines("[", f'"{ONE}",', "]"), "line 1", "'['"),
    "angle brackets": (lines(f"<{ONE}>"), "line 1", "neither"),
    "Markdown": (lines(f"- {ONE}"), "line 1", "neither"),
    "a Markdown link": (lines(f"[a]({ONE})"), "line 1", "neither"),
    "a mark inside": (lines(ONE, f"\ufeff{TWO}"), "line 2", "U+FEFF"),
    "a zero-width space": (lines(ONE.replace("/1", "/\u200b1")), "line 1", "U+200B"),
    "a soft hyphen": (lines(ONE.replace("/1", "/\u00ad1")), "line 1", "U+00AD"),
    "a no-break space": (lines(f"{ONE}\u00a0"), "line 1", "U+00A0"),
    "form feeds": (lines(ONE, TWO, end="\f"), "line 1", "U+000C"),
    "vertical tabs": (lines(ONE, TWO, end="\v"), "line 1", "U+000B"),
    "next lines": (lines(ONE, TWO, end="\u0085"), "line 1", "U+0085"),
    "line separators": (lines(ONE, TWO, end="\u2028"), "line 1", "U+2028"),
    "null characters": (lines(ONE, TWO, end="\0"), "line 1", "U+0000"),
    "UTF-16 without a mark": (lines(ONE).decode().encode("utf-16-le"), "line 1", "U+0000"),
    "Latin-1": (b"http://h3.example/caf\xe9.jpg\n", "line 1", "UTF-8"),
    "a domain": (lines("h3.example"), "line 1", "host:h3.example"),
    "a domain and a slash": (lines("h3.example/"), "line 1", "host:h3.example"),
    "a URL without a scheme": (lines("h3.example/1.jpg"), "line 1", "neither"),
    "no scheme, slashes": (lines("//h3.example/1.jpg"), "line 1", "neither"),
    "a file of hosts": (lines("0.0.0.0 h3.example"), "line 1", "host:h3.example"),
    "ad-block syntax": (lines("||h3.example^"), "line 1", "host:h3.example"),
    "a pattern": (lines("/banner/"), "line 1", "neither"),
    "a domain with a wildcard": (lines("*.h3.example"), "line 1", "host:h3.example"),
    "a host with a wildcard": (lines("http://*.h3.example/"), "line 1", "wildcard"),
    "a path with a wildcard": (lines("http://h3.example/*"), "line 1", "wildcard"),
    "two URLs": (lines(f"{ONE} {TWO}"), "line 1", "neither"),
    "a URL without a host": (lines("http:///1.jpg"), "line 1", "host"),
    "a host that is none": (lines("host:h3.example/1.jpg"), "line 1", "name of a host"),
    "a long line": (b"http://h3.example/" + b"a" * 20_000, "line 1", "16,384"),
}  # fmt: skip


def refusal(path):
    with pytest.raises(InputError) as refused:
        read_block_list(str(path))
    assert refused.value.about == "block_list"
    return str(refused.value)


@pytest.mark.parametrize("form", REFUSED)
def test_a_line_that_would_block_nothing_is_refused(tmp_path, form):
    content, *facts = REFUSED[form]
    (tmp_path / "list.txt").write_bytes(content)
    message = refusal(tmp_path / "list.txt")
    assert [
        fact for fact in ["list.txt", "https://example.org/a.jpg", *facts] if fact not in message
    ] == []
    assert message.isprintable()


TABLES = {
    "numbers in a column of URLs": ({"image_url": [1, 2]}, "image_url (int64)"),
    "ids that are not whole": ({"id": [7.0]}, "id (double)"),
    "domains in a column of URLs": ({"url": [ONE, None, "h3.example"]}, "row 2 ", "'h3.example'"),
    "quoted URLs": ({"url": [f'"{ONE}"']}, "row 0 ", "not a URL"),
    "URLs in a column of hosts": ({"host": [ONE]}, "name of a host"),
}


@pytest.mark.parametrize("form", TABLES)
def test_a_column_that_would_block_nothing_is_refused(tmp_path, form):
    columns, *facts = TABLES[form]
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    message = refusal(tmp_path / "list.parquet")
    assert [fact for fact in ["list.parquet", *facts] if fact not in message] == []


CSV = {
    "no known column": ("a,b\n1,2\n", "no column", "a, b"),
    "no header": (f"{ONE},abuse\n", "no column"),
    "too many fields": (f"url,why\n{ONE},a,b\n", "line 2", "3 columns instead of 2"),
    "ids as pandas writes them": ("id\n7.0\n", "line 2", "'7.0'"),
    "a quote without an end": (f'url\n"{ONE}\n', "cannot be read"),
}


@pytest.mark.parametrize("form", CSV)
def test_a_csv_file_that_would_block_nothing_is_refused(tmp_path, form):
    content, *facts = CSV[form]
    (tmp_path / "list.csv").write_text(content)
    message = refusal(tmp_path / "list.csv")
    assert [fact for fact in ["list.csv", *facts] if fact not in message] == []


def test_a_host_blocks_its_subdomains_and_no_other_host(tmp_path):
    (tmp_path / "l.txt").write_text("host:example.org\nhost:cdn.example.net\nhost:bücher.example\n")
    urls = {
        "http://example.org/a": True,
        "https://A.B.Example.ORG:8080/a": True,
        "http://user@example.org./a": True,
        "http://cdn.example.net": True,
        "http://xn--bcher-kva.example/a": True,
        "http://example.net/a": False,
        "http://anexample.org/a": False,
        "http://example.org.evil/a": False,
        "http://evil/http://example.org/": False,
        "file:///example.org/a": False,
    }
    found = read_block_list(str(tmp_path / "l.txt"))
    assert dict(zip(urls, blocked(found, *((0, url) for url in urls)), strict=True)) == urls
    assert ", 0 ids, 0 URLs, 3 hosts, " in str(found)


def test_urls_that_are_not_utf_8_are_compared_with_their_bytes_replaced(tmp_path):
    raw = pa.array([b"http://a/caf\xe9.jpg", b"http://a/1.jpg"], pa.binary())
    urls = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"url": urls.slice(0, 1)}), tmp_path / "l.parquet")
    found = read_block_list(str(tmp_path / "l.parquet"))
    assert found.holds(np.array([0, 1]), pa.chunked_array([urls])).tolist() == [True, False]


def test_an_archive_is_named_with_the_remedy(tmp_path):
    (tmp_path / "list.txt.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"list\.txt\.zip has the extension \.zip: unpack it"):
        read_block_list(str(tmp_path / "list.txt.zip"))


def big_parquet(path, rows: int) -> None:
    names = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(rows, np.int32)), ["http://h/" + "a" * 60_000]
    )
    pq.write_table(pa.table({"url": names}), path, compression="zstd", store_schema=False)


BOMBS = {"lines.gz": b"1\n", "line.gz": b"a", "spaces.txt.gz": b" "}


@pytest.mark.faults
@pytest.mark.parametrize("form", [*BOMBS, "list.parquet"])
def test_a_small_file_cannot_take_the_memory(tmp_path, form):
    """Unpacked, the Parquet file takes 6 GB and two others 600 MB; a quarter of a gigabyte is enough."""
    path, megabyte = tmp_path / form, 1 << 20
    if form == "list.parquet":
        big_parquet(path, 100_000)
    else:
        with gzip.open(path, "wb", 6) as file:
            for _ in range(20 if form == "lines.gz" else 600):
                file.write(BOMBS[form] * (megabyte // len(BOMBS[form])))
    done = limited(
        "from laion_assets.search.block_list_file import read_block_list",
        "print(read_block_list(sys.argv[1]))",
        str(path),
        memory=256 << 20,
    )
    facts = ["0 ids, 1 URL, "] if form == "list.parquet" else ["InputError", form]
    assert [fact for fact in facts if fact not in done] == []
