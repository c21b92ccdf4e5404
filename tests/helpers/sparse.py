"""Sparse files for tests: disks on which only declared bytes are right, and a store over two files."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np

from laion_assets.io import ranges
from laion_assets.io.arrays import Ids
from laion_assets.io.ranges import Ranges
from laion_assets.staging import Manifest, StagedFile
from laion_assets.staging.opening import open_sparse_files
from laion_assets.staging.sparse.pages import SparseFile, allocate, map_path
from laion_assets.staging.sparse.reads import PAGE_SIZE
from laion_assets.staging.sparse.store import SparseFiles
from laion_assets.staging.transfer.disk import allocated_bytes
from laion_assets.staging.transfer.files import file_version


def as_ranges(spans: Sequence[tuple[int, int]], gap: int = 0) -> Ranges:
    """The ranges that cover spans of (start, length)."""
    starts = np.array([start for start, _ in spans], np.int64)
    return ranges.ranges_of(starts, starts + np.array([length for _, length in spans], np.int64), gap)


def page(number: int) -> slice:
    return slice(number * PAGE_SIZE, (number + 1) * PAGE_SIZE)


def present_pages(path: Path, size: int, content: str) -> list[int]:
    """The pages that hold data by their map."""
    file = SparseFile(path, size, content)
    file.refresh()
    missing = set(file.missing(as_ranges([(0, file.pages)])))
    file.close()
    return [number for number in range(file.pages) if number not in missing]


class OnlyDeclared:
    """A disk on which files are noise, except for declared bytes, and those only while they are held.

    Args:
        files: the right content of each file, by its path on this disk.

    Attributes:
        bytes_needed: number of bytes that were declared.

    """

    whole = False

    def __init__(self, files: Mapping[Path, Path]) -> None:
        self._right = files
        self.bytes_needed = 0
        for path, right in files.items():
            path.write_bytes(b"\xff" * right.stat().st_size)

    @contextmanager
    def hold(self) -> Iterator["OnlyDeclared"]:
        self._held: dict[Path, Ranges] = {}
        yield self
        for path, some in self._held.items():
            self.bytes_needed += ranges.total(some)
            for start, stop in some.tolist():
                self._put(path, start, b"\xff" * (stop - start))

    def need(self, needed: Mapping[Path, Ranges]) -> None:
        for path, some in needed.items():
            content = self._right[path].read_bytes()
            for start, stop in some.tolist():
                assert 0 <= start < stop <= len(content)
                self._put(path, start, content[start:stop])
            self._held[path] = ranges.union(self._held.get(path, ranges.NO_RANGES), some)

    def read(self, path: Path, spans: Ids) -> list[bytes]:
        content = self._right[path].read_bytes()
        self.bytes_needed += ranges.total(spans)
        return [content[start:stop] for start, stop in spans.tolist()]

    def _put(self, path: Path, at: int, content: bytes) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(content)


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> float:
        return self.now


class TwoFiles:
    """Two files of noise at a source, allocated sparse in a cache.

    Attributes:
        cache: the cache directory.
        path: of the first file in the cache, with 40 pages or as many as given, and a part of one.
        content: of each file, by its path in the cache.
        clock: of the store.
        log: lines that it logged.

    """

    def __init__(self, root: Path, pages: int = 40) -> None:
        self.cache = root / "cache"
        (root / "source").mkdir(parents=True)
        self.content: dict[Path, bytes] = {}
        self.clock = Clock()
        self.log: list[str] = []
        staged = []
        for number, size in enumerate((pages * PAGE_SIZE + 17, 3 * PAGE_SIZE)):
            path = root / "source" / f"{number}.arrow"
            path.write_bytes(random.Random(number).randbytes(size).replace(b"\0", b"\1"))
            version = file_version(fsspec.filesystem("file").info(str(path)))
            name = f"metadata/{number}.arrow"
            staged.append(StagedFile(name, name, f"file://{path}", size, version, "content", True))
            allocate(self.cache / name, size, "content")
            self.content[self.cache / name] = path.read_bytes()
        self.path = next(iter(self.content))
        self.manifest = Manifest("source", tuple(staged), True)

    @contextmanager
    def opened(self, budget: int = 1 << 30) -> Iterator[SparseFiles]:
        """Open the store with a budget for its data, in bytes; page maps have room besides."""
        budget += self.bytes_beside()
        disk = open_sparse_files(self.cache, self.manifest, budget, self.log.append, self.clock)
        yield disk
        disk.close()

    def need(self, disk: SparseFiles, start: int, stop: int, path: Path | None = None) -> bytes:
        """Need a range of a file, the first one by default, and read it while it is held."""
        path = path or self.path
        with disk.hold() as held:
            held.need({path: as_ranges([(start, stop - start)])})
            return path.read_bytes()[start:stop]

    def need_pages(self, disk: SparseFiles, first: int, stop: int) -> bytes:
        """Need pages of the first file, and read them while they are held."""
        return self.need(disk, first * PAGE_SIZE, stop * PAGE_SIZE)

    def marked(self, path: Path | None = None) -> list[int]:
        """The pages of a file, the first one by default, that hold data by its map; they are right."""
        path = path or self.path
        content, there = self.content[path], path.read_bytes()
        found = present_pages(path, len(content), "content")
        for number in found:
            assert there[page(number)] == content[page(number)], f"page {number} is marked, and wrong"
        return found

    def unmarked_data(self) -> int:
        """Number of pages with data that no map marks."""
        return sum(
            any(path.read_bytes()[page(number)])
            for path, content in self.content.items()
            for number in set(range(-(-len(content) // PAGE_SIZE))) - set(self.marked(path))
        )

    def bytes_beside(self) -> int:
        """Bytes on the disk that are not data: page maps."""
        return sum(allocated_bytes(map_path(path)) for path in self.content)
