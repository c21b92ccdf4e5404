"""Convert errors of the library to failed steps: one sentence each, with the platform's own names."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from laion_assets.io.errors import InputError
from laion_assets.io.text import printable

STAGE_AGAIN = "materialize staged_laion_index again"


def sentence(error: InputError) -> str:
    """Return an error's message with the name by which a user of the platform knows its remedy.

    What is not printable in it, such as in names of files, is escaped.
    """
    message = printable(str(error))
    if error.about is None:
        return message
    name = STAGE_AGAIN if error.about == "staged_index" else f"LAION_{error.about.upper()}"
    return f"{message} ({name})"


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
