"""Whether a set was made with the settings that a run would use now, a change Dagster does not see.

The step that makes `combined_urls` compares when it ends, and a sensor does when the environment has
changed since. What was given for one run only is no change, but is told of.
What must not live here: what settings there are, and where they come from (settings).
Dagster's concept: https://docs.dagster.io/guides/test/asset-checks
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from laion_assets.partitions import seed_sets
from laion_assets.past_runs import MADE_WITH, OWN_SETTINGS, materializations
from laion_assets.retrieval.errors import InputError
from laion_assets.retrieval.seeds import SETTINGS_FILE
from laion_assets.retrieval.tables import Provenance
from laion_assets.settings import (
    CHOSEN,
    COUNTS,
    DEFAULTS,
    FOR_THIS_RUN,
    RetrievalConfig,
    Settings,
)

SECONDS_BETWEEN_TICKS = 60
COMBINED = dg.AssetKey("combined_urls")
# Settings that are one decision: a target stands in place of the two counts.
DECISIONS = (("target_images", *COUNTS), ("dedup_threshold",), ("nprobe",), ("filters",))

with warnings.catch_warnings():
    warnings.simplefilter("ignore", dg.PreviewWarning)  # as with the other checks of a seed set
    SETTINGS_AS_NOW = dg.AssetCheckSpec(
        "settings_as_now",
        asset=COMBINED,
        description="The set was made with the settings that a run would use now. A warning. Remedy: "
        "materialize the set again, or write into its settings.yaml what is to stay.",
        partitions_def=seed_sets,
    )


@dataclass(frozen=True)
class Difference:
    """Settings that a set was made with, and those of now in their place, each in words."""

    made_with: str
    now: str


@dataclass(frozen=True)
class Comparison:
    """How the settings of a set differ from those of now.

    Attributes:
        changed: the environment, or a default, says something else now.
        given: was said for that run alone.

    """

    changed: Sequence[Difference]
    given: Sequence[Difference]

    def sentence(self, seed_set: str) -> str:
        """Tell what differs, and what to do."""
        parts = [f"made with {change.made_with}, now {change.now}" for change in self.changed]
        parts += [f"materialize {seed_set} again to have it so"] if self.changed else []
        parts += [
            f"{once.made_with} was given for that run alone, the next takes {once.now}"
            for once in self.given
        ]
        parts += [f"what is to stay belongs into {seed_set}/{SETTINGS_FILE}"] if self.given else []
        return "; ".join(parts) or "made with the settings that a run would use now"


def compare(made_with: Mapping[str, Any], now: Settings) -> Comparison:
    """Compare the settings that a set was made with and those of now; a pure function."""
    made, current = _as_asked_for(made_with), now.values()
    changed: list[Difference] = []
    given: list[Difference] = []
    for names in DECISIONS:
        differing = [name for name in names if made[name] != current[name]]
        if differing:
            was_given = any(made_with["origins"].get(name) == FOR_THIS_RUN for name in names)
            (given if was_given else changed).append(_difference(differing, made, now))
    return Comparison(changed, given)


def _as_asked_for(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without what was computed from others."""
    asked = {name: made_with.get(name) for name in DEFAULTS}
    if asked["target_images"] is not None:
        asked |= dict.fromkeys(COUNTS)
    if made_with["origins"].get("nprobe") == CHOSEN:
        asked["nprobe"] = None
    return asked


def _difference(names: Sequence[str], made: Mapping[str, Any], now: Settings) -> Difference:
    current = {name: value for name, value in now.values().items() if value is not None}
    before = [f"{name} {made[name]}" for name in names if made[name] is not None]
    after = [f"{name} {current[name]} ({now.origins[name]})" for name in names if name in current]
    none = f"no {names[0]}"
    return Difference(" and ".join(before) or none, " and ".join(after) or none)


def settings_as_now(origin: Provenance) -> dg.AssetCheckResult:
    """Check a set that was made just now.

    Raises:
        InputError: the settings of now cannot be used.

    """
    found = compare(origin.settings, _now(origin.seed_set, origin.own_settings))
    return dg.AssetCheckResult(
        check_name=SETTINGS_AS_NOW.name,
        passed=not found.changed,
        severity=dg.AssetCheckSeverity.WARN,
        description=found.sentence(origin.seed_set),
    )


