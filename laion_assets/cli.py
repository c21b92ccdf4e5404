"""`laion-assets`: the same graph on the same Dagster instance, without a server.

What must not live here: work; a command builds definitions, runs the job, and prints what it reported.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from dotenv import load_dotenv

from laion_assets.definitions import JOB, build_defs
from laion_assets.defs.failures import sentence
from laion_assets.defs.launcher import fail_abandoned_runs, process_lock
from laion_assets.defs.partitions import seed_sets
from laion_assets.defs.request_plan import history, in_words, plan
from laion_assets.defs.resources import DATA, index_from, seeds_from
from laion_assets.defs.settings import DEFAULTS, KINDS, RetrievalConfig
from laion_assets.demo.build import build_demo
from laion_assets.io.errors import InputError

DEMO_SET = "fruit"
METAVARS: Mapping[type, str] = {int: "N", float: "COSINE", str: "CONDITIONS"}
ENVIRONMENT_OF_DATA = ("LAION_INDEX_URI", "LAION_METADATA_URI", "LAION_SEEDS_URI")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    # Notes from Dagster to the authors of definitions, not to the people who run them.
    warnings.filterwarnings("ignore", module="dagster")
    load_dotenv(Path(".env"))
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.command(parsed))
    except InputError as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="laion-assets",
        description="Seed images in, a clean table of similar images from LAION out: the assets of the "
        "Dagster UI, without a server.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    materialize = commands.add_parser("materialize", help="materialize all assets of one seed set")
    materialize.add_argument("seed_set", metavar="SEED_SET", help="folder under LAION_SEEDS_URI")
    for name, kind in KINDS.items():
        materialize.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar=METAVARS[kind],
            help=RetrievalConfig.model_fields[name].description,
        )
    materialize.set_defaults(command=_materialize)

    planned = commands.add_parser(
        "plan", help="print how many images to ask for, as YAML, and what that takes"
    )
    planned.add_argument("--target", type=int, metavar="N", required=True, help="images wanted in all")
    which = planned.add_mutually_exclusive_group(required=True)
    which.add_argument("--seeds", type=int, metavar="N", help="how many seeds there are")
    which.add_argument("--seed-set", metavar="SEED_SET", help="count them, and use its past runs")
    planned.set_defaults(command=_plan)

    demo = commands.add_parser("demo", help="build the demo's index and seeds, and materialize one set")
    demo.add_argument("--data-only", action="store_true", help="build, and stop there")
    demo.set_defaults(command=_demo)
    return parser


def _materialize(parsed: argparse.Namespace) -> int:
    given = {name: getattr(parsed, name) for name in DEFAULTS}
    return materialize(parsed.seed_set, given)


def _plan(parsed: argparse.Namespace) -> int:
    for name in ("target", "seeds"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}: give 1 or more")
    seeds, own = parsed.seeds, {}
    if parsed.seed_set is not None:
        folder = seeds_from(os.environ)
        seed_set = folder.find(parsed.seed_set)
        own = folder.settings(seed_set)
        seeds = len(folder.read(seed_set).embeddings)
    settings = RetrievalConfig().resolve(os.environ, own, parsed.seed_set or "")
    block_list = index_from(os.environ).block_list() if parsed.seed_set is not None else None
    with instance() as kept:
        known = history(kept, parsed.seed_set, settings.recorded(block_list))
    found = plan(parsed.target, seeds, known)
    print(*in_words(found, parsed.target, seeds), sep="\n")
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    set_elsewhere = [name for name in ENVIRONMENT_OF_DATA if os.environ.get(name)]
    if parsed.data_only and os.environ.get("LAION_INDEX_URI"):
        print("LAION_INDEX_URI is set: no demo is needed")
        return 0
    if set_elsewhere and not parsed.data_only:
        raise InputError(
            f"{', '.join(set_elsewhere)} is set, so this would not be the demo: unset it, or use "
            "`laion-assets materialize SEED_SET`"
        )
    report = build_demo(DATA / "index", DATA / "seeds")
    built = f"built in {report.seconds:.0f} s" if report.seconds else "already there"
    print(
        f"demo index: {report.rows:,} pictures in {report.index_key}, {built}; it finds "
        f"{report.recall_all_lists:.0%} of the 20 true nearest"
    )
    print(f"demo seeds: {', '.join(report.seeds)}, {sum(report.seeds.values())} pictures")
    return 0 if parsed.data_only else materialize(DEMO_SET, {})


def materialize(seed_set: str, given: Mapping[str, Any]) -> int:
    """Materialize all assets of one seed set; print what they report; return the exit status.

    Raises:
        InputError: no such seed set, or a setting out of bounds.

    """
    seeds = seeds_from(os.environ)
    own = seeds.settings(seeds.find(seed_set))
    RetrievalConfig(**given).resolve(os.environ, own, seed_set)
    job = build_defs(os.environ, {"console": console}).resolve_job_def(JOB)
    with instance() as kept, process_lock() as tags:
        for run_id in fail_abandoned_runs(kept):
            print(f"run {run_id} had been killed; it is marked as failed now")
        kept.add_dynamic_partitions(seed_sets.name or "", [seed_set])
        result = job.execute_in_process(
            partition_key=seed_set,
            instance=kept,
            tags=tags,
            raise_on_error=False,
            run_config={
                "resources": {
                    "retrieval_config": {"config": {k: v for k, v in given.items() if v is not None}}
                },
                "loggers": {"console": {"config": {}}},
            },
        )
    if not result.success:
        for sentence in _failures(result):
            print(f"error: {sentence}", file=sys.stderr)
        return 1
    _print_report(result)
    return 0


@contextmanager
def instance() -> Iterator[dg.DagsterInstance]:
    """Open the Dagster instance that `dagster dev` uses in this folder."""
    if os.environ.get("DAGSTER_HOME"):
        opened = dg.DagsterInstance.get()
    elif Path("dagster.yaml").exists():
        opened = dg.DagsterInstance.from_config(str(Path.cwd()))
    else:
        home = DATA / "dagster"
        home.mkdir(parents=True, exist_ok=True)
        opened = dg.DagsterInstance.local_temp(str(home.absolute()))
    with opened:
        yield opened


@dg.logger
def console(_: dg.InitLoggerContext) -> logging.Logger:
    """One short line for each step of the story; Dagster's own events stay in its history."""
    logger = logging.Logger("laion_assets", logging.INFO)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_ShortLine())
    handler.addFilter(_is_told_by_an_asset)
    logger.addHandler(handler)
    return logger


