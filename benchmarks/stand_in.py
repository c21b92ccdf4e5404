"""A stand-in of LAION-5B at its true apparent size, of which only what requests read is really written.

Everything about a row follows from its id: its list and its place there, its code, its texts and where
they lie. So any part of any file can be written, or checked, without the rest. Files are sparse: of the
inverted lists only some are written, of the metadata the record batches' headers and the texts of some
rows. What is not written reads as zeros.
What must not live here: anything that searches or measures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
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
ROUNDS = 4  # of the Feistel network, even

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
TWO_OFFSETS = 8  # bytes
SCHEMA = pa.schema({"url": pa.string(), "caption": pa.string()})
EMPTY = pa.record_batch([[], []], schema=SCHEMA)
LONGEST = "of a thing " * 10


@dataclass(frozen=True)
class Recipe:
    """Everything the data follows from.

    Attributes:
        batches: record batches of metadata, of `BATCH` rows each.
        lists: inverted lists.
        styles: around which their centres lie.
        files: of metadata.

    """

    batches: int = 89_264
    lists: int = 131_072
    styles: int = 64
    files: int = 3

    @property
    def rows(self) -> int:
        """Of the index."""
        return self.batches * BATCH

    def rng(self, *purpose: int) -> np.random.Generator:
        """A generator of its own for each purpose."""
        return np.random.default_rng([self.lists, *purpose])


LAION_5B = Recipe()
QUICK = Recipe(batches=1_395, lists=16_384, styles=8)  # 1/64 of the rows, lists 1/8 as long


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
        return self._seeds(0, count)

    def seeds_of_all_styles(self, each: int) -> Floats:
        """Some of each style, in random order: (styles * each, dimension) unit vectors."""
        seeds = [self._seeds(style, each) for style in range(self.recipe.styles)]
        return self.recipe.rng(7).permutation(np.concatenate(seeds))

    def _seeds(self, style: int, count: int) -> Floats:
        random = self.recipe.rng(4, style) if style else self.recipe.rng(4)
        centres = self._around(self.styles[style], SHARED_BY_SEEDS, self._differences(count, random))
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
        """A Feistel network: a permutation of the rows that scatters each list over all batches."""
        batch, row = np.divmod(places, BATCH)
        for key in range(0, ROUNDS, 2):
            batch = (batch + hashed(row, key)) % self.recipe.batches
            row = (row + hashed(batch, key + 1)) % BATCH
        return batch * BATCH + row

    def _places_of(self, ids: Ids) -> Ids:
        """The inverse of `_ids_at`."""
        batch, row = np.divmod(ids, BATCH)
        for key in reversed(range(0, ROUNDS, 2)):
            row = (row - hashed(batch, key + 1)) % BATCH
            batch = (batch - hashed(row, key)) % self.recipe.batches
        return batch * BATCH + row


def hashed(numbers: Ids, key: int) -> Ids:
    """A number from 0 to 2^62 - 1 for each: the finalizer of splitmix64."""
    mixed = numbers.astype(np.uint64) + np.uint64((key + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(2)).astype(np.int64)


# --- texts, and where they lie --------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What all record batches have in common, for row i of one has texts as long as row i of any other.

    Attributes:
        header: its bytes.
        size: of header and body.
        offsets: (2,) where the offsets of URL and caption begin, from the beginning of the header.
        texts: (2,) where the texts themselves begin.
        edges: (2, rows + 1) where each row's text begins among these, and where the last ends.

    """

    header: bytes
    size: int
    offsets: Ids
    texts: Ids
    edges: Ids


@cache
def layout() -> Layout:
    """Let Arrow write a batch, and see where everything is."""
    lengths = np.random.default_rng(0).integers(*TEXT_LENGTHS, size=(2, BATCH))
    edges = np.pad(np.cumsum(lengths, axis=1), ((0, 0), (1, 0)))
    columns = [
        pa.StringArray.from_buffers(
            BATCH, pa.py_buffer(some.astype(np.int32)), pa.py_buffer(bytes(some[-1]))
        )
        for some in edges
    ]
    written = arrow_file([pa.record_batch(columns, schema=SCHEMA)])
    found = blocks_of(written)
    (start, body), (_, stop) = found.headers[0].tolist(), found.bodies[0].tolist()
    read = pa.ipc.open_file(pa.BufferReader(written)).get_batch(0)
    buffers = np.array([[buffer.address for buffer in column.buffers()[1:]] for column in read.columns])
    offsets, texts = (buffers - written.address - start).T
    return Layout(bytes(written[start:body]), stop - start, offsets, texts, edges)


