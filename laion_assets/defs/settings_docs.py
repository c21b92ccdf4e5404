"""Write the tables of settings in the documentation, and `.env.example`, from the declarations.

`make settings-docs` runs this module in a checkout; a test compares its output with the committed files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic.fields import FieldInfo

from laion_assets.defs.places import Places
from laion_assets.defs.settings import FIELDS, allowed, variable_of

DOCUMENT = Path("docs/settings.md")
EXAMPLE = Path(".env.example")
BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"
EXAMPLE_HEAD = """\
# Copy to .env. Everything is optional. Unset variables select the demo, on the local disk under ./data.
# `laion-assets` and `dagster dev` both read .env from the folder in which they start.
# Credentials do not belong here: Google Cloud's clients find them by themselves (docs/buckets.md).
"""
EXAMPLE_FOOT = """
# Server for gs:// URLs instead of Google's, such as an emulator; used without credentials
#STORAGE_EMULATOR_HOST=http://127.0.0.1:4443
"""


def settings_table() -> str:
    """Return the settings of a request as a Markdown table."""
    rows = [
        (f"`{name}`", f"`{variable_of(name)}`", _default(field), allowed(name), field.description or "")
        for name, field in FIELDS.items()
    ]
    return _table("setting", "variable", "default", "allowed", "meaning", rows=rows)


def places_table() -> str:
    """Return the platform's locations as a Markdown table."""
    rows = [
        (f"`{variable_of(name)}`", _default(field), field.description or "")
        for name, field in Places.model_fields.items()
    ]
    return _table("variable", "default", "meaning", rows=rows)


def _table(*names: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def env_example() -> str:
    """Return `.env.example`, with every variable commented out, its help and an example."""

    def lines(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
        for name, field in fields.items():
            example = _extra(field).get("example") or (
                "" if field.default in (None, {}) else field.default
            )
            yield f"# {(field.description or '').replace('`', '')}"
            yield f"#{variable_of(name)}={'' if field.default_factory else example}"

    places = "\n".join(lines(Places.model_fields))
    settings = "\n".join(lines(FIELDS))
    return (
        f"{EXAMPLE_HEAD}\n{places}\n\n# Settings of a request, for runs and seed sets without their own\n"
        f"{settings}\n{EXAMPLE_FOOT}"
    )


def with_tables(document: str) -> str:
    """Return a document with both tables inserted between their markers."""
    for name, table in (("settings", settings_table()), ("places", places_table())):
        begin, end = BEGIN.format(name), END.format(name)
        pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
        if not re.search(pattern, document, re.DOTALL):
            raise ValueError(f"the document has no {begin} ... {end}")
        replacement = f"{begin}\n{table}\n{end}".replace("\\", "\\\\")
        document = re.sub(pattern, replacement, document, flags=re.DOTALL)
    return document


def _extra(field: FieldInfo) -> Mapping[str, str]:
    extra = field.json_schema_extra
    return {key: str(value) for key, value in extra.items()} if isinstance(extra, dict) else {}


def _default(field: FieldInfo) -> str:
    shown = _extra(field).get("shown")
    return shown or ("" if field.default in (None, {}) else f"`{field.default}`")


def main() -> None:
    """Write the tables and the example into a checkout."""
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
    EXAMPLE.write_text(env_example())


if __name__ == "__main__":
    main()
