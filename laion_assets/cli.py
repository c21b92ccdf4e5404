"""The `laion-assets` command runs the same graph on the same Dagster instance, without a server."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import select
import shlex
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import dagster as dg
from dotenv import load_dotenv
from sqlalchemy.exc import DBAPIError

from laion_assets.build import Build, Request, check_key, cost_of, embed_folder, index_key_for, measured
from laion_assets.definitions import build_defs
from laion_assets.defs.build_sensor import ENCODE_JOB, PUBLISH_JOB, TRAIN_JOB
from laion_assets.defs.dagster_internals import RunFailureReason
from laion_assets.defs.estimate import measured_machine
from laion_assets.defs.failures import sentence
from laion_assets.defs.forget import belongings, forget
from laion_assets.defs.history import FOR_THE_TARGET, asset_of_step, expected_alive, figures_of
from laion_assets.defs.io_manager import Tables
from laion_assets.defs.kubernetes.placement import Placement
from laion_assets.defs.launcher import fail_abandoned_runs, process_lock
from laion_assets.defs.look import SHEETS, TOP, look
from laion_assets.defs.partitions import JOB, SEED_SETS, SHARDS
from laion_assets.defs.places import DATA, Places
from laion_assets.defs.request_plan import as_yaml, estimated, plan_request, read_history, scaled
from laion_assets.defs.resources import Embedder, IndexBuilder, LaionIndex, SeedFolder
from laion_assets.defs.run_origin import give_origin
from laion_assets.defs.services import serve
from laion_assets.defs.settings import FIELDS, KIND_NAMES, Defaults, RetrievalConfig, kind_of
from laion_assets.defs.terminal import count, one_line
from laion_assets.demo import DEMO_MODEL, build_demo
from laion_assets.index import ModelRecord
from laion_assets.io.errors import InputError
from laion_assets.io.locks import locked_folder
from laion_assets.io.storage import on_this_machine
from laion_assets.io.text import printable
from laion_assets.seeds import Model, count_seeds, stage_model
from laion_assets.staging import Scrubbed

DEMO_SET = "fruit"
BLOCKED_BY_A_CHECK = "DagsterAssetCheckFailedError"
EXAMPLES = 8  # rows shown by `index-images`
IMAGES_SHOWN = 10  # skipped images listed by `index-images`
HOST, PORT, MAX_PORT = "127.0.0.1", 3000, 65_535
INSTANCE_FILE = "dagster.yaml"
WRONG_ARGUMENTS = {  # messages of argparse, and ours
    r"argument COMMAND: invalid choice: (.*) \(choose from .*": r"there is no command \1",
    r"argument (\S+): expected one argument": r"\1 has no value: give one",
    r"argument (\S+): not allowed with argument (\S+)": r"\1 and \2 are given: give only one of them",
    r"argument (\S+): ignored explicit argument .*": r"\1 takes no value: give none",
    r"argument (\S+): is (.*): give (.*)": r"\1 is \2: give \3",
    r"ambiguous option: (.*)": r"\1",
    r"the following arguments are required: ([^,]+)": r"\1 is missing",
    r"the following arguments are required: (.+)": r"\1 are missing",
    r"one of the arguments (\S+) (\S+) is required": r"neither \1 nor \2 is given: give one of them",
    r"unrecognized arguments: (.*)": r"\1 is not understood",
}
METAVARS: Mapping[type, str] = {int: "N", float: "X", str: "CONDITIONS"}
DEFAULT_FOLDERS = {"LAION_INDEX_URI": DATA / "index", "LAION_SEEDS_URI": DATA / "seeds"}
CONSOLE: Mapping[str, Any] = {"loggers": {"console": {"config": {}}}}
INDEX_VARIABLES = ("LAION_INDEX_URI", "LAION_EMBEDDINGS_URI")  # setting either disables the demo
DATA_VARIABLES = ("LAION_INDEX_URI", "LAION_METADATA_URI", "LAION_SEEDS_URI", "LAION_EMBEDDINGS_URI")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    try:
        try:
            return _main(arguments)
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError:
        streams = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream]
        unread = [stream for stream in streams if _is_unread(stream)]
        if not unread:
            raise
        for stream in unread:  # for what is still buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        return 128 + signal.SIGPIPE


def _main(arguments: Sequence[str] | None) -> int:
    # These warnings are for authors of definitions, not for users.
    warnings.filterwarnings("ignore", module="dagster")
    load_dotenv(Path(".env"))
    parsed = _parser().parse_args(arguments)
    with _interruptible() as received:
        try:
            return int(parsed.command(parsed, os.environ))
        except InputError as error:
            _print_error(sentence(error), os.environ)
            return 1
        except KeyboardInterrupt:
            print(
                "interrupted: finished work is kept, run the command again to continue", file=sys.stderr
            )
            return 128 + received()


@contextmanager
def _interruptible() -> Iterator[Callable[[], int]]:
    """Raise KeyboardInterrupt for SIGTERM too; yield a function that returns the first signal received.

    Dagster replaces both handlers with one that does not record the signal number.
    """
    received, notify = socket.socketpair()

    def first() -> int:
        with suppress(BlockingIOError):
            return received.recv(1)[0]
        return signal.SIGINT  # raised without a signal

    with received, notify:
        for end in (received, notify):
            end.setblocking(False)
        before = signal.set_wakeup_fd(notify.fileno(), warn_on_full_buffer=False)
        handler = signal.getsignal(signal.SIGTERM)
        if handler is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield first
        finally:
            signal.signal(signal.SIGTERM, handler)
            signal.set_wakeup_fd(before)


def _is_unread(output: int) -> bool:
    """Return whether nobody reads a pipe any more, as after `| head`."""
    asked = select.poll()
    asked.register(output, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))


def _print_error(message: str, environment: Mapping[str, str]) -> None:
    """Print an error, with control characters escaped."""
    lines = "\n".join(map(printable, message.splitlines()))
    print(f"error: {lines}{_remedy(message, environment)}", file=sys.stderr)


def _remedy(message: str, environment: Mapping[str, str]) -> str:
    """Return a command to add to an error about a missing folder, if the command can create it."""
    if environment.get("LAION_EMBEDDINGS_URI"):
        is_missing = "there is no folder" in message and message.endswith("(LAION_INDEX_URI)")
        return "; or run `laion-assets build` to build it" if is_missing else ""
    for variable, folder in DEFAULT_FOLDERS.items():
        is_default = not environment.get(variable) and not folder.exists()
        if is_default and message.endswith(f"({variable})"):
            return "; or run `laion-assets demo` for the demo's data"
    return ""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence with the remedy, like all others."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the arguments, and exit with 2."""
        remedy = f": see `{self.prog} --help`"
        for pattern, wording in WRONG_ARGUMENTS.items():
            if found := re.fullmatch(pattern, message, re.DOTALL):
                message = found.expand(wording)
                remedy = "" if ": give " in wording else remedy
                break
        self.exit(2, f"error: {printable(message)}{remedy}\n")


