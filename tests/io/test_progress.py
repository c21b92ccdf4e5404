"""Progress in a log: how much is done, how fast, and how long it will take."""

import pytest

from laion_assets.io import progress as progress_module
from laion_assets.io.progress import Progress, format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (3570, "1 h 0 min"), (12_000, "3 h 20 min")],
)
def test_durations_are_given_in_the_unit_that_suits_them(seconds, text):
    assert format_duration(seconds) == text


def test_a_line_gives_the_rate_since_the_last_one_and_comes_seldom_in_long_work(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    lines: list[str] = []
    with Progress("copy", 100_000, "B", lines.append) as progress:
        progress.advance(50_000)  # there from before
        assert lines == []
        for moment in (16.0, 17.0, 32.0):
            now = moment
            progress.advance(1600)
        assert len(lines) == 2
        assert lines[1].startswith("copy: 54.8kB of 100kB, 200B/s, ")
        now = 10_000.0
        progress.advance(1)
        now = 10_400.0  # less than a twentieth later
        progress.advance(1)
        assert len(lines) == 3


def test_hours_of_work_take_some_dozens_of_lines(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    lines: list[str] = []
    with Progress("staging", 2_000 * 10**9, "B", lines.append) as progress:
        for _ in range(2_000):  # a GB a second
            now += 1
            progress.advance(10**9)
    assert lines[0] == "staging: 15.0GB of 2.00TB, 1.00GB/s, 33 min left"
    assert 20 < len(lines) < 80
