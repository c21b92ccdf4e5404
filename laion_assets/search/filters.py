"""Filters drop images that are on a block list or fail a condition.

A condition compares a metadata column with a number, a quoted word, or true or false. Conditions are
joined by `and`: `punsafe < 0.5 and width >= 256 and NSFW == "UNLIKELY"`. They are parsed, never evaluated
as code. Null and NaN fail every condition, because a missing safety score does not make an image safe.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from laion_assets.io.arrays import Ids, Mask
from laion_assets.io.errors import InputError
from laion_assets.search.block_list import BlockList

COMPARE: Mapping[str, Callable[..., Any]] = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}
EXACTLY: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
BOOLEANS: Mapping[str, bool] = {"true": True, "false": False}
MAX_LENGTH = 4096  # characters of all conditions
CONDITION = re.compile(
    r"""\s*(?P<column>[A-Za-z_]\w*)\s*(?P<comparison><=|>=|==|!=|<|>)\s*
    (?P<value>-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w)|'[^']*'|"[^"]*"|(?:true|false)(?!\w))\s*""",
    re.VERBOSE | re.ASCII,
)
AND = re.compile(r"and\b", re.IGNORECASE)


@dataclass(frozen=True)
class Condition:
    """A comparison that a row must pass.

    Attributes:
        column: the metadata column.
        comparison: one of <, <=, >, >=, ==, !=.
        value: the value that the column is compared with.

    """

    column: str
    comparison: str
    value: float | str | bool

    def check(self, schema: pa.Schema) -> None:
        """Check that metadata with this schema has the column, with a type that fits the value.

        Raises:
            InputError: the column does not exist or has another type.

        """
        names = [name for name in schema.names if not pa.types.is_binary(schema.field(name).type)]
        if self.column not in names:
            near = difflib.get_close_matches(self.column.lower(), [name.lower() for name in names], n=1)
            meant = next((name for name in names if [name.lower()] == near), None)
            raise InputError(
                f"filters name the column {self.column!r}, which the metadata does not have (it has "
                f"{', '.join(names)}): "
                + (f"did you mean {meant}?" if meant else "remove this condition")
            )
        kind = schema.field(self.column).type
        wanted = _comparable(kind)
        if wanted != _name_of_kind(self.value) and not pa.types.is_null(kind):
            raise InputError(
                f"filters compare {self.column} with {_shown(self.value)}, but it holds {kind}: "
                + (f"give {wanted}" if wanted else "remove this condition")
            )

    def holds(self, rows: pa.Table) -> Mask:
        """Return which rows pass, shape (n,); rows without a value do not. Numbers compare exactly."""
        column = rows[self.column]
        if pa.types.is_null(column.type):
            return np.zeros(len(rows), np.bool_)
        if pa.types.is_floating(column.type):
            column = column.cast(pa.float64())
            column = pc.if_else(pc.is_nan(column), None, column)
        elif _is_number(column.type):
            return self._holds_exactly(column)
        exact = isinstance(self.value, str | bool)
        value = self.value if exact else float(str(self.value))
        if value in (math.inf, -math.inf):  # an infinite number of the column is not this finite one
            return self._holds_exactly(column)
        passed = COMPARE[self.comparison](column, pa.scalar(value))
        held: Mask = pc.fill_null(passed, False).to_numpy()
        return held

    def _holds_exactly(self, column: pa.ChunkedArray) -> Mask:
        """Compare integers and decimals as Python does; Arrow would round or refuse many of them."""
        encoded = column.combine_chunks().dictionary_encode()
        compare = EXACTLY[self.comparison]
        passed = [compare(value, self.value) for value in encoded.dictionary.to_pylist()]
        held = pa.array([*passed, False]).take(pc.fill_null(encoded.indices, len(passed)))
        found: Mask = held.to_numpy(zero_copy_only=False)
        return found


def conditions_in(text: str) -> tuple[Condition, ...]:
    """Parse conditions joined by `and`; an empty text has none.

    Args:
        text: the conditions.

    Raises:
        InputError: the text cannot be parsed; the message quotes it from the first error.

    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"the filters have {len(text):,} characters, at most {MAX_LENGTH:,} are read")
    found: list[Condition] = []
    position = 0
    while text.strip():
        match = CONDITION.match(text, position)
        at_the_end = match is not None and match.end() == len(text)
        joined = AND.match(text, match.end()) if match else None
        if not match or not (at_the_end or joined):
            rest = text[match.end() if match else position :].strip()[:40]
            unjoined = "; only `and` joins conditions" if match else ""
            problem = f"cannot read {rest!r}{unjoined}" if rest else "the last condition is missing"
            raise InputError(
                f"{problem}: write conditions such as "
                "punsafe < 0.5 and NSFW == 'UNLIKELY', each a column, one of "
                f"{' '.join(COMPARE)}, and a number, a quoted word, or true or false"
            )
        found.append(Condition(match["column"], match["comparison"], _value(match["value"])))
        if not joined:
            break
        position = joined.end()
    return tuple(found)


def _value(text: str) -> float | str | bool:
    if text in BOOLEANS:
        return BOOLEANS[text]
    if text[0] in "'\"":
        return text[1:-1]
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def _name_of_kind(value: float | str | bool) -> str:
    if isinstance(value, bool):
        return "true or false"
    return "a quoted word" if isinstance(value, str) else "a number"


def _comparable(kind: pa.DataType) -> str | None:
    """Describe the values with which a column can be compared; None if there are none."""
    if pa.types.is_boolean(kind):
        return "true or false"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "a quoted word"
    return "a number" if _is_number(kind) else None


def _shown(value: float | str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


@dataclass(frozen=True)
class Filters:
    """The conditions and the block list of a search.

    Attributes:
        conditions: conditions that a row must all pass.
        block_list: images that must not appear.

    """

    conditions: Sequence[Condition] = ()
    block_list: BlockList | None = None

    @property
    def columns(self) -> list[str]:
        """Metadata columns that the filters need."""
        return list(dict.fromkeys(["url", *(condition.column for condition in self.conditions)]))

    def check(self, schema: pa.Schema) -> None:
        """Check all conditions against the schema of the metadata, see `Condition.check`."""
        for condition in self.conditions:
            condition.check(schema)

    def blocked(self, ids: Ids, rows: pa.Table) -> Mask:
        """Return which rows are on the block list, shape (n,)."""
        if self.block_list is None:
            return np.zeros(len(ids), np.bool_)
        return self.block_list.holds(ids, rows["url"])

    def failed(self, rows: pa.Table) -> Mask:
        """Return which rows fail a condition, shape (n,)."""
        failed = np.zeros(len(rows), np.bool_)
        for condition in self.conditions:
            failed |= ~condition.holds(rows)
        return failed


NO_FILTERS = Filters()
