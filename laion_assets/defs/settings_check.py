"""Whether a set was made with the settings that a run would use now, a change Dagster does not see.

The step that makes `combined_urls` compares when it ends, and a sensor does when the environment has
changed since. What was given for one run only is no change, but is told of.
What must not live here: what settings there are, and where they come from (settings); sensors.
Dagster's concept: https://docs.dagster.io/guides/test/asset-checks
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,
)

from laion_assets.defs.history import MADE_WITH, OWN_SETTINGS, Materialized, materializations
from laion_assets.defs.partitions import seed_sets
from laion_assets.defs.resources import LaionIndex
from laion_assets.defs.settings import (
    BLOCK_LIST,
    COUNTS,
    FOR_THIS_RUN,
    RetrievalConfig,
    Settings,
)
from laion_assets.io.errors import InputError
from laion_assets.io.tables import Provenance
from laion_assets.seeds.seed_sets import SETTINGS_FILE

COMBINED = dg.AssetKey("combined_urls")

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
    """Settings that a set was made with, and those of now in their place, each in words.

    Settings are those that were asked for: counts that follow from a target, or an nprobe that the index
    allows, are none.
    """

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
            f"made with {once.made_with} for that run alone, the next takes {once.now}"
            for once in self.given
        ]
        parts += [f"what is to stay belongs into {seed_set}/{SETTINGS_FILE}"] if self.given else []
        return "; ".join(parts) or "made with the settings that a run would use now"


@dataclass(frozen=True)
class BlockListNow:
    """The block list that a run would use now.

    Attributes:
        version: of its file; empty where there is none, or it cannot be read.
        told: where it is and what is on it, as tables record it; None where there is none.
        wrong: why it cannot be read; empty where it can.

    """

    version: str = ""
    told: str | None = None
    wrong: str = ""


def block_list_now(index: LaionIndex, last: BlockListNow | None = None) -> BlockListNow:
    """Look at the block list; it is read where its file is not as it was the last time."""
    try:
        version = index.block_list_version()
        if last and last.version == version and not last.wrong:
            return last
        listed = index.block_list()
    except InputError as error:
        return BlockListNow(wrong=str(error))
    return BlockListNow(version, None if listed is None else str(listed))


def compare(made_with: Mapping[str, Any], now: Settings, block_list: str | None = None) -> Comparison:
    """Compare the settings that a set was made with and those of now; a pure function.

    Args:
        made_with: as `Settings.recorded` had them.
        now: what a run would use.
        block_list: likewise, in words; None where there is none.

    """
    made_with = {BLOCK_LIST: None} | {**made_with}  # those of older runs do not tell of it
    current = now.recorded(block_list)
    changed: list[Difference] = []
    given: list[Difference] = []
    for names in _decisions(made_with, current):
        differing = [name for name in names if made_with[name] != current[name]]
        by_the_run = [name for name in differing if made_with["origins"].get(name) == FOR_THIS_RUN]
        if by_the_run:
            given.append(
                Difference(_in_words(by_the_run, made_with), _in_words(differing, current, origins=True))
            )
        elif differing:
            changed.append(
                Difference(_in_words(differing, made_with), _in_words(differing, current, origins=True))
            )
    return Comparison(changed, given)


def _decisions(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the names that change together: where a target came or went, the two counts went or came."""
    names = ("target_images", *COUNTS)
    swapped = (one["target_images"] is None) != (other["target_images"] is None)
    how_many = [names] if swapped else [(name,) for name in names]
    return [*how_many, ("dedup_threshold",), ("nprobe",), ("filters",), (BLOCK_LIST,)]


def _in_words(names: Sequence[str], values: Mapping[str, Any], *, origins: bool = False) -> str:
    told = [
        f"{name} {values[name]}" + (f" ({values['origins'][name]})" if origins else "")
        for name in names
        if values[name] is not None
    ]
    return " and ".join(told) or f"no {names[0]}"


def settings_as_now(origin: Provenance, block_list: BlockListNow) -> dg.AssetCheckResult:
    """Check a set that was made just now."""
    passed, told = _judged(origin.seed_set, origin.asked, origin.own_settings, block_list)
    return dg.AssetCheckResult(
        check_name=SETTINGS_AS_NOW.name,
        passed=passed,
        severity=dg.AssetCheckSeverity.WARN,
        description=told,
    )


def _judged(
    seed_set: str, made_with: Mapping[str, Any], own: Mapping[str, Any], block_list: BlockListNow
) -> tuple[bool, str]:
    """Tell whether a set is as the next run would make it, and in words how it differs.

    Settings of now that no run could use are a difference too: the run that made the set may have
    brought its own in their place.
    """
    try:
        if block_list.wrong:
            raise InputError(block_list.wrong)
        now = RetrievalConfig().resolve(os.environ, own, seed_set)
        found = compare(made_with, now, block_list.told)
    except InputError as error:
        return False, f"the next run cannot be made: {error}"
    return not found.changed, found.sentence(seed_set)


@dataclass(frozen=True)
class Made:
    """A set as it was made last.

    Attributes:
        seed_set: the partition.
        run: that made it.
        materialized: as Dagster's history has it.
        as_now: whether its settings are those of now.
        told: in words.

    """

    seed_set: str
    run: dg.DagsterRun
    materialized: Materialized
    as_now: bool
    told: str


def last_made(instance: dg.DagsterInstance, seed_set: str, block_list: BlockListNow) -> Made | None:
    """Compare a set that was made before; None where the history does not say by what, or with what."""
    past = next(materializations(instance, "combined_urls", seed_set), None)
    if past is None or not {MADE_WITH, OWN_SETTINGS} <= past.figures.keys():
        return None
    run = instance.get_run_by_id(past.run)
    if run is None:
        return None
    as_now, told = _judged(seed_set, past.figures[MADE_WITH], past.figures[OWN_SETTINGS], block_list)
    return Made(seed_set, run, past, as_now, told)


def check_again(instance: dg.DagsterInstance, made: Made) -> None:
    """Check again what a run has made, as a further event of that run.

    As an event of no run, which a sensor may return, Dagster's storage takes the check of a partition
    only once. Without the materialization that was checked, the UI shows the check as missing.
    """
    past = made.materialized
    evaluation = dg.AssetCheckEvaluation(
        asset_key=COMBINED,
        check_name=SETTINGS_AS_NOW.name,
        passed=made.as_now,
        target_materialization_data=AssetCheckEvaluationTargetMaterializationData(
            storage_id=past.storage_id, run_id=past.run, timestamp=past.timestamp
        ),
        severity=dg.AssetCheckSeverity.WARN,
        description=made.told,
        partition=made.seed_set,
    )
    event = dg.DagsterEvent(
        dg.DagsterEventType.ASSET_CHECK_EVALUATION.value,
        job_name=made.run.job_name,
        event_specific_data=evaluation,
    )
    instance.report_dagster_event(event, run_id=made.run.run_id)
