"""A stand-in of LAION-5B at its true apparent size, of which only what requests read is really written.

Everything about a row follows from its id: its list and its place there, its code, its texts and where
they lie. So any part of any file can be written, or checked, without the rest. Files are sparse: of the
inverted lists only some are written, of the metadata the record batches' headers and the texts of some
rows. What is not written reads as zeros.
What must not live here: anything that searches or measures.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from laion_assets.build.merge import with_lists_on_disk
from laion_assets.index import ID_SIZE, INVERTED_LISTS, METADATA_FOLDER, POPULATED_INDEX, unit
from laion_assets.index import arrow_layout as arrow
from laion_assets.io.ranges import Ranges, ranges_of

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

DIMENSION, ROTATED = 768, 896
PARTS, PART = 128, 7  # a code has a byte for each part of a rotated vector
ROW_BYTES = PARTS + ID_SIZE
BUCKET, FOLDER = "truesize", "laion"
ROUNDS = 4  # of the Feistel network

# Geometry. Squared lengths: a row is the centre of its list and a residual. Centres lie around styles,
# some nearer than others, so that seeds of one style share lists, and the order of lists matters.
OF_CENTRE, OF_RESIDUAL = 0.66, 0.34
SHARED_BY_STYLES = 0.5
SHARED_BY_STYLE = (0.32, 0.92)
SHARED_BY_SEEDS = 0.93
# Row i of a list of n rows shows image IMAGES n (i/n)^COPIES, rounded down: a few images have thousands
# of copies. Up to MOST_CHANGED bytes of a copy's code are its own, those that matter least.
IMAGES, COPIES = 0.35, 5
MOST_CHANGED = 72

BATCH = 65_536
TEXT_LENGTHS = (37, 110)  # bytes of a URL or of a caption: 73 on average
SCHEMA = pa.schema({"url": pa.string(), "caption": pa.string()})
LONGEST = "of a thing " * 10


@dataclass(frozen=True)
class Recipe:
    """Everything the data follows from.

    Attributes:
        sides: the rows are as many as the numbers in a rectangle of this height and width.
        lists: inverted lists.
        styles: around which their centres lie.
        files: of metadata.

    """

    sides: tuple[int, int] = (78_000, 75_000)  # 5.85e9
    lists: int = 131_072
    styles: int = 64
    files: int = 3

    @property
    def rows(self) -> int:
        """Of the index."""
        return self.sides[0] * self.sides[1]

    def rng(self, *purpose: int) -> np.random.Generator:
        """A generator of its own for each purpose."""
        return np.random.default_rng([self.lists, *purpose])


LAION_5B = Recipe()
QUICK = Recipe(sides=(9_750, 9_375), lists=16_384, styles=8)  # 1/64 of the rows, lists 1/8 as long


# --- where vectors lie ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """Centres, seeds and codewords, in the space of rotated vectors."""

    recipe: Recipe

    @cached_property
    def spread(self) -> Floats:
        """How far vectors differ along each axis: a few matter much, many a little, as with CLIP."""
        scale = np.repeat(np.arange(1, PARTS + 1), PART) ** -0.5
        return (scale / np.linalg.norm(scale)).astype(np.float32)

    @cached_property
    def rotation(self) -> Floats:
        """Orthonormal columns: what stands for OPQ, (rotated, dimension)."""
        random = self.recipe.rng(0).standard_normal((ROTATED, DIMENSION), np.float32)
        return np.linalg.qr(random)[0]

    @cached_property
    def codewords(self) -> Floats:
        """(part, code, coordinate), longer by what decoding loses: all outside the rotation's range."""
        random = self.recipe.rng(1).standard_normal((PARTS, 256, PART), np.float32)
        length = np.sqrt(OF_RESIDUAL * ROTATED / DIMENSION)
        return random * (length * self.spread).reshape(PARTS, 1, PART).astype(np.float32)

    @cached_property
    def styles(self) -> Floats:
        """(styles, rotated) unit vectors, in the rotation's range."""
        random = self.recipe.rng(2)
        everything = self._differences(1, random)
        return self._around(everything, SHARED_BY_STYLES, self._differences(self.recipe.styles, random))

    def centres(self) -> Floats:
        """The centres of all lists; list n is of style n modulo the styles."""
        each = self.recipe.lists // self.recipe.styles
        found = np.empty((each, self.recipe.styles, ROTATED), np.float32)
        for style, direction in enumerate(self.styles):
            random = self.recipe.rng(3, style)
            least, most = SHARED_BY_STYLE
            shared = most - (most - least) * np.sqrt(random.random((each, 1), np.float32))  # few are near
            found[:, style] = self._around(direction, shared, self._differences(each, random))
        found *= np.float32(np.sqrt(OF_CENTRE))
        return found.reshape(-1, ROTATED)

    def seeds(self, count: int) -> Floats:
        """Images that are not in the index, all of one style: (count, dimension) unit vectors."""
        random = self.recipe.rng(4)
        centres = self._around(self.styles[0], SHARED_BY_SEEDS, self._differences(count, random))
        images = self._around(centres, OF_CENTRE, self._differences(count, random))
        return unit(images @ self.rotation)

    def _differences(self, count: int, random: np.random.Generator) -> Floats:
        differences = random.standard_normal((count, ROTATED), np.float32) * self.spread
        return unit(differences @ self.rotation @ self.rotation.T)

    def _around(self, middle: Floats, shared: float | Floats, differences: Floats) -> Floats:
        """Unit vectors that share so much with the middle, as a squared length."""
        return unit((np.sqrt(shared) * middle + np.sqrt(1 - shared) * differences).astype(np.float32))


