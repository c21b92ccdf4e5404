"""Compare URLs as browsers do, and find their hosts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
from yarl import URL

# URLs that are already comparable; nearly all are of this form.
PLAIN = r"^https?://[a-z0-9.-]*[a-z0-9](/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+$"
AUTHORITY = r"^(?:[a-z][a-z0-9+.-]*:)?//(?:[^/?]*@)?(?P<host>\[[^\]/]*\]|[^:/?\[\]]+)"
NO_PATH = re.compile(r"^[a-z]+://[^/?]+(?=\?|$)")
HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


def comparable(urls: pa.Array) -> pa.Array:
    """Return URLs in a form in which those of the same image are equal.

    As in browsers, the case of scheme and host, default ports, fragments, dot segments and unnecessary
    percent-encoding make no difference. Neither does http or https. What is not a URL is kept.

    Args:
        urls: (n,) strings.

    Returns:
        (n,) strings, without a scheme if it is http or https; null stays null.

    """
    is_odd = pc.invert(pc.fill_null(pc.match_substring_regex(urls, PLAIN), True))
    changed = pa.array([_comparable(url) for url in urls.filter(is_odd).to_pylist()], urls.type)
    merged = pc.replace_with_mask(urls, is_odd, changed)
    return pc.replace_substring_regex(merged, "^https?:", "", max_replacements=1)


def hosts(urls: pa.Array) -> pa.Array:
    """Return the host of each URL as `comparable` returns it; null if it has none."""
    found = pc.struct_field(pc.extract_regex(urls, AUTHORITY), 0)
    return pc.utf8_rtrim(found, ".")


def comparable_host(host: str) -> str:
    """Return the name or IPv4 address of a host in the form of `hosts`.

    Raises:
        ValueError: it is neither.

    """
    name = host if re.search(r"[/@:?#]", host) else URL(f"http://{host}").raw_host
    if name is None or not HOST.fullmatch(name := name.rstrip(".")):
        raise ValueError(f"{host!r} is not the name of a host")
    return name


def with_parents(host: str) -> Iterator[str]:
    """Yield a host and the domains that contain it: a.example.org, example.org, org."""
    yield host
    while "." in host:
        host = host.partition(".")[2]
        yield host


def _comparable(url: str) -> str:
    try:
        text = str(URL(url).with_fragment(None))
    except ValueError:
        return url
    return NO_PATH.sub(r"\g<0>/", text, count=1)
