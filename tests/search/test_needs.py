"""What combining takes follows the measured laws, and what cannot fit is refused with the numbers."""

import re

import pytest
from helpers.project import REPOSITORY

from laion_assets.io.errors import InputError
from laion_assets.search import needs
from laion_assets.search.needs import Needs


def test_the_laws_are_those_of_the_last_benchmark():
    told = (REPOSITORY / "benchmarks" / "combine.md").read_text()
    linear, quadratic = re.findall(r"core seconds: (\d+) n \+ (\d+) n²", told)[0]
    memory, image = re.findall(r"memory: ([\d.]+) GB \+ (\d+) bytes an image", told)[0]
    (disk,) = re.findall(r"disk: (\d+) bytes an image", told)
    (start,) = re.findall(r"core seconds of each stripe beyond the first: (\d+) n", told)
    millions, many = Needs.of(3_000_000), Needs.of(30_000_000)
    assert millions.core_seconds == pytest.approx(3 * int(linear) + 9 * int(quadratic))
    assert millions.memory == pytest.approx(float(memory) * 1e9 + 3e6 * int(image))
    assert millions.disk == pytest.approx(3e6 * int(disk))
    beyond = (many.stripes - 1) * int(start) * 30
    assert many.core_seconds == pytest.approx(30 * int(linear) + 900 * int(quadratic) + beyond)
    assert Needs.of(3_000_000, 5_000_000).memory > millions.memory


@pytest.mark.parametrize(
    ("memory", "disk", "facts"),
    [
        (2 * 10**9, 10**12, ("3.76 GB of memory, but 2 GB are free", "30,000,000")),
        (10**12, 2 * 10**9, ("20.2 GB of disk, but 2 GB are free", "TMPDIR")),
    ],
)
def test_what_cannot_fit_is_refused_with_the_numbers(monkeypatch, memory, disk, facts):
    monkeypatch.setattr(needs, "free_memory", lambda: memory)
    monkeypatch.setattr(needs, "free_disk", lambda: disk)
    with pytest.raises(InputError) as refused:
        Needs.of(30_000_000).check()
    for fact in facts:
        assert fact in str(refused.value)
    Needs.of(1_000_000).check()


def test_each_stripe_takes_some_hours_at_most_and_nodes_share_them():
    assert [Needs.of(images).stripes for images in (0, 1_000_000, 6_000_000)] == [1, 1, 1]
    many = Needs.of(30_000_000)
    assert 4 < many.core_seconds / many.stripes / needs.HOUR <= 8.1
    assert many.hours(cores=1) == pytest.approx(many.core_seconds / needs.HOUR)
    assert many.hours(1) / 4.1 < many.hours(4) < many.hours(1) / 3.5
    assert many.hours(10**6) < 1
    assert needs.worth(16) == 9


def test_a_small_request_is_never_refused(monkeypatch):
    for what in ("free_memory", "free_disk"):
        monkeypatch.setattr(needs, what, lambda: 0)
    Needs.of(100_000).check()
