"""The settings of a request: declare them once, resolve them from four levels, and record their values.

`Settings` declares the type, bounds, default and help of every setting. The Launchpad
(`RetrievalConfig`), the command line, `settings.yaml`, the environment (`LAION_<NAME>`) and the tables in
the documentation are derived from it. The external asset `retrieval_settings` in `sources` makes tables
stale if settings change.

Dagster's concept: https://docs.dagster.io/guides/build/external-resources
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, get_args

import dagster as dg
from annotated_types import Ge, Gt, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic.fields import FieldInfo

from laion_assets.io.errors import InputError
from laion_assets.search.filters import conditions_in
from laion_assets.search.near_duplicates import DEDUP_THRESHOLD
from laion_assets.search.sizing import EXPECT_ALIVE, images_wanted
from laion_assets.seeds.settings_file import SETTINGS_FILE

COUNTS = ("nb_images_knn", "nb_images_centroid")
TARGET, ALIVE = "target_images", "expect_alive"
TEAM = "team"  # in settings.yaml only; it tags runs, and changes no table
BLOCK_LIST = "block_list"  # set per deployment; recorded with the settings
NONE = "none"  # shown for a setting without a value
OF_SEEDS = {"max_bad_images"}  # settings of seeds, which no search uses
THIS_RUN = "Launchpad or command line"
KIND_NAMES: Mapping[type, str] = {int: "a whole number", float: "a number", str: "text"}
SHOWN_CHARACTERS = 60  # characters of a wrong value


def _conditions(text: str) -> str:
    conditions_in(text)
    return text


class Settings(BaseModel):
    """The settings of one request. None means that a value is chosen for the request, or not used."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    nb_images_knn: int | None = Field(50, ge=1, description="Images requested for each seed")
    nb_images_centroid: int | None = Field(
        500, ge=1, description="Images requested around the mean of the seeds"
    )
    target_images: int | None = Field(
        None,
        ge=1,
        description="Images wanted whose URLs work. Replaces the two numbers above: each search "
        "continues until the combined table holds target_images / expect_alive images, or the index has "
        "no more",
    )
    expect_alive: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Expected share of URLs that work; if unset, what the check urls_alive measured in "
        f"the set's last run, or {EXPECT_ALIVE}. Only used with target_images",
    )
    dedup_threshold: float = Field(
        DEDUP_THRESHOLD,
        gt=0,
        le=1,
        description="Cosine above which two images are near-duplicates; 1 keeps all",
    )
    nprobe: int | None = Field(
        None, ge=1, description="Inverted lists to probe; chosen from the number of images if unset"
    )
    max_bad_images: float = Field(
        0.05, ge=0, le=1, description="Share of a seed set's images that may be unusable"
    )
    filters: Annotated[str, AfterValidator(_conditions)] | None = Field(
        None,
        description="Conditions on metadata columns, joined by `and`, such as "
        "`punsafe < 0.5 and width >= 256`",
    )


FIELDS: Mapping[str, FieldInfo] = Settings.model_fields


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"LAION_{name.upper()}"


def kind_of(name: str) -> type:
    """Return the Python type of a setting: int, float or str."""
    annotation = FIELDS[name].annotation
    return next(kind for kind in KIND_NAMES if kind in (annotation, *_nested(annotation)))


def allowed(name: str) -> str:
    """Describe in words the values that a setting accepts."""
    bounds = {type(bound): bound for bound in FIELDS[name].metadata}
    words = [KIND_NAMES[kind_of(name)]]
    if Ge in bounds:
        words.append(f"of {bounds[Ge].ge} or more")
    if Gt in bounds:
        words.append(f"above {bounds[Gt].gt}")
    if Le in bounds:
        words.append(f"up to {bounds[Le].le}")
    return " ".join(words)


def _nested(annotation: Any) -> tuple[Any, ...]:
    return tuple(part for arg in get_args(annotation) for part in (arg, *_nested(arg)))


