"""URLs without secrets.

A user name, a password or a signature in a URL would otherwise be written to manifests, tables, logs and
Dagster's history. `public` removes them where a URL enters the platform, and remembers them in this
process. `private` adds them again to a URL that is about to be requested.
"""

from __future__ import annotations

import re

WEB = ("http://", "https://")

ANY_URL = re.compile(r"(?P<scheme>\w+://)(?:(?P<user>[^/?#]*)@)?(?P<host>[^/?#]*)(?P<path>.*)", re.DOTALL)

_secrets: dict[str, tuple[str, str]] = {}  # user information and query, by public URL


def public(url: str) -> str:
    """Return a URL without user, password, query and fragment; paths are returned unchanged."""
    shown, user, query = _split(url)
    if user or query:
        _secrets[shown.rstrip("/")] = user, query
    return shown


def is_same(one: str, other: str) -> bool:
    """Whether two URLs or paths of folders are the same, whatever their secrets."""
    return public(one).rstrip("/") == public(other).rstrip("/")


def private(url: str) -> str:
    """Return a public URL with the secrets of the file or folder that it is, or is in."""
    above = [shown for shown in _secrets if url == shown or url.startswith(f"{shown}/")]
    if not above:
        return url
    user, query = _secrets[max(above, key=len)]
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{user}{'@' * bool(user)}{rest}{'?' * bool(query)}{query}"


def without_secrets(text: str) -> str:
    """Return a message in which every URL is public."""
    return re.sub(r"https?://[^\s'\"<>]+", lambda url: _split(url[0])[0], text)


def _split(url: str) -> tuple[str, str, str]:
    """Return the public part of a URL, its user information and its query.

    In URLs of other protocols than HTTP, "?" and "#" may be parts of a name.
    """
    if (parts := ANY_URL.fullmatch(url)) is None or parts["scheme"] == "file://":
        return url, "", ""
    user, path, query = parts["user"] or "", parts["path"], ""
    if parts["scheme"] in WEB:
        path, _, query = path.partition("#")[0].partition("?")
    return f"{parts['scheme']}{parts['host']}{path}", user, query
