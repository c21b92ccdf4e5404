"""Sphinx configuration: `make docs` builds the site and fails on every warning and dead internal link."""

import re
from importlib import metadata
from pathlib import Path
from pkgutil import walk_packages

from docutils.nodes import document
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import laion_assets

project = "laion_assets"
author = "the laion_assets authors"
release = metadata.version("laion_assets")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "laion_assets"
myst_heading_anchors = 3

# --- reference pages, one a package, from the docstrings ------------------------------------------

LIBRARY = ("search", "index", "seeds", "staging", "io")
API = Path(__file__).parent / "reference" / "api"
MODULE = """
{title}
{underline}

.. automodule:: {name}
   :members:
   :ignore-module-all:
"""

autodoc_member_order = "bysource"
ARRAYS = ("Bytes", "Floats", "Ids", "Mask", "Ranges")  # aliases that say more than what they stand for
autodoc_type_aliases = {name: name for name in ARRAYS}
ALIAS = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")
default_role = "literal"  # of `names` in docstrings
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def write_reference() -> None:
    """Write a page for each package of the library, with a section for each of its modules."""
    modules = sorted(found.name for found in walk_packages(laion_assets.__path__, "laion_assets."))
    API.mkdir(exist_ok=True)
    for package in LIBRARY:
        root = f"laion_assets.{package}"
        sections = [_section(root, "=")]
        sections += [_section(name, "-") for name in modules if name.startswith(f"{root}.")]
        (API / f"{package}.rst").write_text("".join(sections))


def _section(name: str, underline: str) -> str:
    title = name.replace("_", r"\_")
    return MODULE.format(title=title, underline=underline * len(title), name=name)


write_reference()

# --- links ----------------------------------------------------------------------------------------

nitpicky = True
OTHERS = "PIL aiohttp collections concurrent contextlib ctypes datetime google_crc32c ipaddress numpy"
OTHERS += " obstore pathlib pyarrow threading yarl"
nitpick_ignore_regex = [
    ("py:.*", rf"({'|'.join(OTHERS.split())})\..*"),  # documented elsewhere
    ("py:class", "|".join(ARRAYS)),
    ("py:class", r"laion_assets\..*\.(Argument|Result|FetchJob|Kind)"),  # type variables
]

# Markdown files outside of docs/, and the page that includes each: on GitHub, links lead to the files.
INCLUDED = {
    "CHANGELOG": "changelog",
    "CONTRIBUTING": "contributing",
    "benchmarks/combine": "benchmarks",
    "benchmarks/duplicates": "benchmarks",
    "benchmarks/results": "benchmarks",
    "benchmarks/runs": "benchmarks",
    "benchmarks/sparse": "benchmarks",
    "benchmarks/staging": "benchmarks",
    "benchmarks/truesize": "benchmarks",
    "k8s/README": "kubernetes",
}

# `make docs-links` follows the links that lead to the web; `make docs` follows none.
linkcheck_timeout = 30
linkcheck_retries = 2
linkcheck_ignore = [r"http://127\.0\.0\.1.*"]


def link_to_pages(app: Sphinx, doctree: document) -> None:
    """Let links to included files lead to the pages that include them."""
    repository = Path(app.srcdir).parent
    for link in doctree.findall(pending_xref):
        target = Path(link["reftarget"])
        if link["refdomain"] == "doc" and target.is_relative_to(repository):
            name = target.relative_to(repository).as_posix()
            link["reftarget"] = INCLUDED.get(name, link["reftarget"])


def name_aliases(*event: str | None) -> tuple[str | None, ...]:
    """Name aliases inside of other types too, which autodoc leaves as references to them."""
    return tuple(text and ALIAS.sub(r"\1", text) for text in event[-2:])


def setup(app: Sphinx) -> None:
    """Register what the configuration adds to Sphinx."""
    app.connect("autodoc-process-signature", name_aliases)
    app.connect("doctree-read", link_to_pages)