# --- the record -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResolvedSettings:
    """The settings of one request as used, with the origin of each.

    Attributes:
        values: values as used.
        origins: origins of the settings, by name; some settings have none.
        computed: names of values that are computed from others or from the index, not requested.
        block_list: description of the block list; None without one.

    """

    values: Settings
    origins: Mapping[str, str]
    computed: frozenset[str] = frozenset()
    block_list: str | None = None

    def asked(self) -> dict[str, Any]:
        """Return the requested settings, with the block list; computed and unused values are None."""
        values = self.values.model_dump(exclude=OF_SEEDS)
        left_out = self.computed | ({ALIVE} if self.values.target_images is None else set())
        return {name: None if name in left_out else values[name] for name in values} | {
            BLOCK_LIST: self.block_list
        }

    @property
    def images(self) -> int | None:
        """Number of images that the target requires in the combined table; None without a target."""
        target, alive = self.values.target_images, self.values.expect_alive
        return None if target is None or alive is None else images_wanted(target, alive)

    def with_expect_alive(self, share: float, origin: str) -> ResolvedSettings:
        """Return the settings with the share of URLs that is expected to work, unless it was given."""
        if self.values.target_images is None or self.values.expect_alive is not None:
            return self
        return self._with({ALIVE: share}, origin)

    def with_nprobe(self, nprobe: int | None) -> ResolvedSettings:
        """Return the settings with the actual number of probed lists."""
        if nprobe == self.values.nprobe:
            return self
        asked = self.origins.get("nprobe")
        origin = f"{asked}, capped at the index's lists" if asked else "chosen from the number of images"
        return self._with({"nprobe": nprobe}, origin)

    def _with(self, computed: Mapping[str, Any], origin: str) -> ResolvedSettings:
        return replace(
            self,
            values=self.values.model_copy(update=dict(computed)),
            origins={**self.origins} | dict.fromkeys(computed, origin),
            computed=self.computed | computed.keys(),
        )

    def rows(self) -> list[dict[str, str]]:
        """Return a row for each setting with an origin, for tables in the UI."""
        values = self.values.model_dump() | {BLOCK_LIST: self.block_list}
        return [
            {"setting": name, "value": _or_none(values[name]), "from": origin}
            for name, origin in self._all_origins().items()
        ]

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> ResolvedSettings:
        """Read the output of `rows`, which does not say what was computed.

        Raises:
            KeyError, ValueError: another release with other settings wrote it.

        """
        values = {row["setting"]: None if row["value"] == NONE else row["value"] for row in rows}
        block_list = values.pop(BLOCK_LIST, None)
        origins = {row["setting"]: row["from"] for row in rows if row["setting"] in values}
        return cls(Settings(**dict.fromkeys(FIELDS) | values), origins, block_list=block_list)

    def _all_origins(self) -> dict[str, str]:
        return {**self.origins} | ({BLOCK_LIST: variable_of(BLOCK_LIST)} if self.block_list else {})

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object for `from_json`."""
        return {
            "values": self.values.model_dump(),
            "origins": dict(self.origins),
            "computed": sorted(self.computed),
            BLOCK_LIST: self.block_list,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> ResolvedSettings:
        """Read the output of `to_json`.

        Raises:
            ValueError: another release with other settings wrote it.

        """
        return cls(
            Settings(**stored["values"]),
            stored["origins"],
            frozenset(stored["computed"]),
            stored[BLOCK_LIST],
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe how two requests differ, such as "nb_images_knn 830 -> 1000".

    Args:
        before: the earlier output of `ResolvedSettings.asked`; what is None may be left out.
        now: its current output.

    """
    return [
        f"{name} {_or_none(before.get(name))} -> {_or_none(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def _or_none(value: Any) -> str:
    return NONE if value is None else str(value)


# --- where settings come from ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """A given value that is not checked yet."""

    value: Any
    origin: str
    is_text: bool = False


_Level = Mapping[str, _Given]


@dataclass(frozen=True)
class Defaults:
    """Settings from the environment, the fallback for runs and seed sets.

    Attributes:
        variables: text of each `LAION_<NAME>` that is set, by name of the setting.

    """

    variables: Mapping[str, str]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Defaults:
        """Read the variables of all settings; they are checked later, when a request is resolved."""
        found = {name: environment.get(variable_of(name)) for name in FIELDS}
        return cls({name: text for name, text in found.items() if text})

    def _level(self) -> _Level:
        """Return the variables as one level of settings."""
        return {
            name: _Given(text, variable_of(name), is_text=True) for name, text in self.variables.items()
        }


def _as_launchpad_fields() -> dict[str, Any]:
    """Return the fields of `Settings`, each optional, because empty fields fall back to other levels."""

    def described(field: FieldInfo) -> str:
        default = "" if field.default is None else f" (default {field.default})"
        return f"{field.description}{default}"

    return {
        name: (kind_of(name) | None, Field(None, description=described(field)))
        for name, field in FIELDS.items()
    }


_Launchpad: Any = create_model(
    "_Launchpad", __base__=dg.ConfigurableResource, __module__=__name__, **_as_launchpad_fields()
)


class RetrievalConfig(_Launchpad):  # type: ignore[misc]  # its fields are those of Settings
    """How many images to request, and how similar two images may be.

    Empty fields are taken from the settings.yaml of the seed set, then from the environment
    (LAION_NB_IMAGES_KNN and so on), then from the defaults. Values given here apply to this run only.
    """

    def resolve(
        self,
        defaults: Defaults,
        of_seed_set: Mapping[str, Any] | None = None,
        seed_set: str = "",
        block_list: str | None = None,
    ) -> ResolvedSettings:
        """Resolve every setting, in this order: this run, the seed set, the environment, the default.

        The first level that gives the target or one of the two counts decides which of them is used. A
        value of this run that equals what applies without it is not the run's: the Launchpad shows
        current values, and most are left as they are.

        Args:
            defaults: settings of the environment.
            of_seed_set: contents of the seed set's settings.yaml.
            seed_set: name of the seed set, for messages and origins.
            block_list: description of the block list, to be recorded.

        Raises:
            InputError: a setting is wrong; the message names the setting, its value, its origin, and what
                is allowed.

        """
        below = (
            _file_level(of_seed_set or {}, f"{seed_set}/{SETTINGS_FILE}"),
            defaults._level(),
        )
        own = self._level()
        if own:
            with suppress(InputError):  # a value of this run may replace a wrong one
                without = _resolved(below, block_list).values
                own = {name: each for name, each in own.items() if each.value != getattr(without, name)}
        return _resolved((own, *below), block_list)

    def _level(self) -> _Level:
        given = {name: getattr(self, name) for name in FIELDS}
        return {name: _Given(value, THIS_RUN) for name, value in given.items() if value is not None}


def team_of(values: Mapping[str, Any], origin: str) -> str | None:
    """Return the team that a seed set's settings.yaml names, which tags its runs; None without one.

    Raises:
        InputError: it is not a name.

    """
    if TEAM not in values:
        return None
    team = values[TEAM]
    if not isinstance(team, str) or not _TEAM.fullmatch(team):
        raise InputError(
            f"{TEAM} is {_shown(team)} (from {origin}): give at most 60 letters, digits, - and _"
        )
    return team


_TEAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")


def _resolved(levels: Sequence[_Level], block_list: str | None) -> ResolvedSettings:
    """Resolve every setting from levels, the first of which counts most."""
    chosen = {
        name: _Given(field.default, "default")
        for name, field in FIELDS.items()
        if field.default is not None
    }
    for level in reversed(levels):
        chosen |= level
    for name in _unused(levels):
        chosen.pop(name, None)
    checked = {name: _checked(name, given) for name, given in chosen.items()}
    values = {name: None if checked.get(name) == "" else checked.get(name) for name in FIELDS}
    origins = {name: chosen[name].origin for name in FIELDS if name in chosen}
    return ResolvedSettings(Settings.model_validate(values), origins, block_list=block_list)


def _file_level(values: Mapping[str, Any], origin: str) -> _Level:
    team_of(values, origin)
    values = {name: value for name, value in values.items() if name != TEAM}
    for name in values:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(FIELDS)}"
            raise InputError(f"{origin} sets {name[:SHOWN_CHARACTERS]!r}, which is not a setting: {hint}")
    return {name: _Given(value, origin) for name, value in values.items()}