# --- which rows are in which list -----------------------------------------------------------------


@dataclass(frozen=True)
class Lists:
    """The rows of every list: their ids and codes."""

    recipe: Recipe

    @cached_property
    def edges(self) -> Ids:
        """The place of each list's first row, and of the last one's end; a few lists are very long."""
        weights = self.recipe.rng(5).lognormal(sigma=0.5, size=self.recipe.lists)
        shares = np.concatenate([[0], np.cumsum(weights)]) / weights.sum()
        return np.round(shares * self.recipe.rows).astype(np.int64)

    @property
    def sizes(self) -> Ids:
        """Rows of each list."""
        return np.diff(self.edges)

    def of(self, ids: Ids) -> Ids:
        """The list of each id."""
        return np.searchsorted(self.edges, self._places_of(ids), side="right") - 1

    def content(self, number: int) -> tuple[Bytes, Ids]:
        """Codes and ids of a list, ascending by id."""
        places = np.arange(*self.edges[number : number + 2])
        rows, size = places - places[0], len(places)
        random = self.recipe.rng(6, number)
        own = random.integers(256, size=(size, PARTS), dtype=np.uint8)
        image = (IMAGES * size * (rows / size) ** COPIES).astype(np.int64)
        changed = random.integers(MOST_CHANGED, size=(size, 1))
        codes = np.where(np.arange(PARTS) < PARTS - changed, own[image], own)
        ids = self._ids_at(places)
        order = np.argsort(ids)
        return codes[order], ids[order]

    def _ids_at(self, places: Ids) -> Ids:
        """A Feistel network: a permutation of the rows that scatters each list over all ids."""
        high, wide = self.recipe.sides
        left, right = np.divmod(places, wide)
        for turn in range(ROUNDS):
            if turn % 2:
                right = (right + hashed(left, turn)) % wide
            else:
                left = (left + hashed(right, turn)) % high
        return left * wide + right

    def _places_of(self, ids: Ids) -> Ids:
        """The inverse of `_ids_at`."""
        high, wide = self.recipe.sides
        left, right = np.divmod(ids, wide)
        for turn in reversed(range(ROUNDS)):
            if turn % 2:
                right = (right - hashed(left, turn)) % wide
            else:
                left = (left - hashed(right, turn)) % high
        return left * wide + right


