"""Open files: as many as the system allows, and one sentence if they are too few."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from laion_assets.io.errors import InputError

TOO_MANY_OPEN_FILES = {errno.EMFILE, errno.ENFILE}


@contextmanager
def enough_descriptors() -> Iterator[None]:
    """Allow as many open files as the hard limit of the process; convert the error if it is too low.

    Raises:
        InputError: the block opens more files than that.

    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    except OSError as error:
        if error.errno not in TOO_MANY_OPEN_FILES:
            raise
        raise InputError(
            f"this process may open only {hard:,} files at once, which is too few ({error.strerror}): "
            "raise the limit, for example with `ulimit -n 4096`"
        ) from error
