"""The one error that users meet: their input, named, with the remedy."""

from __future__ import annotations


class InputError(ValueError):
    """The input cannot be used. The message names the file, row or setting, and the remedy.

    Attributes:
        about: the parameter of the library that the remedy changes, such as "cache_dir", or
            "staged_index" where the index has to be staged again. A caller who knows it under another
            name, such as an environment variable, adds that name.

    """

    def __init__(self, message: str, about: str | None = None) -> None:
        super().__init__(message)
        self.about = about
