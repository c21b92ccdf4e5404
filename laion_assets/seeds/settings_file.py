"""Read the settings file of a seed set: size-limited YAML of plain data, with unique names."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

from laion_assets.io.errors import InputError
from laion_assets.io.storage import open_storage, reaching
from laion_assets.seeds.folder import SEEDS_URI, SeedSet
from laion_assets.seeds.seed_files import SeedFile, UnusableFileError, read_files, verified

SETTINGS_FILE = "settings.yaml"
MAX_SETTINGS_BYTES = 16 << 10
MAX_BITS = 1024  # of a number; settings have lower bounds of their own


def read_settings(uri: str, seed_set: SeedSet) -> dict[str, Any]:
    """Read a seed set's own settings.yaml.

    Args:
        uri: the folder of the seed sets.
        seed_set: the listing of the set.

    Returns:
        Values by name, both unchecked; empty if the set has no settings.yaml.

    Raises:
        InputError: a YAML file has another name, is too large, or does not hold `name: value` lines.

    """
    for file in seed_set.settings_files:
        if file.name != SETTINGS_FILE:
            raise InputError(
                f"{seed_set.name}/{file.name} is not read: the settings of a seed set belong in "
                f"{SETTINGS_FILE}; rename or remove it"
            )
    return _settings_in(uri, seed_set, *seed_set.settings_files) if seed_set.settings_files else {}


def _settings_in(uri: str, seed_set: SeedSet, file: SeedFile) -> dict[str, Any]:
    where = f"{seed_set.name}/{file.name}"
    if file.size > MAX_SETTINGS_BYTES:
        raise InputError(
            f"{where} has {file.size:,} bytes, at most {MAX_SETTINGS_BYTES:,} are allowed: shorten it"
        )
    fs, _ = open_storage(uri, SEEDS_URI)
    try:
        with reaching(uri, SEEDS_URI):
            ((_, content),) = read_files(fs, [file])
        return _parsed(verified(content, file))
    except UnusableFileError as error:
        raise InputError(f"{where} {error}") from error


def _parsed(content: bytes) -> dict[str, Any]:
    """Parse `name: value` lines; aliases and tags that construct objects are refused."""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, yaml.CSafeLoader)):
            raise UnusableFileError("uses an alias (*): write each value where it is used")
        values = yaml.safe_load(content)
        root = yaml.compose(content, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnusableFileError(
            f"is not YAML ({reason}): write one setting per line, as name: value"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UnusableFileError("is not a list of settings: write one per line, as name: value")
    counts = Counter(key.value for key, _ in root.value)
    for name, times in counts.items():
        if times > 1:
            raise UnusableFileError(f"has {name} twice: remove one of them")
    for name, value in values.items():
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise UnusableFileError(f"has a number of {value.bit_length():,} bits for {name}: correct it")
    return values
