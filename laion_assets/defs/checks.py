"""Asset checks. Each description says what is checked, how severe a failure is, and the remedy.

Checks share the asset's step: a separate op would start another pod and reopen the index. Three checks
block downstream assets, because continuing would waste hours or produce a wrong table. `search.audit`
does the measuring.

Checks are partitioned by seed set, and a run does not announce them, see `announcements`. So a check
fails in the UI only if a set that exists now was measured and failed.

Dagster's concept: https://docs.dagster.io/guides/test/asset-checks
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa

from laion_assets.build import Built
from laion_assets.defs.drawing.markup import plain
from laion_assets.defs.partitions import seed_sets
from laion_assets.defs.settings import ResolvedSettings
from laion_assets.defs.terminal import count
from laion_assets.index.decoder import Decoder
from laion_assets.index.vectors import Coded
from laion_assets.io.arrays import Floats
from laion_assets.io.tables import StoredTable, code_bytes
from laion_assets.search import audit
from laion_assets.search.block_list import BlockListMatches
from laion_assets.search.combined import DECODER
from laion_assets.search.liveness import SAMPLE, Liveness
from laion_assets.search.sizing import EXPECT_ALIVE
from laion_assets.staging import OpenIndex, sample_damage

WARN, ERROR = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR
SAMPLED_BLOCKS = 256
COHERENT = 0.1  # mean cosine of two seeds; unrelated vectors have 0. Not calibrated on CLIP
ROWS_COMPARED = 1 << 16  # number of first rows of a table that are searched for near-duplicates
ONLY_A_PART = "only a part of the index is on the disk"
SEARCHES = ("knn_urls", "centroid_urls")
WITHOUT_SEED_SETS = ("laion_index", "staged_laion_index")
FOUND_BY_PROBING_MORE = 0.05  # most of the best rows that the default nprobe may miss
DIGITS = 4  # of a figure in the UI
USABLE = 0.99  # share of the rows of a built index

Results = Iterator[dg.AssetCheckResult]


def outputs_with(asset: str, specs: Iterable[dg.AssetCheckSpec]) -> dict[str, dg.Out]:
    """Return the outputs of the last step of a graph: the asset, and its checks."""
    names = ["result", *(f"{asset}_{spec.name}" for spec in specs)]
    return {name: dg.Out(dg.Nothing) for name in names}


def _spec(asset: str, name: str, description: str, *, blocking: bool = False) -> dg.AssetCheckSpec:
    with warnings.catch_warnings():
        # Partitioned checks are new in Dagster. Without partitions, the last run would decide for all
        # seed sets.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return dg.AssetCheckSpec(
            name,
            asset=asset,
            description=description,
            blocking=blocking,
            partitions_def=None if asset in WITHOUT_SEED_SETS else seed_sets,
        )


def _specs(asset: str) -> list[dg.AssetCheckSpec]:
    return [spec for spec in _ALL if spec.asset_key.to_user_string() == asset]


_SEARCH = [
    spec
    for asset in SEARCHES
    for spec in (
        _spec(
            asset,
            "similarity_falls_with_rank",
            "Within a query, similarity falls as rank rises. An error that blocks: combining relies on "
            "ranks and would keep the wrong rows. Remedy: materialize again; if it fails again, restage "
            "the index.",
            blocking=True,
        ),
        _spec(
            asset,
            "similarity_is_in_range",
            "Similarities are inner products of unit vectors, so at most slightly above 1. A warning. "
            "Remedy: build the index from vectors of length 1; otherwise long vectors outrank near ones.",
        ),
        _spec(
            asset,
            "block_list_matches",
            "At least one entry of the block list matches: an id is a row of the index, or a URL or host "
            "blocked a row of this request. Passes without a block list. A warning: the list may be that "
            "of another index, or name its images in another way. Remedy: compare its entries with the "
            "ids and URLs in this table; none is needed for a short list of images of another style.",
        ),
    )
]
_URL_SETS = [
    spec
    for asset in (*SEARCHES, "combined_urls")
    for spec in (
        _spec(
            asset,
            "no_near_duplicates_left",
            f"None of {audit.ANCHORS} sampled rows is a near-duplicate of one of the first "
            f"{ROWS_COMPARED:,} rows"
            + (" found for the same query" if asset in SEARCHES else "")
            + ". An error that blocks nothing: the rows are right, but too many. Remedy: report it; "
            "until it is fixed, a lower dedup_threshold removes more.",
        ),
    )
]
_ALL = [
    _spec(
        "laion_index",
        "recall_is_sufficient",
        "A search finds at least LAION_MIN_RECALL of the 100 best rows by the raw vectors. Queries are "
        "rows that the index was not trained on. A warning. Remedy: allow more bytes per row "
        "(LAION_BYTES_PER_ROW) or set another LAION_INDEX_KEY; either rebuilds the index.",
    ),
    _spec(
        "laion_index",
        "nprobe_is_sufficient",
        f"Probing more lists than a search for 1,000 rows chooses by default finds less than "
        f"{FOUND_BY_PROBING_MORE:.0%} more of the best rows. A warning. Remedy: set nprobe to the number "
        "from which the chart is flat.",
    ),
    _spec(
        "laion_index",
        "rows_have_vectors",
        f"At least {USABLE:.0%} of the rows have a finite, non-zero vector. A warning: the other rows "
        "keep their id but cannot be found. Remedy: check the embeddings of the shards that report such "
        "rows.",
    ),
    _spec(
        "staged_laion_index",
        "metadata_covers_the_index",
        "Index and metadata have the same number of rows. A warning: rows without metadata are left out "
        "and counted. Remedy: stage index and metadata of the same release; none is needed if you keep "
        "only a part of the metadata.",
    ),
    _spec(
        "staged_laion_index",
        "metadata_belongs_to_the_index",
        "Captions of neighbours in the index share more words than random captions, in every quarter of "
        "its rows that has enough captions. A warning, because this is a statistical test. Remedy: check "
        "that no metadata file is missing, duplicated or from another release, and that file names sort "
        "in the order of the ids.",
    ),
    _spec(
        "staged_laion_index",
        "staged_index_is_intact",
        f"{SAMPLED_BLOCKS} random blocks of 1 MiB of all files still have the checksums recorded at "
        "staging. Rows sampled from the whole index have ids of their own, and at least one a vector. An "
        "error that blocks: every search would be useless. Remedy: materialize again, which fetches the "
        "damaged blocks; `laion-assets verify` reads all blocks. If no file is named, replace the index "
        "at the source.",
        blocking=True,
    ),
    _spec(
        "centroid_vector",
        "seeds_are_coherent",
        f"The mean cosine of two seeds is at least {COHERENT}. A warning: the less the seeds have in "
        "common, the less the images around their mean resemble any of them. This is a floor, not a "
        "measure of style: all CLIP embeddings lie in a narrow cone, so seeds of several styles can "
        "pass, and failures are mostly vectors that are not CLIP embeddings. Remedy: check that the "
        "vectors come from the index's model, split the seed set by style, or use knn_urls alone.",
    ),
    _spec(
        "centroid_vector",
        "centroid_of_all_seeds",
        "The centroid is the mean of all seeds. A warning if a set has both images and prompts: CLIP "
        "places texts apart from images, so the centroid is the mean of the images, and prompts affect "
        "only knn_urls. Remedy: none is needed, or move the prompts to a separate seed set.",
    ),
    *_SEARCH,
    *_URL_SETS,
    _spec(
        "combined_urls",
        "one_row_per_image",
        "No id and no URL occurs in two rows. An error that blocks assets you build on the table, which "
        "would fetch images twice. Remedy: materialize again; if it fails again, report it.",
        blocking=True,
    ),
    _spec(
        "combined_urls",
        "urls_well_formed",
        "Every URL is written as one: http or https, with a host, without spaces. Nothing is requested; "
        "urls_alive does that. A warning: img2dataset cannot download other URLs. Remedy: name the right "
        "column in LAION_METADATA_COLUMNS; none is needed for an index of your own images, whose URLs "
        "are files.",
    ),
    _spec(
        "combined_urls",
        "urls_alive",
        f"As many of {SAMPLE} random URLs return an image as expect_alive says ({EXPECT_ALIVE:.0%} if "
        "unset), within a 95 % confidence interval. They are requested only if "
        "LAION_SHOW_REMOTE_PICTURES=true. A warning: img2dataset will deliver fewer images. Remedy: "
        "materialize again; with target_images, a run requests more if expect_alive is unset, because it "
        "then expects the share that this check measured last.",
    ),
]
BUILT, STAGED, CENTROID, KNN_URLS, CENTROID_URLS, COMBINED = map(
    _specs, ("laion_index", "staged_laion_index", "centroid_vector", *SEARCHES, "combined_urls")
)


# --- the built index -----------------------------------------------------------------------------


def nprobe_of_a_search(built: Built) -> int:
    """Return the nprobe of a search for 1,000 rows, or the nearest one measured; 0 without lists."""
    return max((n for n in map(int, built.recall) if n <= built.nprobe_of_a_search), default=0)


def of_built_index(built: Built, min_recall: float) -> Results:
    """Check the measured recall and the number of rows that can be found.

    Args:
        built: the index.
        min_recall: lowest accepted recall@100.

    """
    by_nprobe = {int(nprobe): shares for nprobe, shares in built.recall.items()}
    chosen = nprobe_of_a_search(built)
    most = max(by_nprobe, default=0)
    found = by_nprobe.get(chosen, {}).get("100", 1.0)
    yield _result(
        "recall_is_sufficient",
        found >= min_recall,
        WARN,
        f"{found:.1%} of the 100 best rows are found at nprobe {chosen}; at least {min_recall:.0%} are "
        "expected"
        if by_nprobe
        else "every search compares all rows",
        {"recall@100": found},
    )
    best = next((n for n in ("1000", "100", "10", "1") if n in by_nprobe.get(most, {})), "")
    further = by_nprobe[most][best] - by_nprobe[chosen][best] if best else 0.0
    yield _result(
        "nprobe_is_sufficient",
        further <= FOUND_BY_PROBING_MORE,
        WARN,
        f"of the {int(best):,} best rows, probing {count(most, 'list')} instead of {chosen} finds "
        f"{further:.1%} more"
        if best
        else "every search compares all rows",
        {"more": further},
    )
    usable = built.stored / built.rows
    yield _result(
        "rows_have_vectors",
        usable >= USABLE,
        WARN,
        f"{built.unusable:,} of {count(built.rows, 'row')} without a usable vector",
        {"usable": usable},
    )


# --- the staged index -----------------------------------------------------------------------------


def of_staged_index(opened: OpenIndex, cache_dir: Any) -> list[dg.AssetCheckResult]:
    """Compare index and metadata, and check for damage.

    If only a part of the index is on the disk, rows are not sampled, because each would have to be
    fetched.
    """
    rows, metadata_rows = opened.index.rows, len(opened.metadata)
    partly = not opened.whole
    damage = sample_damage(opened.manifest.files, cache_dir, SAMPLED_BLOCKS)
    captions = None if partly else audit.agreement(opened.index, opened.metadata)
    sound = None if partly else audit.soundness(opened.index)
    wrong = [*(found.describe(cache_dir) for found in damage), *(sound.wrong if sound else [])]
    if not rows:
        wrong.append("the index has no rows: name the populated index instead of the trained one")
    read_again = (
        f"random blocks of {count(len(copied), 'file')} were read again and are unchanged"
        if (copied := [file for file in opened.manifest.files if file.is_copied])
        else "no file was read again: files that are used in place have no checksum"
    )
    return [
        _result(
            "metadata_covers_the_index",
            rows == metadata_rows,
            WARN,
            _coverage(rows, metadata_rows),
            {"rows": rows, "metadata rows": metadata_rows},
        ),
        _result(
            "metadata_belongs_to_the_index",
            captions is None or captions.is_aligned,
            WARN,
            _agreement(captions) if captions else f"not checked: {ONLY_A_PART}",
            {
                "words shared by neighbours": captions.near,
                "words shared by chance": captions.apart,
            }
            if captions
            else None,
        ),
        _result(
            "staged_index_is_intact",
            not wrong,
            ERROR,
            "; ".join(wrong) or f"{read_again}; {_sampled(sound)}",
            {"rows without a vector": sound.without_vector} if sound else None,
        ),
    ]


def _sampled(sound: audit.Soundness | None) -> str:
    if sound is None:
        return f"no rows were sampled: {ONLY_A_PART}"
    rows = count(sound.rows, "sampled row")
    return f"{rows} with valid ids, {sound.without_vector:,} of them without a vector"


def _coverage(rows: int, metadata_rows: int) -> str:
    if rows == metadata_rows:
        return f"{count(rows, 'row')} in the index and in the metadata"
    if rows > metadata_rows:
        return (
            f"{rows - metadata_rows:,} of {count(rows, 'row')} without metadata: left out and counted; "
            "this is fine if you keep only a part of the metadata, such as the English part"
        )
    return (
        f"{count(metadata_rows - rows, 'row')} of metadata without a row of the index: make sure that "
        "both come from the same release"
    )


def _agreement(captions: audit.Agreement) -> str:
    if not captions.is_decidable:
        return f"not checked: only {count(captions.pairs, 'pair')} of neighbours with captions"
    described = (
        f"neighbours share {captions.near:.1%} of their words, random captions {captions.apart:.1%} "
        f"({count(captions.pairs, 'pair')}, in the quarter of the rows with the smallest difference)"
    )
    if captions.silent:
        described += f"; {captions.silent} of {audit.PARTS} quarters of the rows have too few captions"
    return described if captions.is_aligned else f"{described}: metadata and index may be misaligned"


# --- tables ---------------------------------------------------------------------------------------


def of_centroid(seeds: int, norm_of_mean: float, mean: Floats, prompts: Floats) -> Results:
    """Check whether the seeds have a style in common, and whether the centroid covers all of them.

    Args:
        seeds: number n of seeds in the mean.
        norm_of_mean: length of the mean; the mean cosine of two seeds is (n * length^2 - 1) / (n - 1).
        mean: (d,) the centroid.
        prompts: (n, d) unit vectors of prompts that the mean leaves out.

    """
    cosine = (seeds * norm_of_mean**2 - 1) / (seeds - 1) if seeds > 1 else 1.0
    yield _result(
        "seeds_are_coherent",
        cosine >= COHERENT,
        WARN,
        f"the mean cosine of pairs of seeds is {cosine:.2f}; at least {COHERENT} is expected",
        {"mean cosine of two seeds": cosine},
    )
    gap = float((prompts @ mean).mean()) if len(prompts) else 1.0
    yield _result(
        "centroid_of_all_seeds",
        not len(prompts),
        WARN,
        f"left out: {count(len(prompts), 'prompt')}; mean cosine with the images' centroid {gap:.2f}"
        if len(prompts)
        else "it is the mean of all seeds",
        {"mean cosine of prompts": gap} if len(prompts) else None,
    )


def of_search(table: StoredTable, threshold: float) -> Results:
    """Check a URL set before combining."""
    there = set(table.schema.names)
    ranking = audit.ranking(table.read([n for n in ("rank", "similarity", "seed") if n in there]))
    rows = len(ranking.similarities)
    yield _result(
        "similarity_falls_with_rank",
        not ranking.out_of_order,
        ERROR,
        f"{ranking.out_of_order:,} of {count(rows, 'row')} out of order",
        {"rows out of order": ranking.out_of_order},
    )
    lowest, highest = (
        (float(ranking.similarities.min()), float(ranking.similarities.max())) if rows else (0.0, 0.0)
    )
    yield _result(
        "similarity_is_in_range",
        not ranking.out_of_range,
        WARN,
        f"similarities from {lowest:.3f} to {highest:.3f}, {ranking.out_of_range:,} out of range",
        {"lowest": lowest, "highest": highest},
    )
    first = table.top(ROWS_COMPARED, [n for n in ("code", "seed") if n in there])
    codes = code_bytes(first["code"])
    groups = first["seed"].to_numpy() if "seed" in there else np.zeros(len(first), np.int64)
    decoder = Decoder.from_bytes(table.attachment(DECODER))
    yield _near_duplicates(codes, groups, decoder, threshold)


def of_combined(table: StoredTable, knn: StoredTable, centroid: StoredTable, threshold: float) -> Results:
    """Check the combined table, with the codes of its rows from its source tables."""
    images = audit.images(table.batches(["id", "url"]))
    repeated = {"id": audit.repeated(images.ids), "url": audit.repeated(images.urls)}
    yield _result(
        "one_row_per_image",
        not any(repeated.values()),
        ERROR,
        f"{count(len(table), 'row')}, {count(repeated['id'], 'repeated id')}, "
        f"{count(repeated['url'], 'repeated URL')}",
        {f"repeated {name}s": number for name, number in repeated.items()},
    )
    wrong = images.not_web
    yield _result(
        "urls_well_formed",
        not wrong,
        WARN,
        f"{wrong:,} of {count(len(table), 'URL')} not well-formed; whether they work is not checked here",
        {"not on the web": wrong}
        | ({"such as": dg.MetadataValue.json(images.examples)} if wrong else {}),
    )
    batches = chain.from_iterable(each.batches(["id", "code"]) for each in (knn, centroid))
    schema = pa.schema([knn.schema.field(name) for name in ("id", "code")])
    wanted = np.unique(images.ids[:ROWS_COMPARED])
    codes = audit.codes_of(batches, schema, wanted)
    one, other = (Decoder.from_bytes(each.attachment(DECODER)) for each in (knn, centroid))
    yield _near_duplicates(codes, np.zeros(len(codes)), one.merged(other), threshold)


def block_list_matches(matches: BlockListMatches | None) -> dg.AssetCheckResult:
    """Check that the block list of a search is not one that blocks nothing."""
    return _result(
        "block_list_matches",
        matches is None or matches.matching > 0,
        WARN,
        "no block list is set" if matches is None else str(matches),
        {"matching entries": matches.matching} if matches else None,
    )


def urls_alive(alive: Liveness | None, settings: ResolvedSettings) -> dg.AssetCheckResult:
    """Check that about as many URLs work as expected.

    Args:
        alive: what a sample of the URLs answered; None if it was not requested.
        settings: settings of the table.

    """
    if alive is None or not alive.requested:
        why = "no host answered in time" if alive else "LAION_SHOW_REMOTE_PICTURES=true allows requests"
        return _result("urls_alive", True, WARN, f"not checked: {why}")
    expected = settings.values.expect_alive or EXPECT_ALIVE
    low, high = alive.interval
    return _result(
        "urls_alive",
        high >= expected,
        WARN,
        f"{alive.share:.0%} of {count(alive.requested, 'URL')} work (95 % confidence interval {low:.0%} "
        f"to {high:.0%}); {expected:.0%} are expected"
        + (f"; {plain(alive.reasons)}" if alive.reasons else ""),
        {"working": alive.working, "requested": alive.requested, "low": low, "high": high},
    )


def _near_duplicates(codes: Any, groups: Any, decoder: Decoder, threshold: float) -> dg.AssetCheckResult:
    left = audit.near_duplicates_left(Coded(codes, decoder), groups, threshold) if threshold < 1 else 0
    looked_at = min(len(codes), audit.ANCHORS)
    return _result(
        "no_near_duplicates_left",
        not left,
        ERROR,
        f"of {count(looked_at, 'row')}, compared with {len(codes):,}, {left:,} with a near-duplicate "
        f"(cosine above {threshold})",
        {"rows compared": looked_at, "near-duplicates left": left},
    )


def logged(
    context: dg.AssetExecutionContext, results: Iterable[dg.AssetCheckResult]
) -> list[dg.AssetCheckResult]:
    """Return the results, and log failed ones: a terminal shows only the log."""
    found = list(results)
    for result in found:
        if not result.passed:
            context.log.warning(f"check {result.check_name} failed: {result.description}")
    return found


def _result(
    name: str,
    passed: bool,
    severity: dg.AssetCheckSeverity,
    description: str,
    metadata: Mapping[str, Any] | None = None,
) -> dg.AssetCheckResult:
    figures = {
        label: round(value, DIGITS) if isinstance(value, float) else value
        for label, value in (metadata or {}).items()
    }
    return dg.AssetCheckResult(
        check_name=name, passed=passed, severity=severity, description=description, metadata=figures
    )
