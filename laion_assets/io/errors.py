"""The error for unusable input, which names the input and the remedy."""

from __future__ import annotations


class InputError(ValueError):
    """The input cannot be used. The message names the file, row or setting, and the remedy.

    Attributes:
        about: the parameter of the library that the remedy changes, such as "cache_dir", or
            "staged_index" if the index must be staged again. A caller that uses another name for it, such
            as an environment variable, adds that name.

    """

    def __init__(self, message: str, about: str | None = None) -> None:
        super().__init__(message)
        self.about = about
