"""How errors of the library reach the operator: one sentence, and no retry of what cannot get better.

What must not live here: the errors themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from laion_assets.retrieval.errors import InputError


@contextmanager
def as_failures() -> Iterator[None]:
    """Turn an `InputError` into a failure of the step with the same sentence."""
    try:
        yield
    except InputError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
