"""How errors of the library reach the operator: one sentence, and no retry of what cannot get better.

What must not live here: the errors themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from laion_assets.io.errors import InputError


@contextmanager
def as_failures() -> Iterator[None]:
    """Turn every error into a failure of the step that is not retried, an `InputError` as its sentence.

    What is retried is a step whose pod was evicted or killed, which raises nothing here.
    """
    try:
        yield
    except dg.Failure:
        raise
    except InputError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from None
    except Exception as error:
        sentence = f"{type(error).__name__}: {error}"
        raise dg.Failure(description=sentence, allow_retries=False) from error
