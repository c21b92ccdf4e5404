"""The commands and options in the documentation exist."""

import re

import pytest
from helpers.project import REPOSITORY

from laion_assets.cli import main

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")]
TEXT = "\n".join(page.read_text() for page in PAGES)


def test_every_make_target_exists():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^make ([a-z][\w-]*)", TEXT, re.MULTILINE))
    targets |= set(re.findall(r"`(?:\w+=\w+ )?make ([a-z][\w-]*)`", TEXT))
    assert len(targets) > 10
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("command", ["materialize", "plan", "look"])
def test_every_option_of_the_command_line_exists(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    used = re.findall(rf"laion-assets {command}( [^\n`#]*)", TEXT)
    assert used
    assert {option for line in used for option in re.findall(r"--[\w-]+", line)} <= known