def _number(kind: type) -> Callable[[str], Any]:
    """Return a function that reads a value of a type; its error says which is expected."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}: give {KIND_NAMES[kind]}") from None

    return read


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="laion-assets",
        description="Turn seed images into a clean table of similar images from LAION. Runs the assets "
        "of the Dagster UI without a server.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('laion_assets')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    materialize = commands.add_parser("materialize", help="materialize all assets of one seed set")
    materialize.add_argument("seed_set", metavar="SEED_SET", help="folder under LAION_SEEDS_URI")
    for name in FIELDS:
        materialize.add_argument(
            f"--{name.replace('_', '-')}",
            type=_number(kind_of(name)),
            metavar=METAVARS[kind_of(name)],
            help=RetrievalConfig.model_fields[name].description,
        )
    materialize.set_defaults(command=_materialize)

    planned = commands.add_parser(
        "plan", help="print how many images to request, as YAML, with the expected time and disk space"
    )
    planned.add_argument(
        "--target-images",
        type=_number(int),
        metavar="N",
        required=True,
        help="images wanted whose URLs work",
    )
    which = planned.add_mutually_exclusive_group(required=True)
    which.add_argument("--seeds", type=_number(int), metavar="N", help="number of seeds")
    which.add_argument(
        "--seed-set", metavar="SEED_SET", help="count the seeds of this set and use its past runs"
    )
    planned.set_defaults(command=_plan)

    looked = commands.add_parser(
        "look", help="show the best rows around an image, a folder, a seed set or a prompt, in seconds"
    )
    looked.add_argument("what", metavar='IMAGE|FOLDER|SEED_SET|"a prompt"', help="the query")
    looked.add_argument(
        "--top", type=_number(int), metavar="N", default=TOP, help=f"number of rows (default {TOP})"
    )
    looked.add_argument(
        "--output", metavar="PNG", help=f"file of the contact sheet (default {SHEETS}/<name>.png)"
    )
    looked.set_defaults(command=_look)

    built = commands.add_parser(
        "build", help="build the index at LAION_INDEX_URI from the embeddings at LAION_EMBEDDINGS_URI"
    )
    built.set_defaults(command=_build)

    costs = commands.add_parser(
        "plan-build", help="estimate a build: shards, core-hours, bytes; measures this machine"
    )
    costs.add_argument(
        "--rows", type=_number(int), metavar="N", help="number of rows, instead of LAION_EMBEDDINGS_URI"
    )
    costs.add_argument(
        "--dimension",
        type=_number(int),
        metavar="N",
        default=768,
        help="dimension of the vectors, with --rows (default 768)",
    )
    costs.add_argument("--core-price", type=_number(float), metavar="X", help="price of a core-hour")
    costs.set_defaults(command=_plan_build)

    verified = commands.add_parser(
        "verify", help="read all of the staged index and compare it with its checksums"
    )
    verified.add_argument(
        "--repair", action="store_true", help="fetch damaged parts from LAION_INDEX_URI again"
    )
    verified.set_defaults(command=_verify)

    own = commands.add_parser(
        "index-images", help="embed a folder of images, build an index of them, and run a first search"
    )
    own.add_argument("folder", metavar="FOLDER", help="images, including subfolders; a path or a URL")
    own.add_argument(
        "--into",
        metavar="DIR",
        help=f"folder for the index (default {DATA}/indices/<name of the folder>)",
    )
    own.set_defaults(command=_index_images)

    forgotten = commands.add_parser(
        "forget", help="delete the tables, pictures, runs and partition of a seed set, after confirmation"
    )
    forgotten.add_argument("seed_set", metavar="SEED_SET", help="folder under LAION_SEEDS_URI")
    forgotten.add_argument("--yes", action="store_true", help="delete without confirmation")
    forgotten.set_defaults(command=_forget)

    demo = commands.add_parser("demo", help="build the demo's index and seeds, and materialize one set")
    demo.add_argument("--data-only", action="store_true", help="only build the index and seeds")
    demo.set_defaults(command=_demo)

    dev = commands.add_parser("dev", help="start the Dagster UI with this folder's data and history")
    dev.add_argument("--port", type=_number(int), metavar="N", default=PORT, help=f"default {PORT}")
    dev.set_defaults(command=_dev)
    return parser


def _materialize(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    given = {name: getattr(parsed, name) for name in FIELDS}
    return materialize(parsed.seed_set, given, environment)


def _plan(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    for option, value in (("--target-images", parsed.target_images), ("--seeds", parsed.seeds)):
        if value is not None and value < 1:
            raise InputError(f"{option} is {value}: give 1 or more")
    places, name = Places.from_environment(environment), parsed.seed_set or ""
    index = LaionIndex.at(places)
    seeds, own, block_list = parsed.seeds, {}, None
    if name:
        folder = SeedFolder(places.seeds_uri)
        seed_set = folder.find(name)
        own = dict(folder.settings(seed_set))
        seeds = count_seeds(folder.uri, seed_set)
        block_list = index.block_list_description()
    config = RetrievalConfig(target_images=parsed.target_images)
    settings = config.resolve(Defaults.from_environment(environment), own, name, block_list)
    with instance(environment) as kept:
        known = read_history(kept, places.index_uri, parsed.seed_set, settings.asked())
        alive = settings.values.expect_alive or expected_alive(kept, parsed.seed_set)[0]
    plan = plan_request(parsed.target_images, seeds, known, alive)
    try:
        times = estimated(plan, seeds, measured_machine(index), settings.values.nprobe)
    except InputError as error:  # above all, an index that is not staged
        times = [f"# reads: unknown, because {one_line(str(error))}", *scaled(plan)]
    print(*as_yaml(plan, seeds, times), sep="\n")
    if (most := places.max_images) and plan.images > most:
        print(f"# the run would be refused: LAION_MAX_IMAGES allows {most:,}")
    if lacks := plan.needs.shortage():
        print(f"# combining would be refused on this machine: it needs {lacks}")
    return 0


def _look(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    found = look(parsed.what, environment, top=parsed.top, output=parsed.output, log=_to_stderr)
    for note in found.notes:
        _to_stderr(note)
    sheet = ["", f"contact sheet: {_from_here(found.sheet.absolute())}"] if found.sheet else []
    for line in [found.about, "", *found.lines(is_terminal=sys.stdout.isatty()), *sheet]:
        _print_any(line)
    return 0


def _build(_: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Run the missing steps of a build, each as a separate run; a failed shard does not stop others."""
    builder = IndexBuilder.at(Places.from_environment(environment))
    jobs = build_defs(environment, {"console": console})
    with builder.open(print) as build:
        build.listing()  # a wrong location fails here, before a run
        with _kept_instance(environment) as (kept, tags):

            def run(job: str, shard: str | None = None) -> bool:
                result = jobs.resolve_job_def(job).execute_in_process(
                    partition_key=shard,
                    instance=kept,
                    tags=tags,
                    raise_on_error=False,
                    run_config=dict(CONSOLE),
                )
                if _was_interrupted(result):
                    raise KeyboardInterrupt
                for failure in _failures(result):
                    _print_error(f"shard {shard}: {failure}" if shard else failure, environment)
                return bool(result.success)

            if not run(TRAIN_JOB):
                return 1
            plan = build.stored_plan()
            kept.add_dynamic_partitions(SHARDS, [shard.name for shard in plan.shards])
            if failed := [name for name in build.missing(plan) if not run(ENCODE_JOB, name)]:
                print(f"{count(len(failed), 'shard')} failed; the others are done", file=sys.stderr)
                return 1
            if not run(PUBLISH_JOB):
                return 1
        if built := build.published():
            print(f"{built.summary} in {built.index_key}, at {build.request.index_uri}")
            print("search it with `laion-assets materialize SEED_SET`; for images, set LAION_MODEL")
    return 0


