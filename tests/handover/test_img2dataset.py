"""img2dataset reads our tables unchanged, and loses only images that the web has lost.

It runs unchanged, by the README's command, in an environment of its own. The web is a server on this
machine.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from helpers.host import MANNERS, REFUSED, THERE, Host, hosting, manner_of
from helpers.project import REPOSITORY, Demo, Project, failures, new_project
from PIL import Image

PROGRAMS = Path(__file__).parent / ".venv" / "bin"
SEED_SET = "interiors"  # as in the README
SUCCESS = "success"
UNREADABLE = "Image decoding error"

# What img2dataset calls each manner in which a picture is served.
REASONS = {
    THERE: SUCCESS,
    "there, but moved": SUCCESS,
    REFUSED: "<urlopen error [Errno 111] Connection refused>",
    "not found": "HTTP Error 404: Not Found",
    "gone": "HTTP Error 410: Gone",
    "forbidden": "HTTP Error 403: Forbidden",
    "out of order": "HTTP Error 503: Service Unavailable",
    "hung up": "Remote end closed connection without response",
    "broken off": "IncompleteRead",
    "silent": "timed out",
    "stalled": "timed out",
    "a page": UNREADABLE,
    "a page that claims to be a picture": UNREADABLE,
    "half a picture": UNREADABLE,
    "empty": "OpenCV",
    "not for models": "Use of image disallowed by X-Robots-Tag directive",
}


@dataclass(frozen=True)
class Downloaded:
    """An image downloaded by img2dataset: the contents of its three files."""

    picture: bytes
    caption: str
    about: dict[str, Any]


# --- the web, the index that points into it, and our tables ---------------------------------------


@pytest.fixture(scope="module")
def host(demo: Demo) -> Iterator[Host]:
    """A host that serves the demo's images, by row of the index."""
    files = sorted((demo.index / "metadata").iterdir())
    with hosting([picture for file in files for picture in read(file)["thumbnail"].to_pylist()]) as web:
        yield web


@pytest.fixture(scope="module")
def project(demo: Demo, host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The demo in `data`, with URLs that lead to the host."""
    root = tmp_path_factory.mktemp("handover")
    index = shutil.copytree(demo.index, root / "index")
    first = 0
    for file in sorted((index / "metadata").iterdir()):
        table = read(file)
        urls = pa.array([host.url_of(row) for row in range(first, first + len(table))])
        first += len(table)
        table = table.set_column(table.schema.get_field_index("url"), "url", urls)
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    (root / "data").mkdir()
    with new_project(root / "data", index) as made:
        shutil.copytree(demo.seeds / "fruit", made.seeds / SEED_SET)
        yield made


def read(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.OSFile(str(file))).read_all()


def materialized(project: Project, **settings: Any) -> pa.Table:
    """Run the whole graph and return the combined table."""
    assert failures(project.run(SEED_SET, **settings)) == {}
    return pq.read_table(project.table("combined_urls", SEED_SET))


# --- img2dataset ----------------------------------------------------------------------------------


def in_readme(pattern: str) -> str:
    """The only match of a pattern in the README."""
    (found,) = re.findall(pattern, (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    return found


COMMAND = in_readme(r"^img2dataset (?:.*\\\n)*.*$")
OPTION = in_readme(r"`(--save_additional_columns [^`]*)`")


def download(project: Project, more: str = "") -> dict[str, Downloaded]:
    """Run the README's command beside `data`, with further options; return the images by key."""
    folder = project.output.parents[1]
    images = folder / "images"
    shutil.rmtree(images, ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "NO_ALBUMENTATIONS_UPDATE": "1"}
    command = ["bash", "-c", f"{COMMAND} {more}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for shard in sorted(images.glob("*.tar")):
        with tarfile.open(shard) as files:
            content = {member.name: files.extractfile(member).read() for member in files}
        for key in {name.partition(".")[0] for name in content}:
            about = json.loads(content[f"{key}.json"])
            found[key] = Downloaded(content[f"{key}.jpg"], content[f"{key}.txt"].decode(), about)
    return dict(sorted(found.items()))


def outcomes(project: Project) -> Counter[str]:
    """The result for each URL, as reported by img2dataset."""
    stated: Counter[str] = Counter()
    for file in (project.output.parents[1] / "images").glob("*_stats.json"):
        for message, count in json.loads(file.read_text())["status_dict"].items():
            stated[re.sub(r"^(OpenCV|IncompleteRead)\(.*", r"\1", message, flags=re.DOTALL)] += count
    return stated


def expected(served: Counter[str]) -> Counter[str]:
    """The expected results for URLs served in these ways."""
    told: Counter[str] = Counter()
    for manner, count in served.items():
        told[REASONS[manner]] += count
    return told


def check(project: Project, host: Host, table: pa.Table, images: dict[str, Downloaded]) -> None:
    """Compare img2dataset's report and files with the table and with the host's records."""
    rows, urls = table["id"].to_pylist(), table["url"].to_pylist()
    refused = {row for row in rows if manner_of(row) == REFUSED}
    served = host.served + Counter({REFUSED: len(refused)})
    assert served == Counter(map(manner_of, rows))
    assert host.asked_for == Counter(set(rows) - refused), "every URL is asked for once"
    assert outcomes(project) == expected(served)
    there = [row for row in rows if REASONS[manner_of(row)] == SUCCESS]
    captions = dict(zip(urls, table["caption"].to_pylist(), strict=True))
    assert [image.about["url"] for image in images.values()] == [host.url_of(row) for row in there]
    for row, image in zip(there, images.values(), strict=True):
        assert image.about["sha256"] == hashlib.sha256(host.pictures[row]).hexdigest()
        assert image.caption == image.about["caption"] == captions[image.about["url"]]
        assert Image.open(io.BytesIO(image.picture)).size == (256, 256)


# --- the claims -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def counted_anew(host: Host) -> None:
    host.forget()


def test_there_is_a_reason_for_every_manner() -> None:
    assert list(REASONS) == list(MANNERS)


def test_the_command_of_the_readme_downloads_all_that_is_there_and_tells_why_the_rest_is_not(
    project: Project, host: Host
) -> None:
    table = materialized(project)
    assert set(table["seed_set"].to_pylist()) == {SEED_SET}
    assert "thumbnail" not in table.column_names
    assert set(map(manner_of, table["id"].to_pylist())) == set(MANNERS)
    images = download(project)
    check(project, host, table, images)
    print(f"\n{len(table)} URLs: {dict(outcomes(project).most_common())}")


def test_a_table_of_several_shards_keeps_its_order_and_every_image_the_columns_that_it_was_told_to(
    project: Project, host: Host
) -> None:
    table = materialized(project, nb_images_centroid=2_500, dedup_threshold=1.0)
    assert len(table) > 2_000
    images = download(project, f"--number_sample_per_shard 1000 {OPTION}")
    check(project, host, table, images)
    assert len({key[:5] for key in images}) == -(-len(table) // 1000)
    carried = ["id", "similarity", "strategies"]
    there = [REASONS[manner_of(row)] == SUCCESS for row in table["id"].to_pylist()]
    rows = table.select(carried).filter(pa.array(there)).to_pylist()
    assert [{name: image.about[name] for name in carried} for image in images.values()] == rows


def test_the_tables_of_the_strategies_can_be_handed_over_too(project: Project, host: Host) -> None:
    materialized(project)
    file = project.table("centroid_urls", SEED_SET)
    table = pq.read_table(file)
    assert pa.types.is_fixed_size_binary(table.schema.field("code").type)
    images = download(project, f"--url_list {file}")
    check(project, host, table, images)
