"""How long a run of a small seed set takes in `make dev`, against the command line.

A fresh project runs the demo and starts `make dev`. The same set is then run in turns by the command line
and by a launch in the UI, and a new set is dropped in for the sensor. Prints the seconds and the ratio.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from helpers.webserver import IN_PROGRESS, RAN_BY_THE_DEMO, Project, Run, Webserver, wait_for

REPEATED = 3
DROPPED = "dropped"


def main() -> None:
    """Measure, and print a table."""
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
                for _ in range(REPEATED)
            ]
            after_tick = _dropped(project)
        finally:
            project.dev.press_ctrl_c()
    command_line, ui = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    print(f"`laion-assets materialize {RAN_BY_THE_DEMO}`, from start to exit  {command_line:5.1f} s")
    print(f"launched in the UI, from launch to the end of the run      {ui:5.1f} s")
    print(f"ratio                                                      {ui / command_line:5.2f}")
    print(f"dropped in, from the tick that requests the run to its end {after_tick:5.1f} s")


def _command_line(project: Project, *arguments: str) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "laion_assets.cli", *arguments]
    subprocess.run(command, cwd=project.folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _launched(ui: Webserver) -> float:
    return _seconds(ui, ui.launch(RAN_BY_THE_DEMO))


def _dropped(project: Project) -> float:
    """Copy a seed set of the demo under another name; return how long its run takes."""
    seeds = project.folder / "data" / "seeds"
    shutil.copytree(seeds / RAN_BY_THE_DEMO, seeds / DROPPED)
    (run,) = wait_for("the sensor", lambda: project.ui.runs_of(DROPPED))
    return _seconds(project.ui, run.id)


def _seconds(ui: Webserver, run_id: str) -> float:
    """Return the time from the creation of a run to its end."""
    assert ui.finished(run_id).status == "SUCCESS"
    told = ui.ask(
        "query($run: ID!) { runOrError(runId: $run) { ... on Run { creationTime endTime } } }", run=run_id
    )["runOrError"]
    return float(told["endTime"] - told["creationTime"])


def _wait_until_quiet(ui: Webserver) -> None:
    """Wait until the sensor has run the other sets of the demo."""

    def quiet() -> list[Run]:
        runs = ui.runs()
        sets = {run.seed_set for run in runs}
        return runs if len(sets) > 1 and all(run.status not in IN_PROGRESS for run in runs) else []

    wait_for("the demo's other seed sets", quiet)


if __name__ == "__main__":
    main()