def _checked(name: str, given: _Given) -> Any:
    """Return a value in the type of its setting.

    Raises:
        InputError: the value is wrong; the message names the setting, its value, its origin and what is
            allowed.

    """
    if given.value is None:  # an empty value in a settings file; a missing line is not in `given`
        raise InputError(f"{name} is empty (from {given.origin}): give {allowed(name)}, or remove it")
    field = FIELDS[name]
    annotation: Any = Annotated[field.annotation, field]
    adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=_FINITE)
    try:
        if given.is_text:
            return adapter.validate_strings(given.value)
        return adapter.validate_python(given.value, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        if isinstance(reason := problem.get("ctx", {}).get("error"), InputError):
            raise InputError(f"{name} (from {given.origin}): {reason}") from error
        raise InputError(
            f"{name} is {_shown(given.value)} (from {given.origin}): give {allowed(name)}"
        ) from error


_FINITE = ConfigDict(allow_inf_nan=False)


def _shown(value: Any) -> str:
    """Return a value of a settings file for a message, shortened however deeply it is nested."""
    if isinstance(value, dict | list | set):
        return "a list"
    return repr(value)[:SHOWN_CHARACTERS]


def _unused(levels: Sequence[_Level]) -> Sequence[str]:
    """Return the names that the first level makes unused: the target, or the two counts."""
    for level in levels:
        counts = [name for name in COUNTS if name in level]
        if counts and TARGET in level:
            target, count = level[TARGET], level[counts[0]]
            raise InputError(
                f"{TARGET} is {target.value} (from {target.origin}) and {counts[0]} is {count.value} "
                f"(from {count.origin}): give the target or the two numbers, not both"
            )
        if counts:
            return [TARGET]
        if TARGET in level:
            return COUNTS
    return [TARGET]