def _plan_build(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    places = Places.from_environment(environment)
    for name in ("rows", "dimension"):
        if (value := getattr(parsed, name)) is not None and value < 1:
            raise InputError(f"--{name} is {value}: give 1 or more")
    if parsed.rows is None:
        with IndexBuilder.at(places).open(_to_stderr) as build:
            cost = build.cost()
    else:
        key = places.index_key or index_key_for(parsed.rows, parsed.dimension, places.bytes_per_row)
        check_key(key, parsed.dimension, parsed.rows)
        rates = measured(key, parsed.dimension)
        cost = cost_of(parsed.rows, parsed.dimension, key, rates, shard_rows=places.shard_rows)
    print(*cost.lines(parsed.core_price), sep="\n")
    return 0


def _verify(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Verify the staged index; continue an interrupted verification."""
    index = LaionIndex.at(Places.from_environment(environment))
    found = index.verify(_to_stderr, repair=parsed.repair)
    for damage in found.damaged:
        _print_any(damage)
    if found.unchecked:
        _print_any(f"{count(found.unchecked, 'file')} used in place: no checksums to compare with")
    print(f"{count(found.files, 'file')}, {found.size:,} bytes: {_verdict(found)}")
    return 0 if found.mended else 1


def _verdict(found: Scrubbed) -> str:
    if not found.files:
        return "nothing to verify"
    if not found.damaged:
        return "intact"
    if found.mended:
        return "intact now; the damaged parts were fetched again"
    return "damaged: run `laion-assets verify --repair`, or materialize staged_laion_index"


def _index_images(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Embed images, build an index and search it; a later call embeds and encodes only new images."""
    places = Places.from_environment(environment)
    folder = parsed.folder.rstrip("/")
    into = Path(parsed.into or DATA / "indices" / (folder.rpartition("/")[2] or "images")).absolute()
    model_uri = places.model or str(DEMO_MODEL)
    if "://" not in model_uri:  # the printed variables must work in any folder
        model_uri = str(Path(model_uri).expanduser().absolute())
    own = {"LAION_CACHE_DIR": str(into / "cache"), "LAION_OUTPUT_URI": str(into / "output")}
    embedder = Embedder.at(Places.from_environment({**environment, **own}))
    model = Model(stage_model(model_uri, embedder.cache_dir, print), embedder.device)
    found = embed_folder(folder, str(into / "embeddings"), model, print)
    print(f"{count(found.images, 'image')} embedded, {found.new:,} of them now")
    for image in found.bad[:IMAGES_SHOWN]:
        _to_stderr(f"left out: {image}")
    if len(found.bad) > IMAGES_SHOWN:
        _to_stderr(f"left out: {len(found.bad) - IMAGES_SHOWN:,} more")
    request = Request(
        str(into / "embeddings"),
        str(into / "index"),
        index_key=places.index_key,
        bytes_per_row=places.bytes_per_row,
        model=ModelRecord(model.name, model_uri),
    )
    built = Build(request, print).run()
    print(f"{built.summary} in {built.index_key}, at {request.index_uri}")
    variables = {"LAION_INDEX_URI": request.index_uri, "LAION_MODEL": model_uri, **own}
    if found.example and on_this_machine(folder):
        print(f"images most like {found.example}:\n")
        _look(
            argparse.Namespace(what=found.example, top=EXAMPLES, output=None),
            {**environment, **variables, "LAION_STAGING": "in-place"},
        )
    print("\nto use it with `laion-assets look IMAGE` and all other commands, set these variables:\n")
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()))
    return 0


