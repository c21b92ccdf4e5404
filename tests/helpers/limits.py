"""Run a few lines of Python in a process with little memory and little time."""

import subprocess
import sys

SECONDS = 60


def limited(imports: str, body: str, *arguments: str, memory: int) -> str:
    """Return what the lines print, or the error that they end with.

    Args:
        imports: lines that may take any memory.
        body: lines that may take so much more.
        arguments: of the process.
        memory: bytes of address space.

    """
    program = f"""
import resource, sys
{imports}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {memory}, used + {memory}))
try:
    {body}
except BaseException as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout
