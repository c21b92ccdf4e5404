"""Folders and files of web servers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import yarl
from fsspec.implementations.http import HTTPFileSystem

from laion_assets.io.errors import InputError
from laion_assets.io.public_urls import private

REQUESTS = 16  # at once, for the sizes of files
DOWNLOAD = "download the files, and name the local folder"


class WebFiles(HTTPFileSystem):  # type: ignore[misc]  # fsspec has no type hints
    """A web server that lists folders in pages with links and returns parts of files.

    Its URLs are public, see `laion_assets.io.public_urls`; requests add the secrets.
    """

    def encode_url(self, url: str) -> yarl.URL:
        """Return a URL as it is requested; fsspec calls this for every request."""
        return yarl.URL(private(url))

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, **_: Any
    ) -> dict[str, Mapping[str, Any]]:
        """Return the details of the files below a folder, or in its first `maxdepth` levels, by URL.

        The links have no sizes, so this takes a request for each file. Unlike that of fsspec, it raises
        errors of listings.

        Raises:
            InputError: a size is not reported.

        """
        if withdirs:
            raise NotImplementedError("folders are not returned")
        try:
            files = list(self._files(path, maxdepth))
        except FileNotFoundError:
            return {}
        with ThreadPoolExecutor(REQUESTS) as pool:
            found = dict(zip(files, pool.map(self.info, files), strict=True))
        for url, info in found.items():
            if info["size"] is None:
                raise InputError(f"the server does not report the size of {url}: {DOWNLOAD}")
        return found

    def _files(self, folder: str, depth: int | None) -> Iterator[str]:
        """Yield the files that the pages of a folder link to."""
        for entry in sorted(self.ls(f"{folder.rstrip('/')}/", detail=False)):
            if "?" in entry or "#" in entry:  # the same page in another order
                continue
            if not entry.endswith("/"):
                yield entry
            elif depth is None or depth > 1:
                yield from self._files(entry, depth and depth - 1)

    async def _cat_file(
        self, url: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """Read a file or a part of it.

        Raises:
            InputError: the server returns the whole file instead of a part.

        """
        if start is None and end is None:
            content: bytes = await super()._cat_file(url, **kwargs)
            return content
        if start == end:
            return b""
        headers = {"Range": await self._process_limits(url, start, end), "Accept-Encoding": "identity"}
        session = await self.set_session()
        async with session.get(self.encode_url(url), headers=headers) as answer:
            self._raise_not_found_for_status(answer, url)
            is_all = not start and answer.content_length == end  # small files are read at once
            if answer.status != HTTPStatus.PARTIAL_CONTENT and not is_all:
                raise InputError(
                    f"{url} cannot be read in parts, because its server returns the whole file: use a "
                    f"server that supports ranges, such as nginx, or {DOWNLOAD}"
                )
            part: bytes = await answer.read()
            return part

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            raise InputError(
                f"{path} cannot be written, because it is on a web server: name a local folder, or one "
                "in a bucket (gs://)"
            )
        return super()._open(path, mode, **options)
