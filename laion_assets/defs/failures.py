"""Convert errors of the library to failed steps: one sentence each, with the platform's own names."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from laion_assets.io.errors import InputError
from laion_assets.io.text import printable

REMEDIES = {
    "staged_index": "materialize staged_laion_index again",
    "trained_index": "materialize trained_index",
    "index_shards": "materialize these partitions of index_shards",
}


def sentence(error: InputError) -> str:
    """Return an error's message with the name by which a user of the platform knows its remedy.

    What is not printable in it, such as in names of files, is escaped.
    """
    message = printable(str(error))
    if error.about is None:
        return message
    return f"{message} ({REMEDIES.get(error.about, f'LAION_{error.about.upper()}')})"


@contextmanager
def as_failures() -> Iterator[None]:
    """Turn every error into a failure of the step that is not retried.

    Steps are retried when their pod was evicted or killed, which raises nothing here.
    """
    try:
        yield
    except dg.Failure:
        raise
    except InputError as error:
        raise dg.Failure(description=sentence(error), allow_retries=False) from None
    except Exception as error:
        described = f"{type(error).__name__}: {error}"
        raise dg.Failure(description=described, allow_retries=False) from error
