"""Convert errors of the library to failed steps, with one sentence that uses the platform's names."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from laion_assets.io.errors import InputError
from laion_assets.io.storage import first_line
from laion_assets.io.text import printable

NO_THREAD = "can't start new thread"  # Python's words if there is no memory for its stack
REMEDIES = {
    "staged_index": "materialize staged_laion_index or a seed set",
    "trained_index": "materialize trained_index",
    "index_shards": "materialize these partitions of index_shards",
}


def sentence(error: InputError) -> str:
    """Return an error's message with the variable or action that a user needs for the remedy.

    Unprintable characters, for example in file names, are escaped.
    """
    message = printable(str(error))
    if error.about is None:
        return message
    return f"{message} ({REMEDIES.get(error.about, f'LAION_{error.about.upper()}')})"


@contextmanager
def as_failures() -> Iterator[None]:
    """Convert every error to a step failure that is not retried.

    Only steps of evicted or killed pods are retried; these raise no error here.
    """
    try:
        yield
    except dg.Failure:
        raise
    except InputError as error:
        raise dg.Failure(description=sentence(error), allow_retries=False) from None
    except Exception as error:
        described = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or str(error) == NO_THREAD:
            described = (
                f"there is not enough memory ({first_line(error)}): give the step more, or request fewer "
                "images"
            )
        raise dg.Failure(description=described, allow_retries=False) from error
