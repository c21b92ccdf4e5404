"""Compare many different images in stripes, which may run at the same time, each by itself.

A stripe is a share of the product of all images with all images, see `caps.Comparison`. The plan of the
comparison is handed over as a table: the codes of the images, in the order in which `combined` numbers
them, with two attachments, their decoder and the plan. Each stripe returns links. The union of the links
of all stripes has the components that comparing all images at once would find.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa

from laion_assets.index.decoder import Decoder
from laion_assets.index.vectors import Coded, held
from laion_assets.io.arrays import Bytes, Ids
from laion_assets.io.spill import spilled
from laion_assets.io.tables import StoredTable, Written, code_bytes, fixed_size_binary, new_table
from laion_assets.search.caps import Comparison, find_links_of_stripe, plan_comparison
from laion_assets.search.combined import (
    COMBINED_ROWS,
    DECODER,
    HELD_VECTORS,
    Stored,
    decoder_of,
    differing,
    images_of,
    read_numbers,
    urls_and_codes,
)
from laion_assets.search.links import SIZES, Links
from laion_assets.search.needs import Needs, stripes_of

PLAN = "plan"  # attachment of a table of codes
LINKS = pa.schema({"row": pa.int64(), "label": pa.int64()})


def stripes_for(knn: StoredTable, centroid: StoredTable) -> int:
    """Return in how many stripes to compare the different images of two URL sets; at least 1."""
    if stripes_of(len(knn) + len(centroid)) == 1:  # different images are at most as many
        return 1
    ids = [batch["id"].to_numpy() for table in (knn, centroid) for batch in table.batches(["id"])]
    return stripes_of(len(np.unique(np.concatenate(ids))))


def write_plan(
    knn: Stored, centroid: Stored, threshold: float, uri: str, log: Callable[[str], None]
) -> Written:
    """Plan a comparison, and write what the stripes need.

    Args:
        knn: rows found around each seed.
        centroid: rows found around the centroid.
        threshold: cosine above which two images are near-duplicates, below 1.
        uri: location of the table.
        log: called with what the comparison takes, before it begins.

    Raises:
        InputError: this machine has too little memory or disk; nothing was compared yet.

    """
    rows = read_numbers(knn, centroid)
    representative, _ = images_of(rows)
    needs = Needs.of(len(representative), len(rows.ids))
    needs.check()
    log(f"{needs}, in {needs.stripes:,} stripes")
    del rows
    _, codes = urls_and_codes(knn, centroid, representative, with_codes=True)
    decoder = decoder_of(knn, centroid)
    links = _links(codes, decoder, threshold)
    plan = plan_comparison(links)[0]
    with new_table(uri, pa.schema({"code": pa.binary(codes.shape[1])})) as table:
        for start in range(0, len(codes), COMBINED_ROWS):
            some = fixed_size_binary(codes[start : start + COMBINED_ROWS])
            table.write(pa.RecordBatch.from_arrays([some], ["code"]))
        table.attach(DECODER, decoder.to_bytes())
        table.attach(PLAN, _packed(plan, links.forest.labels()))
    return table.written()


def compare_stripe(planned: StoredTable, threshold: float, stripe: tuple[int, int], uri: str) -> Written:
    """Write the links of one stripe; those of the first include the links that the plan found.

    Args:
        planned: what `write_plan` wrote.
        threshold: the one of the plan.
        stripe: its number, from 0, and the number of all.
        uri: location of the table of links.

    Raises:
        InputError: this machine has too little memory or disk.

    """
    Needs.of(len(planned)).check()
    plan, before = _unpacked(planned.attachment(PLAN))
    links = _links(_codes(planned), Decoder.from_bytes(planned.attachment(DECODER)), threshold)
    everything = np.arange(len(planned))
    links.forest.connect(everything, before)
    find_links_of_stripe(links, plan, stripe)
    found = differing(before if stripe[0] else everything, links.forest.labels())
    with new_table(uri, LINKS) as table:
        table.write(pa.RecordBatch.from_arrays([pa.array(each) for each in found], schema=LINKS))
    return table.written()


def links_in(tables: Iterable[StoredTable]) -> Iterator[tuple[Ids, Ids]]:
    """Read the links of stripes."""
    for table in tables:
        for batch in table.batches():
            yield batch["row"].to_numpy(), batch["label"].to_numpy()


def _links(codes: Bytes, decoder: Decoder, threshold: float) -> Links:
    return Links(held(Coded(codes, decoder), HELD_VECTORS), threshold, SIZES)


def _codes(planned: StoredTable) -> Bytes:
    codes = spilled((len(planned), planned.schema.field("code").type.byte_width), np.uint8)
    start = 0
    for batch in planned.batches(["code"]):
        codes[start : start + len(batch)] = code_bytes(pa.chunked_array([batch["code"]]))
        start += len(batch)
    return codes


def _packed(plan: Comparison, labels: Ids) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, allow_pickle=False, labels=labels, **vars(plan))
    return sink.getvalue()


def _unpacked(content: bytes) -> tuple[Comparison, Ids]:
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    labels = arrays.pop("labels")
    return Comparison(**arrays), labels
