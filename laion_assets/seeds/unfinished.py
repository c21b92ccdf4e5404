"""Checkpoint embedded images every few minutes, so that the next run can reuse them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from types import TracebackType

import numpy as np
import pyarrow as pa

from laion_assets.io.errors import InputError
from laion_assets.io.storage import list_files, open_storage, reaching
from laion_assets.io.tables import OUTPUT, SUFFIX, StoredTable, new_table, vector_column
from laion_assets.seeds.images import EmbeddedImage

SECONDS = 120.0
MODEL_KEY = "laion_assets.model"


class UnfinishedImages:
    """Embedded images of an unfinished table, in Parquet files of one folder.

    Leaving the context, even with an error, writes the images not written yet. Runs may share a folder.

    Args:
        uri: the folder, a local path or a URL; it need not exist.
        model: fingerprint of the model.
        log: called with a line about each file that cannot be read.
        seconds: time between writes, the most work that a kill can lose.

    """

    def __init__(
        self, uri: str, model: str, log: Callable[[str], object], seconds: float = SECONDS
    ) -> None:
        self._uri, self._model, self._log, self._seconds = uri, model, log, seconds
        self._waiting: list[EmbeddedImage] = []
        self._written = time.monotonic()

    def tables(self) -> list[pa.Table]:
        """Read the images that this model embedded: `content`, `thumbnail` and `embedding`."""
        found = []
        for uri in self._files():
            try:
                stored = StoredTable(uri, "remove it")
                if stored.footer.get(MODEL_KEY) == self._model:
                    found.append(stored.read())
            except InputError as error:
                self._log(f"embedding these images again: {error}")
        return found

    def keep(self, image: EmbeddedImage) -> None:
        """Add an image, and write the waiting images if the last write was long enough ago."""
        self._waiting.append(image)
        if time.monotonic() - self._written >= self._seconds:
            self._write()

    def remove(self) -> None:
        """Remove all files; to be called once the table is written."""
        fs, _ = open_storage(self._uri, OUTPUT)
        for uri in self._files():
            with reaching(uri, OUTPUT):
                fs.rm_file(open_storage(uri, OUTPUT)[1])

    def __enter__(self) -> UnfinishedImages:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._waiting:
            self._write()

    def _files(self) -> list[str]:
        fs, root = open_storage(self._uri, OUTPUT)
        with reaching(self._uri, OUTPUT):
            if not fs.exists(root):
                return []
            names = [listed.name for listed in list_files(fs, root)]
        return [f"{self._uri}/{name}" for name in sorted(names) if name.endswith(SUFFIX)]

    def _write(self) -> None:
        rows = pa.record_batch(
            {
                "content": pa.array([image.content for image in self._waiting]),
                "thumbnail": pa.array([image.thumbnail for image in self._waiting], pa.binary()),
                "embedding": vector_column(np.stack([image.vector for image in self._waiting])),
            }
        )
        with new_table(f"{self._uri}/{uuid.uuid4()}{SUFFIX}", rows.schema) as table:
            table.footer = {MODEL_KEY: self._model}
            table.write(rows)
        self._waiting, self._written = [], time.monotonic()
