"""The one error users meet: their input, named, with the remedy.

What must not live here: errors of our own making; those stay ordinary exceptions.
"""


class InputError(ValueError):
    """What we were given cannot be used: the message names the file, row or setting, and the remedy."""
