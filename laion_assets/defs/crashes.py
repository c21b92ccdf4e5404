"""Report a signal that kills a process while it reads the memory-mapped index.

If the disk cannot read a mapped page, or a damaged file leads to a wrong address, the system sends SIGBUS
or SIGSEGV. No error can be raised any more: Python's fault handler only writes which signal it was. A
shell waits for that line, and then starts this module.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import dagster as dg

from laion_assets.defs.dagster_internals import DagsterHomeNotSetError

STANDARD_ERROR = os.dup(2)  # Dagster redirects it to a file while a step runs
SHELL = 'read -r fault && exec "$0" -m laion_assets.defs.crashes "$fault" "$@"'
CAUSES = {
    "Bus error": "SIGBUS: the disk could not read a part of a file, or the file was cut while in use",
    "Segmentation fault": "SIGSEGV: probably a file of the index is damaged",
}
REMEDY = (
    "run `laion-assets verify --repair`, and look for errors of the disk in the kernel's log (`dmesg`)"
)


@contextmanager
def reported(step: str, run_id: str = "") -> Iterator[None]:
    """Report it to standard error and in the log of the run if a signal kills this process in the block.

    If Python's fault handler is already in use, for example by PYTHONFAULTHANDLER=1, it is left alone.

    Args:
        step: what the process does, for the message.
        run_id: the run, in the instance of DAGSTER_HOME.

    """
    if faulthandler.is_enabled():
        yield
        return
    reading, writing = os.pipe()
    command = ["/bin/sh", "-c", SHELL, sys.executable, step, run_id]
    watcher = subprocess.Popen(  # noqa: S603  # no input of a user
        command, stdin=reading, stderr=STANDARD_ERROR, start_new_session=True
    )
    os.close(reading)
    faulthandler.enable(writing, all_threads=False)
    try:
        yield
    finally:
        faulthandler.disable()
        os.close(writing)
        watcher.wait()


def describe(fault: str, step: str) -> str | None:
    """Describe the end of a process in one sentence; None if it has nothing to do with the index.

    Args:
        fault: the first line of Python's fault handler.
        step: what the process did.

    """
    cause = CAUSES.get(fault.removeprefix("Fatal Python error: "))
    return cause and f"{step} was killed while it read the index, by {cause}{_memory_limit()}; {REMEDY}"


def _memory_limit() -> str:
    """Return a second possible cause: a library may crash where it gets no memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # the process that crashed had the same
    if limit == resource.RLIM_INFINITY:
        return ""
    return f", or `ulimit -v {limit >> 10}` leaves too little memory: raise it"


def main(fault: str, step: str, run_id: str) -> None:
    """Report the end of a process."""
    sentence = describe(fault, step)
    if sentence is None:
        return
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    # Without DAGSTER_HOME, as on the command line, the next command reports that the run was killed.
    with suppress(DagsterHomeNotSetError), dg.DagsterInstance.get() as instance:
        if run := instance.get_run_by_id(run_id):
            instance.report_engine_event(sentence, run, step_key=step)


if __name__ == "__main__":
    main(*sys.argv[1:])