def _is_told_by_an_asset(record: logging.LogRecord) -> bool:
    """Leave out what Dagster says of its steps: what failed, and why, stands at the end."""
    is_event = getattr(record, "dagster_meta", {}).get("dagster_event") is not None
    return not is_event and record.levelno < logging.ERROR


class _ShortLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return `asset: message`."""
        meta = getattr(record, "dagster_meta", {})
        step = meta.get("step_key") or "run"
        return f"{step}: {meta.get('orig_message', record.getMessage())}"


def _failures(result: dg.ExecuteInProcessResult) -> Iterator[str]:
    for event in result.filter_events(lambda event: event.is_step_failure):
        failure = event.step_failure_data
        described = failure.user_failure_data and failure.user_failure_data.description
        yield f"{event.step_key}: {described or failure.error_display_string}"


def _print_report(result: dg.ExecuteInProcessResult) -> None:
    reported = {
        name: {key: value.value for key, value in event.metadata.items()}
        for name in ("knn_urls", "centroid_urls", "combined_urls")
        for event in result.asset_materializations_for_node(name)
    }
    shown = {name: _from_here(figures["dagster/uri"]) for name, figures in reported.items()}
    print()
    print(f"{'':14}{'requested':>10}{'received':>10}{'kept':>10}")
    for name in ("knn_urls", "centroid_urls"):
        counts = [f"{reported[name][key]:>10,}" for key in ("requested", "received", "kept")]
        print(f"{name:14}{''.join(counts)}   {shown[name]}")
    combined = reported["combined_urls"]
    print(f"{'combined_urls':34}{combined['kept']:>10,}   {shown['combined_urls']}")
    if "picture" in combined:
        print(f"\ncontact sheet: {_from_here(combined['picture'])}")


def _from_here(place: object) -> str:
    """Return a path below this folder as people would type it, any other place as it is."""
    path, here = Path(str(place)), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(place)


if __name__ == "__main__":
    sys.exit(main())