def _now(seed_set: str, own: Mapping[str, Any]) -> Settings:
    return RetrievalConfig().resolve(os.environ, own, seed_set)


def build_settings_sensor() -> dg.SensorDefinition:
    """Return the sensor that checks again when settings in the environment have changed."""

    @dg.sensor(
        name="settings_sensor",
        minimum_interval_seconds=SECONDS_BETWEEN_TICKS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Warns of sets that were made with other settings than a run would use now. Starts "
        "nothing; a changed settings.yaml does.",
    )
    def settings_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        seen = _Seen.read(context.cursor)
        made = context.instance.event_log_storage.get_latest_storage_id_by_partition(
            COMBINED, dg.DagsterEventType.ASSET_MATERIALIZATION
        )
        try:
            settings = RetrievalConfig().resolve(os.environ).values()
            changed = settings != seen.settings
            new = {name for name, place in made.items() if changed or place > seen.read_up_to}
            if not new:
                return dg.SkipReason("no other settings, nothing new to compare with them")
            found = {name: last for name in sorted(new) if (last := _Made.last(context.instance, name))}
        except InputError as error:
            return dg.SkipReason(str(error))
        warned = {name for name, last in found.items() if last.comparison.changed}
        # The step has said already that it is as it should be, unless this sensor said otherwise since.
        for name in sorted(warned | (found.keys() & seen.warned)):
            _report(context.instance, name, found[name])
        still = sorted((set(seen.warned) - new) | warned)
        saw = f"{len(new)} sets compared, {len(still)} of all made with other settings"
        told = _Seen(saw, settings, max(made.values()), still)
        return dg.SensorResult(cursor=str(told), skip_reason=saw)

    return settings_sensor


@dataclass(frozen=True)
class _Seen:
    """What the cursor remembers.

    Attributes:
        saw: what the tick saw, first, where one reads it in the UI.
        settings: of the environment and by default.
        read_up_to: storage id of the newest materialization that was compared with them.
        warned: sets that were made with other settings.

    """

    saw: str
    settings: Mapping[str, Any]
    read_up_to: int
    warned: Sequence[str]

    @classmethod
    def read(cls, cursor: str | None) -> _Seen:
        saw, _, rest = (cursor or "").partition("\n")
        return cls(saw, **json.loads(rest)) if rest else cls(saw, {}, 0, ())

    def __str__(self) -> str:
        rest = {name: kept for name, kept in vars(self).items() if name != "saw"}
        return f"{self.saw}\n{json.dumps(rest)}"


@dataclass(frozen=True)
class _Made:
    """A set as it was made last: by which run, and how its settings differ from those of now."""

    run: str
    comparison: Comparison

    @classmethod
    def last(cls, instance: dg.DagsterInstance, seed_set: str) -> _Made | None:
        """Read it from the history; None where that does not say with which settings."""
        past = next(materializations(instance, "combined_urls", seed_set), None)
        made_with = past.figures.get(MADE_WITH) if past else None
        if past is None or made_with is None:
            return None
        return cls(past.run, compare(made_with, _now(seed_set, made_with.get(OWN_SETTINGS, {}))))


def _report(instance: dg.DagsterInstance, seed_set: str, made: _Made) -> None:
    """Check again what a run has made, as a further event of that run.

    As an event of no run, which a sensor may return, Dagster's storage takes the check of a partition
    only once.
    """
    run = instance.get_run_by_id(made.run)
    evaluation = dg.AssetCheckEvaluation(
        asset_key=COMBINED,
        check_name=SETTINGS_AS_NOW.name,
        passed=not made.comparison.changed,
        severity=dg.AssetCheckSeverity.WARN,
        description=made.comparison.sentence(seed_set),
        partition=seed_set,
    )
    event = dg.DagsterEvent(
        dg.DagsterEventType.ASSET_CHECK_EVALUATION.value,
        job_name=run.job_name if run else "",
        event_specific_data=evaluation,
    )
    instance.report_dagster_event(event, run_id=made.run)