def hashed(numbers: Ids, key: int) -> Ids:
    """A number from 0 to 2^62 - 1 for each: the finalizer of splitmix64."""
    mixed = numbers.astype(np.uint64) + np.uint64((key + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(2)).astype(np.int64)


# --- texts, and where they lie --------------------------------------------------------------------


@dataclass(frozen=True)
class RecordBatch:
    """What all record batches of as many rows have in common, for their texts are equally long.

    Attributes:
        header: its bytes.
        size: of header and body.
        offsets: for each column the first byte of its offsets, from the beginning of the header.
        texts: the same for its texts.
        edges: for each column where each row's text begins, and where the last ends.

    """

    header: bytes
    size: int
    offsets: tuple[int, ...]
    texts: tuple[int, ...]
    edges: tuple[Ids, ...]


@cache
def record_batch(rows: int) -> RecordBatch:
    """The layout of a batch, as Arrow writes it."""
    lengths = np.random.default_rng(rows).integers(*TEXT_LENGTHS, size=(2, rows))
    edges = tuple(np.concatenate([[0], np.cumsum(column)]) for column in lengths)
    columns = [
        pa.StringArray.from_buffers(
            rows, pa.py_buffer(edge.astype(np.int32)), pa.py_buffer(bytes(edge[-1]))
        )
        for edge in edges
    ]
    written = arrow_file([pa.record_batch(columns, schema=SCHEMA)])
    first, body = table_of_blocks(written).headers[0]
    stop = table_of_blocks(written).bodies[0, 1]
    read = pa.ipc.open_file(pa.BufferReader(written)).get_batch(0)
    places = [
        [buffer.address - written.address - first for buffer in c.buffers()[1:]] for c in read.columns
    ]
    offsets, texts = zip(*places, strict=True)
    return RecordBatch(bytes(written[first:body]), stop - first, offsets, texts, edges)


def arrow_file(batches: Iterable[pa.RecordBatch]) -> pa.Buffer:
    """What Arrow writes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def table_of_blocks(written: pa.Buffer) -> arrow.Blocks:
    """Where the batches of a file are."""
    tail = bytes(written[written.size - arrow.TAIL :])
    return arrow.blocks(bytes(written[int(arrow.footer(written.size, tail)[0, 0]) :]))


def as_blocks(starts: Ids, headers: Ids, bodies: Ids) -> bytes:
    """The footer's table of batches."""
    blocks = np.zeros(len(starts), arrow.FOOTER_BLOCK)
    blocks["offset"], blocks["header"], blocks["body"] = starts, headers, bodies
    return blocks.tobytes()


@dataclass(frozen=True)
class Texts:
    """URLs and captions: what they say, and where they lie."""

    recipe: Recipe

    @property
    def batches(self) -> int:
        """Of all files."""
        return -(-self.recipe.rows // BATCH)

    @property
    def batches_of_a_file(self) -> int:
        """But for the last one, which may have fewer."""
        return -(-self.batches // self.recipe.files)

    def of(self, ids: Ids) -> pa.Table:
        """The texts of some rows."""
        ends = self._lengths(ids)
        return pa.table(
            [[text[:end] for text, end in zip(texts, column, strict=True)] for texts, column in
             zip((map(url, ids.tolist()), map(caption, ids.tolist())), ends.T.tolist(), strict=True)],
            schema=SCHEMA,
        )  # fmt: skip

    def _lengths(self, ids: Ids) -> Ids:
        """(n, 2): bytes of each row's URL and caption."""
        found = np.empty((len(ids), 2), np.int64)
        for some, rows, batch in self._by_batch_length(ids):
            found[some] = np.stack([edge[rows + 1] - edge[rows] for edge in batch.edges], axis=1)
        return found

    def places(self, ids: Ids) -> tuple[Ids, Ids, Ids]:
        """Where rows lie: the file of each, its offsets and its texts, a column of the table each.

        Returns:
            (n,) files, (n, 2, 2) starts and stops of two offsets, (n, 2, 2) those of the text.

        """
        file, number = np.divmod(ids // BATCH, self.batches_of_a_file)
        offsets, texts = np.empty((2, len(ids), 2, 2), np.int64)
        for some, rows, batch in self._by_batch_length(ids):
            start = self.first_batch + number[some] * record_batch(BATCH).size
            for column, edge in enumerate(batch.edges):
                at = start + batch.offsets[column] + rows * 4
                offsets[some, column] = np.stack([at, at + 8], axis=1)
                at = start + batch.texts[column]
                texts[some, column] = at[:, None] + np.stack([edge[rows], edge[rows + 1]], axis=1)
        return file, offsets, texts

    def ranges(self, ids: Ids, file: int) -> Ranges:
        """The bytes of one file that hold rows."""
        found, *places = self.places(ids)
        spans = np.concatenate([each[found == file].reshape(-1, 2) for each in places])
        return ranges_of(spans[:, 0], spans[:, 1])

    def _by_batch_length(self, ids: Ids) -> Iterator[tuple[NDArray[np.bool_], Ids, RecordBatch]]:
        """Yield which ids are in batches of one length, their rows there, and the layout."""
        last = ids // BATCH == self.batches - 1
        for some, length in ((~last, BATCH), (last, self.recipe.rows - (self.batches - 1) * BATCH)):
            if some.any():
                yield some, ids[some] % BATCH, record_batch(length)

    @cached_property
    def first_batch(self) -> int:
        """Where the first batch of each file begins."""
        return int(table_of_blocks(arrow_file([pa.record_batch([[], []], schema=SCHEMA)])).headers[0, 0])

    def header_ranges(self, file: int) -> Ids:
        """(n, 2): starts and stops of the headers of a file."""
        starts, headers, _ = self._blocks(file)
        return np.stack([starts, starts + headers], axis=1)

    def _blocks(self, file: int) -> tuple[Ids, Ids, Ids]:
        """Starts of batches, and the lengths of their headers and bodies."""
        numbers = np.arange(
            file * self.batches_of_a_file, min((file + 1) * self.batches_of_a_file, self.batches)
        )
        layouts = [
            record_batch(min(BATCH, self.recipe.rows - number * BATCH)) for number in numbers.tolist()
        ]
        sizes = np.array([layout.size for layout in layouts])
        headers = np.array([len(layout.header) for layout in layouts])
        return self.first_batch + np.cumsum(sizes) - sizes, headers, sizes - headers

    def write_frame(self, file: int, path: Path) -> None:
        """Write a file without its texts: the schema, all headers, and the footer."""
        starts, headers, bodies = self._blocks(file)
        empty = pa.record_batch([[], []], schema=SCHEMA)
        small = arrow_file([empty] * len(starts))
        blocks = table_of_blocks(small)
        lengths = (blocks.headers[:, 1] - blocks.headers[:, 0], blocks.bodies[:, 1] - blocks.bodies[:, 0])
        tail = bytes(small[int(blocks.bodies[-1, 1]) :])
        old, new = as_blocks(blocks.headers[:, 0], *lengths), as_blocks(starts, headers, bodies)
        assert tail.count(old) == 1
        with path.open("wb") as out:
            out.write(small[: self.first_batch])
            header_of = {length: record_batch(length).header for length in (BATCH, self._last_length)}
            last = file == self.recipe.files - 1
            for number, start in enumerate(starts.tolist()):
                length = self._last_length if last and number == len(starts) - 1 else BATCH
                os.pwrite(out.fileno(), header_of[length], start)
            out.seek(int(starts[-1] + headers[-1] + bodies[-1]))
            out.write(tail.replace(old, new))

    @property
    def _last_length(self) -> int:
        return self.recipe.rows - (self.batches - 1) * BATCH

    def write(self, ids: Ids, paths: list[Path]) -> None:
        """Write the texts of rows, and the offsets that lead to them."""
        texts = self.of(ids)
        file, offsets, places = self.places(ids)
        edges = np.empty((len(ids), 2, 2), np.int32)
        for some, rows, batch in self._by_batch_length(ids):
            for column, edge in enumerate(batch.edges):
                edges[some, column] = np.stack([edge[rows], edge[rows + 1]], axis=1)
        for number, path in enumerate(paths):
            with path.open("r+b") as out:
                for column, name in enumerate(SCHEMA.names):
                    mine = np.flatnonzero(file == number)
                    some = texts[name].take(pa.array(mine)).to_pylist()
                    for row, text in zip(mine.tolist(), some, strict=True):
                        os.pwrite(
                            out.fileno(), edges[row, column].tobytes(), int(offsets[row, column, 0])
                        )
                        os.pwrite(out.fileno(), text.encode(), int(places[row, column, 0]))


def url(number: int) -> str:
    """As long as any is; it is cut."""
    return f"https://example.org/{number:010}/" + LONGEST.replace(" ", "-")


def caption(number: int) -> str:
    """As long as any is; it is cut."""
    return f"Picture {number} " + LONGEST


# --- the files ------------------------------------------------------------------------------------


class StandIn:
    """The folder of the data: the frame of all files, and what was written of them so far.

    Args:
        place: a folder for everything.
        recipe: everything follows from it.

    Attributes:
        buckets: what a server of buckets serves: a folder for each.
        folder: of the index, in a bucket.
        notes: a folder beside them, also for others.

    """

    def __init__(self, place: Path, recipe: Recipe) -> None:
        self.recipe, self.space, self.lists, self.texts = (
            recipe,
            Space(recipe),
            Lists(recipe),
            Texts(recipe),
        )
        self.buckets, self.notes = place / "buckets", place / "notes"
        self.folder = self.buckets / BUCKET / FOLDER
        self.index, self.ivfdata = self.folder / POPULATED_INDEX, self.folder / INVERTED_LISTS
        self.metadata = [self.folder / METADATA_FOLDER / f"{n}.arrow" for n in range(recipe.files)]

    @property
    def paths(self) -> list[Path]:
        """All files."""
        return [self.index, self.ivfdata, *self.metadata]

    def create(self) -> None:
        """Write what every request reads, unless it is there."""
        for path in (*self.paths, self.notes / "x"):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not self.ivfdata.exists():
            with self.ivfdata.open("wb") as file:
                file.truncate(self.recipe.rows * ROW_BYTES)
        for number, path in enumerate(self.metadata):
            written_once(path, lambda at, number=number: self.texts.write_frame(number, at))
        written_once(self.index, self._write_index)

    def _write_index(self, path: Path) -> None:
        """Make an index that is not trained: what training finds is drawn."""
        key = f"OPQ{PARTS}_{ROTATED},IVF{self.recipe.lists}_HNSW32,PQ{PARTS}x8"
        index = faiss.index_factory(DIMENSION, key, faiss.METRIC_INNER_PRODUCT)
        opq = faiss.downcast_VectorTransform(index.chain.at(0))
        faiss.copy_array_to_vector(self.space.rotation.ravel(), opq.A)
        ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
        faiss.copy_array_to_vector(self.space.codewords.ravel(), ivf.pq.centroids)
        ivf.quantizer.add(self.space.centres())  # with the usual efConstruction of 40, it takes minutes
        opq.is_trained = ivf.is_trained = index.is_trained = True
        made = with_lists_on_disk(index, self.lists.sizes, PARTS, self.ivfdata.name)
        faiss.write_index(made, str(path))

    def write_lists(self, numbers: Ids) -> int:
        """Write the lists that are not there yet; returns how many these are."""
        missing = np.setdiff1d(numbers, self._written("lists"))
        with self.ivfdata.open("r+b") as file, ThreadPoolExecutor(2) as pool:

            def write(number: int) -> None:
                codes, ids = self.lists.content(number)
                start = int(self.lists.edges[number]) * ROW_BYTES
                os.pwrite(file.fileno(), codes, start)
                os.pwrite(file.fileno(), ids, start + codes.nbytes)

            list(pool.map(write, missing.tolist()))
        self._note("lists", missing)
        return len(missing)

    def write_rows(self, ids: Ids) -> int:
        """Write the texts that are not there yet; returns of how many rows."""
        missing = np.setdiff1d(ids, self._written("rows"))
        self.texts.write(missing, self.metadata)
        self._note("rows", missing)
        return len(missing)

    def list_ranges(self, numbers: Ids) -> Ranges:
        """The bytes of lists."""
        return ranges_of(*(self.lists.edges[numbers + end] * ROW_BYTES for end in (0, 1)))

    def _written(self, what: str) -> Ids:
        path = self.notes / f"{what}.npy"
        return np.load(path) if path.exists() else np.empty(0, np.int64)

    def _note(self, what: str, numbers: Ids) -> None:
        """Remember what was written; it is written again if this is not reached."""
        np.save(self.notes / f"{what}.npy", np.union1d(self._written(what), numbers))


def written_once(path: Path, write: object) -> None:
    """Write a file under another name, and rename it."""
    if path.exists():
        return
    unfinished = path.with_name(f".{path.name}")
    write(unfinished)  # type: ignore[operator]
    unfinished.replace(path)
