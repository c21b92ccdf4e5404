"""The tables of settings and `.env.example` match the declarations."""

from helpers.project import REPOSITORY

from laion_assets.defs.settings_docs import DOCUMENT, EXAMPLE, env_example, with_tables

REMEDY = "run `make settings-docs`"


def test_the_tables_follow_from_the_declarations():
    page = (REPOSITORY / DOCUMENT).read_text()
    assert with_tables(page) == page, REMEDY


def test_the_example_follows_from_the_declarations():
    assert env_example() == (REPOSITORY / EXAMPLE).read_text(), REMEDY