def _forget(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    places = Places.from_environment(environment)
    with instance(environment) as kept:
        found = belongings(kept, Tables(places.output_uri), parsed.seed_set)
        for uri in found.files:
            _print_any(_from_here(uri))
        with suppress(InputError):
            SeedFolder(places.seeds_uri).find(parsed.seed_set)
            print(f"its folder in {places.seeds_uri} is still there: the sensor will run it as a new set")
        if not parsed.yes and not _agreed(f"delete {found}, and its partition?"):
            print("nothing was deleted")
            return 1
        forget(kept, found)
    print(f"deleted {found}, and its partition")
    return 0


def _agreed(question: str) -> bool:
    """Ask for confirmation before something is deleted.

    Raises:
        InputError: the input is not a terminal.

    """
    if not sys.stdin.isatty():
        raise InputError("the input is not a terminal, so nobody can confirm this: give --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _to_stderr(line: str) -> None:
    print(one_line(line), file=sys.stderr)


def _print_any(line: str) -> None:
    """Print a line, replacing characters that the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(printable(line).encode(encoding, "replace").decode(encoding))


def _demo(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    set_elsewhere = [name for name in DATA_VARIABLES if environment.get(name)]
    for variable in INDEX_VARIABLES:
        if parsed.data_only and environment.get(variable):
            print(f"{variable} is set: no demo is needed")
            return 0
    if set_elsewhere and not parsed.data_only:
        raise InputError(
            f"{', '.join(set_elsewhere)} is set, so this would not run the demo: unset it, or use "
            "`laion-assets materialize SEED_SET`"
        )
    _build_demo()
    return 0 if parsed.data_only else materialize(DEMO_SET, {}, environment)


def _build_demo() -> None:
    report = build_demo(DATA / "index", DATA / "seeds")
    built = f"built in {report.seconds:.0f} s" if report.seconds else "already built"
    print(
        f"demo index: {count(report.rows, 'image')} in {report.index_key}, {built}; it finds "
        f"{report.recall_all_lists:.0%} of the 10 true nearest"
    )
    print(f"demo seeds: {', '.join(report.seeds)}, {count(sum(report.seeds.values()), 'image')}")


def _dev(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Run Dagster's services with the history of this folder."""
    Places.from_environment(environment)  # a wrong setting fails here, in one sentence
    Placement.from_environment(environment, 0)
    _check_port(parsed.port)
    if not any(environment.get(variable) for variable in INDEX_VARIABLES):
        _build_demo()
    with instance(environment):
        pass  # creates the tables of a new history, which three services at once could not
    print(f"Dagster's UI: http://{HOST}:{parsed.port}", flush=True)
    return serve(HOST, parsed.port, _home(environment), environment)


def _check_port(port: int) -> None:
    """Check that the webserver can listen; if it could not, Dagster's daemon would still run unnoticed.

    Raises:
        InputError: the port is invalid, in use, or reserved.

    """
    if not 1 <= port <= MAX_PORT:
        raise InputError(f"--port is {port}: give 1 to {MAX_PORT}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the webserver does
        try:
            probe.bind((HOST, port))
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise InputError(
                f"port {port} {why}: choose another with --port, or `make dev PORT=N`"
            ) from error


def materialize(seed_set: str, given: Mapping[str, Any], environment: Mapping[str, str]) -> int:
    """Materialize all assets of one seed set, print their reports, and return the exit status.

    Raises:
        InputError: the seed set does not exist, or a setting is out of bounds.

    """
    seeds = SeedFolder(Places.from_environment(environment).seeds_uri)
    own = seeds.settings(seeds.find(seed_set))
    RetrievalConfig(**given).resolve(Defaults.from_environment(environment), own, seed_set)
    job = build_defs(environment, {"console": console}).resolve_job_def(JOB)
    with _kept_instance(environment) as (kept, tags):
        kept.add_dynamic_partitions(SEED_SETS, [seed_set])
        result = job.execute_in_process(
            partition_key=seed_set,
            instance=kept,
            tags=tags,
            raise_on_error=False,
            run_config={
                "resources": {
                    "retrieval_config": {"config": {k: v for k, v in given.items() if v is not None}}
                },
                **CONSOLE,
            },
        )
    if not result.success:
        if _was_interrupted(result):
            raise KeyboardInterrupt
        for failure in _failures(result):
            _print_error(failure, environment)
        return 1
    _print_report(result)
    return 0


@contextmanager
def _kept_instance(
    environment: Mapping[str, str],
) -> Iterator[tuple[dg.DagsterInstance, Mapping[str, str]]]:
    """Open the instance for runs of the code location, with tags that identify this process."""
    with instance(environment) as kept, process_lock() as tags:
        for run_id in fail_abandoned_runs(kept):
            print(f"run {run_id} was killed; it is now marked as failed")
        give_origin(kept)
        yield kept, tags


@contextmanager
def instance(environment: Mapping[str, str]) -> Iterator[dg.DagsterInstance]:
    """Open the Dagster instance of this folder, which `laion-assets dev` uses too."""
    home = _home(environment)
    with _keeping_history(home):
        with locked_folder(home):  # two processes that create the tables of a new history fail
            opened = dg.DagsterInstance.from_config(str(home))
        with opened:
            yield opened


@contextmanager
def _keeping_history(home: Path) -> Iterator[None]:
    """Convert errors of Dagster's storage to one sentence.

    Raises:
        InputError: its database or its folder cannot be written or reached.

    """
    try:
        yield
    except (DBAPIError, OSError) as error:
        if isinstance(error, OSError) and not str(error.filename or "").startswith(str(home)):
            raise
        why = error.orig if isinstance(error, DBAPIError) else error.strerror
        raise InputError(
            f"Dagster's history in {home} cannot be written or reached ({why}): free space there, check "
            "its permissions, or let DAGSTER_HOME name another folder"
        ) from error


def _home(environment: Mapping[str, str]) -> Path:
    """Return the folder of Dagster's configuration, and create it if there is none.

    It is DAGSTER_HOME if set. Otherwise it is the working directory if that has a dagster.yaml, as in a
    checkout, or else the folder of the history.
    """
    if environment.get("DAGSTER_HOME"):
        return Path(environment["DAGSTER_HOME"]).expanduser()
    if Path(INSTANCE_FILE).exists():
        return Path.cwd()
    home = (DATA / "dagster").absolute()
    with _keeping_history(home):
        home.mkdir(parents=True, exist_ok=True)
        if not (home / INSTANCE_FILE).exists():
            packaged = resources.files("laion_assets.defs") / "instance.yaml"
            (home / INSTANCE_FILE).write_text(packaged.read_text())
    return home


@dg.logger
def console(_: dg.InitLoggerContext) -> logging.Logger:
    """Print a short line for each message of an asset, without Dagster's own events."""
    logger = logging.Logger("laion_assets", logging.INFO)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_ShortLine())
    handler.addFilter(_is_from_an_asset)
    logger.addHandler(handler)
    return logger


def _is_from_an_asset(record: logging.LogRecord) -> bool:
    """Filter out Dagster's events; failures are printed at the end."""
    is_event = getattr(record, "dagster_meta", {}).get("dagster_event") is not None
    return not is_event and record.levelno < logging.ERROR


class _ShortLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return `asset: message`."""
        meta = getattr(record, "dagster_meta", {})
        asset = asset_of_step(meta.get("step_key") or "run")
        return f"{asset}: {meta.get('orig_message', record.getMessage())}"


def _was_interrupted(result: dg.ExecuteInProcessResult) -> bool:
    """Return whether a signal ended a run, in a step or between two steps."""
    return any(
        event.job_failure_data.failure_reason is RunFailureReason.UNEXPECTED_TERMINATION
        for event in result.filter_events(lambda event: event.is_run_failure)
    )


def _failures(result: dg.ExecuteInProcessResult) -> Iterator[str]:
    for event in result.filter_events(lambda event: event.is_step_failure):
        failure = event.step_failure_data
        described = failure.user_failure_data and failure.user_failure_data.description
        asset = asset_of_step(str(event.step_key))
        if failure.error and failure.error.cls_name == BLOCKED_BY_A_CHECK:
            described = "; ".join(_failed_checks(result, asset))
        yield f"{asset}: {described or failure.error_display_string}"


def _failed_checks(result: dg.ExecuteInProcessResult, asset: str) -> Iterator[str]:
    for check in result.get_asset_check_evaluations():
        is_error = check.severity is dg.AssetCheckSeverity.ERROR and not check.passed
        if is_error and check.asset_key.to_user_string() == asset:
            yield f"check {check.check_name} failed: {check.description}"


def _print_report(result: dg.ExecuteInProcessResult) -> None:
    reported = {
        event.asset_key.path[-1]: figures_of(made.metadata)
        for event in result.get_asset_materialization_events()
        if event.asset_key and (made := event.materialization)
    }
    shown = {name: _from_here(figures["dagster/uri"]) for name, figures in reported.items()}
    print()
    print(f"{'':14}{'requested':>10}{'received':>10}{'kept':>10}")
    for name in ("knn_urls", "centroid_urls"):
        counts = [f"{reported[name][key]:>10,}" for key in ("requested", "received", "kept")]
        print(f"{name:14}{''.join(counts)}   {shown[name]}")
    combined = reported["combined_urls"]
    print(f"{'combined_urls':34}{combined['kept']:>10,}   {shown['combined_urls']}")
    if "target images" in combined:
        print(
            f"target {combined['target images']:,}: {combined['kept']:,} kept of the "
            f"{combined[FOR_THE_TARGET]:,} that it needs"
        )
    if "picture" in combined:
        print(f"\ncontact sheet: {_from_here(combined['picture'])}")


def _from_here(place: object) -> str:
    """Shorten a path below this folder; return other locations unchanged."""
    path, here = Path(str(place)), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(place)


if __name__ == "__main__":
    sys.exit(main())