def arrow_file(batches: Iterable[pa.RecordBatch]) -> pa.Buffer:
    """What Arrow writes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def blocks_of(written: pa.Buffer) -> arrow.Blocks:
    """Where the batches of a file are, by its footer."""
    tail = bytes(written[written.size - arrow.TAIL :])
    footer = bytes(written[int(arrow.footer(written.size, tail)[0, 0]) :])
    return arrow.blocks(footer, written.size)


def as_in_footer(headers: Ids, bodies: Ids) -> bytes:
    """Starts and stops of batches, (n, 2), as a footer states them."""
    blocks = np.zeros(len(headers), arrow.FOOTER_BLOCK)
    blocks["offset"] = headers[:, 0]
    blocks["header"], blocks["body"] = (stops - starts for starts, stops in (headers.T, bodies.T))
    return blocks.tobytes()


@dataclass(frozen=True)
class Texts:
    """URLs and captions: what they say, and where they lie."""

    recipe: Recipe

    @property
    def batches_of_a_file(self) -> int:
        """But for the last one, which may have fewer."""
        return -(-self.recipe.batches // self.recipe.files)

    @cached_property
    def first_batch(self) -> int:
        """Where it begins, in every file."""
        return int(blocks_of(arrow_file([EMPTY])).headers[0, 0])

    def of(self, ids: Ids) -> pa.Table:
        """The texts of some rows."""
        lengths = np.diff(layout().edges)[:, ids % BATCH].tolist()
        columns = [map(url, ids.tolist()), map(caption, ids.tolist())]
        cut = [[t[:n] for t, n in zip(*both, strict=True)] for both in zip(columns, lengths, strict=True)]
        return pa.table(cut, schema=SCHEMA)

    def places(self, ids: Ids) -> tuple[Ids, Ids, Ids, Ids]:
        """Where URL and caption of rows lie.

        Returns:
            (n,) the file of each row; (n, 2) where its offsets begin, of which two are read; (n, 2)
            starts of its texts; (n, 2) their stops.

        """
        number, row = np.divmod(ids, BATCH)
        file, number = np.divmod(number, self.batches_of_a_file)
        batch = (self.first_batch + number * layout().size)[:, None]
        edges = layout().edges.T
        texts = batch + layout().texts
        return (
            file,
            batch + layout().offsets + 4 * row[:, None],
            texts + edges[row],
            texts + edges[row + 1],
        )

    def ranges(self, ids: Ids, file: int) -> Ranges:
        """The bytes of one file that taking rows reads."""
        of, offsets, starts, stops = self.places(ids)
        some = of == file
        starts = np.concatenate([offsets[some], starts[some]]).ravel()
        return ranges_of(starts, np.concatenate([offsets[some] + TWO_OFFSETS, stops[some]]).ravel())

    def write_frame(self, file: int, path: Path) -> None:
        """Write a file without its texts: the schema, all headers, and the footer.

        The footer is that of as many empty batches, with other places.
        """
        first = file * self.batches_of_a_file
        count = min(self.batches_of_a_file, self.recipe.batches - first)
        small = arrow_file([EMPTY] * count)
        before = blocks_of(small)
        starts = self.first_batch + np.arange(count) * layout().size
        edges = np.stack([starts, starts + len(layout().header), starts + layout().size], axis=1)
        ending = bytes(small[int(before.bodies[-1, 1]) :])
        old = as_in_footer(before.headers, before.bodies)
        assert ending.count(old) == 1
        with path.open("wb") as out:
            out.write(small[: self.first_batch])
            for start in starts.tolist():
                os.pwrite(out.fileno(), layout().header, start)
            out.seek(int(edges[-1, 2]))
            out.write(ending.replace(old, as_in_footer(edges[:, :2], edges[:, 1:])))

    def write(self, ids: Ids, paths: Sequence[Path]) -> None:
        """Write the texts of rows, and the offsets that lead to them."""
        columns = [column.to_pylist() for column in self.of(ids).columns]
        file, *places = self.places(ids)
        edges = layout().edges[:, ids % BATCH + np.arange(2)[:, None]].astype(np.int32)
        for number, path in enumerate(paths):
            mine = np.flatnonzero(file == number).tolist()
            with path.open("r+b", buffering=0) as out:
                for column, texts in enumerate(columns):
                    offsets, starts, _ = (each[:, column].tolist() for each in places)
                    for row in mine:
                        os.pwrite(out.fileno(), edges[column, :, row].tobytes(), offsets[row])
                        os.pwrite(out.fileno(), texts[row].encode(), starts[row])


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
        self.recipe = recipe
        self.space, self.lists, self.texts = Space(recipe), Lists(recipe), Texts(recipe)
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
            written_once(path, partial(self.texts.write_frame, number))
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


def written_once(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under another name, and rename it."""
    if path.exists():
        return
    unfinished = path.with_name(f".{path.name}")
    write(unfinished)
    unfinished.replace(path)
