"""The settings of a request: what there is to set, what is allowed, and where each value came from.

What is given for a run (in the Launchpad or on the command line) comes first, then the settings.yaml of
the seed set, then the environment, then a default. What must not live here: places, reading files.
Dagster's concept: https://docs.dagster.io/guides/build/external-resources
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dagster as dg
from pydantic import Field

from laion_assets.io.errors import InputError
from laion_assets.search.filters import BlockList, conditions_in
from laion_assets.search.sizing import Yield, counts_for
from laion_assets.seeds.seed_sets import SETTINGS_FILE

DEFAULTS: Mapping[str, Any] = {
    "nb_images_knn": 50,
    "nb_images_centroid": 500,
    "target_images": None,
    "dedup_threshold": 0.94,
    "nprobe": None,
    "filters": None,
}
KINDS: Mapping[str, type] = {
    "nb_images_knn": int,
    "nb_images_centroid": int,
    "target_images": int,
    "dedup_threshold": float,
    "nprobe": int,
    "filters": str,
}
KIND_NAMES: Mapping[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text (quote it)",
}
BLOCK_LIST_SETTING = "LAION_BLOCK_LIST"
BLOCK_LIST = "block_list"  # a place, and so no setting of a request; recorded with them
COUNTS = ("nb_images_knn", "nb_images_centroid")
MANY = 1e300  # beyond that numbers are not numbers any more
FOR_THIS_RUN = "Launchpad or command line"


def variable_of(name: str) -> str:
    """Name the variable of the environment that stands for a setting."""
    return f"LAION_{name.upper()}"


@dataclass(frozen=True)
class Settings:
    """The settings of one request, and where each came from.

    Attributes:
        nb_images_knn: images for each seed; None where they follow from the target.
        nb_images_centroid: images around the mean; None likewise.
        target_images: images wanted in the combined table; None where the two counts are given.
        dedup_threshold: cosine above which two images are near-duplicates.
        nprobe: inverted lists to look into; None to choose it from the number of images.
        filters: conditions on the metadata; None for none.
        origins: of each setting that somebody or a default has set, if only to none.

    """

    nb_images_knn: int | None
    nb_images_centroid: int | None
    target_images: int | None
    dedup_threshold: float
    nprobe: int | None
    filters: str | None
    origins: Mapping[str, str]

    def values(self) -> dict[str, Any]:
        """The settings alone."""
        return {name: getattr(self, name) for name in DEFAULTS}

    def recorded(self, block_list: BlockList | str | None = None) -> dict[str, Any]:
        """The settings and their origins, as tables and reports keep them.

        Args:
            block_list: the list itself, or what was told of it; None where there is none.

        """
        told = None if block_list is None else str(block_list)
        listed = {BLOCK_LIST: BLOCK_LIST_SETTING} if told else {}
        return self.values() | {BLOCK_LIST: told, "origins": {**self.origins, **listed}}

    def sized(self, seeds: int, yielded: Yield, rows: int | None = None) -> Settings:
        """Compute the two counts from the target; nothing to do where they are given.

        Args:
            seeds: how many there are.
            yielded: which share of what is requested is kept.
            rows: of the index, more than which are never asked for.

        """
        if self.target_images is None:
            return self
        counts = counts_for(self.target_images, seeds, yielded.share, rows)
        origin = f"half of target_images, at {yielded}"
        if rows in (counts.nb_images_knn, counts.nb_images_centroid):
            origin += f", and no more than the {rows:,} rows of the index"
        return replace(
            self,
            nb_images_knn=counts.nb_images_knn,
            nb_images_centroid=counts.nb_images_centroid,
            origins={**self.origins} | dict.fromkeys(COUNTS, origin),
        )


class RetrievalConfig(dg.ConfigurableResource[None]):
    """How many images to ask for, and how alike two may be.

    What is left empty comes from the settings.yaml of the seed set, then the environment
    (LAION_NB_IMAGES_KNN and so on), then the default. Numbers given here hold for this run only.
    """

    nb_images_knn: int | None = Field(
        default=None,
        description=f"Images wanted for each seed, at least 1 (default {DEFAULTS['nb_images_knn']})",
    )
    nb_images_centroid: int | None = Field(
        default=None,
        description="Images wanted around the mean of the seeds, at least 1 "
        f"(default {DEFAULTS['nb_images_centroid']})",
    )
    target_images: int | None = Field(
        default=None,
        description="Images wanted in the combined table, at least 1, in place of the two numbers above: "
        "half of them from each strategy, more being asked for by the yield of the last run",
    )
    dedup_threshold: float | None = Field(
        default=None,
        description="Cosine above which two images are near-duplicates, over 0 up to 1 "
        f"(default {DEFAULTS['dedup_threshold']}); 1 keeps all",
    )
    nprobe: int | None = Field(
        default=None,
        description="Inverted lists to probe, at least 1 (default: chosen from the number of images)",
    )
    filters: str | None = Field(
        default=None,
        description="Conditions on columns of the metadata, such as punsafe < 0.5 and width >= 256 "
        "(default: none)",
    )

    def resolve(
        self,
        environment: Mapping[str, str],
        own: Mapping[str, Any] | None = None,
        seed_set: str = "",
    ) -> Settings:
        """Settle every setting: for this run, then the seed set's own, then environment, then default.

        Of the two counts and the target, what is given nearer replaces what is given further.

        Args:
            environment: where LAION_NB_IMAGES_KNN and so on may be set.
            own: what the settings.yaml of the seed set says.
            seed_set: its name, for messages and origins.

        Raises:
            InputError: names the setting, its value, where it came from, and what is allowed.

        """
        levels = (
            _given(self),
            _own(own or {}, f"{seed_set}/{SETTINGS_FILE}"),
            _from_environment(environment),
        )
        chosen = {
            name: UNSET if default is None else _Value(default, "default")
            for name, default in DEFAULTS.items()
        }
        for level in reversed(levels):
            chosen |= level
        chosen |= _how_many(levels)
        for name, value in chosen.items():
            _check(name, value)
        if not chosen["filters"].value:  # an empty text: those of levels further away do not hold
            chosen["filters"] = replace(chosen["filters"], value=None)
        return Settings(
            **{name: value.value for name, value in chosen.items()},
            origins={name: value.origin for name, value in chosen.items() if value != UNSET},
        )


@dataclass(frozen=True)
class _Value:
    value: Any
    origin: str


_Level = Mapping[str, _Value]
UNSET = _Value(None, "not set")


def _given(config: RetrievalConfig) -> _Level:
    given = {name: getattr(config, name) for name in DEFAULTS}
    return {name: _Value(value, FOR_THIS_RUN) for name, value in given.items() if value is not None}


def _own(values: Mapping[str, Any], where: str) -> _Level:
    for name, value in values.items():
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KINDS)}"
            raise InputError(f"{where} sets {name[:60]!r}, which is no setting: {hint}")
        if not _is_of_kind(value, KINDS[name]):
            raise InputError(
                f"{where} sets {name} to {_shown(value)}, which is not {KIND_NAMES[KINDS[name]]}: "
                "correct or remove it"
            )
    return {name: _Value(KINDS[name](value), where) for name, value in values.items()}


def _from_environment(environment: Mapping[str, str]) -> _Level:
    variables = {name: variable_of(name) for name in DEFAULTS}
    return {
        name: _Value(_read(environment[variable], name, variable), variable)
        for name, variable in variables.items()
        if environment.get(variable)
    }


def _read(text: str, name: str, variable: str) -> Any:
    try:
        return KINDS[name](text)
    except ValueError as error:
        raise InputError(
            f"{variable} is {text!r}, which is not {KIND_NAMES[KINDS[name]]}: correct or unset it"
        ) from error


def _is_of_kind(value: Any, kind: type) -> bool:
    if isinstance(value, bool):  # which Python counts among the whole numbers
        return False
    if kind is float:
        return isinstance(value, int | float) and abs(value) < MANY
    return isinstance(value, kind)


def _shown(value: Any) -> str:
    """Return what stands in a YAML file, for a message: short, whatever is nested in it."""
    if isinstance(value, dict | list | set):
        return "a list"
    return "nothing" if value is None else repr(value)[:60]


def _how_many(levels: Sequence[_Level]) -> _Level:
    """Unset the target or the two counts: the nearest level that has either says which it is to be."""
    for level in levels:
        counts = [name for name in COUNTS if name in level]
        if counts and "target_images" in level:
            one, other = level["target_images"], level[counts[0]]
            raise InputError(
                f"target_images is {one.value} (from {one.origin}) and {counts[0]} is {other.value} "
                f"(from {other.origin}): give the target or the two numbers, not both"
            )
        if counts:
            return {"target_images": UNSET}
        if "target_images" in level:
            return dict.fromkeys(COUNTS, UNSET)
    return {}


def _check(name: str, chosen: _Value) -> None:
    if chosen.value is None:
        return
    if name == "dedup_threshold":
        if not 0 < chosen.value <= 1:
            raise InputError(
                f"dedup_threshold is {chosen.value} (from {chosen.origin}): give a cosine over 0 and up "
                "to 1, where 1 keeps all"
            )
    elif name == "filters":
        conditions_in(chosen.value, chosen.origin)
    elif chosen.value < 1:
        raise InputError(f"{name} is {chosen.value} (from {chosen.origin}): give 1 or more")
