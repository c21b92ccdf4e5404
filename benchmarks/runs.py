"""How long a run of a small seed set takes in `make dev`, against the command line.

A fresh project runs the demo and starts `make dev`. The same set is then run in turns by the command
line and by a launch in the UI, and new sets are dropped in for the sensor, one after the other. Writes
runs.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from helpers.webserver import IN_PROGRESS, RAN_BY_THE_DEMO, Project, Run, Webserver, wait_for

REPORT = """# Runs of a small seed set

A seed set of the demo with {seeds} seeds, on a machine with {cores} cores and a load of {load:.0f} at the
start; medians of {repeated} runs, in turns. A run in the UI is measured from its launch to its end, the
command line from its start to its exit, and a dropped set from the tick of the sensor that requests its
run to its table. `make bench-runs` measures again.

| | seconds (lowest to highest) | of the command line |
|---|---|---|
{lines}

A run in the UI waits {waiting:.1f} s for its process and {starting:.1f} s for its first step.
"""


@dataclass(frozen=True)
class Times:
    """Seconds of a run, from its creation.

    Attributes:
        launched: until its process was started.
        started: until its process started its first step.
        ended: until its end.

    """

    launched: float
    started: float
    ended: float


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeated", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        root.mkdir()
        project = Project(root)
        _command_line(project, "demo")
        project.dev.start()
        try:
            _wait_until_quiet(project.ui)
            pairs = [
                (_command_line(project, "materialize", RAN_BY_THE_DEMO), _launched(project.ui))
                for _ in range(asked.repeated)
            ]
            dropped = [_dropped(project, f"dropped {number}") for number in range(asked.repeated)]
            seeds = project.ui.materialization("seed_embeddings", RAN_BY_THE_DEMO)["seeds"]
        finally:
            project.dev.press_ctrl_c()
    command_line, launched = ([*one] for one in zip(*pairs, strict=True))
    lines = {
        f"`laion-assets materialize {RAN_BY_THE_DEMO}`": command_line,
        "launched in the UI": [times.ended for times in launched],
        "dropped into the seeds folder": dropped,
    }
    report = REPORT.format(
        seeds=seeds,
        cores=os.cpu_count(),
        load=load,
        repeated=asked.repeated,
        lines="\n".join(
            f"| {name} | {statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | "
            f"{statistics.median(seconds) / statistics.median(command_line):.2f} |"
            for name, seconds in lines.items()
        ),
        waiting=statistics.median(times.launched for times in launched),
        starting=statistics.median(times.started for times in launched),
    )
    asked.output.write_text(report)
    print(report)


def _command_line(project: Project, *arguments: str) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "laion_assets.cli", *arguments]
    subprocess.run(command, cwd=project.folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _launched(ui: Webserver) -> Times:
    """Launch a run in the UI; return its times."""
    run_id = ui.launch(RAN_BY_THE_DEMO)
    assert ui.finished(run_id).status == "SUCCESS"
    told = ui.ask(
        "query($run: ID!) { runOrError(runId: $run) { ... on Run { creationTime stats"
        " { ... on RunStatsSnapshot { launchTime endTime } } stepStats { startTime } } } }",
        run=run_id,
    )["runOrError"]
    began, stats = told["creationTime"], told["stats"]
    first = min(step["startTime"] for step in told["stepStats"])
    return Times(stats["launchTime"] - began, first - began, stats["endTime"] - began)


def _dropped(project: Project, name: str) -> float:
    """Copy a seed set under another name; return the time from the tick that requests its run."""
    seeds = project.folder / "data" / "seeds"
    shutil.copytree(seeds / RAN_BY_THE_DEMO, seeds / name)
    (run,) = wait_for("the sensor", lambda: project.ui.runs_of(name))
    assert project.ui.finished(run.id).status == "SUCCESS"
    (tick,) = (tick for tick in project.ui.ticks() if run.id in tick["runIds"])
    return float(project.table("combined_urls", name).stat().st_mtime - tick["timestamp"])


def _wait_until_quiet(ui: Webserver) -> None:
    """Wait until the sensor has run the other sets of the demo."""

    def quiet() -> list[Run]:
        runs = ui.runs()
        sets = {run.seed_set for run in runs}
        return runs if len(sets) > 1 and all(run.status not in IN_PROGRESS for run in runs) else []

    wait_for("the demo's other seed sets", quiet)


if __name__ == "__main__":
    main()
