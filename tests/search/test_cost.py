"""The laws of what a request reads and takes: what must grow, what is linear, and what was measured."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laion_assets.index.metadata_file import BatchLayout
from laion_assets.search.cost import (
    Pairwise,
    Rates,
    Shape,
    Step,
    buffer_reads,
    combine_steps,
    distinct_lists,
    list_bytes,
    lists_among,
    mean_probed_rows,
    metadata_reads,
    recall_lists,
    rows_found,
    rows_scanned,
    search_of,
    search_steps,
    together,
    total,
    touched,
)
from laion_assets.search.links import SIZES

ROWS = 65_536  # of a record batch
PAGE = 4096
TEXT = 73  # bytes of a URL or a caption
GB = 1e9


def text(size: int) -> tuple[int, int]:
    """The buffers of a text column: offsets and values."""
    return 4 * (ROWS + 1), size * ROWS


URL_AND_CAPTION = BatchLayout(ROWS, 0, (*text(TEXT), *text(TEXT)))
NSFW, SIMILARITY, LICENSE, WIDTH, HEIGHT = text(8), (8 * ROWS,), text(1), (4 * ROWS,), (4 * ROWS,)
FIVE_MORE = replace(
    URL_AND_CAPTION,
    buffers=(*URL_AND_CAPTION.buffers, *NSFW, *SIMILARITY, *LICENSE, *WIDTH, *HEIGHT),
)
LAION = Shape(5_850_000_000, 131_072, 45_300, 136, 89_264, URL_AND_CAPTION, 512_000_000, 128 << 10)
SPARSE = replace(LAION, sparse=True)
RATES = Rates(
    16, 4.0, 1.0, 1e-3, 1e-5, 6e-8, 1e-6, Pairwise(2e-5, 1e-9), Pairwise(3e-5, 1e-11), 1e-4, 1e-7, 1e-6,
    1e-6, 1e-5, 1e-9, 5e-4, 1e-9,
)  # fmt: skip

# --- what was measured at the size of LAION-5B ----------------------------------------------------


def test_64_lists_have_2_9_million_rows_and_0_4_gb():
    assert rows_scanned(LAION, 64) == pytest.approx(2.9e6, rel=0.2)
    assert list_bytes(SPARSE, 64, 0) == pytest.approx(0.39 * GB, rel=0.2)


def test_what_is_always_read_of_a_batch_is_read_once_for_all_its_rows():
    reads, size = metadata_reads(replace(LAION, layout=BatchLayout(ROWS, 600)), LAION.rows)
    assert reads == pytest.approx(89_264, rel=0.2)
    assert size == pytest.approx(0.37 * GB, rel=0.2)


def test_1000_random_styles_probe_50_343_lists_and_306_gb():
    lists = distinct_lists(LAION.lists, 64, 1000)
    assert lists == pytest.approx(50_343, rel=0.02)
    assert list_bytes(LAION, lists, 0) == pytest.approx(306 * GB, rel=0.2)


@pytest.mark.parametrize(
    ("layout", "k", "kept", "reads", "size"),
    [
        (URL_AND_CAPTION, 100_000, 36_000, 141_552, 1.01 * GB),
        (URL_AND_CAPTION, 830_000, 300_000, 1.07e6, 7.83 * GB),
        (FIVE_MORE, 830_000, 300_000, 2.38e6, 18.5 * GB),
    ],
)
def test_a_sparse_request_reads_what_was_measured(layout, k, kept, reads, size):
    shape = replace(SPARSE, layout=layout)
    whole = total(search_steps(shape, RATES, search_of(shape, 1, k, kept / k)))
    assert whole.reads == pytest.approx(reads, rel=0.2)
    assert whole.size == pytest.approx(size, rel=0.2)


def test_scattered_rows_take_4_7_page_faults_each():
    reads, size = metadata_reads(LAION, 2500)
    assert reads / 2500 == pytest.approx(4.7, rel=0.2)
    assert size == pytest.approx(reads * PAGE)


@pytest.mark.parametrize(("kept", "read"), [(36_201, 0.74 * GB), (278_103, 4.52 * GB)])
def test_metadata_in_place_reads_what_was_measured(kept, read):
    assert metadata_reads(LAION, kept)[1] == pytest.approx(read, rel=0.2)


@pytest.mark.parametrize(
    ("k", "kept", "read", "most"),
    [(100_000, 36_201, 1.19 * GB, 1.4), (830_000, 278_103, 7.13 * GB, 1.1)],
)
def test_a_request_in_place_reads_little_more_than_was_measured(k, kept, read, most):
    whole = total(search_steps(LAION, RATES, search_of(LAION, 1, k, kept / k)))
    assert read < whole.size < most * read


def test_the_check_of_the_recall_searches_a_quarter_as_many_further_lists_but_not_sparse():
    assert recall_lists(LAION, 298) == 74
    assert recall_lists(replace(LAION, lists=300), 298) == 2
    assert recall_lists(SPARSE, 298) == 0


# --- laws -----------------------------------------------------------------------------------------

few = st.floats(1, 1e6)
searches = st.tuples(st.integers(1, 2000), st.integers(1, 10**6), st.floats(0.01, 1))
shapes = st.sampled_from([LAION, SPARSE, replace(LAION, lists=1, probed_rows=5.85e9)])


@given(st.lists(st.integers(0, 10**6), min_size=1).filter(any))
def test_probed_lists_are_at_least_as_long_as_the_mean_and_no_longer_than_the_longest(sizes):
    mean = mean_probed_rows(np.array(sizes))
    assert np.mean(sizes) <= mean * (1 + 1e-9)
    assert mean <= max(sizes) * (1 + 1e-9)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_lists_of_one_length_are_probed_at_that_length(size, lists):
    assert mean_probed_rows(np.full(min(lists, 1000), size)) == pytest.approx(size)


@given(st.integers(1, 131_072), st.integers(1, 10_000))
def test_distinct_lists_are_between_those_of_one_query_and_all(nprobe, queries):
    lists = distinct_lists(LAION.lists, nprobe, queries)
    assert nprobe * (1 - 1e-9) <= lists <= min(nprobe * queries, LAION.lists) * (1 + 1e-9)
    assert lists <= distinct_lists(LAION.lists, nprobe, queries + 1) * (1 + 1e-9)


@given(st.integers(1, 2_000), st.integers(2, 500), st.floats(1, 50))
def test_the_lists_of_similar_queries_show_among_how_many_they_are_spread(nprobe, queries, spread):
    among = min(nprobe * spread, LAION.lists)
    distinct = round(distinct_lists(among, nprobe, queries))
    found = lists_among(LAION.lists, nprobe, queries, distinct)
    assert distinct_lists(found, nprobe, queries) == pytest.approx(distinct, abs=0.01)
    assert lists_among(LAION.lists, nprobe, queries, nprobe * queries) == LAION.lists


@given(few, few)
def test_visits_touch_no_more_places_than_there_are_visits_or_places(places, visits):
    found = touched(places, visits)
    assert 0 < found <= min(places, visits) * (1 + 1e-9)
    assert found <= touched(places, 2 * visits) * (1 + 1e-9)


@given(st.floats(1, 1e7), st.floats(0.001, ROWS), st.integers(0, 8))
def test_a_buffer_is_never_read_more_than_once(size, rows, gap):
    reads, pages = buffer_reads(size, ROWS, rows, gap)
    assert 0 < pages <= max(size / PAGE, 1) * (1 + 1e-9)
    assert pages <= buffer_reads(size, ROWS, 2 * rows, gap)[1] * (1 + 1e-9)
    assert pages >= buffer_reads(size, ROWS, rows, 0)[1] * (1 - 1e-9)  # merged reads bridge gaps
    assert reads <= max(pages, 1) * (1 + 1e-9)


@given(shapes, searches)
def test_a_larger_request_never_reads_or_takes_less(shape, search):
    queries, k, read = search
    here = total(search_steps(shape, RATES, search_of(shape, queries, k, read)))
    for larger in ((2 * queries, k, read), (queries, 2 * k, read), (queries, k, min(2 * read, 1))):
        more = total(search_steps(shape, RATES, search_of(shape, *larger)))
        assert more.size >= here.size * (1 - 1e-9)
        if larger[0] == queries:  # of more queries, more cores have work
            assert more.warm >= here.warm * (1 - 1e-9)
            # Staged sparse, rows that lie closer are fetched in fewer requests.
            assert more.cold >= here.cold * (1 - 1e-9) or shape.sparse
    assert here.cold >= here.warm > 0
    assert rows_found(shape, search_of(shape, queries, k, read)) <= queries * k


@given(st.integers(16, 1000))
def test_searching_and_near_duplicates_are_linear_in_the_queries(queries):
    def steps(factor: int) -> dict[str, Step]:
        return dict(search_steps(SPARSE, RATES, search_of(SPARSE, factor * queries, 830, 0.3)))

    one, three = steps(1), steps(3)
    for name in ("search", "near-duplicates", "tables"):
        assert three[name].warm == pytest.approx(3 * one[name].warm)


@pytest.mark.parametrize("shape", [LAION, SPARSE])
def test_lists_that_many_queries_share_are_decoded_once_and_compared_with_all(shape):
    rates = replace(RATES, decoded=4e-7, compared=1e-8)

    def scanning(among: float, of: Shape = shape) -> float:
        """Core-seconds for 2,000 queries, without the lists that the check of the recall scans."""
        search = replace(search_of(of, 2000, 830, 0.3), among=among)
        nothing = replace(rates, scanned=0, decoded=0, compared=0)
        all_, others = (search_steps(of, each, search)["search"].warm for each in (rates, nothing))
        sampled = 16 * rows_scanned(of, recall_lists(of, 64)) * rates.scanned
        return rates.cores * (all_ - others) - sampled

    pairs, rows = 2000 * rows_scanned(shape, 64), rows_scanned(shape, 500)
    assert scanning(500) == pytest.approx(rates.decoded * rows + rates.compared * pairs)
    assert scanning(shape.lists) == pytest.approx(rates.scanned * pairs)
    short = replace(shape, probed_rows=450, rows=58_500_000)
    assert scanning(500, short) == pytest.approx(rates.scanned * 2000 * rows_scanned(short, 64))


@given(st.floats(1, 1e4), st.floats(0, 1e-3), st.floats(0, 1e-6))
def test_the_law_of_near_duplicates_goes_through_two_measurements(rows, linear, quadratic):
    law = Pairwise(linear, quadratic)
    fitted = Pairwise.through(rows, law.seconds(rows), 2 * rows, law.seconds(2 * rows))
    assert fitted.seconds(3 * rows) == pytest.approx(law.seconds(3 * rows), rel=1e-3, abs=1e-12)


def test_the_law_is_linear_where_more_rows_take_no_longer_and_where_there_are_no_more():
    assert Pairwise.through(10, 1.0, 20, 1.0) == Pairwise(0.05, 0)
    assert Pairwise.through(10, 1.0, 10, 1.0) == Pairwise(0.1, 0)
    assert Pairwise.through(0, 0.0, 10, 1.0) == Pairwise(0.1, 0)
    assert Pairwise.through(0, 0.0, 0, 0.0) == Pairwise(0, 0)


def test_combining_compares_all_images_with_each_other():
    one, ten = (combine_steps(RATES, rows)["near-duplicates"].warm for rows in (10**6, 10**7))
    assert 10 * one < ten < 100 * one
    law = RATES.long
    assert ten == pytest.approx(law.linear * 10**7 / RATES.threads + law.quadratic * 10**14 / RATES.cores)


def test_threads_share_what_is_too_little_for_processes():
    few, more = (combine_steps(RATES, rows)["near-duplicates"].warm for rows in (SIZES.shared, 10**6))
    assert few == pytest.approx(RATES.long.seconds(SIZES.shared) / RATES.threads)
    assert more < RATES.long.seconds(10**6) / RATES.threads


def test_sparse_requests_wait_for_the_source_and_others_for_the_disk():
    search = search_of(LAION, 200, 830, 0.36)
    whole, sparse = (search_steps(shape, RATES, search)["metadata"] for shape in (LAION, SPARSE))
    assert whole.reads == 0
    assert whole.cold - whole.warm == pytest.approx(whole.size / PAGE * RATES.page)
    assert sparse.cold - sparse.warm == pytest.approx(
        sparse.reads * RATES.request + sparse.size * RATES.fetched
    )


def test_metadata_is_read_while_many_images_are_compared():
    steps = search_steps(LAION, RATES, search_of(LAION, 1, 830_000, 0.36))
    metadata, meanwhile = steps["metadata"], steps["near-duplicates"].warm
    reading = metadata.size / PAGE * RATES.page
    assert 0 < meanwhile < reading
    assert metadata.cold - metadata.warm == pytest.approx(reading - meanwhile)


def test_a_compressed_batch_is_read_whole():
    layout = BatchLayout(ROWS, 5_000_000)
    assert metadata_reads(replace(LAION, layout=layout), 10)[1] == pytest.approx(5e7, rel=0.01)
    reads, size = metadata_reads(replace(SPARSE, layout=layout), 10)
    assert (reads, size) == (pytest.approx(10, rel=0.01), pytest.approx(5e7, rel=0.01))
    assert metadata_reads(replace(LAION, batches=0), 10) == (0, 0)


def test_steps_of_the_same_name_are_added():
    one, other = {"a": Step(1, 2, 3, 4)}, {"a": Step(10, 20, 30, 40), "b": Step(100)}
    both = together(one, other)
    assert both == {"a": Step(11, 22, 33, 44), "b": Step(100)}
    assert total(both) == Step(111, 22, 33, 44)
